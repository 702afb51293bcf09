"""Loads the model's processor, which renders conversations as in serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoProcessor

from morphoquant_vllm.errors import MorphoQuantError


def load_processor(model_dir: Path | str, *, trust_remote_code: bool = False) -> Any:
    """The directory's multimodal processor, or its tokenizer if it has none; runs its code only if it is trusted.

    Raises MorphoQuantError naming the directory if neither can be loaded.
    """
    if not Path(model_dir).is_dir():
        raise MorphoQuantError(f"{model_dir}: no such model directory; give a downloaded Hugging Face model")
    try:
        processor = AutoProcessor.from_pretrained(model_dir, local_files_only=True, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise MorphoQuantError(
            f"{model_dir}: its processor needs a library that does not load ({failure(error)}); install it"
        ) from error
    except (KeyboardInterrupt, SystemExit):
        raise
    # Damaged files may raise any error; a panic of the tokenizer's Rust code is not an Exception.
    except BaseException as error:
        raise MorphoQuantError(
            f"{model_dir}: no usable tokenizer or processor ({failure(error)}); copy its files into the directory"
        ) from error
    tokenizer = getattr(processor, "tokenizer", processor)
    ordinary = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab())
    if not ordinary:
        # If tokenizer.json is missing, transformers builds a tokenizer with special tokens only.
        raise MorphoQuantError(f"{model_dir}: its tokenizer has no vocabulary; copy tokenizer.json into the directory")
    return processor


def failure(error: BaseException) -> str:
    """The message of an error in the model's files, in one line; with the error's type if the message is short."""
    text = " ".join(str(error).split())
    plain = isinstance(error, OSError | ValueError | jinja2.TemplateError) and text
    return text if plain else f"{type(error).__name__}: {text}"
