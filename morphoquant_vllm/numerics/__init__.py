"""The one definition of MorphoQuant's numbers, in torch (imports torch; its `golden` also safetensors).

Everything else -- calibration, the plugin's backends, kernels, tests -- calls this package or is tested against it.

Notation
    M  tokens
    K  input channels (in_features)
    N  output channels (out_features)
    G  group size: input channels that share one weight scale
    R  modality rows (text, image, video, audio, any, ...)
    E  experts of a layer

    limits       group sizes and levels that a layer may have (imports nothing)
    statistics   statistics that calibration collects per input channel
    reference    the authors' algorithm: dispersion score, mask, range search, 4-bit grid, 16-bit bypass (exact mode)
    activation   the form that integer hardware serves: step, centre, gain, mask -> codes (escape mode)
    weights      absorption of steps into weights, channel order, int4 rounding, packing, absorbed bias
    linear       the integer linear layer: codes x int4 -> output
    experts      a mixture of experts: routed tokens through the integer linears of their experts
    norm         RMSNorm, for ops that compute it before the layer
    exact        exact mode: values that escape the grid are not rounded
    escape_counts  counts of tokens and escapes by row
    head         the 8-bit lm_head
    golden       command: replays the authors' recorded outputs
"""
