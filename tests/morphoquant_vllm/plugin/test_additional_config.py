"""The settings in --additional-config: defaults, values, and one line for each mistake."""

import pytest

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.plugin.additional_config import Settings, Watch, read_settings


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({}, Settings()),
        (object(), Settings()),
        ({"other": 1}, Settings()),
        ({"morphoquant": {}}, Settings("16bit", None)),
        ({"morphoquant": {"lm_head": "16bit"}}, Settings("16bit", None)),
        ({"morphoquant": {"lm_head": "int8"}}, Settings("int8", None)),
        ({"morphoquant": {"watch_escapes": {}}}, Settings("16bit", Watch())),
        (
            {"morphoquant": {"watch_escapes": {"every": 1, "layers": 2, "seconds": 0.5}, "lm_head": "int8"}},
            Settings("int8", Watch(1, 2, 0.5)),
        ),
    ],
)
def test_everything_is_off_unless_asked_for(given: object, settings: Settings) -> None:
    assert read_settings(given) == settings


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"lm_head": "int4"}, "lm_head is 'int4'"),
        ({"lm_haed": "int8"}, "lm_haed"),
        ("int8", "'int8'"),
        ({"watch_escapes": True}, "watch_escapes is an object with every, layers, seconds, got True"),
        ({"watch_escapes": {"each": 2}}, "each"),
        ({"watch_escapes": {"every": 0}}, "every is 0; it must be an integer of 1 to 1000000"),
        ({"watch_escapes": {"every": True}}, "every is True"),
        ({"watch_escapes": {"layers": 1.5}}, "layers is 1.5"),
        ({"watch_escapes": {"seconds": 0}}, "seconds is 0; it must be a number above 0"),
        ({"watch_escapes": {"seconds": float("inf")}}, "seconds is inf"),
        ({"watch_escapes": {"seconds": "10"}}, "seconds is '10'"),
        # time.sleep does not take it.
        ({"watch_escapes": {"seconds": 1e300}}, "it must be a number above 0, at most 1000000"),
    ],
)
def test_a_mistake_is_refused_in_one_line_that_names_it(given: object, named: str) -> None:
    with pytest.raises(MorphoQuantError, match="--additional-config") as caught:
        read_settings({"morphoquant": given})
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [{"lm_head": "int8"}, {"watch_escapes": {}}, {"MorphoQuant": {"lm_head": "int8"}}])
def test_a_setting_in_another_place_is_not_ignored(given: dict[str, object]) -> None:
    with pytest.raises(MorphoQuantError, match=r"would be ignored here; write \{\"morphoquant\"") as caught:
        read_settings({"other": 1, **given})
    assert next(iter(given)) in str(caught.value)
