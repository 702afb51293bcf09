"""Images, sounds and questions of the small omni model.

digits     images of digits, and clips of them
encoding   questions as the model's inputs
pool       the media of each split
questions  the questions and their answers
speech     spoken digits
"""
