"""From stored results to figures, bars, tables and charts.

bars      what the served method is held to
overview  one table of all methods and models
plots     the chart of a summary
report    tables and files
scores    perplexity, accuracy and their errors
summary   the kept JSON object
"""
