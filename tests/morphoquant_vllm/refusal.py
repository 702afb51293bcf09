"""How `verify` refuses a damaged checkpoint."""

from pathlib import Path

import pytest

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.verify import verify_checkpoint


def refused(directory: Path, *fragments: str) -> None:
    """`verify` must refuse in one line that holds every fragment."""
    with pytest.raises(MorphoQuantError) as caught:
        verify_checkpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
