"""Estimates of prompts: what is learned from counts, and what nothing can make of them."""

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.estimate import (
    ASK_EVERY,
    ASK_FIRST,
    BYTES_PER_TOKEN,
    MAX_BYTES_PER_TOKEN,
    MAX_MEDIA_TOKENS,
    MAX_MODELS,
    MEDIA_TOKENS,
    MIN_BYTES_PER_TOKEN,
    Prompt,
    TokenEstimator,
)
from extproc.parse import parse
from extproc.request import Endpoint

CHAT, GENERATE = Endpoint.CHAT, Endpoint.GENERATE


def taught(*counts: tuple[Prompt, float], model: str | None = "m") -> TokenEstimator:
    estimator = TokenEstimator()
    for prompt, tokens in counts:
        estimator.ask(CHAT, model)
        estimator.learn(CHAT, model, prompt, tokens)
    return estimator


def test_begins_with_four_bytes_a_token_and_at_least_one_token_a_prompt():
    estimator = TokenEstimator()
    assert estimator.tokens(CHAT, "m", Prompt(4000)) == 4000 / BYTES_PER_TOKEN
    assert estimator.tokens(CHAT, "m", Prompt(3, prompts=5)) == 5
    assert estimator.known() == {}


def test_a_few_counts_suffice():
    """Lognormal bytes per token around 3.2, as they vary from prompt to prompt."""
    rng = random.Random(5)
    estimator = TokenEstimator()
    for number in range(64):
        tokens = round(math.exp(rng.gauss(7, 1))) + 1
        estimator.ask(CHAT, "m")
        estimator.learn(CHAT, "m", Prompt(round(tokens * 3.2 * math.exp(rng.gauss(0, 0.15)))), tokens)
        if number == 7:
            assert estimator.tokens(CHAT, "m", Prompt(32_000)) == pytest.approx(10_000, rel=0.15)
    assert estimator.tokens(CHAT, "m", Prompt(32_000)) == pytest.approx(10_000, rel=0.05)


def test_follows_traffic_that_changes():
    estimator = taught(*[(Prompt(4_000), 1_000)] * 100, *[(Prompt(4_000), 2_000)] * 100)
    assert estimator.tokens(CHAT, "m", Prompt(4_000)) == pytest.approx(2_000, rel=0.03)  # e^-3.1 is left


def test_models_and_endpoints_are_kept_apart():
    estimator = taught((Prompt(8_000), 1_000))
    mine = estimator.tokens(CHAT, "m", Prompt(4_000))
    assert mine < 1_000
    assert estimator.tokens(CHAT, "other", Prompt(4_000)) == 1_000
    assert estimator.tokens(GENERATE, "m", Prompt(4_000)) == 1_000
    assert estimator.tokens(CHAT, None, Prompt(4_000)) == 1_000


def test_one_outlier_changes_little():
    """1 MB of base64 that an engine counts as one token, and one token's bytes counted as 100,000."""
    estimator = taught(*[(Prompt(4_000), 1_000)] * 32)
    estimator.learn(CHAT, "m", Prompt(1_000_000), 1)
    estimator.learn(CHAT, "m", Prompt(4), 100_000)
    assert estimator.tokens(CHAT, "m", Prompt(4_000)) == pytest.approx(1_000, rel=0.2)


def test_media_count_as_such_and_do_not_spoil_the_text():
    estimator = taught(*[(Prompt(4_000), 1_000)] * 100, *[(Prompt(400, media=2), 100 + 2 * 300)] * 100)
    assert estimator.tokens(CHAT, "m", Prompt(4_000)) == pytest.approx(1_000, rel=0.01)
    assert estimator.tokens(CHAT, "m", Prompt(400, media=1)) == pytest.approx(400, rel=0.01)
    assert TokenEstimator().tokens(CHAT, "m", Prompt(0, media=1)) == MEDIA_TOKENS


def test_asks_for_the_first_prompts_of_a_model_and_then_for_a_few():
    estimator = TokenEstimator()
    asked = [estimator.ask(CHAT, "m") for _ in range(ASK_FIRST + 10 * ASK_EVERY)]
    assert all(asked[:ASK_FIRST])
    assert sum(asked[ASK_FIRST:]) == 10
    assert estimator.ask(CHAT, "other")


def test_names_that_clients_invent_take_a_bounded_place():
    estimator = TokenEstimator()
    for number in range(10 * MAX_MODELS):
        estimator.ask(CHAT, f"{number}" + "x" * 1_000_000)
        estimator.ask(CHAT, "mine")
    assert len(estimator._means) == MAX_MODELS
    assert max(len(model) for _, model in estimator._means) < 1_000
    estimator.learn(CHAT, "0", Prompt(10), 10)  # forgotten meanwhile
    assert "0" not in {model for _, model in estimator.known()}


PROMPTS = st.builds(Prompt, st.integers(0, 10**9), st.integers(0, 50), st.integers(1, 100))
COUNTS = st.lists(st.tuples(PROMPTS, st.integers(-5, 10**9)), max_size=60)


@given(COUNTS, PROMPTS)
def test_whatever_was_counted_an_estimate_is_within_its_bounds(counts, prompt):
    tokens = taught(*counts).tokens(CHAT, "m", prompt)
    assert math.isfinite(tokens)
    slack = 1 + 1e-9
    assert prompt.prompts <= tokens
    assert tokens >= (prompt.text_bytes / MAX_BYTES_PER_TOKEN + prompt.media) / slack
    most = prompt.text_bytes / MIN_BYTES_PER_TOKEN + prompt.media * MAX_MEDIA_TOKENS
    assert tokens <= max(prompt.prompts, most) * slack


@given(COUNTS, PROMPTS, st.integers(0, 10**6), st.integers(0, 5))
def test_longer_prompts_are_never_estimated_shorter(counts, prompt, more_bytes, more_media):
    estimator = taught(*counts)
    longer = Prompt(prompt.text_bytes + more_bytes, prompt.media + more_media, prompt.prompts)
    assert estimator.tokens(CHAT, "m", longer) >= estimator.tokens(CHAT, "m", prompt)


@given(COUNTS, st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_higher_count_never_makes_estimates_lower_than_a_lower_one_does(counts, text_bytes, one, other):
    """At the same weight, i.e. from FULL_WEIGHT_TOKENS up, where only the ratio differs."""
    low, high = sorted((one + 4096, other + 4096))
    prompt = Prompt(text_bytes)
    estimates = [taught(*counts, (prompt, tokens)).tokens(CHAT, "m", Prompt(10_000)) for tokens in (low, high)]
    assert estimates[0] <= estimates[1] * (1 + 1e-9)


# What a body measures


def chat(*content: object, **fields: object) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": each} for each in content]} | fields).encode()


def image(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize("slash", ["/", "\\/"], ids=["plain", "escaped"])
def test_the_bytes_of_an_image_are_no_text(slash):
    embedded = image("data:image/png;base64," + "A" * 1_000_000)
    body = chat([{"type": "text", "text": "x" * 4_000}, embedded, embedded]).replace(
        b"image/png", f"image{slash}png".encode()
    )
    request = parse(CHAT, body)
    assert request.measured.media == 2
    assert 4_000 < request.measured.text_bytes < 4_500
    assert request.prompt_tokens == pytest.approx(1_000 + 2 * MEDIA_TOKENS, rel=0.05)


def test_an_image_elsewhere_is_one_too():
    assert parse(CHAT, chat([image("https://a/b.png"), {"type": "text", "text": "what is it?"}])).measured.media == 1


@pytest.mark.parametrize(
    "text",
    ['see [the "image_url" field] and "data:image/png;base64,AAAA"', "[data: 1, 2, 3]", 'a "data:;base64,' + "x" * 99],
)
def test_text_that_speaks_of_images_is_text(text):
    body = chat(text)
    request = parse(CHAT, body)
    assert request.measured.media == 0
    assert request.measured.text_bytes == len(body) - len(b'{"messages": }')


def test_tools_are_part_of_the_prompt():
    tools = [{"type": "function", "function": {"name": "f", "description": "x" * 1_000}}]
    more = parse(CHAT, chat("hi", tools=tools)).measured.text_bytes - parse(CHAT, chat("hi")).measured.text_bytes
    assert more == len(json.dumps(tools))


def test_token_ids_are_counted_and_teach_nothing():
    request = parse(GENERATE, b'{"input_ids": [1, 2, 3]}')
    assert (request.prompt_tokens, request.measured) == (3, None)


def test_parse_estimates_with_what_was_learned():
    estimator = TokenEstimator()
    for _ in range(200):
        estimator.ask(GENERATE, None)
        estimator.learn(GENERATE, None, Prompt(2_000), 1_000)
    body = json.dumps({"text": "x" * 2_000}).encode()
    assert parse(GENERATE, body, estimator=estimator).prompt_tokens == pytest.approx(1_000, rel=0.01)
