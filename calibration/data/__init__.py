"""From the user's files to the model's input tokens.

conversations  reads JSONL in OpenAI chat format, and plain text files
media          decodes images, audio and video
processor      loads the model's processor
placeholders   counts the tokens that stand for media, and compares them with the media
model_inputs   one conversation, or one window of a text, as inputs of the model
rendering      makes calibration samples of conversations and windows of texts
token_choice   chooses the tokens of the search, and their weights
"""
