"""The engine as a process."""

import argparse
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from sim_pair import PATIENCE_S, words

from extproc.sim.cli import add_arguments, config_from
from extproc.sim.job import Role

READY = re.compile(r"(prefill|decode|null) engine on (http://\S+:(\d+)) \(dp (\d+)(?:, bootstrap (\d+))?\)")


@contextmanager
def engine(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process and its first line."""
    command = [sys.executable, "-m", "extproc.sim", "--port", "0", "--bootstrap-port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline()
        finally:
            process.kill()


def test_a_pair_of_processes_serves_until_it_is_told_to_stop() -> None:
    fast = ("--dp-size", "2", "--time-scale", "200")
    with engine("--role", "prefill", *fast) as (prefill, p_line), engine("--role", "decode", *fast) as (decode, d_line):
        p, d = READY.fullmatch(p_line.strip()), READY.fullmatch(d_line.strip())
        assert p is not None, p_line
        assert d is not None, d_line
        assert (p[1], p[4], d[1], d[4], d[5]) == ("prefill", "2", "decode", "2", None)
        body = {
            "model": "m",
            "prompt": "a",
            "max_tokens": 3,
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": int(p[5]),
        }
        with httpx.Client(timeout=PATIENCE_S) as http, httpx.Client(timeout=PATIENCE_S) as other:
            leg = http.build_request(
                "POST", p[2] + "/v1/completions", json={**body, "bootstrap_room": 1, "stream": True}
            )
            # Streaming lets one thread start both legs: the prefill leg ends when decode has come.
            from threading import Thread  # noqa: PLC0415 - only here

            thread = Thread(target=lambda: http.send(leg))
            thread.start()
            answer = other.post(d[2] + "/v1/completions", json={**body, "bootstrap_room": 1})
            thread.join(PATIENCE_S)
        assert answer.json()["choices"][0]["text"] == words(3)
        for process, number in ((prefill, signal.SIGTERM), (decode, signal.SIGINT)):
            process.send_signal(number)
            assert process.wait(PATIENCE_S) == 0
            assert process.stdout is not None
            assert process.stdout.read() == ""


def test_a_port_in_use_is_said_and_ends_the_process() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with engine("--port", str(taken.getsockname()[1])) as (process, line):
            assert "cannot start" in line
            assert process.wait(PATIENCE_S) == 1


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(flags)


def test_flags_reach_the_configuration() -> None:
    config = config_from(
        parse("--role", "decode", "--dp-size", "4", "--time-scale", "10", "--kv-capacity-tokens", "77")
    )
    assert (config.role, config.dp_size, config.time_scale) == (Role.DECODE, 4, 10.0)
    assert config.gpu.kv_capacity_tokens == 77
    assert config_from(parse()).bootstrap_port == 8998


@pytest.mark.parametrize("flags", [("--dp-size", "0"), ("--time-scale", "0"), ("--role", "both")])
def test_nonsense_is_refused(flags: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*flags)
    assert flags[0] in capsys.readouterr().err
