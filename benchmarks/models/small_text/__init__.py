"""A language model of a few million parameters, trained here on public-domain books: 16 bit by birth.

books      the texts: what trains, what is held out, what calibrates
tokenizer  a byte-pair tokenizer made of the training text
train      trains the model and caches it
"""
