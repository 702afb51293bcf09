"""A small valid checkpoint of random weights, made with the schema and the numerics alone."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import (
    GROUP_SCHEME,
    MASSIVE_CHANNELS,
    TWO_LEVEL_SCHEME,
    ExpertsSpec,
    LayerSpec,
    input_blocks,
    stored_name,
)
from morphoquant_vllm.format.schema import DEFAULT_ROWS, QuantizationSpec
from morphoquant_vllm.format.seal import sealed
from morphoquant_vllm.numerics import weights
from morphoquant_vllm.numerics.limits import MAX_LEVEL

HIDDEN, INTERMEDIATE, KV, VOCABULARY = 64, 128, 32, 16


def layer_specs(layers: int = 2, group_size: int = 32) -> dict[str, LayerSpec]:
    """The seven linears of each of `layers` decoder layers; q, k and v have biases of their own."""
    specs = {}
    for index in range(layers):
        prefix = f"model.layers.{index}"
        for name, out_features, in_features, group in (
            ("self_attn.q_proj", HIDDEN, HIDDEN, "self_attn.qkv_proj"),
            ("self_attn.k_proj", KV, HIDDEN, "self_attn.qkv_proj"),
            ("self_attn.v_proj", KV, HIDDEN, "self_attn.qkv_proj"),
            ("self_attn.o_proj", HIDDEN, HIDDEN, None),
            ("mlp.gate_proj", INTERMEDIATE, HIDDEN, "mlp.gate_up_proj"),
            ("mlp.up_proj", INTERMEDIATE, HIDDEN, "mlp.gate_up_proj"),
            ("mlp.down_proj", HIDDEN, INTERMEDIATE, None),
        ):
            specs[f"{prefix}.{name}"] = LayerSpec(
                in_features=in_features,
                out_features=out_features,
                group_size=group_size,
                parallel="column" if group else "row",
                shared_input=f"{prefix}.{group or name}",
                bias=bool(group and "attn" in group),
            )
    return specs


def random_group(
    shards: list[Tensor], layer: LayerSpec, spec: QuantizationSpec, seed: Tensor
) -> list[dict[str, Tensor]]:
    """The format's tensors of the shards [N, K] that share one input; whatever calibration would find is random.

    The massive intervals of each block hold about every other one of standard normal tokens.
    """
    generator = torch.Generator().manual_seed(int(seed))
    rows, in_features = len(spec.rows), layer.in_features
    step = torch.rand(in_features, generator=generator) + 0.1
    centre = torch.randn(rows, in_features, generator=generator)
    mask = torch.rand(rows, in_features, generator=generator) < 0.1
    mask[spec.any_row] = mask[:-1].any(0)
    blocks = input_blocks(layer, spec.tensor_parallel)
    width = in_features // blocks
    absorbed = weights.absorb(torch.cat(shards), step)
    order = weights.channel_order(absorbed, blocks)
    shared = {
        "activation_step": step,
        "channel_order": order,
        "modality_mask": mask,
        "centre": centre,
        "gain": torch.rand(rows, generator=generator) + 0.5,
        "massive_channel": (
            torch.stack([torch.randperm(width, generator=generator)[:MASSIVE_CHANNELS] for _ in range(blocks)])
            + torch.arange(blocks)[:, None] * width
        ).int(),
        "massive_low": -0.5 - torch.rand(blocks, MASSIVE_CHANNELS, generator=generator),
        "massive_high": 20 + torch.rand(blocks, MASSIVE_CHANNELS, generator=generator),
    }
    group = []
    for shard in shards:
        permuted = weights.absorb(shard, step)[:, order.long()]
        own = {**_rounded(permuted, layer), "absorbed_bias": weights.absorbed_bias(shard, centre, blocks)}
        group.append({name: tensor.clone() for name, tensor in (shared | own).items()})
    return group


def _rounded(permuted: Tensor, layer: LayerSpec) -> dict[str, Tensor]:
    """Codes and scales of W' [N, K] by their stored names; those of two-level scales are rounded up to a level."""
    if layer.weight_bits == 8:
        codes, scale = weights.quantize_int8(permuted, layer.group_size)
        return {"weight_codes": codes, "weight_scale": scale}
    codes, scale = weights.quantize_int4(permuted, torch.ones(layer.in_features), layer.group_size)
    if layer.scale_scheme == GROUP_SCHEME:
        return {"weight_codes": weights.pack(codes), "weight_scale": scale}
    channel_scale = scale.float().amax(1) / MAX_LEVEL
    level = (scale.float() / channel_scale[:, None]).ceil().clamp(1, MAX_LEVEL)
    step = (level * channel_scale[:, None])[..., None]
    codes = weights.round_int4(permuted.unflatten(1, (scale.shape[1], -1)), step).flatten(1).to(torch.int8)
    return {
        "weight_codes": weights.pack(codes),
        "weight_level": level.to(torch.uint8),
        "weight_channel_scale": channel_scale,
    }


def random_experts_tensors(name: str, spec: QuantizationSpec) -> dict[str, Tensor]:
    """All stored tensors of the list of experts `name`, by their names in the files."""
    layers = spec.experts[name].layers(name)
    column = [layer for layer, settings in layers.items() if settings.parallel == "column"]
    groups = [column, *([layer] for layer in layers if layer not in set(column))]
    tensors = {}
    for number, names in enumerate(groups):
        settings = layers[names[0]]
        shards = [torch.randn(settings.out_features, settings.in_features) * settings.in_features**-0.5 for _ in names]
        for layer, group in zip(names, random_group(shards, settings, spec, torch.tensor(number)), strict=True):
            tensors |= {stored_name(layer, tensor): group[tensor] for tensor in spec.stored_tensors(layer)}
    return tensors


def write_random_checkpoint(
    directory: Path,
    *,
    layers: int = 2,
    group_size: int = 32,
    tensor_parallel: int = 2,
    single_file: bool = False,
    two_level: Collection[str] = (),
    eight_bit: Collection[str] = (),
    experts: Mapping[str, ExpertsSpec] | None = None,
) -> QuantizationSpec:
    """Write a valid checkpoint, of one file or of two, with an index; returns its settings.

    `two_level`: shared inputs whose layers have two-level scales. `eight_bit`: those whose layers have 8-bit weights.
    `experts` are added to the linears.
    """
    layers_of = {
        name: replace(
            layer,
            scale_scheme=TWO_LEVEL_SCHEME if layer.shared_input in two_level else GROUP_SCHEME,
            weight_bits=8 if layer.shared_input in eight_bit else 4,
        )
        for name, layer in layer_specs(layers, group_size).items()
    }
    spec = QuantizationSpec(
        layers=layers_of,
        rows=DEFAULT_ROWS,
        tensor_parallel=tensor_parallel,
        placeholder_token_ids={"image": (7,), "audio": (8,)},
        created_by="tests",
        experts=dict(experts or {}),
    )
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN).bfloat16()}
    for names in spec.shared_inputs().values():
        shards = [torch.randn(spec.layers[name].out_features, spec.layers[name].in_features) for name in names]
        seed = torch.randint(1 << 30, ())
        for name, group in zip(names, random_group(shards, spec.layers[names[0]], spec, seed), strict=True):
            tensors |= {stored_name(name, tensor): value for tensor, value in group.items()}
            if spec.layers[name].bias:
                tensors[f"{name}.bias"] = torch.randn(spec.layers[name].out_features).bfloat16()
    for name in spec.experts:
        tensors |= random_experts_tensors(name, spec)
    tensors["model.norm.weight"] = torch.ones(HIDDEN).bfloat16()

    directory.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    middle = len(names) // 2
    files = {"model-00001-of-00002.safetensors": names[:middle], "model-00002-of-00002.safetensors": names[middle:]}
    if single_file:
        files = {"model-00001-of-00001.safetensors": names}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, directory / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return write_config(directory, spec)


def write_config(directory: Path, spec: QuantizationSpec, **changes: object) -> QuantizationSpec:
    """Write config.json for the weights that are there; `changes` replace entries of its quantization_config."""
    config: dict[str, object] = {"model_type": "llama"}
    spec = sealed(directory, config, spec)
    config["quantization_config"] = spec.to_dict() | changes
    (directory / "config.json").write_text(json.dumps(config))
    if changes:
        seal_again(directory)
    return spec


def seal_again(directory: Path) -> None:
    """Give config.json the digests of its current content; nothing if it is too damaged."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    settings = {**config["quantization_config"], "format_version": 2}
    settings.pop("integrity", None)
    try:
        spec = sealed(directory, config, QuantizationSpec.from_dict(settings))
    except MorphoQuantError:
        return
    assert spec.integrity is not None
    config["quantization_config"]["integrity"] = spec.integrity.to_dict()
    path.write_text(json.dumps(config))


def file_of(directory: Path, tensor: str) -> Path:
    """The safetensors file that holds a tensor."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            if tensor in file.keys():  # noqa: SIM118
                return path
    raise KeyError(tensor)


def edit_tensors(path: Path, changes: dict[str, Tensor | None]) -> None:
    """Rewrite a safetensors file with tensors replaced, added, or (None) removed; config.json is sealed again."""
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    path.unlink()
    save_file(tensors, path)
    seal_again(path.parent)


def edit(directory: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Replace a stored tensor by the result of `change`."""
    path = file_of(directory, name)
    with safe_open(str(path), "pt") as file:
        tensor = file.get_tensor(name)
    edit_tensors(path, {name: change(tensor)})


def set_bias(spec: QuantizationSpec, name: str, bias: bool) -> QuantizationSpec:
    """The same settings with one layer's `bias` flag changed."""
    return replace(spec, layers={**spec.layers, name: replace(spec.layers[name], bias=bias)})


def flip_bit(directory: Path, tensor: str) -> None:
    """Change the lowest bit of a tensor's first byte; config.json is left as it was."""
    path = file_of(directory, tensor)
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    first, _ = json.loads(content[8 : 8 + size])[tensor]["data_offsets"]
    content[8 + size + first] ^= 1
    path.write_bytes(content)
