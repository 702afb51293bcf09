"""A small omni model, dense or of experts, with heavy channels by modality, trained here, and questions to measure it."""
