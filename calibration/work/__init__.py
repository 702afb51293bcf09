"""The work directory: what makes a run resumable, to the byte.

directory        the finished blocks and hidden states on disk
opening          takes hold of a work directory, or refuses
identity         what a run was begun with: it goes on only with the same
code_files       which files of this project are part of that
hidden_states    the hidden states between two blocks
block_arguments  what a model passes to its blocks, as tensors and JSON
durable_files    files that a crash leaves whole or not at all
lock             one run at a time
"""
