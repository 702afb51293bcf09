"""Which methods a model can have."""

import pytest

from benchmarks.accuracy.methods import METHODS, obstacle

SMOLLM2 = {"0.self_attn.q_proj": 576, "0.self_attn.o_proj": 576, "0.mlp.up_proj": 576, "0.mlp.down_proj": 1536}
TOOLS = ("auto-round", "gptqmodel")


def test_groups_of_128_are_all_that_576_channels_rule_out() -> None:
    refused = {name for name, method in METHODS.items() if obstacle(method, SMOLLM2, TOOLS)}
    assert refused == {name for name in METHODS if name.endswith("-g128")} and len(refused) == 4
    wider = dict.fromkeys(SMOLLM2, 1536)
    assert {name for name, method in METHODS.items() if obstacle(method, wider, TOOLS)} == set()


@pytest.mark.parametrize(
    ("name", "widths", "reason"),
    [
        ("w4a4-token-group", {"a": 96}, "K = 96 of a is not divisible by group size 64"),
        ("served-g64", {"a": 96}, "K = 96 of a is not divisible by group size 64"),
        # No group size of the format divides 80: calibration leaves that linear in 16 bit.
        ("served-g64", {"a": 80}, None),
        ("floor-weights", {"a": 80}, "K = 80 of a is not divisible by group size 32"),
        ("served-16bit", {"a": 96}, None),
        ("w4a16-nf4", {"a": 96}, None),
        ("floor-o", {"q_proj": 128}, "the model has none of the linears o_proj"),
        # Its groups rule it out with an environment, too.
        ("w4a16-gptqmodel-g128", {"a": 96}, "K = 96 of a is not divisible by group size 128"),
    ],
)
def test_a_reason_names_the_linear_or_the_remedy(name: str, widths: dict[str, int], reason: str | None) -> None:
    assert obstacle(METHODS[name], widths, ()) == reason
