"""Other quantizers, each in a Python environment of its own.

environment      runs a script in such an environment and reads the dequantized weights that it writes
with_auto_round  the script for AutoRound; it imports nothing of this project
with_gptqmodel   the script for GPTQModel; likewise
"""
