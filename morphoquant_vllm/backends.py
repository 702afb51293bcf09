"""The implementations of the integer linear layer, and which of them serves a device. ops.py calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from morphoquant_vllm.cpu import backend as cpu
from morphoquant_vllm.cpu import experts as cpu_experts
from morphoquant_vllm.cpu import head as cpu_head
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.gpu import backend as gpu_backend
from morphoquant_vllm.gpu import experts as gpu_experts
from morphoquant_vllm.gpu import head as gpu_head
from morphoquant_vllm.handles import Bound
from morphoquant_vllm.numerics import activation as activation_numerics
from morphoquant_vllm.numerics import experts as experts_numerics
from morphoquant_vllm.numerics import linear as linear_numerics
from morphoquant_vllm.numerics.activation import ActivationRecord
from morphoquant_vllm.numerics.experts import ExpertsRecord
from morphoquant_vllm.numerics.linear import WeightRecord

Linear = Callable[[Tensor, Tensor, list[Tensor], list[Tensor], Tensor | None], Tensor]
# A weight and an activation record, as a backend prepares them.
Records = tuple[list[Tensor], list[Tensor]]
Prepare = Callable[[WeightRecord, ActivationRecord], Records]


def _takes_any_layer(name: str, weight: WeightRecord, activation: ActivationRecord, dtype: torch.dtype) -> None:
    """The check of a backend that serves every layer."""


def _takes_any_head(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """The check of a head that every machine computes alike."""


def _takes_any_experts(name: str, record: ExpertsRecord, dtype: torch.dtype) -> None:
    """The check of a backend that serves all experts."""


def _serves_no_weight(weight: Tensor) -> bool:
    """The answer of a backend that has no 16-bit head."""
    return False


def _has_no_instructions() -> str:
    """The instruction set of a backend that is not compiled for one."""
    return ""


Bind = Callable[[list[Tensor], list[Tensor], Tensor | None, torch.dtype], Bound]


@dataclass(frozen=True)
class Head:
    """A backend's implementation of lm_head."""

    # y [M, N] of x, codes and scale. Inputs as the ops take them; checked.
    eight_bit: Callable[[Tensor, Tensor, Tensor], Tensor]
    # The reason why codes of a 16-bit weight [N, K] are not served; None if they are.
    eight_bit_refusal: Callable[[Tensor], str | None]
    # Compile for codes, scale and a dtype of activations. Raises MorphoQuantError if a kernel gives a wrong result.
    check: Callable[[Tensor, Tensor, torch.dtype], None] = _takes_any_head
    # y [M, N] of x and the 16-bit weight; None if the backend leaves that head to vLLM.
    bfloat16: Callable[[Tensor, Tensor], Tensor] | None = None
    # Whether `bfloat16` takes a weight [N, K], and is the best that the machine has.
    serves_bfloat16: Callable[[Tensor], bool] = _serves_no_weight


@dataclass(frozen=True)
class Experts:
    """A backend's implementation of routed experts."""

    # Lay a record out for this backend, once, after loading. The result holds all that `run` needs; no weight is twice
    # in memory once the record is gone.
    prepare: Callable[[ExpertsRecord], Any]
    # y [M, K] of x, modality, topk_weights, topk_ids and the result of `prepare`. Inputs as the op takes them; checked.
    run: Callable[[Tensor, Tensor, Tensor, Tensor, Any], Tensor]
    # Raise MorphoQuantError, with the experts' name, if a record or activations of a dtype are not served.
    check: Callable[[str, ExpertsRecord, torch.dtype], None] = _takes_any_experts


@dataclass(frozen=True)
class Backend:
    """One implementation of the integer linear layer."""

    # Lay the canonical records out for this backend, once, after loading.
    prepare: Prepare
    # Inputs as the ops take them, modality with M entries or more; checked.
    act_quant: Callable[[Tensor, Tensor, list[Tensor]], Tensor]
    linear: Linear
    # Raise MorphoQuantError, with the layer's name, if canonical records or activations of a dtype are not served.
    check: Callable[[str, WeightRecord, ActivationRecord, torch.dtype], None] = _takes_any_layer
    # Compile everything for prepared records, a bias and a dtype of activations, so no request waits for a compiler.
    # None for a backend that has nothing to prepare for its calls.
    bind: Bind | None = None
    # The layer with silu(gate) * up before it, if that costs the backend less than two steps.
    silu_mul_linear: Linear | None = None
    # lm_head, if the backend computes it; otherwise vLLM does.
    head: Head | None = None
    # Routed experts; None if the backend does not serve quantized ones.
    experts: Experts | None = None
    # Instruction set of its compiled kernels; empty if it has none.
    instructions: Callable[[], str] = _has_no_instructions


def _reference_prepare(weight: WeightRecord, activation: ActivationRecord) -> Records:
    return list(weight), list(activation)


def _reference_act_quant(x: Tensor, modality: Tensor, activation: list[Tensor]) -> Tensor:
    record, modality = ActivationRecord(*activation), modality[: x.shape[0]]
    return activation_numerics.act_quant(x, activation_numerics.token_rows(x, modality, record), record)


def _reference_linear(
    x: Tensor, modality: Tensor, weight: list[Tensor], activation: list[Tensor], bias: Tensor | None
) -> Tensor:
    modality = modality[: x.shape[0]]
    return linear_numerics.linear(x, modality, WeightRecord(*weight), ActivationRecord(*activation), bias)


def _reference_prepare_experts(record: ExpertsRecord) -> ExpertsRecord:
    return record


def _reference_experts(
    x: Tensor, modality: Tensor, topk_weights: Tensor, topk_ids: Tensor, record: ExpertsRecord
) -> Tensor:
    return experts_numerics.experts(x, modality[: x.shape[0]], topk_weights, topk_ids, record)


BACKENDS = {
    "reference": Backend(
        prepare=_reference_prepare,
        act_quant=_reference_act_quant,
        linear=_reference_linear,
        experts=Experts(_reference_prepare_experts, _reference_experts),
    ),
    "triton": Backend(
        prepare=gpu_backend.prepare,
        act_quant=gpu_backend.act_quant,
        linear=gpu_backend.linear,
        check=gpu_backend.check,
        bind=gpu_backend.bind,
        silu_mul_linear=gpu_backend.silu_mul_linear,
        head=Head(gpu_head.head, gpu_head.eight_bit_refusal, gpu_head.check),
        experts=Experts(gpu_experts.prepare, gpu_experts.run, gpu_backend.check_experts),
    ),
    "cpu": Backend(
        prepare=cpu.prepare,
        act_quant=cpu.act_quant,
        linear=cpu.linear,
        head=Head(
            cpu_head.head,
            cpu_head.eight_bit_refusal,
            bfloat16=cpu_head.head_bfloat16,
            serves_bfloat16=cpu_head.serves_bfloat16,
        ),
        experts=Experts(cpu_experts.prepare, cpu_experts.run),
        instructions=cpu.instructions,
    ),
}

# By type of device. A GPU that the kernels do not know is refused by the backend's check, not served slowly.
BACKEND_OF_DEVICE = {"cuda": "triton"}


def select_backend(device: torch.device) -> str:
    """Key of the backend that serves layers on `device`: its kernels if they run, else the torch reference."""
    if device.type == "cpu" and cpu.available():
        return "cpu"
    return BACKEND_OF_DEVICE.get(device.type, "reference")


def check_inputs(x: Tensor, modality: Tensor) -> None:
    """Raise ValueError unless x is [M, K] and modality int32 with M entries or more."""
    if x.dim() != 2:
        raise ValueError(f"x must be [M, K], got shape {list(x.shape)}")
    if modality.dtype != torch.int32 or modality.dim() != 1 or modality.numel() < x.shape[0]:
        raise ValueError(
            f"modality must be int32 with at least M = {x.shape[0]} entries, "
            f"got {modality.dtype} {list(modality.shape)}"
        )


@dataclass(frozen=True)
class Prepared:
    """A layer's records in the layout of one backend, for callers that do not bind their layers."""

    backend: str
    weight: list[Tensor]
    activation: list[Tensor]

    def linear(self, x: Tensor, modality: Tensor, bias: Tensor | None) -> Tensor:
        """y [M, N] of x [M, K] and modality int32 [M], in the dtype of x."""
        check_inputs(x, modality)
        return BACKENDS[self.backend].linear(x, modality, self.weight, self.activation, bias)


def prepare_layer(
    name: str, weight: WeightRecord, activation: ActivationRecord, dtype: torch.dtype, backend: str = ""
) -> Prepared:
    """Prepare canonical records for `backend`, by default the one of their device, and activations of `dtype`.

    Raises MorphoQuantError, with the layer's `name`, if the backend does not serve them.
    """
    backend = backend or select_backend(weight.codes.device)
    chosen = BACKENDS[backend]
    chosen.check(name, weight, activation, dtype)
    return Prepared(backend, *chosen.prepare(weight, activation))


@dataclass(frozen=True)
class PreparedExperts:
    """The routed experts of a layer in the layout of one backend."""

    implementation: Experts
    prepared: Any

    def experts(self, x: Tensor, modality: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """y [M, K] of x [M, K], in its dtype; inputs as the op takes them."""
        return self.implementation.run(x, modality, topk_weights, topk_ids, self.prepared)


def prepare_experts(name: str, record: ExpertsRecord, dtype: torch.dtype, backend: str = "") -> PreparedExperts:
    """Prepare the experts of a list for `backend`, by default the one of their device, and activations of `dtype`.

    Raises MorphoQuantError, with the list's `name`, if the backend does not serve them.
    """
    backend = backend or select_backend(record.down.codes.device)
    found = BACKENDS[backend].experts
    if found is None:
        raise MorphoQuantError(
            f"{name}: the backend '{backend}' does not serve quantized experts; leave them in 16 bit: calibrate with "
            "--ignore '*.experts.*'"
        )
    found.check(name, record, dtype)
    return PreparedExperts(found, found.prepare(record))


def has_counters() -> bool:
    """Whether layers of this process share counters on a GPU. They must keep their zeros, and are no buffers."""
    # Imported here: it imports Triton.
    from morphoquant_vllm.gpu import adding_launch

    return adding_launch.has_counters()
