"""The merged result as Markdown. Pure."""

from __future__ import annotations

from typing import Any

from benchmarks.common.tables.linears import table
from benchmarks.gpu.parts import PARTS

_ABOUT = {part.name: part.about for part in PARTS}


def outcome(entry: dict[str, Any]) -> str:
    """One cell for a part: its state, and the counts of tests."""
    result = entry.get("result") or {}
    if not isinstance(result.get("failed"), list):
        return str(entry["state"])
    skipped = sum(result["skipped"].values())
    return f"{entry['state']}: {result['passed']} passed, {len(result['failed'])} failed, {skipped} skipped"


def markdown(merged: dict[str, Any]) -> str:
    """Device, versions, a table of the parts, and the linears."""
    versions = ", ".join(f"{name} {version}" for name, version in merged["versions"].items())
    lines = [f"# {merged['device']}", "", f"`python -m benchmarks.gpu`; {versions}.", ""]
    lines += ["| part | what | state | seconds | when |", "|---|---|---|---|---|"]
    for name, entry in merged["parts"].items():
        about = _ABOUT.get(name, "")
        lines.append(f"| {name} | {about} | {outcome(entry)} | {entry['seconds']:.0f} | {entry['when']} |")
    for name, entry in merged["parts"].items():
        if "rows" in (entry.get("result") or {}):
            lines += ["", f"## {name}: microseconds (times faster than bf16)", "", *table(entry["result"]["rows"])]
        if entry.get("output"):
            lines += ["", f"## {name}: the end of its output", "", "```text", entry["output"].rstrip(), "```"]
    return "\n".join(lines) + "\n"
