"""Offline calibration: from a Hugging Face model directory to a MorphoQuant checkpoint."""
