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
    findings = [
        *guarded("python", machine.python),
        *guarded("torch", machine.torch_build),
        *guarded("processor", machine.processor),
        *guarded("compiler", lambda: machine.compiler(has_gpu)),
        *guarded("cache", machine.cache),
        *guarded("gpu", machine.gpu),
        *guarded("vllm", server.distribution),
        *guarded("plugin", server.plugin),
        *guarded("interfaces", server.interfaces),
        *guarded("mends", server.needed_mends),
        *guarded("media", lambda: server.media(needed)),
    ]
    if model is not None:
        findings += guarded("memory", lambda: memory.serving(model, machine.gpu_memory()))
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
    problems = sum(finding.state == "problem" for finding in findings)
    lines.append(f"{problems} problem{'s' * (problems != 1)}" if problems else "this machine can serve")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as a JSON object."""
    return {"healthy": is_healthy(findings), "findings": [vars(finding) for finding in findings]}
