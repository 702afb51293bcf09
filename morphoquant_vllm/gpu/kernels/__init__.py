"""The Triton kernels. Only this package and the modules that launch or compile it import Triton.

act_quant       activation -> int8 codes, and the row of each token
norm_quant      RMSNorm and the quantizer after it
gemm            codes x int4 weights, scaled per group
gemm_two_level  the loop of gemm for two-level scales
gemm_adding     a split K whose last program adds the partial sums; no shipped tile has it
unpack_int8     a layer with two-level scales -> int8
int8_gemm       codes x int8 weights
fused_int8      codes x packed weights, which are unpacked while products run; in Gluon
tile_order      the order in which programs take the tiles of the output
epilogue        from sums to outputs
reduce_splits   adds the partial sums of a split K
experts         routed experts: products of pairs, their quantizer, the sum of a token's pairs
eight_bit_head  lm_head: 16-bit activations x 8-bit weights
pdl             programmatic dependent launch: a kernel starts while the one before ends
"""
