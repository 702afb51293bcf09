"""A calibration timed block by block, and the least time that it can take.

bound    floating-point operations over measured rates
measure  runs the worker, keeps what it has measured
rates    rates of matrix products
worker   the process that calibrates
"""
