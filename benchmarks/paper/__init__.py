"""The paper's table with our rows in it, by one command: calibrates, serves with vLLM, asks four benchmarks.

calibration  data to calibrate on, and the calibration itself
model        the model's directory: files, sizes, processor
options      the command line
plan         the files that are missing, and estimates of size and time
questions    the four benchmarks: their folders below --data, and the questions that are asked
rows         one row of the table: a server, and its answers to every benchmark
table        the paper's rows and ours, as JSON and as Markdown
"""
