"""Missing files of a run, its size, and an estimate of its time, printed before it begins."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.questions.items import Media, fault
from benchmarks.paper import model
from benchmarks.paper.calibration import SAMPLES, TRAINING_SPLITS, is_calibrated
from benchmarks.paper.questions import BENCHMARKS, IMAGE, Benchmark, asked
from morphoquant_vllm.errors import MorphoQuantError

# Files of one data set that are named; the rest is counted.
NAMED = 10
# Multiplications and additions a second that a served prompt gets. The CPU's: 285 tokens in 12.1 s of a 3B on 2 cores
# (benchmarks/results/calibrate/serve.json). The GPU's is a guess: no run of this project has measured one.
CPU_CORE_RATE, GPU_RATE = 0.07e12, 50e12
# Time of a 3B on 2 cores, extrapolated from two blocks (benchmarks/results/calibrate/calibrate.json), and its quantized
# elements: 64 samples of 512 tokens, 16,384 drawn tokens, effort fast. There are twice as many samples here, of about
# three times as many tokens, and the default effort. By the operations of a 3B its blocks take 4.8 times as long;
# learning takes 2.0 times.
CALIBRATION_SECONDS, CALIBRATION_ELEMENTS, CALIBRATION_CORES, BLOCKS, LEARNING = 5906.5, 2.77e9, 2, 4.8, 2.0
# A guess: decoding a video on the host.
VIDEO_SECONDS = 2.0
# Memory of an engine beside its weights: activations and the key-value cache.
ENGINE_BYTES = 6 << 30


@dataclass
class Plan:
    """Lines for the user: missing files, which stop the run, and estimates of it."""

    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    questions: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """All of it."""
        return [*self.notes, *(f"missing: {line}" for line in self.missing)]


def make_plan(options: Any, rates: Mapping[str, float]) -> Plan:
    """Look at model, data and machine; nothing is written. `rates`: seconds of an answer that were measured already."""
    found = Plan()
    check_model(found, options)
    for name in options.benchmarks:
        check_data(found, BENCHMARKS[name], options)
    check_tools(found)
    if (options.model / "config.json").is_file():
        try:
            sizes = model.sizes(options.model)
        except MorphoQuantError as error:
            found.missing.append(str(error))
        else:
            check_machine(found, sizes, options)
            found.notes += estimates(found.questions, sizes, options, gpu_bytes() is not None, rates)
    return found


def check_model(found: Plan, options: Any) -> None:
    """Files of the model, and, if they are there, whether the processor takes all media."""
    found.missing += model.missing_files(options.model, weights=not options.dry_run)
    lacking = model.missing_files(options.model, weights=True) if options.dry_run else []
    found.notes += [f"weights, needed for the run: {line}" for line in lacking if line not in found.missing]
    if found.missing:
        return
    try:
        tokens = model.check_processor(options.model)
    except MorphoQuantError as error:
        found.missing.append(str(error))
    else:
        found.notes.append(f"{options.model}: its processor makes {tokens} tokens of a picture, a sound and a question")


def check_data(found: Plan, benchmark: Benchmark, options: Any) -> None:
    """Files of a benchmark: a line for each that is missing, and the number of questions."""
    directory = benchmark.directory(options.data)
    if not directory.is_dir():
        command = f"hf download --repo-type dataset {benchmark.repository} --local-dir {directory}"
        found.missing.append(f"{directory}: no such folder; {command}")
        return
    absent: dict[str, str] = {}
    count = 0
    try:
        for item in asked(benchmark, options.data, options):
            count += 1
            absent |= _faults(item.parts)
        if options.calibration_data is None and benchmark.name in TRAINING_SPLITS:
            next(iter(benchmark.reader.load(directory, TRAINING_SPLITS[benchmark.name])))
    except MorphoQuantError as error:
        found.missing.append(str(error))
        return
    except StopIteration:
        found.missing.append(f"{directory}: its {TRAINING_SPLITS[benchmark.name]} split is empty; download it again")
        return
    if absent and not options.skip_missing:
        named = list(absent.items())[:NAMED]
        found.missing += [f"{name}: {wrong}; download {benchmark.repository} again" for name, wrong in named]
        if len(absent) > NAMED:
            found.missing.append(f"{directory}: and {len(absent) - NAMED} more files (--skip-missing leaves them out)")
    found.questions[benchmark.name] = count if options.limit is None else min(count, options.limit)
    published = 2017 if benchmark.name == "scienceqa" and options.scienceqa == IMAGE else benchmark.questions
    other = f" (published: {published})" if published != count else ""
    found.notes.append(f"{directory}: {count} questions{other}, {gigabytes(_tree_bytes(directory))}")


def _faults(parts: Iterable[str | Media]) -> dict[str, str]:
    media = [part for part in parts if isinstance(part, Media)]
    return {str(part.source): wrong for part in media if (wrong := fault(part))}


def _tree_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def check_tools(found: Plan) -> None:
    """The command `vllm`, beside this Python."""
    if not Path(sys.executable).with_name("vllm").is_file():
        found.missing.append("the command vllm: not beside this Python; run `make setup`")


def gpu_bytes() -> int | None:
    """Memory of the first GPU; None without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def check_machine(found: Plan, sizes: model.Sizes, options: Any) -> None:
    """Compare disk, memory and GPU with the need of the run."""
    place = next(path for path in (options.output.resolve(), *options.output.resolve().parents) if path.exists())
    free, available, on_gpu = shutil.disk_usage(place).free, psutil.virtual_memory().available, gpu_bytes()
    # Quantized blocks and states lie in the work directory until the checkpoint is there.
    disk = 0 if is_calibrated(options.output) else 2 * sizes.checkpoint
    served = sizes.checkpoint if options.without_16_bit else sizes.sixteen_bit
    found.notes.append(
        f"size: {gigabytes(sizes.sixteen_bit)} in 16 bit, {gigabytes(sizes.checkpoint)} as checkpoint; "
        f"{gigabytes(disk)} of disk needed, {gigabytes(free)} free"
    )
    if free < disk:
        found.missing.append(f"{place}: {gigabytes(disk - free)} of disk; make room, or choose another --output")
    if available < sizes.memory.least and not is_calibrated(options.output):
        found.missing.append(
            f"memory: calibration needs {gigabytes(sizes.memory.least)}, {gigabytes(available)} are available; "
            f"close other programs, or calibrate with {sizes.memory.remedy} (--calibrate-arguments)"
        )
    if on_gpu is None:
        found.notes.append("GPU: none; vLLM serves on the CPU, where the whole table takes days to weeks")
        # vLLM repacks 16-bit weights on a CPU.
        served, where, have = 2 * served, "memory", available
    else:
        where, have = "GPU memory", on_gpu
    # A tiny model's engine takes less.
    needed = served + min(ENGINE_BYTES, 4 * served)
    if have < needed:
        remedy = "use a larger machine" if options.without_16_bit else "pass --without-16-bit, or use a larger machine"
        found.missing.append(f"{where}: serving needs about {gigabytes(needed)}, {gigabytes(have)} are there; {remedy}")


def estimates(
    questions: Mapping[str, int], sizes: model.Sizes, options: Any, on_gpu: bool, rates: Mapping[str, float]
) -> list[str]:
    """Lines with the estimated time of a run; each states that it is an estimate, and its basis."""
    cores = os.cpu_count() or 1
    core_seconds = (BLOCKS + LEARNING) * CALIBRATION_SECONDS * CALIBRATION_CORES
    calibration = core_seconds * sizes.quantized / CALIBRATION_ELEMENTS / cores
    source = "of this CPU; it has not been timed on a GPU" if on_gpu else "from a measured 3B layout"
    done = is_calibrated(options.output)
    lines = ["time: calibration is done" if done else f"time: calibration {about(calibration)} (estimate {source})"]
    rate = GPU_RATE if on_gpu else CPU_CORE_RATE * cores
    total = 0.0
    for name, count in questions.items():
        benchmark = BENCHMARKS[name]
        guess = 2 * sizes.quantized * benchmark.tokens / rate + (VIDEO_SECONDS if name == "video-mme" else 0)
        seconds = count * rates.get(name, guess)
        basis = "measured on answers so far" if name in rates else f"estimate, {benchmark.tokens} tokens a question"
        lines.append(f"time: {name}, {count} questions, {about(seconds)} for each row ({basis})")
        total += seconds
    rows = 2 - options.without_16_bit + len(options.server)
    if len(questions) > 1:
        lines.append(f"time: {rows} rows, {about(rows * total)} of asking together (estimate)")
    return lines


def describe_calibration(options: Any) -> str:
    """The sources of the calibration samples, in a line."""
    if options.calibration_data is not None:
        return f"calibration data: {', '.join(map(str, options.calibration_data))}; no question is held out"
    from_splits = [f"{name} {TRAINING_SPLITS[name]}" for name in options.benchmarks if name in TRAINING_SPLITS]
    held = [name for name in options.benchmarks if name not in TRAINING_SPLITS]
    line = f"calibration data: up to {SAMPLES} samples"
    if from_splits:
        line += f", of {' and '.join(from_splits)}"
    if not held:
        return line
    if options.hold_out:
        return f"{line}, and media of {' and '.join(held)}, whose questions are left out of every row"
    return f"{line}; no sound and no video, whose tokens are then served with the row of all"


def about(seconds: float) -> str:
    """An estimated time for people."""
    return f"about {duration(seconds)}" if seconds >= 1 else "less than a second"


def gigabytes(count: float) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 5e6 else f"{count / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    """A time for people."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
