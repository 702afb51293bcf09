"""Measures what counting escapes costs an engine step."""
