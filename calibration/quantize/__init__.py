"""The algorithm: from the observed activations of one input to the tensors of its layers.

No module touches files. Only `observation` sets hooks, and `attention_range` watches torch's attention.

    observation      statistics and drawn tokens of a block's inputs, by module hooks
    layer            the phases for one input, from grids to tensors
    experts          the same for routed experts: one input, and each expert on its tokens
    grids            step and centre of each channel, and the rows of modalities
    coded_tokens     rows and codes of the drawn tokens, and their moments
    served_weights   weights rounded to the stored and served form
    bias             the bias that makes mean outputs right
    step_search      steps of least error within the escape budget
    reference_grid   the authors' search of a grid
    modality_rows    whether a modality gets a separate row
    massive_tokens   tokens unlike all others, and the intervals that recognize them
    moments          means and second moments of codes and 16-bit values
    rounding         weights to int4 with error compensation
    output_metric    outputs rounded so that their errors cancel for the model
    held_out         tokens of samples that no fit of weights sees
    group_search     codes and scales of each group, by the loss of the codes
    allowed_scales   group scales and two-level ones, and candidates among them
    scale_fit        least squares of scales for given codes
    attention_range  the largest queries, keys and values of a block
    two_level        two-level scales for a layer that has group scales
    int8_products    exact products of integer codes
    bit_losses       estimated cost of 4-bit and 8-bit weights for the model's output
    escape_prices    one price of escapes for all inputs of the model
    layer_report     the figures of each layer in the report
    chunks           runs of tokens that are processed at a time
"""
