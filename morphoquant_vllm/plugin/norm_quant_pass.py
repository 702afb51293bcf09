"""RMSNorm computed by the quantizer of the layer after it, in compiled models: one launch less for each such norm.

In the graphs that vLLM compiles for GPUs a norm is one operator of its intermediate representation, whichever kernel
would compute it and whether vLLM's custom ops are on or off; its own fusions look for the same two operators. Only on
CPUs, and with `ir_enable_torch_wrap` off, is a norm spelled out; those stay. So do Gemma's, whose weight is float32.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Graph, Node
from vllm.compilation.passes.inductor_pass import InductorPass

from morphoquant_vllm import ops


class NormFusion(InductorPass):
    """Graph pass: bound_linear(rms_norm(x)) becomes rms_norm_linear(x), with or without a residual added before.

    Only where nothing but that linear reads the norm.
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
            # Two users that take the same output would be one entry.
            if len(outputs) == len(norm.users) and 0 in outputs:
                self.matched += _fuse(graph, norm, outputs[0], 2, ops.add_rms_norm_linear.default)
        graph.eliminate_dead_code()


def _fuse(graph: Graph, norm: Node, normed: Node, activations: int, fused: Callable[..., object]) -> bool:
    """Put the norm and the linear that reads its output `normed` into one call, if that can be; says whether it did.

    `activations`: how many arguments of the norm come before its weight.
    """
    linear = _only_reader(normed)
    if linear is None or not _is_plain(norm, activations):
        return False
    # The sum moves to where the linear is: nothing may read it before.
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
    """The linear that alone reads a norm's output, as its input; None if something else does."""
    users = list(normed.users)
    if len(users) != 1 or users[0].target is not ops.bound_linear.default:
        return None
    linear = users[0]
    return linear if linear.args[0] is normed and normed not in linear.args[1:] and not linear.kwargs else None


def _is_plain(norm: Node, activations: int) -> bool:
    """Whether a norm is that of numerics/norm.py: over all channels, its weight there and of its input's dtype."""
    weight, rest = norm.args[activations], norm.args[activations + 2 :]
    if norm.kwargs or any(size is not None for size in rest) or not isinstance(weight, Node):
        return False
    tensors = [node.meta["val"] for node in (*norm.args[:activations], weight) if isinstance(node, Node)]
    return len({tensor.dtype for tensor in tensors}) == 1 and tensors[0].dim() == 2
