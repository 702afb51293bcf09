"""Peers that run beside ours.

vllm_layers  what a layer of vLLM's needs without an engine, and its refusals
"""
