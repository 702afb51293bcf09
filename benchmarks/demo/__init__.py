"""`make demo`: a real language model, calibrated, served and asked, in minutes on two cores."""
