"""Costs and gains of the format's decisions, measured on single layers."""
