"""Makes MorphoQuant checkpoints offline. Never imports vLLM.

cli             the command `morphoquant`
calibrate       one run from model and data to checkpoint
stages          its stages: capture, quantize, export
settings        the settings, each declared once
model           the source model: files, architectures, what will be quantized
data            from conversations to tokens
blocks          runs the model block by block
quantize        the algorithm
work            what makes a run resumable
output          the checkpoint, its report, and what shows them
processes       the processes that share a run
progress        what the terminal shows
"""
