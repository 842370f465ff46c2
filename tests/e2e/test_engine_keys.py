"""Engines that want a key: what the service asks them with it, and that clients bring their own."""

import httpx
import pytest
from conftest import until
from split_gateway import Engines, SplitGateway, extproc

pytestmark = pytest.mark.envoy

KEY = "sk-0123456789"


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    with Engines(tmp_path_factory.mktemp("engines"), ["--api-key", KEY]) as engines:
        yield engines


def check(engines, *flags):
    return extproc("check", "--prefill", engines.urls["prefill"], "--decode", engines.urls["decode"], *flags)


def test_check_needs_the_key(tmp_path, engines, monkeypatch):
    file = tmp_path / "key"
    file.write_text("sk-wrong")
    wrong = check(engines, "--api-key-file", str(file))
    assert wrong.returncode == 1
    assert "did not say what it is" in wrong.stdout
    file.write_text(KEY + "\n")
    right = check(engines, "--api-key-file", str(file))
    assert (right.returncode, right.stdout.count("dp_size 2")) == (0, 2), right.stdout + right.stderr
    assert "/v1/loads" in right.stdout
    monkeypatch.setenv("ENGINE_KEY", KEY)
    assert check(engines, "--api-key-env", "ENGINE_KEY").returncode == 0


def test_the_key_itself_is_not_taken_from_the_command_line(engines):
    for flags in (["--api-key", KEY], [f"--api-key={KEY}"]):
        done = check(engines, *flags)
        assert done.returncode == 2
        assert "use --api-key-file FILE or --api-key-env NAME" in done.stderr
        assert KEY not in done.stdout + done.stderr


def test_clients_bring_their_own(tmp_path, engines):
    """The service's key opens nothing for clients: their header goes to the engines as it is."""
    file = tmp_path / "key"
    file.write_text("sk-wrong")
    gateway = SplitGateway(
        tmp_path,
        engines,
        {
            "api_key_file": str(file),
            "metrics_paths": ["/v1/loads?format=prometheus"],
            "worker_load_check_interval": 0.2,
        },
    )

    def scraped():
        return "extproc_scraped_tokens{" in httpx.get(gateway.status_url + "/metrics").text

    with gateway.serve() as service, gateway.envoy():
        until(lambda: "status 401" in service.log_text, "a scrape was refused")
        assert not scraped()
        file.write_text(KEY)
        until(scraped, "loads were read with the new key")
        body = {"text": "hello", "sampling_params": {"max_new_tokens": 2}}
        url = gateway.url + "/generate"
        assert httpx.post(url, json=body, timeout=60).status_code == 401
        good = {"authorization": f"Bearer {KEY}"}
        until(lambda: httpx.post(url, json=body, headers=good, timeout=60).status_code == 200, "a good answer")
        assert KEY not in service.log_text
