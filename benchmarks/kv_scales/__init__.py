"""What scales by modality would buy in an FP8 cache of keys and values: a simulation on the trained omni model.

scales   the magnitudes of keys and values by layer and modality, and attention that rounds them to FP8
"""
