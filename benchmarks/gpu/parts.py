"""The parts of the evidence: the command of each, its time limit, and what it leaves behind. Pure."""

from __future__ import annotations

from dataclasses import dataclass

LINEAR_METHODS = ("bf16", "morphoquant", "morphoquant-two-level", "marlin-w4a16", "cutlass-w8a8", "humming-w4a8")
ENGINE_METHODS = ("bf16", "morphoquant-g32-two-level")
ALL_ENGINE_METHODS = (*ENGINE_METHODS, "morphoquant-g32", "gptq", "w8a8", "fp8", "nvfp4")
MODEL = "Qwen2.5-7B"


@dataclass(frozen=True)
class Part:
    """One process. In `command`, {work} is a folder of the part's own and {python} the interpreter."""

    name: str
    about: str
    command: tuple[str, ...]
    # Seconds after which it is stopped.
    limit: int
    # Whether `make gpu` runs it; `make gpu-full` runs all.
    quick: bool
    # Whether it needs vLLM's CUDA build.
    vllm: bool
    # Its result below {work}: JSON of a benchmark, or pytest's JUnit file.
    result: str


def _tests(name: str, about: str, folder: str, limit: int, vllm: bool, quick: bool = True) -> Part:
    marked = "gpu and not full" if quick else "gpu"
    command = ("{python}", "-m", "pytest", "-q", "-m", marked, folder, "--junitxml={work}/tests.xml")
    return Part(name, about, command, limit, quick, vllm, "tests.xml")


def _linears(name: str, about: str, limit: int, quick: bool, *arguments: str) -> Part:
    command = ("{python}", "-m", "benchmarks.gpu_linear", "--results", "{work}", *arguments)
    return Part(name, about, command, limit, quick, False, "*-G*.json")


def _engines(name: str, about: str, limit: int, quick: bool, methods: tuple[str, ...], *arguments: str) -> Part:
    settings = ("--models", MODEL, "--no-throughput", "--results", "{work}", "--name", "serve")
    command = ("{python}", "-m", "benchmarks.serve", *settings, *arguments, "--methods", *methods)
    return Part(name, about, command, limit, quick, True, "serve.json")


def _calibration(name: str, layout: str, limit: int) -> Part:
    """A few blocks of a generated model, of which the whole is extrapolated; 24 GiB of the GPU at most."""
    size = ("--layout", layout, "--layers", "5", "--blocks", "4", "--samples", "128", "--tokens", "512", "--media", "0")
    where = ("--set", "device=cuda", "--set", "dtype=bfloat16", "--memory-budget", "24", "--work", "{work}/models")
    command = ("{python}", "-m", "benchmarks.calibrate", "measure", *size, *where, "--results", "{work}")
    about = f"calibrating the {layout} layout on the GPU, by four blocks"
    return Part(name, about, command, limit, False, False, "calibrate.json")


def _experts(name: str, about: str, limit: int, *arguments: str) -> Part:
    command = ("{python}", "-m", "benchmarks.gpu_experts", "--results", "{work}", *arguments)
    return Part(name, about, command, limit, False, True, "*-G*.json")


_FEW = ("--layers", "gate_up", "down", "--tokens", "1", "16", "256", "2048", "--methods", *LINEAR_METHODS)
PARTS = (
    _tests("kernels", "kernels beside the torch reference", "tests/morphoquant_vllm/gpu", 180, False),
    _linears("linears", "linears beside bf16 and three peers", 120, True, *_FEW),
    _tests("engine", "tiny engines: layers, graphs, rows, sleep, ranks", "tests/engine", 300, True),
    _engines("serve", "a 7B engine, bf16 and ours", 300, True, ENGINE_METHODS, "--rounds", "1", "--prompts", "4"),
    _linears("linears-g32", "all linears and peers at G = 32", 600, False),
    _linears("linears-g128", "all linears and peers at G = 128", 600, False, "--group-size", "128"),
    _experts("experts-g32", "routed experts beside vLLM's in bf16, Marlin and Humming, G = 32", 600),
    _experts("experts-g128", "the same at G = 128", 600, "--group-size", "128"),
    _tests("calibration", "calibration: bytes, resume, towers", "tests/calibration", 600, False, False),
    _tests(
        "speech", "a sentence spoken by vLLM-Omni, if it is installed", "tests/engine/test_speech.py", 1800, True, False
    ),
    _calibration("calibrate-7b", "7B", 1500),
    _calibration("calibrate-3b", "3B", 900),
    Part(
        "demo",
        "the demo: perplexity by this GPU, beside README's by a CPU",
        ("{python}", "-m", "benchmarks.demo", "--work", "{work}", "--result", "{work}/demo.json"),
        900,
        False,
        True,
        "demo.json",
    ),
    _engines("serve-peers", "a 7B engine beside all peers", 1800, False, ALL_ENGINE_METHODS, "--rounds", "2"),
)
NAMES = tuple(part.name for part in PARTS)


def chosen(names: list[str], full: bool) -> list[Part]:
    """The parts to run: those that are named, else the quick ones, or all."""
    if names:
        return [part for part in PARTS if part.name in names]
    return [part for part in PARTS if full or part.quick]
