"""The evidence of a GPU by one command: tests, linears and engines, merged under the device's name.

parts     the parts: what each runs and what it leaves behind
run       runs one part as a process of its own, and reads its result
report    the merged result as Markdown
"""
