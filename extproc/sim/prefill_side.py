"""The prefill engine's side of the KV transfer, and the bootstrap server that decode engines find it by.

`/route` is the real bootstrap server's (`disaggregation/common/conn.py`: `CommonKVBootstrapServer`), with the old and
the new names of its query parameters. `/sim/kv` is ours: the line on which KV caches are asked for and handed over.
"""

from typing import Any

from aiohttp import web

from extproc.sim.channel import DROP, FAILED, SENT, TAKEN, WANT, Channel, Message
from extproc.sim.job import Phase
from extproc.sim.runner import Pending, Runner

Place = tuple[int, int]
"""(rank, room)"""


class PrefillSide:
    """Knows which decode engine wants which room at which rank."""

    def __init__(self, runner: Runner, dp_size: int) -> None:
        self._runner = runner
        self._dp_size = dp_size
        self._wanted: dict[Place, Channel] = {}
        self._channels: set[Channel] = set()
        self.rank_host = ""
        self.rank_port = 0
        runner.on_sent = self._sent
        runner.on_ended = self._ended

    def application(self) -> web.Application:
        """The bootstrap server."""
        app = web.Application()
        app.router.add_get("/route", self._route)
        app.router.add_get("/health", self._health)
        app.router.add_get("/sim/kv", self._line)
        return app

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(text="OK")

    async def _route(self, request: web.Request) -> web.Response:
        query = request.query
        rank_text = query.get("target_dp_group", query.get("prefill_dp_rank"))
        engine_text = query.get("engine_rank", query.get("target_tp_rank"))
        try:
            rank, engine_rank = int(rank_text or ""), int(engine_text or "")
        except ValueError:
            return web.Response(text="Missing inputs for bootstrap server.", status=400)
        if rank == -1 and engine_rank == -1:
            return web.json_response(self._parallel_info())
        if not 0 <= rank < self._dp_size:
            return web.Response(text="Bootstrap info not Found", status=404)
        return web.json_response({"rank_ip": self.rank_host, "rank_port": self.rank_port})

    def _parallel_info(self) -> dict[str, Any]:
        return {
            "prefill_tp_size": self._dp_size,
            "prefill_dp_size": self._dp_size,
            "prefill_pp_size": 1,
            "attn_tp_size": 1,
            "attn_cp_size": 1,
            "dp_size": self._dp_size,
            "pp_size": 1,
            "page_size": 1,
            "kv_cache_dtype": "auto",
            "follow_bootstrap_room": True,
        }

    async def _line(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(compress=False)
        await socket.prepare(request)
        channel = Channel(socket)
        self._channels.add(channel)
        try:
            await channel.run(lambda message: self._receive(channel, message))
        finally:
            self._channels.discard(channel)
            self._lost(channel, request.remote or "decode")
        return socket

    def _receive(self, channel: Channel, message: Message) -> None:
        place = (message.rank, message.room)
        if message.op == WANT and 0 <= message.rank < self._dp_size:
            self._wanted[place] = channel
            runner = self._runner
            runner.apply(runner.model.announce(message.rank, message.room, runner.now_s()))
        elif self._wanted.get(place) is not channel:
            return
        elif message.op == TAKEN:
            if (pending := self._at(place)) is not None:
                self._runner.apply(self._runner.model.taken(pending.job, self._runner.now_s()))
        elif message.op == DROP:
            self._forget(place, message.reason)

    def _at(self, place: Place) -> Pending | None:
        """The request for a room, if it runs on that rank."""
        pending = self._runner.by_room.get(place[1])
        return pending if pending is not None and pending.job.rank == place[0] else None

    def _forget(self, place: Place, reason: str) -> None:
        """Decode gave a room up."""
        del self._wanted[place]
        pending = self._at(place)
        if pending is None:
            self._runner.model.withdraw(*place)
        elif pending.job.phase is not Phase.BOOTSTRAP:
            self._runner.fail(pending, reason)

    def _lost(self, channel: Channel, peer: str) -> None:
        """A decode engine is gone: what it wanted fails."""
        reason = f"Decode instance could be dead, remote mooncake session {peer} is not alive"
        for place in [place for place, wanting in self._wanted.items() if wanting is channel]:
            self._forget(place, reason)

    def _sent(self, pending: Pending) -> None:
        room = pending.job.room
        channel = None if room is None else self._wanted.get((pending.job.rank, room))
        if room is None or channel is None:
            self._runner.fail(pending, "Decode instance could be dead")
        else:
            channel.send(Message(SENT, pending.job.rank, room))

    def _ended(self, pending: Pending) -> None:
        """A request ended, well or not; if not, decode hears of it."""
        if pending.job.room is None:
            return
        place = (pending.job.rank, pending.job.room)
        channel = self._wanted.pop(place, None)
        if channel is not None and (pending.error or pending.abort_message is not None):
            channel.send(Message(FAILED, *place, pending.error))
