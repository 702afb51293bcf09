"""MMMU by lm-eval from a local copy, with the command of docs/guide/evaluate.md."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.omni_eval.miniature import write_mmmu
from tests.benchmarks.omni_eval.stub import serving
from tests.harness import REPOSITORY


# Imports all of lm-eval in a process of its own.
@pytest.mark.full
def test_the_command_of_the_docs_reads_a_local_copy(tmp_path: Path) -> None:
    found = re.search(
        r"HF_HUB_OFFLINE=1 (lm_eval run [^`]+)", (REPOSITORY / "docs" / "guide" / "evaluate.md").read_text()
    )
    assert found is not None
    write_mmmu(tmp_path / "MMMU" / "MMMU")
    with serving() as (url, asked):
        # The miniature has two of the 30 subjects.
        line = found[1].replace("http://127.0.0.1:8000/v1", url).replace("mmmu_val", "mmmu_val_art,mmmu_val_math")
        program, *arguments = shlex.split(line.replace("\\\n", ""))
        done = subprocess.run(
            [str(Path(sys.executable).with_name(program)), *arguments],
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    kinds = [[part["type"] for part in body["messages"][-1]["content"]] for body in asked]
    assert sorted(map(len, kinds)) == [2, 2, 3], "the images of every question are sent"
    assert all(parts[-1] == "text" for parts in kinds)
    assert "Art" in done.stdout, "the table of results"
