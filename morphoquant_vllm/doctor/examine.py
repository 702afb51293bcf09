"""All checks in order, and their display."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from morphoquant_vllm.doctor import machine, memory, server
from morphoquant_vllm.doctor.finding import Finding, guarded

_MARKS = {"ok": "ok", "note": "note", "problem": "PROBLEM"}


def examine(model: memory.Model | None = None) -> list[Finding]:
    """Every fact of this machine, in the order of the display; with `model`, also its media and its memory."""
    has_gpu = machine.has_gpu()
    needed = None if model is None or not model.is_quantized else model.media
    mends = guarded("mends", server.needed_mends)
    mendable = {finding.subject for finding in mends}
    findings = [
        *guarded("python", machine.python),
        *guarded("torch", machine.torch_build),
        *guarded("processor", machine.processor),
        *guarded("compiler", lambda: machine.compiler(has_gpu)),
        *guarded("cache", machine.cache),
        *guarded("gpu", machine.gpu),
        *guarded("vllm", server.distribution),
        *guarded("plugin", server.plugin),
        *guarded("interfaces", lambda: server.interfaces(mendable)),
        *mends,
        *guarded("media", lambda: server.media(needed, mendable)),
        *guarded("kv-cache", lambda: () if has_gpu else memory.kv_cache()),
    ]
    if model is not None:
        findings += guarded("bits", lambda: memory.weight_bits(model, has_gpu=has_gpu))
        findings += guarded("memory", lambda: memory.serving(model, *machine.gpu_memory()))
    return findings


def is_healthy(findings: Sequence[Finding]) -> bool:
    """Whether none of the findings prevents serving."""
    return all(finding.state != "problem" for finding in findings)


def as_text(findings: Sequence[Finding]) -> str:
    """One line per finding, a second for a remedy, and the verdict."""
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{_MARKS[finding.state]:7}  {finding.subject:{width}}  {finding.text}")
        if finding.remedy:
            lines.append(f"{'':7}  {'':{width}}  -> {finding.remedy}")
    return "\n".join([*lines, _verdict(findings)])


def _verdict(findings: Sequence[Finding]) -> str:
    problems = [finding for finding in findings if finding.state == "problem"]
    if not problems:
        return "this machine can serve"
    begin = f"; begin with {server.MEND}" if any(server.MEND in finding.remedy for finding in problems) else ""
    return f"{len(problems)} problem{'s' * (len(problems) != 1)}{begin}"


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as a JSON object."""
    return {"healthy": is_healthy(findings), "findings": [vars(finding) for finding in findings]}
