"""The rows of docs/reference/features.md that a running server answers: what every other method of vLLM has."""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import NotFoundError, OpenAI
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.common.server import Server, serve
from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from tests import tiny_models
from tests.engine.agreement import TIED_TOLERANCE, assert_same_logprobs
from tests.engine.conftest import TEXT_PROMPT, media_messages
from tests.hub_cache import write_hub_cache
from tests.reference_model import Checkpoint, reference_thinker, swap_linears
from tests.tiny_conversations import image_bytes, write_calibration_data

NAME, REPOSITORY = "a name of our own", "tests/features"
LONG = 32_000


def ask(client: OpenAI, **settings: Any) -> Any:
    """A greedy completion of TEXT_PROMPT by the only model of the server."""
    defaults = {"model": client.models.list().data[0].id, "prompt": TEXT_PROMPT, "max_tokens": 6, "temperature": 0}
    return client.completions.create(**{**defaults, **settings})


@torch.no_grad()
def distribution(model: nn.Module, tokens: list[int]) -> torch.Tensor:
    """The reference's log probabilities [vocabulary] of the token after `tokens`."""
    return model(torch.tensor([tokens]), logits_to_keep=1).logits[0, -1].log_softmax(-1)


def metric(server: Server, name: str) -> float:
    """Sum of a counter of vLLM's over its labels."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} "))]
    assert found, f"vLLM has no counter {name}"
    return sum(found)


@pytest.mark.slow
def test_structured_outputs_follow_their_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"animal": {"enum": ["cat", "dog"]}, "seen": {"type": "boolean"}},
        "required": ["animal", "seen"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "What do you see?"}],
        max_tokens=64,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "seen", "schema": schema}},
    )
    found = json.loads(answer.choices[0].message.content)
    assert found["animal"] in ("cat", "dog") and isinstance(found["seen"], bool) and len(found) == 2


@pytest.mark.slow
def test_a_choice_is_one_of_the_given_words(client: OpenAI) -> None:
    words = ["the sound", "the picture"]
    answer = ask(client, max_tokens=16, extra_body={"structured_outputs": {"choice": words}})
    assert answer.choices[0].text in words and answer.choices[0].text not in ask(client).choices[0].text


@pytest.mark.slow
def test_the_most_likely_tokens_and_their_log_probabilities_are_the_references(
    client: OpenAI, omni_source: Path, checkpoint: Checkpoint
) -> None:
    answer = ask(client, max_tokens=1, logprobs=5, extra_body={"return_tokens_as_token_ids": True})
    (found,) = answer.choices[0].logprobs.top_logprobs
    expected = distribution(reference_thinker(omni_source, checkpoint), TEXT_PROMPT)
    ids = [int(token.removeprefix("token_id:")) for token in found]
    assert len(ids) >= 5 and float(expected.topk(5).values[-1]) - TIED_TOLERANCE <= float(expected[ids].min())
    torch.testing.assert_close(torch.tensor(list(found.values())), expected[ids], atol=TIED_TOLERANCE, rtol=0)


@pytest.mark.slow
def test_several_answers_to_one_question_differ_and_repeat_by_their_seed(client: OpenAI) -> None:
    drawn = [ask(client, n=4, temperature=1.0, seed=7, max_tokens=12) for _ in range(2)]
    first, second = ([choice.text for choice in answer.choices] for answer in drawn)
    assert len(set(first)) == 4 and first == second
    assert [choice.text for choice in ask(client, n=4, temperature=1.0, seed=8, max_tokens=12).choices] != first


@pytest.mark.slow
def test_a_streamed_answer_is_the_whole_one_in_parts(client: OpenAI) -> None:
    parts = [part.choices[0].text for part in ask(client, max_tokens=12, stream=True)]
    # vLLM may send two tokens at once.
    assert len(parts) > 2 and "".join(parts) == ask(client, max_tokens=12).choices[0].text


@pytest.mark.slow
def test_an_equal_image_hits_the_prefix_cache_and_another_does_not(
    client: OpenAI, server: Server, media: dict[str, Path]
) -> None:
    def question(image: bytes) -> tuple[float, str]:
        before = metric(server, "vllm:prefix_cache_hits_total")
        url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        content = [media_messages(url, "")[0]["content"][0], {"type": "text", "text": "What is it? " * 60}]
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": content}],
            max_tokens=8,
            temperature=0,
        )
        return metric(server, "vllm:prefix_cache_hits_total") - before, answer.choices[0].message.content

    first, again, other = (question(image_bytes(seed)) for seed in (71, 71, 72))
    # A block of vLLM's cache on a CPU has 128 tokens, and the image lies in the first one.
    assert (first[0], other[0]) == (0, 0) and again[0] >= 128 and again[1] == first[1]


@pytest.fixture(scope="module")
def text_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of many positions."""
    source = tiny_models.build_tiny_llama(tmp_path_factory.mktemp("features") / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2 * LONG}))
    return source


@pytest.fixture(scope="module")
def text_checkpoint(text_source: Path) -> Path:
    data = write_calibration_data(text_source.with_name("data"), "text")
    recipe = Recipe(device="cpu", max_samples=2, rounding="nearest", regression=False)
    calibrate(text_source, data, text_source.with_name("checkpoint"), recipe=recipe)
    return text_source.with_name("checkpoint")


@pytest.fixture(scope="module")
def text_reference(text_source: Path, text_checkpoint: Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(text_source, dtype=torch.float32)
    return swap_linears(model, Checkpoint(text_checkpoint))


@pytest.fixture(scope="module")
def second_server(text_checkpoint: Path, server: Server) -> Iterator[Server]:
    """A server beside `server`: of a hub id in the local cache, under a name of its own, of a long context."""
    home = text_checkpoint.with_name("hub home")
    write_hub_cache(home / "hub", REPOSITORY, text_checkpoint)
    arguments = (
        "--dtype=float32",
        f"--max-model-len={LONG + 100}",
        "--max-num-batched-tokens=8192",
        "--max-num-seqs=4",
        "--enforce-eager",
        "--enable-prompt-embeds",
        f"--served-model-name={NAME}",
    )
    log = text_checkpoint.with_name("serve.log")
    with serve(Path(REPOSITORY), log, arguments, environment={"HF_HOME": str(home)}) as running:
        yield running


@pytest.fixture(scope="module")
def second_client(second_server: Server) -> OpenAI:
    return OpenAI(base_url=second_server.openai_url, api_key="none", timeout=200, max_retries=0)


def assert_last_token_agrees(model: nn.Module, prompt: list[int], answer: Any) -> None:
    """The log probability of an answer's first token is the reference's."""
    token = int(answer.choices[0].logprobs.tokens[0].removeprefix("token_id:"))
    expected = distribution(model, prompt)
    assert_same_logprobs(torch.tensor(answer.choices[0].logprobs.token_logprobs[:1]), expected[token][None])


IDS = {"logprobs": 1, "extra_body": {"return_tokens_as_token_ids": True}}


@pytest.mark.full
def test_a_hub_id_is_served_under_the_name_that_was_given(second_client: OpenAI, text_reference: nn.Module) -> None:
    assert [model.id for model in second_client.models.list().data] == [NAME]
    assert_last_token_agrees(text_reference, TEXT_PROMPT, ask(second_client, **IDS))
    with pytest.raises(NotFoundError):
        ask(second_client, model=REPOSITORY)


@pytest.mark.full
def test_two_servers_answer_at_once(client: OpenAI, second_client: OpenAI) -> None:
    alone = [ask(asked, max_tokens=32).choices[0].text for asked in (client, second_client)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda asked: ask(asked, max_tokens=32), [client, second_client] * 4))
    assert [answer.choices[0].text for answer in together] == alone * 4 and alone[0] != alone[1]


@pytest.mark.full
def test_a_prompt_of_embeddings_is_answered_as_its_tokens_are(second_client: OpenAI, text_reference: nn.Module) -> None:
    with torch.no_grad():
        embedded = text_reference.get_input_embeddings()(torch.tensor(TEXT_PROMPT))
    buffer = io.BytesIO()
    torch.save(embedded, buffer)
    body = {**IDS["extra_body"], "prompt_embeds": base64.b64encode(buffer.getvalue()).decode()}
    answer = ask(second_client, prompt=None, logprobs=1, extra_body=body)
    assert_last_token_agrees(text_reference, TEXT_PROMPT, answer)
    assert answer.choices[0].text == ask(second_client).choices[0].text


@pytest.mark.full
def test_a_prompt_of_32000_tokens_agrees_with_the_reference(second_client: OpenAI, text_reference: nn.Module) -> None:
    prompt = torch.randint(20, 500, (LONG,), generator=torch.Generator().manual_seed(0)).tolist()
    assert_last_token_agrees(text_reference, prompt, ask(second_client, prompt=prompt, **IDS))
