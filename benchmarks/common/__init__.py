"""Code that benchmarks share.

command    errors in one line
corpus     public-domain texts, fetched once
files      whole files, results, digests
machine    processor, versions, load
peers      layers of vLLM beside ours
plots      panels and PNG
questions  published omni benchmarks, and a server that is asked them
server     starts and stops `vllm serve`
tables     tables that several benchmarks print
texts      texts to evaluate and to calibrate on
windows    texts cut into windows of tokens
"""
