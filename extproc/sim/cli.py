"""`extproc engine`: one simulated engine as a process."""

import argparse
import asyncio
import contextlib
import dataclasses
import signal

import uvloop

from extproc.sim.config import EngineConfig
from extproc.sim.engine import Engine
from extproc.sim.faults import HELP as FAULT_HELP
from extproc.sim.faults import BadFault, parse_fault
from extproc.sim.gpu import GpuModel
from extproc.sim.job import Role

GPU_HELP = {
    "prefill_tokens_per_s": "prompt tokens computed per second and rank",
    "chunk_tokens": "most prompt tokens in one prefill batch",
    "decode_base_ms": "decode step time: constant part",
    "decode_per_request_ms": "decode step time: part for each request in the batch",
    "decode_per_kv_token_us": "decode step time: part for each token in the KV cache",
    "kv_capacity_tokens": "KV cache of a rank",
    "max_running_requests": "largest decode batch of a rank",
}
"""The fields of `GpuModel` that have a flag of the same name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags. Times and speeds are those of the modelled GPU; `--time-scale` makes all of it faster."""
    default = EngineConfig()
    parser.add_argument("--role", choices=[role.value for role in Role], default="null", help="null: no disaggregation")
    parser.add_argument("--host", default=default.host)
    parser.add_argument("--port", type=int, default=30000, help="0: any free port (default: %(default)s)")
    parser.add_argument("--dp-size", type=_positive, default=1, help="DP ranks (default: %(default)s)")
    parser.add_argument(
        "--bootstrap-port", type=int, default=8998, help="of a prefill engine; 0: any free port (default: %(default)s)"
    )
    parser.add_argument("--model", default=default.model, help="served model name (default: %(default)s)")
    parser.add_argument(
        "--time-scale",
        type=_fast,
        default=1.0,
        help="10: ten times faster than the modelled GPU (default: %(default)s)",
    )
    parser.add_argument(
        "--bootstrap-timeout",
        type=float,
        default=default.bootstrap_timeout_s,
        metavar="S",
        help="how long prefill waits for decode (default: %(default)s)",
    )
    parser.add_argument(
        "--waiting-timeout",
        type=float,
        default=default.waiting_timeout_s,
        metavar="S",
        help="how long decode waits for the KV cache (default: %(default)s)",
    )
    parser.add_argument("--context-length", type=_positive, default=default.context_tokens, help="longest prompt")
    parser.add_argument("--api-key", metavar="KEY", help="401 for requests that do not bring it, as the real engine")
    parser.add_argument("--header-overrides", action="store_true", help="read x-override-* headers")
    parser.add_argument("--fault", type=_fault, action="append", default=[], metavar="SPEC", help=FAULT_HELP)
    parser.add_argument("--fault-seed", type=int, default=0, metavar="N", help="of the chance in p (default: 0)")
    gpu = GpuModel()
    for name, text in GPU_HELP.items():
        value = getattr(gpu, name)
        parser.add_argument(
            "--" + name.replace("_", "-"), type=type(value), default=value, help=f"{text} (default: %(default)s)"
        )


def config_from(args: argparse.Namespace) -> EngineConfig:
    """The configuration that the flags ask for."""
    return EngineConfig(
        role=Role(args.role),
        host=args.host,
        port=args.port,
        bootstrap_port=args.bootstrap_port,
        dp_size=args.dp_size,
        model=args.model,
        time_scale=args.time_scale,
        gpu=dataclasses.replace(GpuModel(), **{name: getattr(args, name) for name in GPU_HELP}),
        context_tokens=args.context_length,
        bootstrap_timeout_s=args.bootstrap_timeout,
        waiting_timeout_s=args.waiting_timeout,
        header_overrides=args.header_overrides,
        api_key=args.api_key,
        faults=tuple(args.fault),
        fault_seed=args.fault_seed,
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; the exit status."""
    config = config_from(args)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(_serve(config))
        except OSError as error:
            print(f"{config.role.value} engine cannot start: {error}")
            return 1


async def _serve(config: EngineConfig) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, stop.set)
    async with Engine(config) as engine:
        bootstrap = f", bootstrap {engine.bootstrap_port}" if config.role is Role.PREFILL else ""
        print(f"{config.role.value} engine on {engine.url} (dp {config.dp_size}{bootstrap})", flush=True)
        await stop.wait()
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _fault(text: str) -> str:
    try:
        parse_fault(text)
    except BadFault as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _fast(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def main() -> int:
    """Entry point of `python -m extproc.sim`."""
    parser = argparse.ArgumentParser(prog="python -m extproc.sim", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args())
