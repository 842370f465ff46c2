"""What routing knows of a client's request: the endpoint, what is looked at in the body, and what came of it."""

import enum

import msgspec
from msgspec import Raw

from extproc.estimate import Prompt


class Endpoint(enum.StrEnum):
    """The generation endpoints, by their path. Any other path is passed on untouched."""

    GENERATE = "/generate"
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


ENDPOINTS: dict[str, Endpoint] = {endpoint.value: endpoint for endpoint in Endpoint}

GENERATE, CHAT, COMPLETIONS = Endpoint
"""As `model.PREFILL`."""

ROUTING_FIELDS = (
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "routed_dp_rank",
    "disagg_prefill_dp_rank",
    "data_parallel_rank",
    "bootstrap_pair_key",
    "decode_tp_size",
)
"""Body fields that steer an engine (SGLang 0.5.23 `GenerateReqInput`). A client's own values are never honoured."""

ROUTING_KEY = "x-smg-routing-key"
"""Header with a client's routing key, as SGLang's gateway names it. It cannot name a worker, only keep one."""

MOST_PROMPTS = 4096
"""Rooms for a request whose number of prompts is not known; a batch is seldom more than a few hundred prompts."""


class SamplingParams(msgspec.Struct):
    n: int | None = None
    max_new_tokens: Raw = Raw()


class Body(msgspec.Struct):
    """The fields that routing needs; everything else is skipped, and stays in the bytes.

    A field holding `Raw` is only located, not decoded. All are optional: whether the request makes sense is for the
    engine to say, whether it can be *placed* is for us.
    """

    model: str | None = None
    n: int | None = None
    stream: Raw = Raw()
    sampling_params: Raw = Raw()
    max_tokens: Raw = Raw()
    max_completion_tokens: Raw = Raw()
    prompt: Raw = Raw()
    text: Raw = Raw()
    input_ids: Raw = Raw()
    messages: Raw = Raw()
    tools: Raw = Raw()
    bootstrap_host: Raw = Raw()
    bootstrap_port: Raw = Raw()
    bootstrap_room: Raw = Raw()
    routed_dp_rank: Raw = Raw()
    disagg_prefill_dp_rank: Raw = Raw()
    data_parallel_rank: Raw = Raw()
    bootstrap_pair_key: Raw = Raw()
    decode_tp_size: Raw = Raw()


class Part(msgspec.Struct):
    text: str = ""


class Message(msgspec.Struct):
    content: str | list[Part] | None = None


class GenerationRequest(msgspec.Struct, frozen=True, gc=False):
    """One generation request, as far as placing it goes."""

    endpoint: Endpoint
    model: str | None
    batch_size: int
    """Prompts in it, at least 1; the engine uses one bootstrap room for each."""
    prompt_tokens: float
    """All prompts together: counted for `input_ids`, else estimated."""
    max_output_tokens: float
    """What it may generate at most, all prompts together, or the default where it sets no limit."""
    client_fields: tuple[str, ...] = ()
    """Those of ROUTING_FIELDS that the client set, to be overridden."""
    prompt: memoryview = memoryview(b"")
    """The prompt or messages as they stand in the body: JSON, undecoded. Equal prompts have equal bytes."""
    routing_key: str = ""
    """What the client wants requests of a kind to stick by (header ROUTING_KEY); empty: nothing."""
    measured: Prompt | None = None
    """What the estimate was made from; None where the tokens are `input_ids`, and there is nothing to learn."""
    streams: bool = False
    """The client set `stream`, and not to false."""
    opaque: bool = False
    """Its body is not read."""

    @property
    def rooms(self) -> int:
        """Bootstrap rooms to reserve."""
        return MOST_PROMPTS if self.opaque else self.batch_size
