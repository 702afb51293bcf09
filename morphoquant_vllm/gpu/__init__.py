"""The integer linear layer on GPUs, in Triton.

Notation
    M  tokens                     N  output channels          K  input channels, in permuted order
    G  group size along K         R  modality rows            P  channels that one tile of packed weights holds along K
    m, n, k, g, r, p              an index along each of them

    backend          the entry `triton` of backends.BACKENDS
    layout           the layout of packed weights, scales and the activation's tables in GPU memory (torch only)
    bound            the layers that serve, each bound to its kernels when it is loaded
    bound_kernels    the compiled quantizer and product of a bound layer
    bound_int8       the compiled int8 path of a bound layer
    bound_calls      each call of a bound layer separately, for the self-check
    workspace        the int8 memory that the layers of a device share
    turn             the stream that may use the shared memory now
    launch           the two ops through Triton's JIT, for tests, tools and layers that are not bound
    launcher         one launch, by Triton's JIT or compiled; the latter costs the host little
    quantize_launch  the choice of a quantizer kernel by the number of tokens, and its launch
    product_launch   the launches of the product and of the addition of a split K
    int8_path        launches of the int8 path: a layer unpacked once, then int8 x int8
    tiles            tile sizes by architecture and shape, from tiles.json (neither torch nor Triton)
    device           properties of this machine's GPU
    load_checks      refusals when a layer is loaded
    selfcheck        each kernel compared with the torch reference on this GPU, before the first layer serves
    kernels          the Triton kernels
    tools            offline: tuning, compiling ahead of time, checks of binaries
    adding_launch    the product over a split K that adds its partial sums; no shipped tile has it
    norm_launch      the launch of RMSNorm with the quantizer, and the layer after it
    bound_norm       the compiled kernel of norm_launch, for a bound layer
    experts          routed experts: pairs sorted on the device, and their launches
    experts_layout   their layout in GPU memory (torch only)
    experts_check    their kernels compared with the torch reference on this GPU
    head             the 8-bit lm_head: its launch and its check

Importing this package imports none of its modules.
"""
