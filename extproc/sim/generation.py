"""One generation request over HTTP: from its body to the last byte of its answer."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from extproc.sim import api_answer, api_request
from extproc.sim.api_answer import Choice
from extproc.sim.api_request import Api, ApiError, ApiRequest, Prompt
from extproc.sim.config import EngineConfig
from extproc.sim.decode_side import DecodeSide
from extproc.sim.fault_effects import FaultEffects
from extproc.sim.faults import Phase
from extproc.sim.job import Job, Rejected, Role
from extproc.sim.records import Record, Records
from extproc.sim.runner import Pending, Runner

Intake = Callable[[web.Request, Record], Awaitable[web.StreamResponse | None]]
"""Sees every generation request before the engine does. An answer takes its place; None lets it through."""

CLIENT_GONE = "Client disconnected"


async def let_through(_request: web.Request, _record: Record) -> web.StreamResponse | None:
    """The intake that interferes with nothing."""
    return None


class Generation:
    """Answers the three generation paths. `intake` is the one place where a request meets the engine."""

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        records: Records,
        decode_side: DecodeSide | None,
        faults: FaultEffects,
    ) -> None:
        self._config = config
        self._runner = runner
        self._records = records
        self._decode_side = decode_side
        self._faults = faults
        self.intake: Intake = let_through
        self.open_requests = 0
        """HTTP requests that have no complete answer, those that a fault holds included."""

    async def answer(self, http: web.Request) -> web.StreamResponse:
        """Handle one request; what happens to it is written into its record."""
        self.open_requests += 1
        try:
            return await self._recorded(http)
        finally:
            self.open_requests -= 1

    async def _recorded(self, http: web.Request) -> web.StreamResponse:
        api = Api(http.path)
        fault = self._faults.plan.strike(Phase.UPLOAD)
        body = b"" if fault else await http.read()
        headers = {name.lower(): value for name, value in http.headers.items()}
        record = self._records.open(self._runner.now_s(), time.time(), http.path, headers, body)
        try:
            if fault is not None:
                await self._faults.show(fault, http, record)
            replaced = await self.intake(http, record)
            if replaced is not None:
                record.outcome = "replaced"
                return replaced
            await self._faults.reach(Phase.ARRIVAL, http, record)
            async with self._faults.while_working(http, record):
                return await self._answer(api, http, headers, body, record)
        except ApiError as error:
            if record.outcome == "open":
                record.outcome = "rejected" if error.status < 500 else "failed"
            record.status, record.error = error.status, error.message
            return _json(error.body(), error.status)
        except (asyncio.CancelledError, ConnectionError):
            record.outcome, record.error = "aborted", record.error or CLIENT_GONE
            record.aborted_unix = time.time()
            raise
        finally:
            record.finished_s, record.ended_unix = self._runner.now_s(), time.time()

    async def _answer(
        self, api: Api, http: web.Request, headers: dict[str, str], body: bytes, record: Record
    ) -> web.StreamResponse:
        fields = api_request.decode_body(body)
        api_request.apply_headers(api, fields, headers, self._config.header_overrides)
        record.stream = fields.get("stream") is True
        record.bootstrap_host = fields.get("bootstrap_host")
        record.bootstrap_port = fields.get("bootstrap_port")
        record.bootstrap_room = fields.get("bootstrap_room")
        request = api_request.parse(api, fields, self._config.chat_output_tokens)
        del fields
        record.routed_dp_rank = request.routed_dp_rank
        record.disagg_prefill_dp_rank = request.disagg_prefill_dp_rank
        try:
            exchange = Exchange(request, self._runner, record)
            exchange.begin(self._check_length, self._decode_side, self._role_needs_room)
        except ApiError as error:
            if not (request.stream and api is Api.GENERATE):
                raise
            # `/generate` has sent its headers by the time it looks at the request.
            record.outcome, record.status, record.error = "rejected", 200, error.message
            return await _stream_error(http, error)
        try:
            if request.stream:
                wrote = self._faults.in_stream(http, record)
                return await exchange.stream(http, self._config.stream_interval, wrote)
            return await exchange.whole()
        finally:
            exchange.close()

    @property
    def _role_needs_room(self) -> bool:
        return self._config.role is not Role.NULL

    def _check_length(self, api: Api, prompt: Prompt) -> None:
        limit = self._config.context_tokens
        if prompt.tokens >= limit:
            raise api_request.bad_request(
                api, f"The input ({prompt.tokens} tokens) is longer than the model's context length ({limit} tokens)."
            )
        if prompt.tokens + prompt.output_tokens > limit:
            raise api_request.bad_request(
                api,
                f"Requested token count exceeds the model's maximum context length of {limit} tokens. You requested a "
                f"total of {prompt.tokens + prompt.output_tokens} tokens: {prompt.tokens} tokens from the input "
                f"messages and {prompt.output_tokens} tokens for the completion.",
            )


class Exchange:
    """A parsed request on the engine: one pending job for each prompt."""

    def __init__(self, request: ApiRequest, runner: Runner, record: Record) -> None:
        self._request = request
        self._runner = runner
        self._record = record
        self._wake = asyncio.Event()
        self._pendings: list[Pending] = []
        self._created = int(time.time())

    def begin(self, check: Callable[[Api, Prompt], None], decode_side: DecodeSide | None, needs_room: bool) -> None:
        """Accept all prompts, then queue them. Raises `ApiError`; then nothing is left behind."""
        request = self._request
        for prompt in request.prompts:
            check(request.api, prompt)
        try:
            for prompt in request.prompts:
                self._pendings.append(self._accept(prompt))
        except Rejected as error:
            self.close()
            if error.status < 500:
                raise api_request.bad_request(request.api, error.message) from None
            raise ApiError(error.status, error.message, str(error.status)) from None
        self._record.rids = [prompt.rid for prompt in request.prompts]
        self._record.rooms = [prompt.room for prompt in request.prompts]
        self._record.ranks = [pending.job.rank for pending in self._pendings]
        self._record.prompt_tokens = [prompt.tokens for prompt in request.prompts]
        for pending in self._pendings:
            if needs_room and pending.job.room is None:
                rid = pending.job.rid
                message = f"Invalid request: Disaggregated request received without bootstrap room id. req.rid={rid!r}"
                self._runner.fail_early(pending, message, 400)
            elif decode_side is not None:
                decode_side.begin(pending)
            else:
                self._runner.submit(pending)

    def _accept(self, prompt: Prompt) -> Pending:
        request = self._request
        job = Job(prompt.rid, prompt.tokens, prompt.output_tokens, prompt.room, request.routed_dp_rank)
        pending = Pending(job, self._wake, request.stream, prompt.bootstrap_host, prompt.bootstrap_port)
        pending.prefill_rank = request.disagg_prefill_dp_rank
        self._runner.accept(pending)
        return pending

    async def whole(self) -> web.Response:
        """Wait for all prompts, then answer in one piece. Raises `ApiError` when the engine gives one up."""
        while not all(pending.done for pending in self._pendings):
            await self._wake.wait()
            self._wake.clear()
            self._raise_failure()
        self._raise_failure()
        answer = api_answer.whole(self._request, [self._choice(i) for i in range(len(self._pendings))], self._created)
        self._record.status = 200
        self._record.outcome = self._outcome()
        return _json(answer, 200)

    def _raise_failure(self) -> None:
        for pending in self._pendings:
            if pending.error:
                self._record.outcome = "failed" if pending.abort_message is None else "aborted"
                if pending.status < 500:
                    raise api_request.bad_request(self._request.api, pending.error)
                raise ApiError(pending.status, pending.error, str(pending.status))

    async def stream(
        self, http: web.Request, interval: int, wrote: Callable[[int], Awaitable[None]]
    ) -> web.StreamResponse:
        """Answer token by token; `wrote` is told how many chunks are out.

        `/generate` sends its headers at once; the OpenAI paths first wait for the first chunk, be it an error
        (`_handle_streaming_request` of `serving_chat.py` and `serving_completions.py`).
        """
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        if self._request.api is Api.GENERATE:
            await response.prepare(http)
        self._record.status = 200
        chunks = 0
        sent = [0] * len(self._pendings)
        open_choices = set(range(len(self._pendings)))
        while open_choices:
            await self._wake.wait()
            self._wake.clear()
            events: list[Any] = []
            for i in sorted(open_choices):
                self._collect(i, sent, interval, events)
                if self._pendings[i].done:
                    open_choices.discard(i)
            if events:
                if not response.prepared:
                    await response.prepare(http)
                await response.write(b"".join(b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events))
                chunks += 1
                await wrote(chunks)
        self._record.outcome = self._outcome()
        last = b"data: [DONE]\n\n"
        if self._request.include_usage:
            choices = [self._choice(i) for i in range(len(self._pendings))]
            usage = api_answer.chunk(self._request, self._request.prompts[0].rid, self._created, [])
            usage["usage"] = api_answer.usage(self._request, choices)
            last = b"data: " + msgspec.json.encode(usage) + b"\n\n" + last
        await response.write(last)
        await response.write_eof()
        return response

    def _collect(self, index: int, sent: list[int], interval: int, events: list[Any]) -> None:
        """Add the chunks that are due for one prompt."""
        pending = self._pendings[index]
        if pending.error:
            self._record.error = pending.error
            if self._request.api is not Api.GENERATE:
                events.append(api_answer.error_chunk(pending.error, pending.status))
                return
        choice = self._choice(index)
        fresh = choice.tokens - sent[index]
        if pending.done or fresh >= interval or (fresh and not sent[index]):
            events.extend(api_answer.pieces(self._request, choice, index, sent[index], self._created))
            sent[index] = choice.tokens

    def _choice(self, index: int) -> Choice:
        pending = self._pendings[index]
        tokens = self._runner.tokens(pending)
        choice = Choice(self._request.prompts[index], pending.job.rank, tokens)
        if pending.done:
            elapsed_s = (pending.job.finished_s or self._runner.now_s()) - pending.job.arrived_s
            choice.latency_s = self._runner.real_s(elapsed_s)
            if pending.error:
                choice.finish = api_answer.aborted(pending.error, pending.status)
            elif pending.abort_message is not None:
                choice.finish = api_answer.aborted(pending.abort_message, None)
            elif self._runner.model.role is Role.PREFILL:
                choice.finish = {"type": "length", "length": 0}  # what a prefill engine says of its one token
            else:
                choice.finish = api_answer.finished(self._request, tokens)
        return choice

    def _outcome(self) -> str:
        if any(pending.abort_message is not None for pending in self._pendings):
            return "aborted"
        return "failed" if any(pending.error for pending in self._pendings) else "finished"

    def close(self) -> None:
        """Drop what still runs (the client left, or one prompt of a batch failed) and note how far it got."""
        for pending in self._pendings:
            self._runner.abort(pending, CLIENT_GONE)
        self._record.output_tokens = [pending.job.generated_tokens for pending in self._pendings]
        firsts = [job.first_token_s for job in (pending.job for pending in self._pendings) if job.first_token_s]
        self._record.first_token_s = min(firsts, default=None)


def _json(answer: Any, status: int) -> web.Response:
    return web.Response(body=msgspec.json.encode(answer), status=status, content_type="application/json")


async def _stream_error(http: web.Request, error: ApiError) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(http)
    await response.write(b'data: {"error":{"message":' + msgspec.json.encode(error.message) + b"}}\n\ndata: [DONE]\n\n")
    await response.write_eof()
    return response
