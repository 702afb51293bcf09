"""From the user's files to the model's input tokens.

conversations     the classes: conversations, messages, media, plain texts
data_files        loads them from .jsonl, .json, .parquet and .txt files
records           one record: OpenAI messages, ShareGPT, alpaca, or a plain text
messages          messages and their parts, and the media at their marks
media_references  paths, URLs and encoded bytes of media
reading           the place of a record: errors that name it, and keys that are not read
media             decodes images, audio and video
processor         loads the model's processor
placeholders      counts the tokens that stand for media, and compares them with the media
model_inputs      one conversation, or one window of a text, as inputs of the model
rendering         makes calibration samples of conversations and windows of texts
token_choice      chooses the tokens of the search, and their weights
"""
