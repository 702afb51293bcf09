"""The project's measurements: each package is a command, `python -m benchmarks.NAME`; none imports another.

accuracy        perplexity and answers of 4-bit methods, on a language model and an omni model
calibrate       calibration at real size: time and memory by block, and one answer
cpu_experts     routed experts on a CPU against vLLM's bf16
cpu_linear      the CPU kernels against vLLM's linears on a CPU
damping         which damping of the rounding holds for other text
decisions       costs and gains of the format's decisions, on single layers
demo            `make demo`: a real model, calibrated, served and asked
drift           how far ranks and compilation move log probabilities
end_to_end      what learning a checkpoint end to end would buy
error_sources   where the errors of a checkpoint's linears come from
gpu             `make gpu`: tests, linears and engines on the GPU at hand
gpu_cost_model  estimates of the GPU kernels' times, without a GPU
gpu_experts     one layer of routed experts timed on this machine's GPU
gpu_host        what a call of a GPU layer costs the host, without a GPU
gpu_linear      linear layers timed on this machine's GPU
kv_scales       what scales by modality would buy in an FP8 cache of keys and values
load_check      the cost of a checkpoint's checks when it is loaded
omni_eval       published omni benchmarks, asked of any server
paper           the paper's table with our rows: calibrates, serves, asks four benchmarks
serve           whole engines with vLLM's own benchmarks
watch_escapes   the cost of counting escapes in an engine step

common          code that the benchmarks share
models          models that they need, and the shapes of published ones
results         the kept results: JSON, and a short summary of each
"""
