"""Turns one conversation, or one window of a text, into keyword arguments of the model's forward."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import ProcessorMixin, Qwen2AudioProcessor

from calibration.data.conversations import BadConversationError, Conversation, Media, Message, PlainText, Text
from calibration.data.media import decode_audio, decode_image, decode_video
from calibration.data.placeholders import check_placeholders, check_text, frames_per_token, media_tokens
from calibration.data.processor import failure
from calibration.time_limit import time_limit

# Frames per second that are sampled if the video processor's config names no rate.
DEFAULT_VIDEO_FPS = 2.0
# Qwen2.5-Omni's processor scales frames to this many pixels at most, Qwen2.5-VL's to more.
MOST_PIXELS = 768 * 28 * 28
# Sides are rounded to whole patches, so a frame may have fewer tokens than its pixels make.
ROUNDING = 0.7
# What is asked of the part of a processor that takes a medium.
_ASKED = {
    "video": ("fps", "temporal_patch_size", "patch_size", "merge_size", "size", "sample_frames"),
    "audio": ("sampling_rate", "hop_length", "n_samples"),
}
# Seconds of the processor after which a chat template is considered to loop; others take some milliseconds.
TEMPLATE_SECONDS = 20
# Letters of a text that the tokenizer is given at once: about 0.6 GB of its memory.
PIECE = 2**22


@dataclass(frozen=True)
class Window:
    """Consecutive tokens cut from a plain text."""

    source: str
    token_ids: Sequence[int]


def cut_windows(text: PlainText, tokenizer: Any, max_tokens: int) -> list[Window]:
    """The whole text as windows of at most max_tokens tokens."""
    # 4 bytes each: a list of integers takes nine times as many.
    ids = array("I")
    for piece in text_pieces(text.text):
        ids.extend(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
    # If the tokenizer adds a BOS token, served prompts start with it, and so does every window.
    start = tokenizer("")["input_ids"][:1] if tokenizer.bos_token_id is not None else []
    start = array("I", start if start == [tokenizer.bos_token_id] else [])
    step = max_tokens - len(start)
    return [Window(text.source, start + ids[i : i + step]) for i in range(0, len(ids), step)]


def text_pieces(text: str, letters: int = PIECE) -> Iterator[str]:
    """The text in pieces of at most so many letters, cut after a line or a word if possible.

    A tokenizer takes about 150 bytes of memory for each letter that it is given at once.
    """
    start = 0
    while len(text) - start > letters:
        last = start + letters
        end = next((cut + 1 for mark in "\n " if (cut := text.rfind(mark, start, last)) >= 0), last)
        yield text[start:end]
        start = end
    yield text[start:]


def model_inputs(
    processor: Any,
    item: Conversation | Window,
    placeholder_token_ids: Mapping[str, Sequence[int]],
    max_tokens: int,
) -> tuple[dict[str, torch.Tensor], bool]:
    """Inputs of one sample, a batch of one without padding, and whether they were cut to max_tokens.

    Raises BadConversationError if the conversation or window cannot be used.
    """
    if isinstance(item, Window):
        inputs = _text_inputs(processor, item.token_ids)
        check_placeholders(item.source, inputs["input_ids"], {}, placeholder_token_ids)
        return inputs, False
    return _fit(item, _render(processor, item, placeholder_token_ids, max_tokens), max_tokens)


def _text_inputs(processor: Any, token_ids: Sequence[int]) -> dict[str, torch.Tensor]:
    input_ids = torch.tensor([list(token_ids)], dtype=torch.long)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    # Qwen2.5-VL builds its positions from these.
    if "mm_token_type_ids" in processor.model_input_names:
        inputs["mm_token_type_ids"] = torch.zeros_like(input_ids)
    return inputs


def _media(conversation: Conversation) -> list[Media]:
    return [part for message in conversation.messages for part in message.parts if isinstance(part, Media)]


def _render(
    processor: Any, conversation: Conversation, placeholder_token_ids: Mapping[str, Sequence[int]], max_tokens: int
) -> dict[str, torch.Tensor]:
    source, media = conversation.source, _media(conversation)
    _check_takes(source, processor, media, placeholder_token_ids)
    tokenizer = getattr(processor, "tokenizer", processor)
    check_text(conversation, tokenizer, placeholder_token_ids)
    with time_limit(
        TEMPLATE_SECONDS,
        f"{source}: the model's chat template does not end ({TEMPLATE_SECONDS} s were not enough); "
        "correct its chat_template.jinja",
    ):
        text = _apply_template(processor, conversation)
    if not isinstance(processor, ProcessorMixin):
        # A template writes the special tokens itself; without one, the tokenizer adds them.
        special = tokenizer.chat_template is None
        token_ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        if not token_ids:
            raise _no_tokens(source)
        return _text_inputs(processor, token_ids)
    inputs = _process(processor, source, text, media, max_tokens)
    if not inputs["input_ids"].numel():
        raise _no_tokens(source)
    check_placeholders(source, inputs["input_ids"], media_tokens(processor, inputs), placeholder_token_ids)
    return inputs


def _no_tokens(source: str) -> BadConversationError:
    return BadConversationError(f"{source}: the conversation has no tokens; give it text")


def _check_takes(
    source: str, processor: Any, media: list[Media], placeholder_token_ids: Mapping[str, Sequence[int]]
) -> None:
    parts = {"image": "image_processor", "video": "video_processor", "audio": "feature_extractor"}
    takes = [kind for kind, part in parts.items() if kind in placeholder_token_ids and hasattr(processor, part)]
    for item in media:
        if item.kind not in takes:
            raise BadConversationError(
                f"{source}: the model does not take {item.kind} parts, only {', '.join(['text', *takes])}; "
                "remove the line from the data"
            )
        lacking = [
            name for name in _ASKED.get(item.kind, ()) if not hasattr(getattr(processor, parts[item.kind]), name)
        ]
        if lacking:
            raise BadConversationError(
                f"{source}: the model's processor samples {item.kind} parts in its own way (it has no {lacking[0]}), "
                "which is not supported; remove the line from the data"
            )


def _apply_template(processor: Any, conversation: Conversation) -> str:
    multimodal = isinstance(processor, ProcessorMixin)
    tokenizer = processor.tokenizer if multimodal else processor
    # The order of vLLM: the processor's template, then the tokenizer's.
    template = (processor.chat_template if multimodal else None) or tokenizer.chat_template
    if not template:
        return _join_texts(conversation)
    messages = [
        {"role": _known_role(message.role, str(template)), "content": _content(message, multimodal), **message.fields}
        for message in conversation.messages
    ]
    arguments = {"add_generation_prompt": conversation.messages[-1].role != "assistant", **conversation.template}
    named = {"chat_template": template} if isinstance(template, str) else {}
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **named, **arguments)
        # Half a surrogate pair, for example in a call's arguments, is no text.
        text.encode()
    # The template is a program of the model's publisher and may raise any error.
    except Exception as error:
        raise BadConversationError(
            f"{conversation.source}: the model's chat template refuses the conversation ({failure(error)}); "
            "change its roles or parts"
        ) from error
    return text


def _join_texts(conversation: Conversation) -> str:
    """The texts of a conversation for a model without a chat template; BadConversationError if one is needed."""
    needs = ["media"] * bool(_media(conversation)) + [*conversation.template]
    needs += [key for message in conversation.messages for key in message.fields if key != "name"]
    if needs:
        raise BadConversationError(
            f"{conversation.source}: the model has no chat template, which {needs[0]} need; "
            "add its chat_template.jinja to the model directory"
        )
    return "\n".join(_content(m, multimodal=False) for m in conversation.messages)


def _known_role(role: str, template: str) -> str:
    """The role; system instead of developer if the template does not name that role, as in vLLM."""
    known = role != "developer" or "'developer'" in template or '"developer"' in template
    return role if known else "system"


def _content(message: Message, multimodal: bool) -> Any:
    """A message's content in the form that templates take and vLLM uses: a string, or typed parts if multimodal."""
    text_only = all(isinstance(part, Text) for part in message.parts)
    joined = text_only and (len(message.parts) <= 1 or message.role == "tool")
    if multimodal and not joined:
        return [
            {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": part.kind}
            for part in message.parts
        ]
    return "\n".join(part.text for part in message.parts if isinstance(part, Text))


def _process(processor: Any, source: str, text: str, media: list[Media], max_tokens: int) -> dict[str, torch.Tensor]:
    options: dict[str, Any] = {"text_kwargs": {"add_special_tokens": False}}
    kinds = {item.kind for item in media}
    # Processors refuse arguments for media that they do not take.
    if "image" in kinds:
        options["images"] = [decode_image(item) for item in media if item.kind == "image"]
    if "audio" in kinds:
        options["audio"], options["audio_kwargs"] = _decode_audio(processor, media, max_tokens)
    if "video" in kinds:
        options["videos"], options["videos_kwargs"] = _decode_videos(processor.video_processor, media, max_tokens)
    try:
        batch = processor(text=[text], return_tensors="pt", **options)
    # StopIteration and IndexError: the template wrote more placeholders than the conversation has media.
    except (ValueError, StopIteration, IndexError) as error:
        raise BadConversationError(
            f"{source}: the model's processor refuses the conversation "
            f"({failure(error) if str(error) else 'too few media'}); change its media"
        ) from error
    except Exception as error:
        raise BadConversationError(
            f"{source}: the model's processor fails ({failure(error)}); copy the processor's files into the model "
            "directory again"
        ) from error
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    if "feature_attention_mask" in inputs and not _one_window(processor):
        # Whisper's features are padded to a fixed length (300 s in Qwen2.5-Omni: 15 MB a clip), masked in forward.
        longest = int(inputs["feature_attention_mask"].sum(-1).max())
        for name in ("input_features", "feature_attention_mask"):
            inputs[name] = inputs[name][..., :longest].clone()
    return inputs


def _one_window(processor: Any) -> bool:
    """Whether the audio tower takes one window of fixed length, as Whisper's own: longer sounds lose their end."""
    return isinstance(processor, Qwen2AudioProcessor)


def _decode_audio(processor: Any, media: list[Media], max_tokens: int) -> tuple[list[Any], dict[str, Any]]:
    """Samples of each sound, and the feature extractor's keyword arguments for them."""
    extractor = processor.feature_extractor
    rate = extractor.sampling_rate
    limit = (max_tokens + 1) * frames_per_token(processor) * extractor.hop_length
    audio = [decode_audio(item, rate, limit) for item in media if item.kind == "audio"]
    if _one_window(processor):
        return audio, {"sampling_rate": rate, "truncation": True}
    # Without these, sounds longer than chunk_length lose their end. vLLM passes truncation off, too; several sounds
    # are padded to the longest.
    longest = max(extractor.n_samples, *(len(samples) for samples in audio))
    return audio, {"sampling_rate": rate, "truncation": False, "max_length": longest}


def _decode_videos(video_processor: Any, media: list[Media], max_tokens: int) -> tuple[list[Any], dict[str, Any]]:
    """Sampled frames of each video, and the processor's keyword arguments for them."""
    fps = video_processor.fps or DEFAULT_VIDEO_FPS

    def sample_frames(item: Media, metadata: Any) -> Sequence[int]:
        # transformers divides by zero if there are fewer frames than a temporal patch; the processor repeats the last.
        if metadata.total_num_frames < video_processor.temporal_patch_size:
            return range(metadata.total_num_frames)
        indices = video_processor.sample_frames(metadata, fps=fps).tolist()
        tokens = _least_tokens(video_processor, metadata, len(indices))
        if tokens > max_tokens:
            # Before the frames are in memory: an hour of video in a small file has thousands.
            raise BadConversationError(
                f"{item.name}: its {len(indices)} frames take {tokens} tokens or more, "
                f"more than max_tokens={max_tokens}; raise it, or use a shorter or smaller video"
            )
        return indices

    decoded = [decode_video(item, partial(sample_frames, item)) for item in media if item.kind == "video"]
    options = {
        "video_metadata": [metadata for _, metadata in decoded],
        "do_sample_frames": False,
        "input_data_format": "channels_last",
    }
    # The seconds between positions follow from this rate. Without one, a processor takes its own: Qwen2.5-Omni's is 2,
    # Qwen3-Omni's is 1. vLLM leaves it to the processor, too.
    if video_processor.fps:
        options["fps"] = video_processor.fps
    return [frames for frames, _ in decoded], options


def _least_tokens(video_processor: Any, metadata: Any, frames: int) -> int:
    """About the least number of tokens of a video's sampled frames, by its size and MOST_PIXELS."""
    side = video_processor.patch_size * video_processor.merge_size
    pixels = min(metadata.width * metadata.height, MOST_PIXELS, video_processor.size["longest_edge"])
    return int(ROUNDING * frames / video_processor.temporal_patch_size * pixels / side**2)


def _fit(
    conversation: Conversation, inputs: dict[str, torch.Tensor], max_tokens: int
) -> tuple[dict[str, torch.Tensor], bool]:
    """The inputs, cut to max_tokens if they are only text, and whether they were cut."""
    shape = inputs["input_ids"].shape
    if shape[1] <= max_tokens:
        return inputs, False
    if _media(conversation):
        raise BadConversationError(
            f"{conversation.source}: {shape[1]} tokens with media, more than max_tokens={max_tokens}; "
            "raise max_tokens or use shorter or smaller media"
        )
    return {name: value[:, :max_tokens] for name, value in inputs.items() if value.shape == shape}, True
