"""Measures the time that checking a checkpoint adds to loading it."""
