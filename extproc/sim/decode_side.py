"""The decode engine's side of the KV transfer: finds prefill engines by host and port, asks them for rooms.

What it asks the bootstrap server, how often it tries again and what it says when that fails is the real engine's
(`disaggregation/decode.py`, `disaggregation/common/conn.py`).
"""

import asyncio
from dataclasses import dataclass, field

import aiohttp

from extproc.sim.channel import DROP, FAILED, SENT, TAKEN, WANT, Channel, Message
from extproc.sim.config import EngineConfig
from extproc.sim.runner import ABORTED_BY_REQUEST, Pending, Runner

Place = tuple[int, int]
"""(prefill rank, room)"""

DEFAULT_BOOTSTRAP_PORT = 8998
"""For requests that name no port: decode then takes its own `--disaggregation-bootstrap-port`."""
NO_KV_CACHE = "Failed to get kvcache from prefill instance, it might be dead"


@dataclass(eq=False)
class Link:
    """One prefill engine. `ready` once its bootstrap server has answered and the line is up."""

    address: str
    dp_size: int = 0
    channel: Channel | None = None
    opening: asyncio.Task[None] | None = None
    known_ranks: set[int] = field(default_factory=set)
    waiting: dict[Place, Pending] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        return self.channel is not None and self.channel.open


class PrefillUnreachable(Exception):
    """The bootstrap server did not answer as often as we ask."""


class DecodeSide:
    """Knows which prefill engine each waiting job's KV cache comes from. `pending.at_peer` is (link, place)."""

    def __init__(self, runner: Runner, config: EngineConfig) -> None:
        self._runner = runner
        self._config = config
        self._links: dict[str, Link] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        timeout = aiohttp.ClientTimeout(total=None, connect=5.0, sock_connect=5.0)
        self._http = aiohttp.ClientSession(timeout=timeout)
        runner.on_allocated = self._allocated
        runner.on_ended = self._ended

    def begin(self, pending: Pending) -> None:
        """Start an accepted job: at once if its prefill engine is known, else when it answers."""
        host, port = pending.bootstrap_host, pending.bootstrap_port or DEFAULT_BOOTSTRAP_PORT
        address = f"{host}:{port}"
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = Link(address)
        if link.ready and self._place(link, pending)[0] in link.known_ranks:
            self._submit(link, pending)
        else:
            self._spawn(self._find(link, pending))

    async def close(self) -> None:
        """Hang up everywhere."""
        opening = [link.opening for link in self._links.values() if link.opening is not None]
        tasks = [*self._tasks, *opening]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.close()

    def _spawn(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _place(self, link: Link, pending: Pending) -> Place:
        """Where the KV cache should be: the rank that the request names, else the one that follows from its room."""
        room = pending.job.room or 0
        rank = pending.prefill_rank if pending.prefill_rank is not None else room % link.dp_size
        return rank, room

    async def _find(self, link: Link, pending: Pending) -> None:
        """Make the link ready and the rank known, then submit the job."""
        try:
            if not link.ready:
                if link.opening is None:
                    link.opening = asyncio.get_running_loop().create_task(self._open(link))
                await asyncio.shield(link.opening)
            rank = self._place(link, pending)[0]
            if rank not in link.known_ranks:
                await self._ask_rank(link, rank)
        except PrefillUnreachable as error:
            self._runner.fail_early(pending, str(error))
            return
        except aiohttp.ClientError as error:
            self._runner.fail_early(pending, f"Error fetching prefill info from bootstrap: {error}")
            return
        if not pending.done:
            self._submit(link, pending)

    async def _open(self, link: Link) -> None:
        """Ask for the engine's size until it answers, then open the line."""
        try:
            for attempt in range(self._config.bootstrap_retries):
                if attempt:
                    await asyncio.sleep(self._runner.real_s(self._config.bootstrap_retry_s))
                try:
                    await self._connect(link)
                except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError):
                    continue
                return
            self._links.pop(link.address, None)  # requests that come later start over, as in the engine
            raise PrefillUnreachable(
                f"Could not fetch prefill parallel info from {link.address} "
                f"after {self._config.bootstrap_retries} attempts"
            )
        finally:
            link.opening = None

    async def _connect(self, link: Link) -> None:
        query = {"engine_rank": "-1", "target_dp_group": "-1"}
        async with self._http.get(f"http://{link.address}/route", params=query) as response:
            response.raise_for_status()
            link.dp_size = int((await response.json(content_type=None))["prefill_dp_size"])
        socket = await self._http.ws_connect(f"http://{link.address}/sim/kv", compress=0, max_msg_size=0)
        link.known_ranks.clear()
        link.channel = Channel(socket)
        self._spawn(self._listen(link, link.channel))

    async def _ask_rank(self, link: Link, rank: int) -> None:
        query = {"engine_rank": "0", "target_dp_group": str(rank)}
        async with self._http.get(f"http://{link.address}/route", params=query) as response:
            if response.status != 200:
                raise PrefillUnreachable(
                    f"Could not fetch bootstrap info for engine rank: 0 and target_dp_group: {rank} "
                    f"from {link.address}: {response.status}, {await response.text()}"
                )
        link.known_ranks.add(rank)

    def _submit(self, link: Link, pending: Pending) -> None:
        pending.at_peer = (link, self._place(link, pending))
        self._runner.submit(pending)

    def _allocated(self, pending: Pending) -> None:
        link, place = self._peer(pending)
        link.waiting[place] = pending
        if link.channel is None or not link.channel.open:
            self._spawn(self._notice_loss([pending], link.address))
            return
        link.channel.send(Message(WANT, *place))

    async def _listen(self, link: Link, channel: Channel) -> None:
        try:
            await channel.run(lambda message: self._receive(link, channel, message))
        finally:
            left = list(link.waiting.values())
            link.waiting.clear()
        if left:
            await self._notice_loss(left, link.address)

    async def _notice_loss(self, pendings: list[Pending], address: str) -> None:
        """A prefill engine is gone; the engine's heartbeats take a while to find out."""
        await asyncio.sleep(self._runner.real_s(self._config.heartbeat_loss_s))
        for pending in pendings:
            reason = f"Lost connection with prefill instance (bootstrap_addr: {address}). {NO_KV_CACHE}"
            self._runner.fail(pending, reason)

    def _receive(self, link: Link, channel: Channel, message: Message) -> None:
        place = (message.rank, message.room)
        pending = link.waiting.pop(place, None)
        if pending is None:
            return
        if message.op == SENT:
            channel.send(Message(TAKEN, *place))
            self._runner.apply(self._runner.model.received(pending.job, self._runner.now_s()))
        elif message.op == FAILED:
            self._runner.fail(pending, NO_KV_CACHE)

    def _ended(self, pending: Pending) -> None:
        """A job ended; if it still waited for its KV cache, prefill hears of it."""
        if pending.at_peer is None:
            return
        link, place = self._peer(pending)
        if link.waiting.get(place) is pending:
            del link.waiting[place]
            if link.channel is not None:
                link.channel.send(Message(DROP, *place, ABORTED_BY_REQUEST))

    @staticmethod
    def _peer(pending: Pending) -> tuple[Link, Place]:
        link, place = pending.at_peer
        assert isinstance(link, Link)  # noqa: S101 - narrows the type; only `_submit` writes it
        return link, place
