"""The model's directory: its files, the sizes that follow from them, and whether its processor takes all media."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphoquant_vllm.errors import MorphoQuantError

if TYPE_CHECKING:
    from calibration.blocks.memory_need import MemoryNeed

# One of each line must be there.
FILES = (
    ("config.json",),
    ("tokenizer.json", "vocab.json"),
    ("tokenizer_config.json",),
    ("preprocessor_config.json", "processor_config.json"),
    ("chat_template.json", "chat_template.jinja", "tokenizer_config.json"),
)
INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
# A prompt of more tokens would be cut. The one of `check_processor` has a picture, a sound and a question.
MAX_TOKENS = 16384


@dataclass(frozen=True)
class Sizes:
    """Bytes of the model's weights and of the checkpoint to come; calibration's need of memory."""

    sixteen_bit: int
    checkpoint: int
    memory: MemoryNeed
    # Elements of the quantized linears.
    quantized: int


def missing_files(directory: Path, *, weights: bool) -> list[str]:
    """One line for each file that is not there, or not whole; `weights`: whether those are wanted, too."""
    if not directory.is_dir():
        return [f"{directory}: no such model directory; download the model and give its directory"]
    lines = [
        f"{directory / names[0]}: missing; download the model again"
        for names in FILES
        if not any((directory / name).is_file() for name in names)
    ]
    if weights:
        files = weight_files(directory)
        lines += [] if files else [f"{directory / SINGLE_FILE}: missing, as is {INDEX_FILE}; download the weights"]
        lines += [f"{path}: {state}; download it again" for path in files if (state := _state(path))]
    return lines


def weight_files(directory: Path) -> list[Path]:
    """The weight files that the index names, there or not; without an index the single one, if it is there."""
    index = directory / INDEX_FILE
    if index.is_file():
        try:
            return sorted({directory / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MorphoQuantError(f"{index}: no index of weights ({error}); download it again") from error
    return [directory / SINGLE_FILE] if (directory / SINGLE_FILE).is_file() else []


def _state(path: Path) -> str:
    """Why a weight file cannot be used; empty if it is whole."""
    if not path.is_file():
        return "missing"
    size, header = path.stat().st_size, read_header(path)
    if header is None:
        return "not safetensors"
    end = max((entry["data_offsets"][1] for entry in header[0].values()), default=0)
    return f"{header[1] + end - size} bytes short" if size < header[1] + end else ""


def read_header(path: Path) -> tuple[dict[str, Any], int] | None:
    """Tensors by name as a safetensors header describes them, and the offset of their data; None without a header.

    The data need not exist.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            # safetensors' own limit.
            if length > 100_000_000:
                return None
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for entry in header.values():
            # What is read of it later; another form raises one of the errors below.
            str(entry["dtype"]), tuple(entry["shape"]), int(entry["data_offsets"][1])
    except (OSError, struct.error, ValueError, RecursionError, AttributeError, LookupError, TypeError):
        return None
    return header, 8 + length


def sizes(directory: Path) -> Sizes:
    """Sizes of the model and of its checkpoint, from the headers of the weights, or without them from the config.

    By the config alone, parts that are published in float32 count as 16-bit.
    Raises MorphoQuantError for an architecture that calibration does not know.
    """
    from calibration.blocks.memory_need import planned_need
    from calibration.model.architectures import find_architecture
    from calibration.model.plan import decoder_names, plan
    from calibration.model.source import Source
    from calibration.output.export import checkpoint_size
    from calibration.settings.recipe import Recipe
    from morphoquant_vllm.format.files import read_json

    config = read_json(directory / "config.json")
    architecture, recipe = find_architecture(config), Recipe()
    tensors = _tensors(directory, config)
    spec = plan(architecture, config, tensors, recipe)
    names = decoder_names(architecture, config, tensors)
    need = planned_need(architecture, tensors, names, spec, recipe)
    return Sizes(
        sixteen_bit=sum(info.nbytes for info in tensors.values()),
        checkpoint=checkpoint_size(Source(directory, config, dict(tensors)), spec),
        memory=need,
        quantized=sum(layer.in_features * layer.out_features for layer in spec.layers.values()),
    )


def _tensors(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """File, dtype and shape of every tensor, by the headers of the files, or by a model without weights."""
    from calibration.model.run_config import prepare_run
    from calibration.model.source import TensorInfo

    headers = {path: read_header(path) for path in weight_files(directory)}
    if headers and all(headers.values()):
        return {
            name: TensorInfo(path, entry["dtype"], tuple(entry["shape"]))
            for path, header in headers.items()
            if header is not None
            for name, entry in header[0].items()
        }
    import torch
    import transformers

    name = next(iter(config.get("architectures") or [""]))
    # The directory's own class with both halves, thinker and talker, has no Auto class.
    model_class = getattr(transformers, name.replace("Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration"), None)
    if model_class is None:
        raise MorphoQuantError(f"{directory / 'config.json'}: architectures names no class of transformers: {name!r}")
    try:
        with torch.device("meta"):
            model = model_class._from_config(prepare_run(transformers.AutoConfig.from_pretrained(directory)))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise MorphoQuantError(f"{directory / 'config.json'}: {name} cannot be made of it ({error})") from error
    return {
        key: TensorInfo(directory / SINGLE_FILE, "BF16", tuple(value.shape))
        for key, value in model.state_dict().items()
    }


def check_processor(directory: Path) -> int:
    """Tokens of a prompt with a picture, a sound and a text, by the model's processor and chat template.

    Raises MorphoQuantError if tokenizer, processor, chat template or token ids do not fit each other.
    """
    from calibration.data.conversations import Conversation, Media, Message, Text
    from calibration.data.model_inputs import model_inputs
    from calibration.data.processor import load_processor
    from calibration.model.architectures import find_architecture
    from morphoquant_vllm.format.files import read_json

    config = read_json(directory / "config.json")
    parts = (
        Media("image", _picture(), "a picture"),
        Media("audio", _silence(), "a sound"),
        Text("What can you see and hear?"),
    )
    conversation = Conversation(str(directory), (Message("user", parts),))
    ids = find_architecture(config).placeholder_token_ids(config)
    inputs, _ = model_inputs(load_processor(directory), conversation, ids, MAX_TOKENS)
    return int(inputs["input_ids"].shape[1])


def _picture() -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (224, 224), (90, 120, 150)).save(content, format="PNG")
    return content.getvalue()


def _silence() -> bytes:
    content = io.BytesIO()
    with wave.open(content, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16000)
        sound.writeframes(bytes(2 * 16000))
    return content.getvalue()


def identity(directory: Path) -> str:
    """SHA-256 of config.json and of the weight files' headers: whether a run goes on with the same model."""
    total = hashlib.sha256((directory / "config.json").read_bytes())
    for path in weight_files(directory):
        total.update(f"{path.name} {path.stat().st_size} {json.dumps(read_header(path))}".encode())
    return total.hexdigest()
