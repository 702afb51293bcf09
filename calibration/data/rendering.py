"""Makes calibration samples: conversations and texts, rendered by the model's processor and chat template."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibration.data.conversations import LISTED, BadConversationError, Conversation, PlainText, bad_conversations
from calibration.data.model_inputs import Window, cut_windows, model_inputs
from calibration.data.processor import load_processor
from calibration.processes import ONE, Processes
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.token_table import rows_of_ids

logger = logging.getLogger(__name__)

# Where the inputs of the sample at a place wait until they are used.
Keep = Callable[[int, dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Sample:
    """One sequence for the model.

    `inputs`: keyword arguments of the model's forward, a batch of one without padding; they may be on disk. `modality`:
    int32 [M], the row of each token. `source`: the file, or "file:line". `place`: index of the sample in the order of
    the data, over all processes.
    """

    inputs: Mapping[str, torch.Tensor]
    modality: torch.Tensor
    source: str
    place: int = 0


def in_memory(_: int, inputs: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Keep the inputs of a sample as they are."""
    return inputs


def without_values(_: int, inputs: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Keep no values of pixels and sounds, whose names and shapes say how much there is."""
    return {name: value.to("meta") if value.is_floating_point() else value for name, value in inputs.items()}


def build_samples(
    model_dir: Path | str,
    data: Sequence[Conversation | PlainText],
    *,
    max_tokens: int,
    max_samples: int | None,
    window_tokens: int | None = None,
    placeholder_token_ids: Mapping[str, Sequence[int]],
    rows: Sequence[str],
    skip_bad: bool = False,
    trust_remote_code: bool = False,
    keep: Keep = in_memory,
    processes: Processes = ONE,
) -> list[Sample]:
    """Render this process's share of the calibration data into model inputs, in the order of the data.

    Each conversation makes one sample. Each plain text is cut into windows of `window_tokens` tokens (None:
    `max_tokens`). If that gives more than `max_samples`, evenly spaced ones are taken. Text-only conversations are cut
    at `max_tokens`. Each of `size` processes renders every `size`-th sample, since adjacent samples are similar.

    `placeholder_token_ids` maps "image", "video" and "audio" to the ids of their placeholder tokens. The model does
    not take a modality that is missing there. `rows` names the rows in order, see rows_of_ids. With `skip_bad`,
    conversations that cannot be used are logged and left out. `trust_remote_code` lets a processor's own code run.
    `keep` puts each sample's inputs away as soon as they are rendered.

    Raises MorphoQuantError if the directory has no usable tokenizer. Other errors name the file and line of the first
    few unusable conversations. Their media are not taken, cannot be decoded, or do not match the placeholders. Or a
    chat template refuses, or media have more than `max_tokens` tokens.
    """
    window_tokens = window_tokens or max_tokens
    if min(max_tokens, window_tokens) < 2 or (max_samples is not None and max_samples < 1):
        raise MorphoQuantError(
            f"max_tokens={max_tokens}, window_tokens={window_tokens} and max_samples={max_samples} leave no data; "
            "use at least 2, 2 and 1"
        )
    processor = load_processor(model_dir, trust_remote_code=trust_remote_code)
    items = _choose_items(data, processor, window_tokens, max_samples, processes)
    own = list(enumerate(items))[processes.rank :: processes.size]
    samples, cut, bad = _render(processor, own, max_tokens, placeholder_token_ids, rows, keep, skip_bad=skip_bad)
    _check_bad([reason for part in processes.all_gather(bad) for reason in part], len(items), skip_bad, processes)
    total = sum(processes.all_gather(Counter({"cut": cut, "samples": len(samples)})), Counter[str]())
    if total["cut"] and processes.first:
        logger.warning("%d of %d samples were cut to max_tokens=%d tokens", total["cut"], total["samples"], max_tokens)
    _log_tokens(samples, total["samples"], rows, processes)
    return samples


def _render(
    processor: Any,
    items: Sequence[tuple[int, Conversation | Window]],
    max_tokens: int,
    placeholder_token_ids: Mapping[str, Sequence[int]],
    rows: Sequence[str],
    keep: Keep,
    *,
    skip_bad: bool,
) -> tuple[list[Sample], int, list[str]]:
    """The samples of the items, each with its place; how many were cut, and why others cannot be used."""
    samples: list[Sample] = []
    cut = 0
    bad: list[str] = []
    for place, item in items:
        try:
            inputs, was_cut = model_inputs(processor, item, placeholder_token_ids, max_tokens)
        except BadConversationError as error:
            bad.append(str(error))
            if skip_bad:
                logger.warning("skipped: %s", error)
            elif len(bad) == LISTED:
                break
            continue
        cut += was_cut
        modality = rows_of_ids(inputs["input_ids"][0], placeholder_token_ids, rows)
        samples.append(Sample(keep(place, inputs), modality, item.source, place))
    return samples, cut, bad


def _check_bad(reasons: Sequence[str], items: int, skip_bad: bool, processes: Processes) -> None:
    """Raise MorphoQuantError if there are unusable conversations, or no others; else log their number."""
    if not reasons:
        return
    if not skip_bad:
        raise bad_conversations(reasons, listed=processes.first)
    if len(reasons) == items:
        raise MorphoQuantError(f"no calibration sample is left: none can be used; the first: {reasons[0]}")
    if processes.first:
        logger.warning("%d of %d samples were skipped because they cannot be used", len(reasons), items)


def _choose_items(
    data: Sequence[Conversation | PlainText],
    processor: Any,
    window_tokens: int,
    max_samples: int | None,
    processes: Processes,
) -> list[Conversation | Window]:
    """Conversations and windows, each for one sample; evenly spaced ones if there are too many."""
    tokenizer = getattr(processor, "tokenizer", processor)
    items: list[Conversation | Window] = []
    for entry in data:
        items += cut_windows(entry, tokenizer, window_tokens) if isinstance(entry, PlainText) else [entry]
    if not items:
        raise MorphoQuantError("no calibration data was given; give at least one conversation or text")
    if max_samples is None or len(items) <= max_samples:
        return items
    if processes.first:
        logger.info("taking %d of %d calibration samples, evenly spaced", max_samples, len(items))
    return [items[i * len(items) // max_samples] for i in range(max_samples)]


def _log_tokens(samples: Sequence[Sample], count: int, rows: Sequence[str], processes: Processes) -> None:
    """Log the tokens of each row in the `count` samples of all processes; `samples` are those of this process."""
    local = sum((Counter(sample.modality.tolist()) for sample in samples), Counter[int]())
    counts = sum(processes.all_gather(local), Counter[int]())
    described = ", ".join(f"{rows[row]} {number}" for row, number in sorted(counts.items()))
    if processes.first:
        logger.info("calibration data: %d samples, tokens: %s", count, described)
