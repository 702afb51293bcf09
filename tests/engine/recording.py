"""What runs inside vLLM's workers: which row serves which token of which request, in the first quantized layer.

The truth comes from positions: where a request's media lie in its prompt is what vLLM's processor says, apart from any
token id. The rows are what the layer's op is given.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor


def decoder_layers(model: Any) -> list[Any]:
    """The quantized layers that take each token's own row, in the order of the model."""
    return [layer for layer in model.modules() if "modality" in dict(layer.named_buffers(recurse=False))]


def install(worker: Any) -> None:
    """Record every step from now on, into `worker.recorded_steps`."""
    from morphoquant_vllm import backends

    runner = worker.model_runner
    layer = decoder_layers(runner.model)[0]
    key = layer.quant_method.backend
    first_weight = layer.quant_method.records(layer)[0][0].data_ptr()
    backend = backends.BACKENDS[key]
    worker.recorded_steps = []

    def linear(x: Tensor, modality: Tensor, weight: list[Tensor], *rest: Any) -> Tensor:
        y = backend.linear(x, modality, weight, *rest)
        if weight[0].data_ptr() == first_weight:
            worker.recorded_steps.append({"rows": modality[: x.shape[0]].tolist(), "tokens": _tokens(runner)})
        return y

    backends.BACKENDS[key] = dataclasses.replace(backend, linear=linear)
    worker.stop_recording = lambda: backends.BACKENDS.__setitem__(key, backend)


def _tokens(runner: Any) -> list[dict[str, Any]]:
    """The step's requests in the order of the batch: which positions of which request, and what lies there."""
    batch = runner.input_batch
    starts = runner.query_start_loc.np
    found = []
    for index, request_id in enumerate(batch.req_ids):
        request = runner.requests[request_id]
        first = int(batch.num_computed_tokens_cpu[index])
        positions = range(first, first + int(starts[index + 1] - starts[index]))
        kinds = _kinds(request)
        found.append(
            {
                "request": request_id,
                "first": first,
                "prompt": request.num_prompt_tokens,
                "kinds": [kinds.get(position, "text") for position in positions],
            }
        )
    return found


def _kinds(request: Any) -> dict[int, str]:
    """Modality of every position of the request that holds an encoder's output."""
    kinds = {}
    for feature in request.mm_features:
        place = feature.mm_position
        for index in range(place.length):
            if place.is_embed is None or bool(place.is_embed[index]):
                kinds[place.offset + index] = feature.modality
    return kinds


def collect(worker: Any) -> dict[str, Any]:
    """The steps since the last call, and whether all layers read one buffer."""
    steps, worker.recorded_steps[:] = list(worker.recorded_steps), []
    layers = decoder_layers(worker.model_runner.model)
    return {
        "steps": steps,
        "layers": len(layers),
        "buffers": len({layer.modality.data_ptr() for layer in layers}),
        "capacity": layers[0].modality.numel(),
    }


def swap_rows(worker: Any, one: int, other: int) -> None:
    """Make the bus take one modality for another, as a wrong token table would."""
    from morphoquant_vllm.plugin.modality_bus import TABLE

    (table,) = [buffer for name, buffer in worker.model_runner.model.named_buffers() if name.endswith(f".{TABLE}")]
    ones, others = table == one, table == other
    table[ones], table[others] = other, one


def stop(worker: Any) -> None:
    worker.stop_recording()
