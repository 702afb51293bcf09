"""The settings of a calibration, each declared once.

recipe  the declaration: name, type, default, meaning
flags   flags of the command, made of it
table   the table of the documentation, made of it
"""
