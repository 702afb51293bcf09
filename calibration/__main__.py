"""`python -m calibration` is the command `morphoquant`."""

from calibration.cli import main

if __name__ == "__main__":
    main()
