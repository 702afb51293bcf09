"""The integer linear layer on GPUs, in Triton.

Notation
    M  tokens                     N  output channels          K  input channels, in permuted order
    G  group size along K         R  modality rows            P  channels that one tile of packed weights holds along K
    m, n, k, g, r, p              an index along each of them

    layout      how packed weights, scales and the activation's tables lie in GPU memory (torch only)
    act_quant   kernel: activation -> int8 codes and the row of each token
    gemm        kernel: codes x int4 weights, scaled per group; writes the output or a split's partial sum
    two_level   the loop of gemm for layers with two-level scales
    reduce      kernel: adds the partial sums of a split K and writes the output
    tiles       which tile sizes serve which architecture and shape, read from tiles.json (neither torch nor Triton)
    checks      what is refused when a layer is loaded
    launch      the two ops: allocates, chooses tiles, launches
    autotune    command that measures tiles on the GPU at hand and writes a new tiles.json

Only act_quant, gemm, two_level, reduce and what imports them need Triton. Importing this package imports none of its
modules.
"""
