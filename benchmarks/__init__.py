"""What the project measures: each package is a command, `python -m benchmarks.NAME`; none imports another.

accuracy        perplexity and answers of 4-bit methods, on a language model and an omni model
calibrate       calibration at real size: time and memory by block, and one answer
cpu_linear      the CPU kernels against what vLLM runs there
decisions       what the format's decisions cost and buy, on single layers
demo            `make demo`: a real model, calibrated, served and asked
gpu_cost_model  estimates of the GPU kernels' times, without a GPU
gpu_host        what a call of a GPU layer costs the host, without a GPU
gpu_linear      linear layers timed on the GPU at hand
load_check      what the checks of a checkpoint cost when it is loaded
omni_eval       published omni benchmarks, asked of any server
serve           whole engines with vLLM's own benchmarks

common          what these share
models          models that they need, and the shapes of published ones
results         the kept results: JSON, and a short summary of each
"""
