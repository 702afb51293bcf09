"""A served checkpoint as a student of its 16-bit model: what learning the whole model at once would buy."""
