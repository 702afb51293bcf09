"""A language model of a few million parameters, trained here on public-domain books: 16 bit by birth.

books      the texts for training, evaluation and calibration
tokenizer  a byte-pair tokenizer made of the training text
train      trains the model and caches it
"""
