"""Tile sizes by GPU architecture and shape, read from tiles.json. Needs neither torch nor Triton.

The user may name another file of the same form, as `autotune` writes it (environment.TILES).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from morphoquant_vllm import environment
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics.limits import GROUP_SIZES

DEFAULT_TABLE = Path(__file__).with_name("tiles.json")
TABLE_VERSION = 4
# At this group size a tile along K holds two groups, each with a separate scale.
UNJOINABLE = 32
# The output channels of a program lie in one tile of packed weights, which has 128.
BLOCK_SIZES = {"block_n": (16, 32, 64, 128), "block_m": (8, 16, 32, 64, 128, 256)}
# Sizes of the int8 path; they divide the workspace's sizes.
INT8_BLOCK_SIZES = {"block_n": (32, 64, 128), "block_m": (16, 32, 64, 128, 256), "block_k": (32, 64, 128)}
WARPS = (1, 2, 4, 8, 16)
# block_n, block_k and warps of the fused kernel, and its least block_m.
FUSED = (128, 128, 8)
FUSED_BLOCK_M = 128
# Most tokens of a tile whose programs may add the parts of K: with 128, registers leave room for fewer programs.
ADDING_BLOCK_M = 64


@dataclass(frozen=True)
class Tile:
    """Tile sizes of the matrix kernel for up to `max_tokens` tokens (null: any number)."""

    max_tokens: int | None
    group_sizes: tuple[int, ...]
    # For layers with two-level scales, of any group size, or for those with group scales.
    two_level: bool
    block_n: int
    block_m: int
    warps: int
    # Tiles of K in flight at once, through asynchronous copies.
    stages: int
    # Turns of the loop in one iteration: tiles along K, or with two-level scales pairs of them.
    unroll: int
    # Whether the operands of a turn are joined into one; not for G = 32 of group scales, whose turn is two groups.
    joined: bool
    # Programs that must fit one multiprocessor at a time; registers and shared memory are asserted to allow it.
    programs_per_unit: int
    # The most parts into which K may be split if there are fewer programs than that; 1 never splits.
    max_splits: int
    # Whether the last program of a tile adds the parts, instead of a second launch; NVIDIA only.
    adds_splits: bool
    reason: str

    def serves(self, group_size: int, two_level: bool) -> bool:
        """Whether it is for layers of this group size and kind of scales."""
        return group_size in self.group_sizes and self.two_level == two_level

    def check(self, where: str) -> None:
        """Raise MorphoQuantError if a value is not a tile size that the kernel takes."""
        _check_sizes(self, BLOCK_SIZES, where)
        if self.two_level and set(self.group_sizes) != set(GROUP_SIZES):
            raise MorphoQuantError(f"{where}: a two-level tile serves all of {list(GROUP_SIZES)}; fix the tile table")
        if self.joined and not self.two_level and UNJOINABLE in self.group_sizes:
            raise MorphoQuantError(f"{where}: operands of groups of {UNJOINABLE} cannot be joined; fix the tile table")
        for name in ("stages", "unroll", "programs_per_unit", "max_splits"):
            if getattr(self, name) < 1:
                raise MorphoQuantError(f"{where}: {name} must be at least 1; fix the tile table")
        if self.adds_splits and self.block_m > ADDING_BLOCK_M:
            raise MorphoQuantError(
                f"{where}: adds_splits needs block_m of {ADDING_BLOCK_M} or less, not {self.block_m}; "
                "set adds_splits to false in the tile table"
            )


@dataclass(frozen=True)
class Int8Tile:
    """The other path of layers with two-level scales: one int8 product, unpacked before it or in it; int8_path.py."""

    # Tokens from which it serves; null: never, though `autotune` tries it.
    min_tokens: int | None
    block_n: int
    block_m: int
    block_k: int
    warps: int
    stages: int
    # Whether operands come through tensor descriptors, which compute capability 9.0 and later have.
    descriptors: bool
    # Whether the product's kernel unpacks the weights, which needs no workspace; compute capability 9.0.
    fused: bool
    programs_per_unit: int
    reason: str

    def check(self, where: str) -> None:
        """Raise MorphoQuantError if a value is not a tile size that the kernel takes."""
        _check_sizes(self, INT8_BLOCK_SIZES, where)
        for name in ("stages", "programs_per_unit", "min_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MorphoQuantError(f"{where}: {name} must be at least 1; fix the tile table")
        sizes = (self.block_n, self.block_k, self.warps)
        if self.fused and (sizes != FUSED or self.block_m < FUSED_BLOCK_M or self.stages < 3 or self.descriptors):
            raise MorphoQuantError(
                f"{where}: a fused tile has block_n, block_k and warps {list(FUSED)}, block_m from {FUSED_BLOCK_M} on, "
                "3 stages or more and no descriptors; fix the tile table"
            )


def _check_sizes(tile: Tile | Int8Tile, allowed: Mapping[str, tuple[int, ...]], where: str) -> None:
    for name, sizes in {**allowed, "warps": WARPS}.items():
        size = getattr(tile, name)
        if size not in sizes:
            raise MorphoQuantError(f"{where}: {name} = {size} is not one of {list(sizes)}; fix the tile table")


@dataclass(frozen=True)
class Architecture:
    """One GPU architecture: the names of its devices, the limits of its tiles, and the tiles."""

    name: str
    vendor: str  # "nvidia" or "amd"
    # Compute capabilities ("8.0") or names of AMD's targets ("gfx942") that it serves.
    devices: tuple[str, ...]
    shared_memory: int  # bytes that one program may use
    unit_shared_memory: int  # bytes that the programs of one multiprocessor share
    unit_registers: int  # of 32 bits, that they share
    unit_threads: int  # that it holds at a time
    int8: Int8Tile
    tiles: tuple[Tile, ...]
    reason: str

    def int8_tile(self, tokens: int, two_level: bool) -> Int8Tile | None:
        """The tile of the int8 path if that serves `tokens` tokens of such a layer, else None."""
        least = self.int8.min_tokens
        return self.int8 if two_level and least is not None and tokens >= least else None

    def served_int8_tile(self, two_level: bool) -> Int8Tile | None:
        """The tile of a server's int8 path for such a layer; None if it has none, or the user wants no workspace."""
        tile = self.int8_tile(sys.maxsize, two_level)
        return tile if tile is not None and (tile.fused or environment.workspace_wanted()) else None

    def tile(self, tokens: int, group_size: int, two_level: bool = False) -> Tile:
        """The first tile of the table that takes `tokens` tokens at `group_size`, with two-level scales or others."""
        for tile in self.tiles:
            if tile.serves(group_size, two_level) and (tile.max_tokens is None or tokens <= tile.max_tokens):
                return tile
        raise MorphoQuantError(
            f"{self.name}: the tile table has no entry for {tokens} tokens at group_size {group_size}"
            f"{' with two-level scales' * two_level}; "
            f"unset {environment.TILES} or make a new table with `python -m morphoquant_vllm.gpu.tools.autotune`"
        )

    def tiles_of(self, group_size: int, two_level: bool) -> list[Tile]:
        """The tiles that serve a layer, by rising `max_tokens`, the last one without: `tile` returns one of them."""
        found: list[Tile] = []
        for tile in self.tiles:
            reached = not found or tile.max_tokens is None or tile.max_tokens > (found[-1].max_tokens or 0)
            if tile.serves(group_size, two_level) and reached:
                found.append(tile)
                if tile.max_tokens is None:
                    return found
        raise MorphoQuantError(
            f"{self.name}: the tile table has no entry for any number of tokens at group_size {group_size}"
            f"{' with two-level scales' * two_level}; "
            f"unset {environment.TILES} or make a new table with `python -m morphoquant_vllm.gpu.tools.autotune`"
        )


# A part of K shorter than this many tiles along K is not worth its partial sums.
MIN_K_TILES_PER_SPLIT = 4


def splits_of(tile: Tile, tokens: int, out_features: int, k_tiles: int, units: int) -> int:
    """Parts of K: the fewest that give each of `units` multiprocessors its programs, within the tile's bounds."""
    programs = -(-tokens // tile.block_m) * -(-out_features // tile.block_n)
    wanted = -(-units * tile.programs_per_unit // programs)
    splits = max(1, min(wanted, tile.max_splits, k_tiles // MIN_K_TILES_PER_SPLIT))
    # Turns of the loop. Parts are equal but for the last: fewer of them may be as long.
    turns = k_tiles // 2 if tile.two_level else k_tiles
    return -(-turns // -(-turns // splits))


def parse(table: Mapping[str, Any], source: str) -> dict[str, Architecture]:
    """The architectures of a table read from `source`, by name; raises MorphoQuantError if it is malformed."""
    if table.get("version") != TABLE_VERSION:
        raise MorphoQuantError(
            f"{source}: tile table version {table.get('version')!r} is unknown, this release reads {TABLE_VERSION}; "
            "make a new table with `python -m morphoquant_vllm.gpu.tools.autotune`"
        )
    architectures = {}
    try:
        for name, entry in table["architectures"].items():
            read = {"tiles": tuple(_tile(tile) for tile in entry["tiles"]), "int8": _int8_tile(entry["int8"])}
            rest: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()
            }
            architectures[name] = Architecture(name=name, **(rest | read))
    except (KeyError, TypeError, AttributeError) as problem:
        raise MorphoQuantError(f"{source}: malformed tile table ({problem}); compare it with {DEFAULT_TABLE}") from None
    for architecture in architectures.values():
        architecture.int8.check(f"{source}: {architecture.name}, int8")
        for index, tile in enumerate(architecture.tiles):
            where = f"{source}: {architecture.name}, tile {index}"
            tile.check(where)
            if tile.adds_splits and architecture.vendor != "nvidia":
                # On gfx942 waves come to the barrier before their sums are stored.
                raise MorphoQuantError(
                    f"{where}: adds_splits is for NVIDIA, not for {architecture.vendor}; "
                    "set adds_splits to false in the tile table"
                )
    return architectures


def _typed(entry: Mapping[str, Any], tile: type[Tile | Int8Tile], types: Mapping[str, type], optional: str) -> None:
    """Raise KeyError or TypeError if a field is missing or of a wrong type; `types` are those other than int."""
    for field in fields(tile):
        value, wanted = entry[field.name], types.get(field.name, int)
        if not isinstance(value, wanted) and not (field.name == optional and value is None):
            raise TypeError(f"{field.name} must be {wanted.__name__}, got {value!r}")


def _tile(entry: Mapping[str, Any]) -> Tile:
    types = {"group_sizes": list, "reason": str} | dict.fromkeys(("two_level", "joined", "adds_splits"), bool)
    _typed(entry, Tile, types, "max_tokens")
    return Tile(**{**entry, "group_sizes": tuple(entry["group_sizes"])})


def _int8_tile(entry: Mapping[str, Any]) -> Int8Tile:
    _typed(entry, Int8Tile, {"descriptors": bool, "fused": bool, "reason": str}, "min_tokens")
    return Int8Tile(**entry)


@cache
def load(path: Path) -> dict[str, Architecture]:
    """The table in a file, read once per process."""
    try:
        # A reader would wait for ever at a FIFO.
        if path.exists() and not path.is_file():
            raise OSError("no regular file")
        table = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as problem:
        raise MorphoQuantError(f"{path}: not a readable tile table ({problem}); unset {environment.TILES}") from None
    if not isinstance(table, dict):
        raise MorphoQuantError(f"{path}: a tile table is a JSON object; unset {environment.TILES}")
    return parse(table, str(path))


def architectures() -> dict[str, Architecture]:
    """The table in force."""
    return load(environment.tile_table() or DEFAULT_TABLE)


def architecture_of(device_name: str) -> Architecture | None:
    """The architecture that serves a compute capability ("8.9") or an AMD target ("gfx942"); None if none does."""
    return next((item for item in architectures().values() if device_name in item.devices), None)
