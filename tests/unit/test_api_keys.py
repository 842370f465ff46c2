"""Where engines' keys come from, when they are read again, and that nothing shows them."""

import logging
import os

import pytest

from extproc.config import Config, WorkerConfig, build
from extproc.discovery.api_keys import ApiKeys
from extproc.errors import ConfigError

KEY = "sk-0123456789"


def replaced(path, text):
    """Written anew as another file, as Kubernetes and editors do."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "key"
    path.write_text(KEY + "\n")
    return path


def test_own_key_then_the_one_for_all_then_none(file):
    entries = (
        WorkerConfig(url="http://a:1", api_key_env="OF_A"),
        WorkerConfig(url="http://b:1"),
    )
    keys = ApiKeys(Config(prefill=entries, api_key_file=str(file)), {"OF_A": "sk-a"})
    assert keys.headers("a:1") == {"authorization": "Bearer sk-a"}
    assert keys.headers("b:1") == {"authorization": f"Bearer {KEY}"}
    assert keys.headers("unknown:1") == {}
    assert ApiKeys(Config(prefill=entries[1:])).headers("b:1") == {}


def test_a_file_is_read_again_when_it_has_changed(file, caplog):
    caplog.set_level(logging.DEBUG)
    keys = ApiKeys(Config(decode=(WorkerConfig(url="http://a:1", api_key_file=str(file)),)))
    replaced(file, "sk-next")
    assert keys.headers("a:1") == {"authorization": "Bearer sk-next"}
    assert keys.headers("a:1") == {"authorization": "Bearer sk-next"}
    assert caplog.text.count("new API key") == 1
    assert "sk-next" not in caplog.text


@pytest.mark.parametrize(
    "spoil", [lambda file: file.unlink(), lambda file: replaced(file, ""), lambda file: replaced(file, "two words")]
)
def test_the_last_key_is_used_on_when_the_file_is_spoilt(file, spoil, caplog):
    keys = ApiKeys(Config(decode=(WorkerConfig(url="http://a:1"),), api_key_file=str(file)))
    spoil(file)
    assert [keys.headers("a:1") for _ in range(3)] == [{"authorization": f"Bearer {KEY}"}] * 3
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "two words" not in caplog.text
    replaced(file, "sk-next")
    assert keys.headers("a:1") == {"authorization": "Bearer sk-next"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected one key"),
        ("sk-secret\nsk-other", "expected one key"),
        ("sk-sécret", "expected one key"),
        ("sk-secret\x00", "expected one key"),
        (None, "No such file"),
    ],
)
def test_a_key_that_cannot_be_sent_is_refused_and_not_quoted(tmp_path, content, message):
    path = tmp_path / "key"
    if content is not None:
        path.write_text(content)
    config = Config(prefill=(WorkerConfig(url="http://a:1", api_key_file=str(path)),))
    with pytest.raises(ConfigError, match=rf"^prefill\[0\].api_key_file: .*key: {message}") as caught:
        ApiKeys(config)
    assert "cret" not in str(caught.value)


def test_a_variable_that_is_not_there():
    with pytest.raises(ConfigError, match="api_key_env: the environment has no variable K"):
        ApiKeys(Config(api_key_env="K"), {})
    with pytest.raises(ConfigError, match="api_key_env: K: expected one key"):
        ApiKeys(Config(api_key_env="K"), {"K": ""})


def test_no_repr_shows_a_key(file):
    keys = ApiKeys(
        Config(
            decode=(WorkerConfig(url="http://a:1"), WorkerConfig(url="http://b:1", api_key_env="K")),
            api_key_file=str(file),
        ),
        {"K": KEY},
    )
    shown = [repr(keys), repr(vars(keys)), *map(repr, vars(keys)["_sources"].values())]
    assert KEY not in "".join(shown)


GOOD = {"prefill": [{"url": "http://a:1"}], "decode": [{"url": "http://b:1"}]}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"grpc_tls_cert": "a"}, "^grpc_tls_cert without grpc_tls_key: set both"),
        ({"grpc_tls_key": "a"}, "^grpc_tls_key without grpc_tls_cert: set both"),
        ({"grpc_tls_client_ca": "a"}, "^grpc_tls_client_ca needs TLS"),
        ({"grpc_tls_cert": "a", "grpc_tls_key": "b", "grpc_uds": "/s"}, "a unix socket takes no TLS"),
        ({"envoy_tls_cert": "a", "envoy_tls_ca": "c"}, "^envoy_tls_cert without envoy_tls_key"),
        ({"envoy_tls_cert": "a", "envoy_tls_key": "b"}, "^envoy_tls_cert needs TLS: set envoy_tls_ca"),
        ({"envoy_tls_server_name": "a"}, "^envoy_tls_server_name needs TLS"),
        ({"api_key_file": "a", "api_key_env": "b"}, "^api_key_file and api_key_env: set one"),
        (
            {"decode": [{"url": "http://b:1", "api_key_file": "a", "api_key_env": "b"}]},
            r"^decode\[0\].api_key_file and decode\[0\].api_key_env: set one",
        ),
    ],
)
def test_half_settings_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        build({**GOOD, **keys}, {})
