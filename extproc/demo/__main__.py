"""`python -m extproc.demo`: exit status 0 only if every request was answered right."""

import argparse
import importlib.util
import signal
import sys
from pathlib import Path

EXIT_WRONG = 1
EXIT_CANNOT_RUN = 2
EXIT_INTERRUPTED = 130


def main() -> int:
    """Run the demo with the options of the command line."""
    options = _parser().parse_args()
    if importlib.util.find_spec("openai") is None:
        sys.stderr.write("the demo sends requests with the openai client: pip install openai, or extproc[dev]\n")
        return EXIT_CANNOT_RUN

    from extproc.demo import report, show  # noqa: PLC0415 - needs openai
    from extproc.demo.stack import StackError  # noqa: PLC0415

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_INTERRUPTED))  # so that children are stopped in order
    console = report.make_console()
    try:
        right = show.show(show.Options(**vars(options)), console)
    except StackError as error:
        console.print(f"The demo cannot go on: {error}", style="red", markup=False, soft_wrap=True)
        return EXIT_CANNOT_RUN
    except KeyboardInterrupt:
        console.print("Interrupted.")
        return EXIT_INTERRUPTED
    return 0 if right else EXIT_WRONG


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m extproc.demo",
        description="A PD gateway with simulated engines: sends requests through it and checks every answer.",
        argument_default=argparse.SUPPRESS,  # the defaults are those of `show.Options`
    )
    for name, text in (
        ("prefill", "prefill engines (default: 2)"),
        ("decode", "decode engines (default: 2)"),
        ("dp-size", "DP ranks of each engine (default: 2)"),
        ("requests", "how many to send (default: 160)"),
        ("concurrency", "how many at a time (default: 32)"),
    ):
        parser.add_argument(f"--{name}", type=_positive, metavar="N", help=text)
    parser.add_argument("--seed", type=int, metavar="N", help="another seed makes other requests (default: 1)")
    parser.add_argument("--time-scale", type=float, metavar="X", help="speed of the simulated GPUs (default: 2)")
    parser.add_argument(
        "--load-check-interval",
        dest="load_check_interval_s",
        type=float,
        metavar="S",
        help="--worker-load-check-interval of the gateway (default: 10)",
    )
    parser.add_argument("--keep", action="store_true", help="leave everything running at the end, until Ctrl-C")
    parser.add_argument("--logs", dest="log_dir", type=Path, metavar="DIR", help="keep the processes' logs there")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
