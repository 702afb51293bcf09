"""Calibration at real size: generated models in the published layouts, time and memory by block, and one answer."""
