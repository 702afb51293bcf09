"""A small Qwen2.5-Omni with modality-specific heavy channels, trained here, and questions to measure it by."""
