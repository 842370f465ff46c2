"""Wrong answers on pages that gateways read in the background: health, and figures of load."""

import asyncio
import random
import zlib

from aiohttp import web

MIB = 1 << 20
HUGE_BYTES = 100 * MIB
BOMB_BYTES = 1024 * MIB
"""Unpacked; on the wire it is about 1 MiB."""
SLOW_LINE_S = 0.5
TEXT = "text/plain; version=0.0.4; charset=utf-8"
LINE = b'sglang:num_used_tokens{dp_rank="0",model_name="sim-model"} 1.0\n'
HTML = "<!doctype html><html><head><title>Sign in</title></head><body>sglang:num_used_tokens 1</body></html>"


async def bad_page(kind: str, http: web.Request) -> web.StreamResponse:
    """Answer in the way that `kind` (a value of the faults `health` and `metrics`) says."""
    match kind:
        case "down":
            return web.Response(status=503, text="simulated fault: down")
        case "garbage":
            return web.Response(body=random.Random(0).randbytes(20_000), headers={"Content-Type": TEXT})
        case "html":
            return web.Response(text=HTML, content_type="text/html")
        case "redirect":
            return web.Response(status=302, headers={"Location": f"{http.path}?again"})
        case "gzip-bomb":
            return web.Response(body=_bomb(), headers={"Content-Type": TEXT, "Content-Encoding": "gzip"})
        case "huge":
            return await _endless(http, LINE * (MIB // len(LINE)), 0.0, HUGE_BYTES)
        case "slow":
            return await _endless(http, LINE, SLOW_LINE_S, HUGE_BYTES)
        case _:  # hang: the end of the connection cancels this
            await asyncio.Event().wait()
            raise AssertionError("never set")


async def _endless(http: web.Request, piece: bytes, pause_s: float, limit_bytes: int) -> web.StreamResponse:
    """Good lines, but too many or too slow."""
    response = web.StreamResponse(headers={"Content-Type": TEXT})
    await response.prepare(http)
    for _ in range(limit_bytes // len(piece)):
        await response.write(piece)
        await asyncio.sleep(pause_s)
    await response.write_eof()
    return response


def _bomb() -> bytes:
    """Zeros, packed. After a full flush the packer has no memory, so one packed MiB can be repeated."""
    packer = zlib.compressobj(wbits=31)  # gzip
    first = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    more = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + more * (BOMB_BYTES // MIB - 1)
