"""The flags that leave layers in 16 bit, which vLLM would not find."""

from fnmatch import fnmatchcase

import pytest

from morphoquant_vllm.plugin.model_names import ignored

# Latent attention as in MiniCPM3, whose first linears vLLM builds without a name.
LISTED = [f"layers.{block}.attn.{linear}" for block in range(2) for linear in ("q_a", "q_b", "kv_a", "o")]


@pytest.mark.parametrize(
    ("missing", "flags"),
    [
        (("q_a", "kv_a"), "--ignore '*.q_a' --ignore '*.kv_a'"),
        (("o",), "--ignore '*.o'"),
    ],
)
def test_patterns_match_all_that_is_missing(missing: tuple[str, ...], flags: str) -> None:
    names = [name for name in LISTED if name.rpartition(".")[2] in missing]
    assert ignored(names, LISTED) == flags
    patterns = flags.replace("'", "").replace("--ignore", "").split()
    assert {name for name in LISTED if any(fnmatchcase(name, pattern) for pattern in patterns)} == set(names)


def test_a_name_that_other_blocks_have_is_whole() -> None:
    assert ignored([LISTED[0]], LISTED) == f"--ignore '{LISTED[0]}'"
