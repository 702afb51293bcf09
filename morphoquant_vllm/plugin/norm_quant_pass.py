"""A graph pass for compiled models: the quantizer also computes the RMSNorm before it. Saves a launch per norm.

In the graphs that vLLM compiles for GPUs a norm is one operator of its intermediate representation. That holds for
every kernel of the norm, with vLLM's custom ops on or off. vLLM's fusions look for the same two operators. On CPUs, and
with `ir_enable_torch_wrap` off, a norm consists of several operators; the pass leaves those unchanged. It also leaves
Gemma's norms, whose weight is float32.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Graph, Node
from vllm.compilation.passes.inductor_pass import InductorPass

from morphoquant_vllm import ops


class NormFusion(InductorPass):
    """Graph pass: bound_linear(rms_norm(x)) becomes rms_norm_linear(x), also if a residual is added before.

    Only if nothing but that linear reads the norm.
    """

    def __init__(self) -> None:
        self.matched = 0

    def uuid(self) -> str:
        return self.hash_source(type(self), _fuse, _is_plain, _only_reader)

    def __call__(self, graph: Graph) -> None:
        norms = torch.ops.vllm_ir
        self.matched = 0
        for norm in graph.find_nodes(op="call_function", target=norms.rms_norm.default):
            self.matched += _fuse(graph, norm, norm, 1, ops.rms_norm_linear.default)
        for norm in graph.find_nodes(op="call_function", target=norms.fused_add_rms_norm.default):
            outputs = {node.args[1]: node for node in norm.users if node.target is operator.getitem}
            # A dict would merge two users of the same output into one entry.
            if len(outputs) == len(norm.users) and 0 in outputs:
                self.matched += _fuse(graph, norm, outputs[0], 2, ops.add_rms_norm_linear.default)
        graph.eliminate_dead_code()


def _fuse(graph: Graph, norm: Node, normed: Node, activations: int, fused: Callable[..., object]) -> bool:
    """Join the norm and the linear that reads its output `normed`, if possible; returns whether it did.

    `activations`: the number of the norm's arguments before its weight.
    """
    linear = _only_reader(normed)
    if linear is None or not _is_plain(norm, activations):
        return False
    # The sum moves to the place of the linear, so nothing may read it before.
    if any(user < linear for output in norm.users for user in output.users if activations == 2):
        return False
    inputs, weight_and_epsilon = norm.args[:activations], norm.args[activations : activations + 2]
    with graph.inserting_before(linear):
        call = graph.call_function(fused, (*inputs, *weight_and_epsilon, *linear.args[1:]))
        y = call
        if activations == 2:
            y, total = (
                graph.call_function(operator.getitem, (call, 0)),
                graph.call_function(operator.getitem, (call, 1)),
            )
            total.meta["val"] = norm.meta["val"][1]
            call.meta["val"] = (linear.meta["val"], total.meta["val"])
            for output in norm.users:
                if output is not normed:
                    output.replace_all_uses_with(total)
    y.meta["val"] = linear.meta["val"]
    linear.replace_all_uses_with(y)
    graph.erase_node(linear)
    return True


def _only_reader(normed: Node) -> Node | None:
    """The linear that alone reads a norm's output, as its input; None if anything else reads it."""
    users = list(normed.users)
    if len(users) != 1 or users[0].target is not ops.bound_linear.default:
        return None
    linear = users[0]
    return linear if linear.args[0] is normed and normed not in linear.args[1:] and not linear.kwargs else None


def _is_plain(norm: Node, activations: int) -> bool:
    """Whether a norm is that of numerics/norm.py: over all channels, with a weight in its input's dtype."""
    weight, rest = norm.args[activations], norm.args[activations + 2 :]
    if norm.kwargs or any(size is not None for size in rest) or not isinstance(weight, Node):
        return False
    tensors = [node.meta["val"] for node in (*norm.args[:activations], weight) if isinstance(node, Node)]
    return len({tensor.dtype for tensor in tensors}) == 1 and tensors[0].dim() == 2
