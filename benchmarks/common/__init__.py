"""What benchmarks share.

command  errors in one line
machine  processor and versions
server   starts and stops `vllm serve`
"""
