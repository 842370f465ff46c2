"""File and flags → Config, and what is wrong with them, by name."""

import argparse
from pathlib import Path

import pytest

from extproc.cli.flags import add_config_flags, config_from
from extproc.config import Config, build, read_file
from extproc.errors import ConfigError
from extproc.model import Role

YAML = """
prefill:
  - url: http://a:30000
    bootstrap_port: 8998
decode:
  - url: http://b:30001
    dp_size: 4
policy: round_robin
worker_load_check_interval: 3
"""


def parse(*flags: str, file: Path | None = None) -> Config:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    return config_from(parser.parse_args([*(["--config", str(file)] if file else []), *flags]))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "extproc.yaml"
    path.write_text(YAML)
    return path


def test_a_file(file):
    config = parse(file=file)
    prefill, decode = config.workers()
    assert (prefill.role, prefill.name, prefill.bootstrap_host, prefill.bootstrap_port) == (
        Role.PREFILL,
        "a:30000",
        "a",
        8998,
    )
    assert (decode.role, decode.url, decode.dp_size, decode.bootstrap_port) == (Role.DECODE, "http://b:30001", 4, None)
    assert config.worker_load_check_interval == 3


def test_flags_beat_the_file(file):
    config = parse("--policy", "random", "--prefill", "http://c:1", "9000", "--prefill", "http://d", "none", file=file)
    assert config.policy == "random"
    assert [worker.name for worker in config.workers()] == ["c:1", "d:80", "b:30001"]
    assert config.prefill[0].bootstrap_port == 9000
    assert config.prefill[1].bootstrap_port is None
    assert config.worker_load_check_interval == 3


def test_flags_of_sglang_router_with_their_defaults():
    config = parse("--prefill", "http://a:1", "8998", "--decode", "http://b:1")
    assert config.worker_load_check_interval == 10
    assert config.worker_startup_check_interval == 30
    assert config.worker_startup_timeout_secs == 1800
    assert (config.port, config.prometheus_port) == (30000, 29000)
    assert config.rank_policy(Role.PREFILL) == config.rank_policy(Role.DECODE) == "minimum_tokens"
    config = parse(
        *("--prefill", "http://a:1", "--decode", "http://b:1", "--policy", "random", "--decode-policy", "round_robin"),
        *("--no-dp-minimum-tokens-scheduler", "--decode-rank-policy", "minimum_tokens"),
    )
    assert [config.worker_policy(role) for role in Role] == ["random", "round_robin"]
    assert [config.rank_policy(role) for role in Role] == ["bootstrap_room", "minimum_tokens"]


def test_every_setting_has_a_flag():
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    flags = {action.dest for action in parser._actions}
    assert set(Config.__struct_fields__) - flags == {"metrics_paths", "direct_paths"}  # lists read badly as flags


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prefil: []", "prefil"),
        ("prefill: [{url: 'http://a:1', bootstrap_port: x}]", r"prefill\[0\].bootstrap_port: Expected `int"),
        ("prefill: [{url: 'http://a:1', bootstrap_port: 70000}]", r"prefill\[0\].bootstrap_port"),
        ("worker_load_check_interval: 0", "worker_load_check_interval"),
        ("decode: [{dp_size: 2}]", r"decode\[0\]: .*`url`"),
        ("decode: [{url: 'grpc://a:1'}]", "decode worker url 'grpc://a:1': expected http://HOST"),
        ("decode: [{url: 'http://a:1/path'}]", "nothing after it"),
        ("decode: [{url: 'http://a:99999'}]", "decode worker url"),
        ("decode: [{url: 'http://a:1'}, {url: 'http://a:1'}]", "listed twice"),
        ("decode: [{url: 'http://a:1', model: x}, {url: 'http://b:1', model: y}]", "different models"),
        ("log_level: loud", "log_level"),
    ],
)
def test_errors_name_the_key(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        build(read_file(path), {}, str(path))


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "expected a mapping"), ("a: [", "not YAML"), ("", "expected a mapping")]
)
def test_files_that_are_no_settings(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"bad.yaml: {message}"):
        read_file(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml: No such file"):
        read_file(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no workers: give at least one --prefill"),
        (["--prefill", "http://a:1", "--prefill", "http://b:1"], "one --decode URL"),
        (["--prefill", "http://a:1", "port", "--decode", "http://b:1"], "BOOTSTRAP_PORT must be a number"),
        (["--prefill", "http://a:1", "1", "2", "--decode", "http://b:1"], r"expected URL \[BOOTSTRAP_PORT\]"),
        (["--prefill", "http://a:1", "99999", "--decode", "http://b:1"], r"flags: prefill\[0\].bootstrap_port"),
    ],
)
def test_errors_in_flags(flags, message):
    with pytest.raises(ConfigError, match=message):
        parse(*flags)


def test_ipv6():
    [worker] = build({"decode": [{"url": "http://[::1]:30000"}]}, {}).workers()
    assert (worker.name, worker.endpoint) == ("[::1]:30000", "[::1]:30000")
