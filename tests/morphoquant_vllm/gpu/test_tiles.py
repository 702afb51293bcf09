"""The tile table: what ships, what a malformed one gets, and how K is split."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphoquant_vllm import environment
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.gpu import tiles

TABLE = json.loads(tiles.DEFAULT_TABLE.read_text())


def test_every_architecture_serves_every_number_of_tokens_and_group_size() -> None:
    for architecture in tiles.load(tiles.DEFAULT_TABLE).values():
        for group_size in (32, 64, 128):
            for tokens in (1, 16, 17, 64, 65, 100_000):
                for two_level in (False, True):
                    assert architecture.tile(tokens, group_size, two_level).two_level == two_level
        assert architecture.reason
        assert all(tile.reason for tile in architecture.tiles)


def test_the_int8_path_serves_many_tokens_of_two_level_layers_where_the_table_says_so() -> None:
    table = tiles.load(tiles.DEFAULT_TABLE)
    hopper = table["sm_90"]
    assert hopper.int8_tile(1024, two_level=True) is hopper.int8
    assert hopper.int8_tile(1023, two_level=True) is None
    assert hopper.int8_tile(4096, two_level=False) is None
    assert [name for name, item in table.items() if item.int8_tile(10**6, two_level=True)] == ["sm_90"]
    assert all(item.int8.reason for item in table.values())
    assert not any(item.int8.fused for item in table.values()), "no GPU has run it"


def test_no_shipped_tile_adds_the_parts_of_k_itself_and_a_table_may_let_it() -> None:
    shipped = tiles.load(tiles.DEFAULT_TABLE).values()
    assert not any(tile.adds_splits for item in shipped for tile in item.tiles), "no GPU has run it"
    table = json.loads(json.dumps(TABLE))
    table["architectures"]["sm_80"]["tiles"][0].update(adds_splits=True)
    assert tiles.parse(table, "test")["sm_80"].tiles[0].adds_splits


def test_no_device_is_served_twice() -> None:
    devices = [device for item in tiles.load(tiles.DEFAULT_TABLE).values() for device in item.devices]
    assert len(devices) == len(set(devices))
    assert tiles.architecture_of("8.9").name == "sm_89"
    assert tiles.architecture_of("7.5") is None


def test_the_environment_names_another_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = json.loads(json.dumps(TABLE))
    changed["architectures"]["sm_90"]["tiles"][0]["stages"] = 7
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(changed))
    monkeypatch.setenv(environment.TILES.name, str(path))
    assert tiles.architecture_of("9.0").tile(1, 32).stages == 7


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda table: table.update(version=9), "version 9 is unknown"),
        (lambda table: table["architectures"]["sm_80"].pop("tiles"), "malformed tile table ('tiles')"),
        (lambda table: table["architectures"]["sm_80"].pop("vendor"), "vendor"),
        (lambda table: table["architectures"]["sm_80"]["tiles"][0].update(block_n=48), "block_n = 48 is not one of"),
        (lambda table: table["architectures"]["sm_80"]["tiles"][0].update(warps=3), "warps = 3"),
        (
            lambda table: table["architectures"]["sm_80"]["tiles"][0].update(two_level=True, group_sizes=[32]),
            "a two-level tile serves all of [32, 64, 128]",
        ),
        (lambda table: table["architectures"]["sm_80"]["tiles"][0].update(two_level=1), "two_level must be bool"),
        (
            lambda table: table["architectures"]["sm_80"]["tiles"][0].update(joined=True),
            "operands of groups of 32 cannot be joined",
        ),
        (lambda table: table["architectures"]["sm_80"]["tiles"][0].update(stages=0), "stages must be at least 1"),
        (lambda table: table["architectures"]["sm_80"]["tiles"][0].update(stages="4"), "stages must be int, got '4'"),
        (
            lambda table: table["architectures"]["sm_80"]["tiles"][0].pop("adds_splits"),
            "malformed tile table ('adds_splits')",
        ),
        (lambda table: table["architectures"]["sm_80"]["tiles"][0].update(adds_splits=1), "adds_splits must be bool"),
        (
            lambda table: table["architectures"]["sm_80"]["tiles"][0].update(adds_splits=True, block_m=128),
            "sm_80, tile 0: adds_splits needs block_m of 64 or less, not 128; set adds_splits to false",
        ),
        (
            lambda table: table["architectures"]["gfx942"]["tiles"][0].update(adds_splits=True),
            "gfx942, tile 0: adds_splits is for NVIDIA, not for amd; set adds_splits to false",
        ),
        # A table of version 3 has no other path; its version is refused first.
        (
            lambda table: table.update(version=3),
            "version 3 is unknown, this release reads 4; make a new table with",
        ),
        (lambda table: table["architectures"]["sm_80"].pop("int8"), "malformed tile table ('int8')"),
        (lambda table: table["architectures"]["sm_80"]["int8"].update(block_k=96), "int8: block_k = 96 is not one of"),
        (lambda table: table["architectures"]["sm_80"]["int8"].update(min_tokens=0), "min_tokens must be at least 1"),
        (lambda table: table["architectures"]["sm_80"]["int8"].update(min_tokens="9"), "min_tokens must be int"),
        (lambda table: table["architectures"]["sm_90"]["int8"].update(fused=True), "a fused tile has block_n, block_k"),
    ],
)
def test_a_malformed_table_is_refused_in_one_line(change, fragment: str, tmp_path: Path) -> None:
    table = json.loads(json.dumps(TABLE))
    change(table)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    with pytest.raises(MorphoQuantError) as caught:
        tiles.load(path)
    assert fragment in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "not json", "[]", "[" * 100_000, "FIFO"])
def test_an_unreadable_table_is_refused_in_one_line(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    if text == "FIFO":
        os.mkfifo(path)
    elif text is not None:
        path.write_text(text)
    with pytest.raises(MorphoQuantError, match="tile table") as caught:
        tiles.load(path)
    assert "\n" not in str(caught.value)


def test_a_table_without_the_shape_says_what_to_do() -> None:
    architecture = tiles.parse(TABLE, "test")["sm_80"]
    with pytest.raises(MorphoQuantError, match="no entry for 3 tokens at group_size 48; unset MORPHOQUANT_TILES"):
        architecture.tile(3, 48)
    only_groups = dataclasses.replace(architecture, tiles=tuple(t for t in architecture.tiles if not t.two_level))
    with pytest.raises(MorphoQuantError, match="no entry for 3 tokens at group_size 32 with two-level scales; unset"):
        only_groups.tile(3, 32, two_level=True)


@given(
    tokens=st.integers(1, 4096),
    out_features=st.integers(1, 40_000),
    steps=st.integers(1, 600),
    units=st.integers(1, 304),
    most=st.integers(1, 16),
    two_level=st.booleans(),
)
def test_every_split_has_work(
    tokens: int, out_features: int, steps: int, units: int, most: int, two_level: bool
) -> None:
    tile = tiles.Tile(None, (64,), two_level, 64, 16, 4, 4, 1, False, 4, most, False, "test")
    # Two-level layers have an even number of steps, two a turn.
    width = 1 + two_level
    splits = tiles.splits_of(tile, tokens, out_features, width * steps, units)
    assert 1 <= splits <= most
    # The kernel's parts: ceil(turns / splits) each, the last one perhaps shorter but never empty.
    length = -(-steps // splits)
    assert (splits - 1) * length < steps
    assert splits == 1 or width * length >= tiles.MIN_K_TILES_PER_SPLIT


def test_decode_splits_k_where_outputs_are_few() -> None:
    tile = tiles.load(tiles.DEFAULT_TABLE)["sm_90"].tile(1, 64)
    assert tiles.splits_of(tile, 1, 3584, 18944 // 64, 132) > 4
    assert tiles.splits_of(tile, 1, 37888, 3584 // 64, 132) == 1
