"""From the user's files to tokens that the model reads.

conversations  reads JSONL in OpenAI chat format, and plain text files
media          decodes images, sound and video
processor      loads the model's own processor
placeholders   which tokens stand for media, and whether they match it
model_inputs   one conversation, or one window of a text, as the model takes it
rendering      conversations and windows of texts become calibration samples
token_choice   which tokens the search looks at, and how much each counts
"""
