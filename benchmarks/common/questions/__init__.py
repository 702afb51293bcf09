"""Published benchmarks of omni models: their questions, the server's answers, and their scores.

answers   the responses of a run, kept as they come
ask       asks a server all questions that have no answer yet
items     one question, and how a folder of the wrong layout is refused
run       the questions of a local copy, and one server's responses to them
scoring   right, wrong, or not to be parsed
summary   accuracy with confidence intervals
datasets  how each benchmark lies on disk, its prompts and its rules
"""
