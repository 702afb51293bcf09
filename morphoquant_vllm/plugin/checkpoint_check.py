"""Checks a checkpoint's files before vLLM loads a weight. vLLM would serve missing tensors as uninitialised memory."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from glob import has_magic
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from tqdm import tqdm
from vllm import envs
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.weight_utils import (
    download_weights_from_hf,
    maybe_download_from_modelscope,
)

from morphoquant_vllm.environment import checksums_wanted
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import CONFIG_FILE, INDEX_FILE
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.format.verify import remarks, verify_checkpoint
from morphoquant_vllm.plugin.log import plugin_logger

logger = plugin_logger(__name__)
# Seconds after which a progress bar appears.
_PROGRESS_AFTER = 2.0


def refuse_pattern(directory: Path) -> None:
    """Refuse a path that vLLM takes for a pattern of names: for `out[1]` it would read the files of `out1`."""
    if has_magic(str(directory)):
        raise MorphoQuantError(
            f"{directory}: vLLM takes *, ? and [ in a path for a pattern, and would read other files; rename the "
            "folder, or serve it by a link of another name"
        )


def check_directory(directory: Path, *, complete: bool = True) -> QuantizationSpec:
    """Refuse an incomplete or damaged checkpoint; return its spec. A line in the log names the check and its time.

    Without `complete` the tokenizer's files may be missing: a hub's cache gets them when they are asked for.
    """
    refuse_pattern(directory)
    started = time.monotonic()
    checksums = checksums_wanted()
    total = sum(path.stat().st_size for path in directory.glob("*.safetensors") if path.is_file())
    shown = {"unit": "B", "unit_scale": True, "desc": "Checking the checkpoint", "delay": _PROGRESS_AFTER}
    with tqdm(total=total, disable=not checksums, **shown) as bar:
        spec = verify_checkpoint(directory, checksums=checksums, complete=complete, on_bytes=bar.update)
    seconds = time.monotonic() - started
    for line in remarks(directory, spec, complete=complete):
        logger.warning("MorphoQuant: %s: %s", directory, line)
    if spec.integrity is None:
        return spec
    if checksums:
        logger.info("MorphoQuant: %s: %.2f GB checked in %.1f s, all in order", directory, total / 1e9, seconds)
    else:
        logger.info("MorphoQuant: %s: checked without SHA-256 (MORPHOQUANT_CHECKSUMS=0)", directory)
    return spec


def refuse_other_settings(directory: Path, checked: QuantizationSpec, served: QuantizationSpec) -> None:
    """Refuse to serve other settings than those of the directory that was checked."""
    one, other = (replace(spec, created_by="", integrity=None) for spec in (checked, served))
    if one != other:
        raise MorphoQuantError(
            f"{directory / CONFIG_FILE}: its quantization_config is not the one that vLLM serves; serve without "
            "--hf-config-path, and without quantization_config in --hf-overrides"
        )


def cached_snapshot(model: str, revision: str | None, spec: QuantizationSpec) -> Path | None:
    """The folder of a hub model if the local cache holds all its files; None if not, or if `spec` lists none."""
    if envs.VLLM_USE_MODELSCOPE:
        # vLLM will read another cache.
        return None
    config = try_to_load_from_cache(model, CONFIG_FILE, revision=revision)
    if not isinstance(config, str) or spec.integrity is None:
        return None
    folder = Path(config).parent
    return folder if all((folder / name).exists() for name in (INDEX_FILE, *spec.integrity.files)) else None


def download(model: str, config: VllmConfig) -> Path:
    """Download a hub model's weight files and index to the place where vLLM's loader looks; their folder."""
    revision, cache = config.model_config.revision, config.load_config.download_dir
    local = maybe_download_from_modelscope(model, revision)
    if local is not None:
        return Path(local)
    folder = Path(download_weights_from_hf(model, cache, ["*.safetensors"], revision))
    for name in (INDEX_FILE, CONFIG_FILE):
        # They then lie beside the weights, whatever folder vLLM read them from. The check names a missing file.
        with suppress(EntryNotFoundError):
            hf_hub_download(model, name, revision=revision, cache_dir=cache)
    return folder
