"""The work directory: it makes a run resumable, to the byte.

directory        the finished blocks and hidden states on disk
opening          opens a work directory for one run, or refuses it
fingerprint      everything that the checkpoint's bytes depend on: a run resumes only if it is unchanged
code_files       the files of this project that are part of the fingerprint
budgets          how inputs share budgets of the model, and the samples that decide it
learned          what learning needs and finds
rendered         rendered samples with media, until the decoder's inputs are captured
hidden_states    the hidden states between two blocks
block_arguments  a model's arguments for its blocks, as tensors and JSON
durable_files    files that a crash leaves complete or absent
lock             one run at a time
"""
