"""A calibration timed block by block, and the least time that it can take.

bound    floating-point operations over measured rates
measure  runs the worker, keeps its measurements
rates    rates of matrix products
worker   the process that calibrates
"""
