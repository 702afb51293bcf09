"""One pass of a model without weights, on the meta device: which linears read the same tensor, and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from morphoquant_vllm.errors import MorphoQuantError

# Tokens of the pass on the meta device; its values do not exist.
TOKENS = 4
# Names of linears that choose experts, or weigh the shared ones: they stay in 16 bit.
_GATES = ("gate", "router", "shared_expert_gate")
# Of latent attention: vLLM multiplies its matrix into others, so it stays in 16 bit, too.
_LATENT = "kv_b_proj"


def fix_angles(model: nn.Module) -> None:
    """Let the angles of rotary positions not depend on the positions' values, which the meta device does not have.

    transformers asks this attribute before it chooses the angles of longrope and of dynamic scaling.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            module.rope_type = "default"  # type: ignore[assignment]
        elif isinstance(kinds, dict):
            module.rope_type = dict.fromkeys(kinds, "default")  # type: ignore[assignment]


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block but for routed experts, the gates that choose or weigh experts, and `_LATENT`."""
    modules = dict(block.named_modules())
    lists = tuple(f"{name}." for name in modules if name.rpartition(".")[2] == "experts")
    has_experts = bool(lists)
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
        and not name.startswith(lists)
        and not (has_experts and name.rpartition(".")[2] in _GATES)
        and name.rpartition(".")[2] != _LATENT
    }


@dataclass
class Run:
    """What the pass on the meta device showed."""

    # By block: the linears in the order in which they ran, each with its input.
    inputs: list[dict[str, Tensor]]
    # By block: the hidden states that it was given and that it returned.
    given: list[Tensor] = field(default_factory=list)
    returned: list[Tensor] = field(default_factory=list)
    tuple_output: bool = False
    # Mappings in which blocks leave something, by the argument's name.
    left: dict[str, _Read] = field(default_factory=dict)


class _Read(dict[Any, Any]):
    """A mapping that knows whether something was read of it."""

    was_read = False

    def __getitem__(self, key: Any) -> Any:
        self.was_read = True
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self.was_read = True
        return super().get(key, default)


def _watch(run: Run, blocks: Sequence[nn.Module]) -> list[RemovableHandle]:
    """Hooks that note in `run` what the blocks and their linears get and return."""
    handles: list[RemovableHandle] = []

    def linear(block: int, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        run.inputs[block][name] = args[0]

    def block_begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        empty = {name for name, value in kwargs.items() if isinstance(value, Mapping) and not value}
        return args, {**kwargs, **{name: run.left.setdefault(name, _Read()) for name in empty}}

    def block_end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        run.given.append(args[0] if args else kwargs["hidden_states"])
        run.tuple_output = not isinstance(output, Tensor)
        run.returned.append(output[0] if run.tuple_output else output)

    for index, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(block_begin, with_kwargs=True))
        handles.append(block.register_forward_hook(block_end, with_kwargs=True))
        for name, module in linears(block).items():
            handles.append(module.register_forward_pre_hook(partial(linear, index, name)))
    return handles


@torch.no_grad()
def run_blocks(model: Any, blocks: Sequence[nn.Module], block_module: str) -> Run:
    """Run the language model on the meta device, and note the inputs of every linear of its blocks."""
    run = Run([{} for _ in blocks])
    handles = _watch(run, blocks)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    # transformers takes a mask of four dimensions as it is; it would look at the values of any other.
    masks = (torch.ones(1, 1, TOKENS, TOKENS, device="meta"), None)
    problems = []
    try:
        for mask in masks:
            run.given.clear()
            run.returned.clear()
            try:
                decoder(input_ids=ids, attention_mask=mask, use_cache=False)
                return run
            # Whatever the model's code raises is the reason.
            except Exception as error:
                problems.append(" ".join(str(error).split())[:200])
    finally:
        for handle in handles:
            handle.remove()
    raise MorphoQuantError(
        f"{block_module}: {type(model).__name__} does not run without weights ({problems[0]}), so its structure is "
        "unknown; this model is not supported"
    )
