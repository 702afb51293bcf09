"""Makes MorphoQuant checkpoints offline. Never imports vLLM.

cli             the command `morphoquant`
calibrate       one run from model and data to checkpoint
job             the constants of a run, and its limits of memory
stages          three of its five stages: capture, quantize, export
precision       the stage before the blocks: does it learn, and budgets that inputs share, of bits and of escapes
forecast        what a run will do and need
examination     the memory of a calibration, for `morphoquant doctor`
settings        the settings, each declared once
model           the source model: files, architectures, the plan of quantized layers
data            from conversations to tokens
blocks          runs the model block by block
quantize        the algorithm
learn           the stage after the blocks: steps, scales and constants learn from the model's output, by `effort`
work            the work directory, which makes a run resumable
output          the checkpoint, its report, and their display
time_limit      a limit of processor time for a publisher's code
compare         two models on the same data
processes       the processes that share a run, and their collectives
progress        the progress bar in the terminal
"""
