"""The engine's HTTP server: routes, and everything that is not a generation."""

import time
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from extproc.sim import info
from extproc.sim.api_request import ApiError, decode_body
from extproc.sim.config import EngineConfig
from extproc.sim.fault_effects import FaultEffects
from extproc.sim.faults import BadFault, Phase
from extproc.sim.generation import Generation
from extproc.sim.loads_text import LoadsText
from extproc.sim.metrics_text import MetricsText
from extproc.sim.records import Records
from extproc.sim.runner import ABORTED_BY_REQUEST, Runner


class Server:
    """Handlers of one engine. `port` and `bootstrap_port` are the real ones, set once they are known."""

    def __init__(
        self, config: EngineConfig, runner: Runner, records: Records, generation: Generation, faults: FaultEffects
    ) -> None:
        self._config = config
        self._runner = runner
        self._records = records
        self._generation = generation
        self._faults = faults
        self._metrics = MetricsText(config.role, config.dp_size, config.model, config.gpu, config.time_scale)
        self._loads = LoadsText(config.role, config.gpu, config.time_scale, runner.start_unix)
        self.port = 0
        self.bootstrap_port = 0
        self.healthy = True

    def application(self) -> web.Application:
        """All routes."""
        key = self._config.api_key
        middlewares = [] if key is None else [_key_needed(key)]
        app = web.Application(client_max_size=self._config.max_body_bytes, middlewares=middlewares)
        for path in ("/generate", "/v1/chat/completions", "/v1/completions"):
            app.router.add_post(path, self._generation.answer)
        app.router.add_put("/generate", self._generation.answer)
        guard = self._faults.guard
        for path in ("/health", "/health_generate", "/ready", "/ping"):
            app.router.add_get(path, guard(Phase.HEALTH, self._health))
        for path in ("/server_info", "/get_server_info"):
            app.router.add_get(path, self._server_info)
        for path in ("/model_info", "/get_model_info"):
            app.router.add_get(path, self._model_info)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/loads", guard(Phase.METRICS, self._loads_answer))
        app.router.add_get("/get_load", guard(Phase.METRICS, self._old_loads))
        app.router.add_get("/metrics", guard(Phase.METRICS, self._metrics_answer))
        app.router.add_post("/abort_request", self._abort)
        app.router.add_route("*", "/flush_cache", self._flush_cache)
        app.router.add_get("/sim/requests", self._requests)
        app.router.add_delete("/sim/requests", self._forget_requests)
        app.router.add_get("/sim/state", self._state)
        app.router.add_get("/sim/faults", self._show_faults)
        app.router.add_put("/sim/faults", self._set_faults)
        app.router.add_delete("/sim/faults", self._forget_faults)
        return app

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _server_info(self, _request: web.Request) -> web.Response:
        used = [rank.kv_used_tokens for rank in self._runner.model.ranks]
        return _json(info.server_info(self._config, self.port, self.bootstrap_port, used))

    async def _model_info(self, _request: web.Request) -> web.Response:
        return _json(info.model_info(self._config))

    async def _models(self, _request: web.Request) -> web.Response:
        return _json(info.models(self._config, int(time.time())))

    async def _loads_answer(self, request: web.Request) -> web.Response:
        now_s = self._look()
        rank_text = request.query.get("dp_rank")
        try:
            rank = None if rank_text is None else int(rank_text)
        except ValueError:
            return _json({"detail": f"dp_rank must be an integer, got {rank_text!r}"}, 400)
        figures = [loads for _, loads in self._runner.model.figures(now_s)]
        answer = self._loads.answer(figures, now_s, request.query.get("include", "all"), rank)
        if request.query.get("format") == "prometheus":
            text = self._loads.prometheus(answer)
            return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
        return _json(answer)

    async def _old_loads(self, _request: web.Request) -> web.Response:
        """What `/v1/loads` replaced; older routers still ask for it (`GetLoadReqOutput` in `managers/io_struct.py`)."""
        figures = [loads for _, loads in self._runner.model.figures(self._look())]
        return _json(self._loads.old_answer(figures))

    async def _metrics_answer(self, _request: web.Request) -> web.Response:
        figures = [metrics for metrics, _ in self._runner.model.figures(self._look())]
        text = self._metrics.write(figures)
        return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _abort(self, request: web.Request) -> web.Response:
        try:
            fields = decode_body(await request.read())
        except ApiError as error:
            return _json(error.body(), error.status)
        rid, everything = fields.get("rid"), fields.get("abort_all") is True
        for pending in list(self._runner.pending.values()):
            if everything or (isinstance(rid, str) and rid and pending.job.rid.startswith(rid)):
                self._runner.abort(pending, ABORTED_BY_REQUEST)
        return web.Response()

    async def _flush_cache(self, _request: web.Request) -> web.Response:
        text = (
            "Cache flushed.\nPlease check backend logs for more details. "
            "(When there are running or waiting requests, the operation will not be performed.)\n"
        )
        return web.Response(text=text, status=400 if self._runner.pending else 200)

    async def _requests(self, _request: web.Request) -> web.Response:
        return _json([record.as_json() for record in self._records])

    async def _forget_requests(self, _request: web.Request) -> web.Response:
        self._records.clear()
        return _json({"requests": 0})

    async def _state(self, _request: web.Request) -> web.Response:
        """The truth of this moment, which `/metrics` and `/v1/loads` show late."""
        now_s = self._look()
        jobs = [
            {
                "rid": job.rid,
                "room": job.room,
                "rank": job.rank,
                "phase": job.phase.value,
                "prompt_tokens": job.prompt_tokens,
                "generated_tokens": self._runner.model.generated(job),
            }
            for job in self._runner.pending
        ]
        used = [rank.kv_used_tokens for rank in self._runner.model.ranks]
        return _json(
            {
                "now_s": now_s,
                "open": len(jobs),
                "open_requests": self._generation.open_requests,
                "kv_used_tokens": used,
                "jobs": jobs,
            }
        )

    async def _show_faults(self, _request: web.Request) -> web.Response:
        return _json(self._faults.plan.as_json())

    async def _set_faults(self, request: web.Request) -> web.Response:
        """In place of those there are: a JSON list of specifications. Requests that a fault holds stay held."""
        try:
            self._faults.plan.replace(msgspec.json.decode(await request.read(), type=list[str]))
        except (msgspec.MsgspecError, BadFault) as error:
            return _json({"error": str(error)}, 400)
        return await self._show_faults(request)

    async def _forget_faults(self, request: web.Request) -> web.Response:
        self._faults.plan.replace(())
        return await self._show_faults(request)

    def _look(self) -> float:
        """Bring the model up to date; the virtual time now."""
        now_s = self._runner.now_s()
        self._runner.apply(self._runner.model.advance(now_s))
        return now_s


def _key_needed(key: str) -> Middleware:
    """401 without the key. The exceptions are the real engine's (sgl-project/sglang#15908), and our own pages."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        is_open = request.method == "OPTIONS" or request.path.startswith(("/health", "/metrics", "/sim/"))
        if not is_open and request.headers.get("Authorization") != f"Bearer {key}":
            return _json({"error": "Unauthorized"}, 401)
        return await handler(request)

    return check


def _json(answer: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(answer), status=status, content_type="application/json")
