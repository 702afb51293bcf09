"""The algorithm: from what calibration saw of one input to the tensors of its layers.

No files, no hooks but in observation.

    observation      statistics and sampled tokens of a block's inputs, by module hooks
    layer            the phases for one input, from grids to tensors
    grids            step and centre of each channel, and what each row has
    coded_tokens     rows and codes of the sampled tokens, and their moments
    served_weights   weights rounded to what is stored and served
    bias             what makes mean outputs right
    step_search      finds steps against the budget of escapes
    reference_grid   the authors' way to a grid
    modality_rows    whether a modality gets a row of its own
    massive_tokens   tokens unlike all others, and the intervals that recognize them
    moments          means and second moments of codes and 16-bit values
    rounding         weights to int4 with error compensation
    group_search     codes and scales of each group, by the loss of the codes
    allowed_scales   free scales and two-level ones, and candidates among them
    scale_fit        least squares of scales for given codes
    two_level        two-level scales for a layer that has group scales
    int8_products    exact products of integer codes
    layer_report     what the report says about each layer
    chunks           runs of tokens that are worked on at a time
"""
