"""The integer linear layer on GPUs, in Triton.

Notation
    M  tokens                     N  output channels          K  input channels, in permuted order
    G  group size along K         R  modality rows            P  channels that one tile of packed weights holds along K
    m, n, k, g, r, p              an index along each of them

    backend          the entry `triton` of backends.BACKENDS
    layout           how packed weights, scales and the activation's tables lie in GPU memory (torch only)
    bound            a layer bound to its kernels when it is loaded: what serves
    bound_kernels    its quantizer and its product, compiled
    bound_int8       its int8 path, compiled
    steps            each of these by itself, for the self-check
    workspace        the int8 memory that the layers of a device share
    turn             whose turn it is, among streams, to use memory that layers share
    launch           the two ops through Triton's own launches, for tests and tools
    launcher         one launch: described and run by Triton, or compiled, so that it costs the host little
    quantize_launch  which kernel quantizes how many tokens, and its launch
    product_launch   the launches of the product and of the addition of a split K
    int8_path        launches of the int8 path: a layer unpacked once, then int8 x int8
    tiles            which tile sizes serve which architecture and shape: tiles.json (neither torch nor Triton)
    device           what the GPU at hand is
    load_checks      what is refused when a layer is loaded
    selfcheck        each kernel beside the torch reference, on the GPU at hand, before the first layer serves
    kernels          the Triton kernels
    tools            offline: tuning, compiling ahead of time, checks of binaries
    adding_launch    the product over a split K that adds its parts itself; no shipped tile has it
    norm_launch      the kernel that norms before it quantizes: its launch, and the layer behind it
    bound_norm       that kernel bound, for a bound layer
    head             the 8-bit lm_head: its launch and its check

Importing this package imports none of its modules.
"""
