"""`make fuzz`: damages a checkpoint in many ways, each refused in one line or shown harmless.

    python -m tests.fuzz                        10,000 mutants of seed 0
    python -m tests.fuzz --seed 3 --count 500
    python -m tests.fuzz --seed 3 --only 17     one again, its traceback shown; --keep DIR keeps its files

Ends with exit status 1 if a mutant gave a traceback, a hang or a crash, or was accepted and is wrong.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.batches import findings
from tests.fuzz.examine import Finding, examine, show, tell
from tests.fuzz.intact import write_intact
from tests.fuzz.judge import Judge

COUNT = 10_000
TELL_EVERY = 1_000


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--start", type=int, default=0, help="the first mutant's number")
    parser.add_argument("--only", type=int, help="one mutant, in this process")
    parser.add_argument("--keep", type=Path, help="with --only: where the mutant's files are left")
    parser.add_argument("--failures", type=Path, default=Path("build/fuzz-failures.jsonl"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        intact = Path(folder) / "intact"
        write_intact(intact)
        if arguments.only is not None:
            place = arguments.keep or Path(folder) / "mutant"
            finding = examine(intact, place, Judge(intact), arguments.seed, arguments.only)
            print(show(finding))
            sys.exit(not finding.good)
        numbers = range(arguments.start, arguments.start + arguments.count)
        found = []
        started = time.monotonic()
        for finding in findings(intact, Path(folder) / "mutant", arguments.seed, numbers):
            found.append(finding)
            if not finding.good:
                tell(show(finding))
            if len(found) % TELL_EVERY == 0:
                tell(f"{len(found)} of {len(numbers)} after {time.monotonic() - started:.0f} s")
    bad = [finding for finding in found if not finding.good]
    print(summary(found))
    print(f"seed {arguments.seed}: {len(found)} mutants in {time.monotonic() - started:.0f} s, {len(bad)} faults")
    if bad:
        arguments.failures.parent.mkdir(parents=True, exist_ok=True)
        arguments.failures.write_text("".join(f"{json.dumps(finding.to_dict())}\n" for finding in bad))
        print(f"{arguments.failures}: what was done; replay with --seed {arguments.seed} --only {bad[0].number}")
    sys.exit(bool(bad))


def summary(found: list[Finding]) -> str:
    """A line for each file and kind of damage: the number of mutants, and their outcomes."""
    counts: dict[str, Counter[str]] = {}
    for finding in found:
        counts.setdefault(f"{finding.file}, {finding.kind}", Counter())[finding.outcome] += 1
    total = sum(counts.values(), Counter())
    width = max(map(len, counts))
    lines = [f"{name:{width}}  {_outcomes(counts[name])}" for name in sorted(counts)]
    return "\n".join([*lines, f"{'all':{width}}  {_outcomes(total)}"])


def _outcomes(counted: Counter[str]) -> str:
    return ", ".join(f"{outcome} {count}" for outcome, count in counted.most_common())


if __name__ == "__main__":
    main()
