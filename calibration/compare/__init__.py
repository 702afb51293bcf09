"""Two models on the same data: `morphoquant compare`.

models   loads checkpoints and 16-bit models with transformers
measure  divergence, perplexity and block outputs, sample by sample
run      one comparison, from directories to figures
show     the figures as a table and as an HTML page
"""
