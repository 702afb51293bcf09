"""placeholder"""

import os


def checksums_wanted() -> bool:
    return os.environ.get("MORPHOQUANT_CHECKSUMS", "1") != "0"
