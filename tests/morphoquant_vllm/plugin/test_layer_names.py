"""Names behind a prefix: of drafts, of parts of a model, of packed layers. `test_config` has them in a config."""

from morphoquant_vllm.plugin.layer_names import local_name, packed_names

THINKER = {"language_model.model.layers.0.mlp.down_proj": "thinker.model.layers.0.mlp.down_proj"}
PLAIN = {"model.layers.0.mlp.down_proj": "model.layers.0.mlp.down_proj"}


def test_the_name_of_a_draft_is_taken_away() -> None:
    assert local_name("draft_model.model.layers.0.mlp.down_proj", PLAIN) == "model.layers.0.mlp.down_proj"


def test_the_name_of_a_part_is_taken_away_only_if_its_mapper_dropped_it() -> None:
    (name,) = THINKER
    assert local_name(f"thinker.{name}", THINKER) == name
    assert local_name(name, THINKER) == name
    assert local_name(f"talker.{name}", THINKER) == f"talker.{name}"
    # As of Qwen3-Omni, whose outer class maps the names and keeps "thinker.".
    kept = {f"thinker.{name}": f"thinker.{name}"}
    assert local_name(f"thinker.{name}", kept) == f"thinker.{name}"
    assert local_name("model.layers.1.mlp.down_proj", PLAIN) == "model.layers.1.mlp.down_proj"


def test_the_longest_packed_name_wins() -> None:
    packed = {"qkv": ["q", "k", "v"], "attn.qkv": ["attn.q", "attn.k", "attn.v"]}
    assert packed_names("visual.attn.qkv", packed) == ["visual.attn.q", "visual.attn.k", "visual.attn.v"]
    assert packed_names("visual.qkv", packed) == ["visual.q", "visual.k", "visual.v"]
    assert packed_names("visual.proj", packed) == []
