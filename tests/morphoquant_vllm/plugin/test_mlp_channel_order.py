"""The channels between gate_up_proj and down_proj in down_proj's order: only their positions change."""

import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics.activation import act_quant, token_rows
from morphoquant_vllm.plugin.config import MorphoQuantConfig
from morphoquant_vllm.plugin.mlp_channel_order import DOWN, GATE_UP, reorder_inputs, reorder_outputs
from tests.checkpoints import random_group
from tests.records import activation_of

HIDDEN, WIDTH, G = 64, 128, 32
STEM = "model.layers.0."
SHARDS = ("mlp.gate_proj", "mlp.up_proj")


def specification(ranks: int = 1, bias: bool = False, two_level: bool = False) -> QuantizationSpec:
    scheme = {"scale_scheme": "two_level"} if two_level else {}
    gate = LayerSpec(HIDDEN, WIDTH, G, "column", STEM + "mlp.gate_up_proj", bias, **scheme)
    down = LayerSpec(WIDTH, HIDDEN, G, "row", STEM + "mlp.down_proj", **scheme)
    layers = {STEM + shard: gate for shard in SHARDS} | {STEM + "mlp.down_proj": down}
    return QuantizationSpec(layers=layers, tensor_parallel=ranks)


def stored(spec: QuantizationSpec) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors of gate and up, and of down."""
    generator = torch.Generator().manual_seed(1)
    gate, up, down = (torch.randn(shape, generator=generator) for shape in ((WIDTH, HIDDEN),) * 2 + ((HIDDEN, WIDTH),))
    shards = random_group([gate, up], spec.layers[STEM + SHARDS[0]], spec, torch.tensor(2))
    return shards, random_group([down], spec.layers[STEM + "mlp.down_proj"], spec, torch.tensor(3))[0]


def engine_of(model_type: str = "qwen2", adapters: bool = False) -> SimpleNamespace:
    """As much of vLLM's configuration as decides."""
    model = SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type))
    lora = SimpleNamespace() if adapters else None
    loading = SimpleNamespace(load_format="auto")
    return SimpleNamespace(model_config=model, load_config=loading, lora_config=lora, additional_config={})


def mlp_layers(
    monkeypatch: pytest.MonkeyPatch, config: MorphoQuantConfig, engine: SimpleNamespace | None, rank: int = 0
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """vLLM's own gate_up_proj and down_proj, of one rank of the checkpoint's, before loading."""
    from vllm.model_executor.layers import linear

    monkeypatch.setattr("vllm.config.get_current_vllm_config_or_none", lambda: engine)
    spec = config.spec
    assert spec is not None
    monkeypatch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: spec.tensor_parallel)
    monkeypatch.setattr(linear, "get_tensor_model_parallel_rank", lambda: rank)
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    bias = spec.layers[STEM + SHARDS[0]].bias
    gate_up = linear.MergedColumnParallelLinear(
        HIDDEN, [WIDTH, WIDTH], bias=bias, quant_config=config, prefix=STEM + "mlp.gate_up_proj"
    )
    down = linear.RowParallelLinear(
        WIDTH, HIDDEN, bias=False, reduce_results=False, quant_config=config, prefix=STEM + "mlp.down_proj"
    )
    return gate_up, down


def fill(layer: torch.nn.Module, shards: list[dict[str, Tensor]]) -> None:
    for index, tensors in enumerate(shards):
        for name, tensor in tensors.items():
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, *((index,) if len(shards) > 1 else ()))
    if getattr(layer, "bias", None) is not None:
        layer.bias.data = torch.randn(layer.bias.shape, generator=torch.Generator().manual_seed(4))


def process(*layers: torch.nn.Module) -> None:
    for layer in layers:
        layer.quant_method.process_weights_after_loading(layer)


def output(layers: tuple[torch.nn.Module, torch.nn.Module], x: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of gate_up_proj and of the MLP."""
    gate_up, down = layers
    between, _ = gate_up(x)
    gate, up = between.chunk(2, 1)
    return between, down.quant_method.apply(down, silu(gate) * up)


@pytest.mark.usefixtures("engine_context")
class TestLoading:
    @pytest.mark.parametrize(
        ("ranks", "rank", "bias", "two_level"),
        [(1, 0, False, False), (1, 0, True, True), (2, 0, True, False), (2, 1, False, True), (2, 1, True, False)],
    )
    def test_the_output_keeps_its_bits(
        self, monkeypatch: pytest.MonkeyPatch, ranks: int, rank: int, bias: bool, two_level: bool
    ) -> None:
        spec = specification(ranks, bias, two_level)
        shards, down = stored(spec)
        x = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(5)) * 2
        found = []
        for engine in (engine_of(), engine_of(adapters=True)):
            layers = mlp_layers(monkeypatch, MorphoQuantConfig(spec), engine, rank)
            fill(layers[0], shards)
            fill(layers[1], [down])
            process(*layers)
            found.append(output(layers, x))
            in_order = layers[1].quant_method.mlp
        assert in_order is None, "with adapters, which are written for the source's numbers, nothing moves"
        (moved, y), (plain, expected) = found
        own = WIDTH // ranks
        order = down["channel_order"].long().chunk(ranks)[rank] - rank * own
        assert not torch.equal(order, torch.arange(own))
        assert torch.equal(moved, plain[:, torch.cat((order, order + own))])
        assert torch.equal(y, expected)

    @pytest.mark.parametrize(
        "engine",
        [
            None,
            SimpleNamespace(**{**vars(engine_of()), "model_config": None}),
            engine_of("mixtral"),
            engine_of(""),
        ],
    )
    def test_models_that_are_not_known_stay_as_they_are(
        self, monkeypatch: pytest.MonkeyPatch, engine: SimpleNamespace | None
    ) -> None:
        """Operations between their two layers may not treat every channel alike."""
        gate_up, down = mlp_layers(monkeypatch, MorphoQuantConfig(specification()), engine)
        assert gate_up.quant_method.mlp is None and down.quant_method.mlp is None

    def test_a_second_load_that_cannot_move_gate_up_does_not_move_down(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = specification()
        shards, tensors = stored(spec)
        layers = mlp_layers(monkeypatch, MorphoQuantConfig(spec), engine_of())
        fill(layers[0], shards)
        fill(layers[1], [tensors])
        process(*layers)
        mlp = layers[0].quant_method.mlp
        assert all(layer.quant_method.renumbered for layer in layers)
        assert mlp.order_for_outputs(layers[0], 2 * WIDTH) is None and mlp.order_of_inputs() is None

    def test_a_reload_puts_a_new_bias_in_order_and_leaves_one_that_it_did_not_bring(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spec = specification(bias=True)
        shards, down = stored(spec)
        layers = mlp_layers(monkeypatch, MorphoQuantConfig(spec), engine_of())
        fill(layers[0], shards)
        fill(layers[1], [down])
        source = layers[0].bias.data.clone()
        process(*layers)
        served = layers[0].bias.data.clone()
        assert not torch.equal(served, source)
        order = down["channel_order"].long()
        stacked = {"weight_codes": torch.zeros(2 * WIDTH, 1)}
        for brought, expected in ((served, served), (source, served), (source.flip(0), None)):
            layers[0].bias.data.copy_(brought)
            layers[0].quant_method._reorder(layers[0], dict(stacked), order)
            wanted = brought[torch.cat((order, order + WIDTH))] if expected is None else expected
            assert torch.equal(layers[0].bias.data, wanted)

    def test_nothing_moves_when_down_proj_was_processed_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = specification()
        shards, tensors = stored(spec)
        x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(6))
        found = []
        for engine, backwards in ((engine_of(), True), (engine_of(adapters=True), False)):
            layers = mlp_layers(monkeypatch, MorphoQuantConfig(spec), engine)
            fill(layers[0], shards)
            fill(layers[1], [tensors])
            process(*(layers[::-1] if backwards else layers))
            found.append(output(layers, x))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])

    def test_a_damaged_order_is_refused_by_its_own_layer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = specification()
        shards, tensors = stored(spec)
        tensors["channel_order"] = tensors["channel_order"].clone().fill_(WIDTH + 7)
        gate_up, down = mlp_layers(monkeypatch, MorphoQuantConfig(spec), engine_of())
        fill(gate_up, shards)
        fill(down, [tensors])
        process(gate_up)
        with pytest.raises(MorphoQuantError, match=r"mlp.down_proj.channel_order: must permute the 128 channels"):
            process(down)

    def test_layers_of_two_models_do_not_meet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A draft model may have the same names in the same configuration, and have layers that are not quantized."""
        config = MorphoQuantConfig(specification())
        whole = [mlp_layers(monkeypatch, config, engine_of()) for _ in range(2)]
        for gate_up, down in whole:
            assert gate_up.quant_method.mlp is down.quant_method.mlp is not None
            # Nothing is left for the down_proj of another model, whose gate_up_proj may not be quantized.
            assert config.get_quant_method(down, STEM[:-1] + DOWN).mlp is None
        first, second = (config.get_quant_method(whole[0][0], STEM[:-1] + GATE_UP).mlp for _ in range(2))
        assert (
            len({id(mlp) for mlp in (whole[0][0].quant_method.mlp, whole[1][0].quant_method.mlp, first, second)}) == 4
        )
        assert config._mlps and pickle.loads(pickle.dumps(config))._mlps == {}


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_codes_and_rows_are_those_of_the_shuffled_input(blocks: int) -> None:
    layer = LayerSpec(WIDTH, HIDDEN, G, "row", "down")
    spec = QuantizationSpec(layers={"down": layer}, tensor_parallel=blocks)
    generator = torch.Generator().manual_seed(blocks)
    (tensors,) = random_group([torch.randn(HIDDEN, WIDTH, generator=generator)], layer, spec, torch.tensor(blocks))
    order = tensors["channel_order"].long()
    plain, moved = activation_of(tensors), activation_of(reorder_inputs(tensors, order))
    x = torch.randn(200, WIDTH, generator=generator) * 2
    modality = torch.randint(len(spec.rows) - 1, (200,), generator=generator, dtype=torch.int32)
    rows = token_rows(x, modality, plain)
    assert 0 < int((rows == len(spec.rows) - 1).sum()) < 200
    assert torch.equal(token_rows(x[:, order], modality, moved), rows)
    assert torch.equal(act_quant(x[:, order], rows, moved), act_quant(x, rows, plain))
    assert moved.channel_order.tolist() == list(range(WIDTH))


def test_tensors_of_the_input_do_not_move_with_the_outputs() -> None:
    spec = specification()
    (gate, _), _ = stored(replace(spec))
    rows = torch.arange(WIDTH - 1, -1, -1)
    found = reorder_outputs(gate, rows)
    assert found.keys() == gate.keys()
    for name in ("channel_order", "centre", "massive_low"):
        assert found[name] is gate[name]
    for name in ("weight_codes", "weight_scale"):
        assert torch.equal(found[name], gate[name].flip(0))
    assert torch.equal(found["absorbed_bias"], gate["absorbed_bias"].flip(-1))


@pytest.mark.parametrize("change", ["input_is_parallel", "gather_output", "tp_size"])
def test_layers_that_split_other_channels_are_no_pair(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    from morphoquant_vllm.plugin.mlp_channel_order import are_pair

    gate_up, down = mlp_layers(monkeypatch, MorphoQuantConfig(specification(ranks=2)), engine_of())
    assert are_pair(gate_up, down)
    changed = gate_up if change == "gather_output" else down
    setattr(changed, change, {"input_is_parallel": False, "gather_output": True, "tp_size": 1}[change])
    assert not are_pair(gate_up, down) and not are_pair(down, gate_up)
