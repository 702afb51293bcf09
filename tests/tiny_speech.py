"""A tiny Qwen2.5-Omni that vLLM-Omni can let speak: it has the vocabularies of the published one.

vLLM-Omni has ids of these vocabularies in its code, those of two voices among them.
"""

from __future__ import annotations

from pathlib import Path

from transformers import Qwen2_5OmniForConditionalGeneration

from benchmarks.models.tiny_omni.config import omni_config, write_speakers
from benchmarks.models.tiny_omni.processor import write_processor
from tests.tiny_models import AUDIO, DECODER, VISION, write_model

WORDS, CODES = 152064, 8448
# Ids of the published talker.
TEXT_IDS = {"pad": 151859, "start": 151860, "end": 151861}
CODE_IDS = {"pad": 8292, "start": 8293, "end": 8294, "mask": 8296}


def build_speaking_omni(directory: Path, seed: int = 0) -> Path:
    """Write a full Qwen2.5-Omni with published vocabularies into `directory`; return it."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_processor(directory, "omni")
    config = omni_config(ids, {**DECODER, "vocab_size": WORDS}, VISION, AUDIO)
    talker = config.talker_config
    talker.vocab_size = CODES
    for kind, token in TEXT_IDS.items():
        setattr(talker, f"tts_text_{kind}_token_id", token)
    for kind, token in CODE_IDS.items():
        setattr(talker, f"tts_codec_{kind}_token_id", token)
    write_model(directory, Qwen2_5OmniForConditionalGeneration, config, seed, ids)
    write_speakers(directory, ids)
    return directory
