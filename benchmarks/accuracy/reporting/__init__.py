"""From stored results to figures, bars, tables and charts.

bars     the targets of the served method
plots    the chart of a summary
report   tables and files
scores   perplexity, accuracy and their errors
summary  the kept JSON object
"""
