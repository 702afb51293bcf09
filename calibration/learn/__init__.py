"""Learns what costs no serving time from the decoder's last states: steps, output scales and constants.

linear     a quantized linear whose rounding lets gradients pass
model      the quantized decoder, of which one block at a time is in memory
targets    the next token in the 16-bit model, and the divergence from it
head       the final norm and the head, and their divergence
descent    the steps, the samples that judge them, and the state that a resumed run continues
changes    what was learned, and the tensors that a checkpoint then stores
stage      the stage of a calibration
"""
