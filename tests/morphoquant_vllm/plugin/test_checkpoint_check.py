"""The log of a checkpoint's check, and the checked folder if a model is named by its hub id."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import CONFIG_FILE, INDEX_FILE, read_spec
from morphoquant_vllm.plugin import checkpoint_check
from morphoquant_vllm.plugin.config import MorphoQuantConfig
from tests.checkpoints import flip_bit, seal_again
from tests.hub_cache import REVISION, write_hub_cache

NAME = "some/model"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Messages of the check and the config, as `LEVEL: message`."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(f"{record.levelname}: {record.getMessage()}")  # type: ignore[method-assign]
    for name in ("checkpoint_check", "config"):
        logger = logging.getLogger(f"vllm.morphoquant_vllm.plugin.{name}")
        monkeypatch.setattr(logger, "level", logging.INFO)
        monkeypatch.setattr(logger, "handlers", [*logger.handlers, handler])
    logging.getLogger().manager._clear_cache()
    yield found
    logging.getLogger().manager._clear_cache()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, in the folder that huggingface_hub uses."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def damage(directory: Path) -> None:
    """Damage that only the SHA-256 shows: every value stays legal."""
    flip_bit(directory, "model.layers.0.mlp.down_proj.weight_codes")


@pytest.mark.parametrize("name", ["out[1]", "out*", "out?"])
def test_a_path_that_vllm_takes_for_a_pattern_is_refused(pristine: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(pristine, tmp_path / name)
    with pytest.raises(MorphoQuantError, match="for a pattern, and would read other files; rename the folder"):
        checkpoint_check.check_directory(tmp_path / name)


def make_version_2(directory: Path) -> None:
    config = json.loads((directory / CONFIG_FILE).read_text())
    config["quantization_config"].pop("integrity")
    config["quantization_config"]["format_version"] = 2
    (directory / CONFIG_FILE).write_text(json.dumps(config))


def config_of(checkpoint: Path) -> MorphoQuantConfig:
    return MorphoQuantConfig.from_config(json.loads((checkpoint / CONFIG_FILE).read_text())["quantization_config"])


def test_one_line_says_what_was_checked_and_how_long_it_took(checkpoint: Path, lines: list[str]) -> None:
    checkpoint_check.check_directory(checkpoint)
    (line,) = lines
    start, _, end = line.partition(f"{checkpoint}: ")
    assert start == "INFO: MorphoQuant: "
    size, rest = end.split(" GB checked in ")
    seconds, rest = rest.split(" s, ")
    assert float(size) >= 0 and float(seconds) >= 0 and rest == "all in order"


def test_without_checksums_the_line_says_so_and_damage_is_not_seen(
    checkpoint: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(checkpoint)
    with pytest.raises(MorphoQuantError, match="is damaged"):
        checkpoint_check.check_directory(checkpoint)
    assert not lines
    monkeypatch.setenv("MORPHOQUANT_CHECKSUMS", "0")
    checkpoint_check.check_directory(checkpoint)
    assert lines == [f"INFO: MorphoQuant: {checkpoint}: checked without SHA-256 (MORPHOQUANT_CHECKSUMS=0)"]


def test_version_2_is_read_and_one_warning_says_what_cannot_be_seen(checkpoint: Path, lines: list[str]) -> None:
    make_version_2(checkpoint)
    checkpoint_check.check_directory(checkpoint)
    (line,) = lines
    assert line.startswith(f"WARNING: MorphoQuant: {checkpoint}: format_version 2 lists neither tensors nor hashes")
    assert line.endswith("`morphoquant convert` makes version 3 of it")


def test_a_bar_counts_every_byte_of_the_weight_files(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_check, "_PROGRESS_AFTER", 0.0)
    shown, bars = io.StringIO(), []

    class Bar(checkpoint_check.tqdm):  # type: ignore[misc]
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings, file=shown, mininterval=0)
            bars.append(self)

    monkeypatch.setattr(checkpoint_check, "tqdm", Bar)
    checkpoint_check.check_directory(checkpoint)
    (bar,) = bars
    assert bar.n == bar.total == sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert "Checking the checkpoint: 100%" in shown.getvalue()


def test_a_quick_check_shows_no_bar(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint_check.check_directory(checkpoint)
    assert "Checking the checkpoint" not in "".join(capfd.readouterr())


def test_a_hub_model_gets_its_tokenizer_later_and_a_folder_has_it(
    checkpoint: Path, cache: Path, lines: list[str]
) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        (checkpoint / name).write_text("{}")
    seal_again(checkpoint)
    snapshot = write_hub_cache(cache, NAME, checkpoint)
    for folder in (checkpoint, snapshot):
        for name in ("tokenizer.json", "chat_template.jinja"):
            (folder / name).unlink()
    config_of(checkpoint).maybe_update_config(NAME)
    assert len(lines) == 1 and lines[0].endswith("all in order")
    with pytest.raises(MorphoQuantError, match=r"tokenizer.json: is missing or no file"):
        config_of(checkpoint).maybe_update_config(str(checkpoint))


def test_a_hub_model_in_the_cache_is_checked_before_any_worker(pristine: Path, cache: Path, lines: list[str]) -> None:
    snapshot = write_hub_cache(cache, NAME, pristine)
    config = config_of(pristine)
    config.maybe_update_config(NAME)
    assert f"{snapshot}: " in lines[0] and lines[0].endswith("all in order")
    # The same repository by the name of its revision, too.
    config.maybe_update_config(NAME, revision=REVISION)
    assert len(lines) == 2


def test_a_damaged_hub_model_is_refused_before_any_worker(pristine: Path, cache: Path) -> None:
    write_hub_cache(cache, NAME, pristine, damage)
    with pytest.raises(MorphoQuantError, match="is damaged"):
        config_of(pristine).maybe_update_config(NAME)


@pytest.mark.parametrize("missing", [INDEX_FILE, "model-00002-of-00002.safetensors"])
def test_a_hub_model_of_which_a_file_is_not_there_yet_is_left_to_the_workers(
    pristine: Path, cache: Path, lines: list[str], missing: str
) -> None:
    write_hub_cache(cache, NAME, pristine, lambda files: (files / missing).unlink())
    assert checkpoint_check.cached_snapshot(NAME, None, read_spec(pristine)) is None
    config_of(pristine).maybe_update_config(NAME)
    assert lines == [f"INFO: MorphoQuant: {NAME} is not on this disk yet; its files are checked by the workers"]


def test_a_hub_model_of_version_2_is_left_to_the_workers(checkpoint: Path, cache: Path) -> None:
    make_version_2(checkpoint)
    write_hub_cache(cache, NAME, checkpoint)
    assert checkpoint_check.cached_snapshot(NAME, None, read_spec(checkpoint)) is None


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A worker's configuration of the engine while it makes the layers of a model."""
    engine = SimpleNamespace(
        model_config=SimpleNamespace(revision=None),
        load_config=SimpleNamespace(download_dir=None, load_format="auto"),
    )
    monkeypatch.setattr("vllm.config.get_current_vllm_config_or_none", lambda: engine)
    return engine


def downloads(monkeypatch: pytest.MonkeyPatch, source: Path, target: Path) -> list[str]:
    """Let the hub hold `source`; the names of the requested models."""
    asked: list[str] = []

    def download(model: str, config: Any) -> Path:
        asked.append(model)
        return Path(shutil.copytree(source, target, dirs_exist_ok=True))

    monkeypatch.setattr(checkpoint_check, "download", download)
    return asked


def test_a_worker_checks_what_was_not_there_when_the_engine_was_configured(
    pristine: Path,
    cache: Path,
    tmp_path: Path,
    worker: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[str],
) -> None:
    asked = downloads(monkeypatch, pristine, tmp_path / "downloaded")
    config = config_of(pristine)
    config.maybe_update_config(NAME)
    for _ in range(2):
        config.get_quant_method(torch.nn.Embedding(2, 2), "")
    assert asked == [NAME], "once, before the first layer"
    assert f"{tmp_path / 'downloaded'}: " in lines[1] and lines[1].endswith("all in order")


def test_a_worker_refuses_a_damaged_download_before_it_makes_a_layer(
    checkpoint: Path, cache: Path, tmp_path: Path, worker: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(checkpoint)
    downloads(monkeypatch, checkpoint, tmp_path / "downloaded")
    config = config_of(checkpoint)
    config.maybe_update_config(NAME)
    with pytest.raises(MorphoQuantError, match="is damaged"):
        config.get_quant_method(torch.nn.Embedding(2, 2), "")


def test_a_worker_refuses_other_settings_than_those_of_a_download(
    pristine: Path, cache: Path, tmp_path: Path, worker: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads(monkeypatch, pristine, tmp_path / "downloaded")
    config = MorphoQuantConfig(replace(read_spec(pristine), placeholder_token_ids={"image": (7,)}, integrity=None))
    config.maybe_update_config(NAME)
    with pytest.raises(MorphoQuantError, match="its quantization_config is not the one that vLLM serves"):
        config.get_quant_method(torch.nn.Embedding(2, 2), "")


def test_a_checked_model_is_not_checked_again_by_the_worker(
    pristine: Path, cache: Path, tmp_path: Path, worker: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hub_cache(cache, NAME, pristine)
    asked = downloads(monkeypatch, pristine, tmp_path / "downloaded")
    config = config_of(pristine)
    config.maybe_update_config(NAME)
    config.get_quant_method(torch.nn.Embedding(2, 2), "")
    assert not asked


def test_a_copy_in_another_download_folder_is_checked_though_the_cache_holds_a_whole_one(
    pristine: Path,
    checkpoint: Path,
    cache: Path,
    tmp_path: Path,
    worker: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM reads the folder of --download-dir, of which it says nothing while the engine is configured."""
    write_hub_cache(cache, NAME, pristine)
    damage(checkpoint)
    downloads(monkeypatch, checkpoint, tmp_path / "downloaded")
    config = config_of(pristine)
    config.maybe_update_config(NAME)
    worker.load_config.download_dir = str(tmp_path)
    with pytest.raises(MorphoQuantError, match="is damaged"):
        config.get_quant_method(torch.nn.Embedding(2, 2), "")


def test_the_folder_of_a_download_is_that_which_vllm_reads(pristine: Path, tmp_path: Path) -> None:
    """Without a network: the folder of --download-dir holds the model already."""
    place = tmp_path / "place"
    engine: Any = SimpleNamespace(
        model_config=SimpleNamespace(revision=None), load_config=SimpleNamespace(download_dir=str(place))
    )
    snapshot = write_hub_cache(place, NAME, pristine)
    assert checkpoint_check.download(NAME, engine) == snapshot
    (snapshot / INDEX_FILE).unlink()
    with pytest.raises(MorphoQuantError, match=f"has no {INDEX_FILE}"):
        checkpoint_check.check_directory(checkpoint_check.download(NAME, engine))


def test_other_settings_than_those_of_the_checked_files_are_refused(pristine: Path) -> None:
    """vLLM may read config.json of another place (--hf-config-path), or parts of it from --hf-overrides."""
    config = MorphoQuantConfig(replace(read_spec(pristine), placeholder_token_ids={"image": (7,)}, integrity=None))
    with pytest.raises(MorphoQuantError, match="its quantization_config is not the one that vLLM serves"):
        config.maybe_update_config(str(pristine))
    # Who made it, and hashes, are no settings.
    other = MorphoQuantConfig(replace(read_spec(pristine), created_by="x", integrity=None))
    other.maybe_update_config(str(pristine))


def test_modelscopes_cache_is_not_taken_for_the_hubs(
    pristine: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hub_cache(cache, NAME, pristine)
    assert checkpoint_check.cached_snapshot(NAME, None, read_spec(pristine)) is not None
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    assert checkpoint_check.cached_snapshot(NAME, None, read_spec(pristine)) is None
