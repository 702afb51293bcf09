"""Images, sounds and questions of the small omni model.

digits     images of digits, and clips of them
encoding   questions as the model's inputs
pool       the media of each split
questions  what is asked, and the answers
speech     spoken digits
"""
