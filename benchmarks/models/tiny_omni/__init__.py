"""A small omni model, dense or of experts, with heavy channels by modality, and questions to measure it by."""
