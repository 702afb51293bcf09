"""A dry run, and what it says of files, sizes and times; and runs that are refused before they begin."""

import shutil
from pathlib import Path

import pytest

from benchmarks.paper import calibration, plan
from benchmarks.paper.__main__ import held, keep_settings, main
from benchmarks.paper.model import Sizes
from calibration.blocks.memory_need import MemoryNeed
from calibration.blocks.sensitivity import BUDGET_TOKENS
from calibration.blocks.time_need import metric_operations, operations, sharing_operations
from calibration.learn.metrics import METRIC_TOKENS
from calibration.learn.need import learning_operations
from calibration.model.architectures import find_architecture
from calibration.model.head_tensor import head_tensor
from calibration.model.plan import decoder_names
from calibration.model.plan import plan as architecture_plan
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from tests import tiny_models
from tests.benchmarks.paper.published import options, write_published
from tests.published_layouts import layout


def need(block: int) -> MemoryNeed:
    return MemoryNeed(front=0, front_streamed=0, block=block)


QWEN_3B = Sizes(
    sixteen_bit=11_000_000_000, checkpoint=8_000_000_000, memory=need(5_000_000_000), quantized=2_774_532_096
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("paper")
    tiny_models.build_tiny_omni(directory / "model")
    write_published(directory / "data")
    return directory


@pytest.fixture
def place(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "place"))


def dry_run(place: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[list[str], str]:
    """Lines of a dry run, and the error that ended it, if one did."""
    error = ""
    try:
        main(["--model", str(place / "model"), "--data", str(place / "data"), "--dry-run", *more])
    except SystemExit as stop:
        error = str(stop.code)
    return capsys.readouterr().out.splitlines(), error


def test_a_dry_run_finds_everything_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(place.rglob("*"))
    lines, error = dry_run(place, capsys, "--output", str(place / "out"))
    assert error == "" and lines[-1] == "dry run: nothing is missing; nothing was begun"
    text = "\n".join(lines)
    for part in (
        "its processor makes",
        "ScienceQA: 4 questions (published: 4241)",
        "AIR-Bench-Dataset: 3 questions (published: 24683),",
        "in 16 bit, 1.67 MB as checkpoint;",
        "time: calibration about",
        "(estimate",
        "of scienceqa train and mmmu dev, and media of video-mme and air-bench, whose questions are left out",
    ):
        assert part in text, part
    assert sorted(place.rglob("*")) == before


def test_a_dry_run_needs_no_weights_but_says_that_a_run_does(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "model" / "model.safetensors").unlink()
    lines, error = dry_run(place, capsys)
    assert error == "" and any(line.startswith("weights, needed for the run: ") for line in lines)
    arguments = ["--model", str(place / "model"), "--data", str(place / "data"), "--output", str(place / "out")]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == "error: 1 missing, each listed above; nothing was begun"
    assert "missing: " + str(place / "model" / "model.safetensors") in capsys.readouterr().out
    assert not (place / "out").exists()


def test_each_missing_file_has_its_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = place / "data"
    (place / "model" / "tokenizer.json").unlink()
    shutil.rmtree(data / "ScienceQA")
    (data / "MMMU" / "Art" / "dev-00000-of-00001.parquet").unlink()
    (data / "MMMU" / "Math" / "dev-00000-of-00001.parquet").unlink()
    (data / "Video-MME" / "data" / "dEf_2.mp4").unlink()
    sounds = data / "AIR-Bench-Dataset" / "Foundation"
    for name in ("Music_Genre_fma/0.wav", "Emotion_meld/2.wav"):
        (sounds / name).unlink()
    lines, error = dry_run(place, capsys)
    missing = [line.removeprefix("missing: ") for line in lines if line.startswith("missing: ")]
    assert missing == [
        f"{place / 'model' / 'tokenizer.json'}: missing; download the model again",
        f"{data / 'ScienceQA'}: no such folder; hf download --repo-type dataset derek-thomas/ScienceQA "
        f"--local-dir {data / 'ScienceQA'}",
        f"{data / 'MMMU'}: not the layout of MMMU: expected <Subject>/dev-*.parquet; found Art, Math, README.md",
        f"{data / 'Video-MME' / 'data' / 'dEf_2.mp4'}: no such file; download lmms-lab/Video-MME again",
        *(
            f"{sounds / name}: no such file; download qyang1021/AIR-Bench-Dataset again"
            for name in ("Music_Genre_fma/0.wav", "Emotion_meld/2.wav")
        ),
    ]
    assert error == "error: 6 missing, each listed above; nothing was begun"
    lines, _ = dry_run(place, capsys, "--skip-missing", "--benchmarks", "video-mme", "air-bench")
    assert sum(line.startswith("missing: ") for line in lines) == 1


def test_many_missing_files_are_counted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "NAMED", 1)
    for name in ("aBc-1", "dEf_2"):
        (place / "data" / "Video-MME" / "data" / f"{name}.mp4").unlink()
    found = plan.Plan()
    plan.check_data(found, plan.BENCHMARKS["video-mme"], options(place))
    assert len(found.missing) == 2 and "and 1 more files (--skip-missing leaves them out)" in found.missing[1]


def test_too_little_disk_memory_and_gpu_memory_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "gpu_bytes", lambda: 12_000_000_000)
    found = plan.Plan()
    huge = Sizes(10**18, 10**18, need(10**18), 1)
    plan.check_machine(found, huge, options(tmp_path))
    assert [line.split(":")[0] for line in found.missing] == [str(tmp_path), "memory", "GPU memory"]
    assert found.missing[1].endswith("or calibrate with a smaller --sample-tokens (--calibrate-arguments)")
    found = plan.Plan()
    plan.check_machine(found, Sizes(11_000_000_000, 10, need(10), 1), options(tmp_path))
    (line,) = found.missing
    assert line.startswith("GPU memory: serving needs about 17.44 GB, 12.00 GB are there; pass --without-16-bit")
    found = plan.Plan()
    plan.check_machine(found, Sizes(11_000_000_000, 10, need(10), 1), options(tmp_path, "--without-16-bit"))
    assert found.missing == []


def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "gpu_bytes", lambda: None)
    found = plan.Plan()
    plan.check_machine(found, Sizes(10, 10, need(10), 1), options(tmp_path))
    assert found.missing == [] and any(line.startswith("GPU: none; vLLM serves on the CPU") for line in found.notes)


def test_estimates_are_marked_and_give_way_to_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    questions = {"scienceqa": 4241, "video-mme": 2700}
    lines = plan.estimates(questions, QWEN_3B, options(tmp_path), False, {"video-mme": 2.0})
    # 4.8 times the 3B layout's 5906.5 s, and twice for learning.
    assert lines[0] == "time: calibration about 11.2 h (estimate from a measured 3B layout)"
    # 2 x 2.77e9 x 500 operations at 0.14e12 a second.
    assert lines[1] == "time: scienceqa, 4241 questions, about 23.3 h for each row (estimate, 500 tokens a question)"
    assert lines[2] == "time: video-mme, 2700 questions, about 90.0 min for each row (measured on answers so far)"
    assert lines[3].startswith("time: 2 rows, about 2.1 days")
    assert "not been timed on a GPU" in plan.estimates(questions, QWEN_3B, options(tmp_path), True, {})[0]


def test_the_factors_of_the_time_are_those_of_the_operations() -> None:
    """Of today's recipe on a 3B, over those of the calibration that was measured."""
    config, tensors = layout("3B")
    architecture, recipe = find_architecture(config), Recipe()
    names = decoder_names(architecture, config, tensors)
    spec = architecture_plan(architecture, config, tensors, recipe)
    named = {name: layer for name, layer in spec.layers.items() if name.startswith(f"{names.prefix}.")}
    layers = list(named.values())
    head = head_tensor(architecture, names, tensors).elements
    measured, tokens = operations(layers, 64 * 512, 16384), calibration.SAMPLES * 3 * 512
    blocks = operations(layers, tokens, recipe.sample_tokens)
    blocks += sharing_operations(layers, min(BUDGET_TOKENS, recipe.sample_tokens))
    blocks += metric_operations(named, min(METRIC_TOKENS, recipe.sample_tokens))
    assert blocks / measured == pytest.approx(plan.BLOCKS, abs=0.05)
    assert learning_operations(layers, head, tokens, recipe.effort) / measured == pytest.approx(plan.LEARNING, abs=0.05)


def test_a_finished_calibration_needs_no_time_disk_or_memory(tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint" / "config.json").write_text("{}")
    lines = plan.estimates({"mmmu": 3}, QWEN_3B, options(tmp_path), False, {})
    assert lines[0] == "time: calibration is done"
    found = plan.Plan()
    plan.check_machine(found, Sizes(10, 10**18, need(10**18), 1), options(tmp_path))
    assert found.missing == []


def test_calibration_without_sound_and_video_is_said(tmp_path: Path) -> None:
    line = plan.describe_calibration(options(tmp_path, "--no-hold-out"))
    assert line.endswith(
        "of scienceqa train and mmmu dev; no sound and no video, whose tokens are then served with the row of all"
    )
    line = plan.describe_calibration(options(tmp_path, "--calibration-data", "a.jsonl"))
    assert line == "calibration data: a.jsonl; no question is held out"


def test_an_output_belongs_to_one_run(place: Path) -> None:
    first = options(place)
    with held(first.output):
        keep_settings(first)
        keep_settings(options(place, "--benchmarks", "mmmu"))
        with pytest.raises(
            MorphoQuantError, match="holds a run with another limit, scienceqa; choose another --output"
        ):
            keep_settings(options(place, "--limit", "2", "--scienceqa", "image"))
        with pytest.raises(MorphoQuantError, match="another run is at work there"), held(first.output):
            pass
