"""What checking a checkpoint adds to the time that loading it takes."""
