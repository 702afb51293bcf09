"""The classes that vLLM calls; the one room that imports vLLM.

version_check      one line about an untested vLLM, compared once
config             which layers of a model are quantized, and the checks before workers start
layer_names        the names of the checkpoint's layers behind the prefix of one of vLLM's layers
checkpoint_check   checks a checkpoint's files before vLLM loads a weight
last_word          repeats a worker's refusal in the last line of the log
linear_method      the quantized linear: parameters, checks after loading, the call of the op
linear_checks      refuses a linear whose shapes or bias are not the checkpoint's
experts_method     quantized routed experts: refusals, checks after loading, the call of the op
experts_loading    how one expert's tensors are cut for ranks, and which were loaded
engine_options     refuses options that load weights without a check, or quantize them once more
weight_checker     refuses vLLM's checker of weights, which does not see quantized layers
gpu_memory         refuses options of vLLM that quantized layers do not follow: sleep level 2, offload
unloaded_weights   refuses a checkpoint that leaves a weight as it was built, and a reload of some quantized layers
dummy_weights      valid values for vLLM's --load-format dummy
sharded_state      vLLM's sharded_state: a rank's tensors saved as they are served, and loaded
reload             weights that vLLM loads again into a running engine
parameters         how one checkpoint tensor is cut for fused layers and tensor-parallel ranks
kv_cache           scales of an FP8 cache of keys and values
lm_head            the 16-bit head, and the optional 8-bit one
additional_config  the plugin's settings in vLLM's --additional-config
log                loggers whose messages vLLM shows
escape_watch       counts escapes while a model is served, in some layers and steps
counted_layer      a bound layer that counts its escapes
escape_report      escape rates by row, beside those of calibration
escape_metrics     the counts on vLLM's page /metrics
embeddings         the token embeddings that model classes leave out of quantization
model_names        vLLM's model without weights, compared with a checkpoint's layers
modality_bus       the row of each token, from the embedding that sees its id to the linears
mlp_channel_order  the channels between gate_up_proj and down_proj, in the order that down_proj reads
fusion             the two passes below, as the one that vLLM's compiler has a place for
norm_quant_pass    a pass of vLLM's compiler that joins RMSNorm with the quantizer after it
silu_mul_pass      a pass of vLLM's compiler that joins silu(gate) * up with the quantizer after it
"""


def register() -> None:
    """Entry point of vLLM's general plugins: register `--quantization morphoquant`. Runs in every vLLM process.

    Not if the installed vLLM lacks an interface that the plugin needs: an error in the log names it.
    """
    from morphoquant_vllm.plugin.version_check import may_serve

    if not may_serve():
        return
    # Not before: they import interfaces that another vLLM may lack, and then it would serve no model at all.
    from vllm.model_executor.layers.quantization import register_quantization_config

    from morphoquant_vllm.format.schema import QUANT_METHOD
    from morphoquant_vllm.plugin.config import MorphoQuantConfig

    register_quantization_config(QUANT_METHOD)(MorphoQuantConfig)
