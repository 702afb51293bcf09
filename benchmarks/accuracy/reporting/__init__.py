"""From stored results to figures, bars, tables and charts.

bars         targets of the served method
calibration  the kept parts of calibration's reports
experts      tables of a mixture of experts
overview     one table of all methods and models
plots        the chart of a summary
report       tables and files
scores       perplexity, accuracy and their errors
summary      the kept JSON object
"""
