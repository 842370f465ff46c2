"""The demo's requests: every way to ask, prompts of very different length, the same again for the same seed. Pure.

An exact answer can be expected of each, as the simulated engine makes a token of every 4 bytes of prompt, and answers
`tok0 tok1 …` with as many words as tokens were asked for.
"""

import itertools
import math
import random
from dataclasses import dataclass
from enum import Enum
from typing import Any

from extproc.request import Endpoint

BYTES_PER_TOKEN = 4
MODEL = "sim-model"

MEDIAN_PROMPT_TOKENS = 800
PROMPT_SIGMA = 1.1
"""Log-normal: the mean is 1.8 times the median, and one prompt in 100 is 13 times as long."""
PROMPT_LIMITS = (16, 32_000)
MEDIAN_OUTPUT_TOKENS = 48
OUTPUT_SIGMA = 0.6
OUTPUT_LIMITS = (4, 256)
BATCH_SIZES = (2, 3, 4)

SYSTEM_MESSAGE = "You are a helpful assistant."
"""28 bytes: 7 tokens."""
WORDS = """
the a of in on at by to for and or but so if as is was be are it its this that we they you he she one two
red blue green small large old new fast slow warm cold river stone cloud tree house road night morning
letter number answer question window garden market winter summer engine signal bridge island mountain
"""


class Client(Enum):
    """What sends a request."""

    OPENAI = "openai"
    HTTPX = "httpx"


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to ask."""

    client: Client
    endpoint: Endpoint
    stream: bool
    batch: bool = False
    token_ids: bool = False
    """The prompt is a list of token ids, not text."""


KINDS = (
    Kind(Client.OPENAI, Endpoint.CHAT, stream=True),
    Kind(Client.OPENAI, Endpoint.CHAT, stream=False),
    Kind(Client.OPENAI, Endpoint.COMPLETIONS, stream=True),
    Kind(Client.OPENAI, Endpoint.COMPLETIONS, stream=False),
    Kind(Client.OPENAI, Endpoint.COMPLETIONS, stream=False, batch=True),
    Kind(Client.OPENAI, Endpoint.COMPLETIONS, stream=True, batch=True),
    Kind(Client.HTTPX, Endpoint.CHAT, stream=True),
    Kind(Client.HTTPX, Endpoint.CHAT, stream=False),
    Kind(Client.HTTPX, Endpoint.COMPLETIONS, stream=True, token_ids=True),
    Kind(Client.HTTPX, Endpoint.GENERATE, stream=True),
    Kind(Client.HTTPX, Endpoint.GENERATE, stream=False),
    Kind(Client.HTTPX, Endpoint.GENERATE, stream=False, batch=True),
    Kind(Client.HTTPX, Endpoint.GENERATE, stream=True, batch=True),
    Kind(Client.HTTPX, Endpoint.GENERATE, stream=False, token_ids=True),
)


@dataclass(frozen=True, slots=True)
class Request:
    """One request to send, and what is known of its answer."""

    number: int
    """From 1."""
    kind: Kind
    prompt_tokens: tuple[int, ...]
    """Of each prompt."""
    output_tokens: int
    """Asked for, for each prompt."""
    body: dict[str, Any]

    @property
    def expected_text(self) -> str:
        """The answer to each of its prompts."""
        return " ".join(f"tok{i}" for i in range(self.output_tokens))

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        kind = self.kind
        name = {Endpoint.CHAT: "chat", Endpoint.COMPLETIONS: "completions", Endpoint.GENERATE: "generate"}
        parts = [kind.client.value, name[kind.endpoint]]
        if kind.batch:
            parts.append(f"x{len(self.prompt_tokens)}")
        if kind.token_ids:
            parts.append("ids")
        if kind.stream:
            parts.append("stream")
        return " ".join(parts)


def make_requests(count: int, seed: int) -> list[Request]:
    """That many requests in the order to send them; all kinds alike, shuffled."""
    rng = random.Random(seed)
    kinds = list(itertools.islice(itertools.cycle(KINDS), count))
    rng.shuffle(kinds)
    return [_request(number, kind, rng) for number, kind in enumerate(kinds, 1)]


def _request(number: int, kind: Kind, rng: random.Random) -> Request:
    size = rng.choice(BATCH_SIZES) if kind.batch else 1
    lengths = tuple(_log_normal(rng, MEDIAN_PROMPT_TOKENS, PROMPT_SIGMA, *PROMPT_LIMITS) for _ in range(size))
    output_tokens = _log_normal(rng, MEDIAN_OUTPUT_TOKENS, OUTPUT_SIGMA, *OUTPUT_LIMITS)
    prompts: list[Any]
    if kind.token_ids:
        prompts = [[rng.randrange(100_000) for _ in range(length)] for length in lengths]
    else:
        system = len(SYSTEM_MESSAGE) if kind.endpoint is Endpoint.CHAT else 0
        prompts = [_text(rng, length * BYTES_PER_TOKEN - system) for length in lengths]
    body = _body(kind, prompts if kind.batch else prompts[0], output_tokens)
    return Request(number, kind, lengths, output_tokens, body)


def _log_normal(rng: random.Random, median: float, sigma: float, least: int, most: int) -> int:
    return min(max(round(rng.lognormvariate(math.log(median), sigma)), least), most)


def _text(rng: random.Random, length: int) -> str:
    """Words, cut to a length in bytes."""
    return " ".join(rng.choices(WORDS.split(), k=length // 2 + 1))[:length]


def _body(kind: Kind, prompt: Any, output_tokens: int) -> dict[str, Any]:
    if kind.endpoint is Endpoint.GENERATE:
        name = "input_ids" if kind.token_ids else "text"
        body = {name: prompt, "sampling_params": {"max_new_tokens": output_tokens, "temperature": 0}}
    elif kind.endpoint is Endpoint.COMPLETIONS:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": output_tokens}
    else:
        messages = [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": prompt}]
        body = {"model": MODEL, "messages": messages, "max_completion_tokens": output_tokens}
    if kind.stream:
        body["stream"] = True
        if kind.endpoint is not Endpoint.GENERATE:
            body["stream_options"] = {"include_usage": True}
    return body
