"""The damping of second moments in rounding: what suits how many channels and tokens."""
