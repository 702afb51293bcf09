"""The settings of a calibration, each declared once.

recipe  the declaration: name, type, default, meaning
flags   the command's flags, made from the recipe
table   the documentation's table, made from the recipe
"""
