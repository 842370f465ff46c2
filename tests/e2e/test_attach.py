"""Our part in an Envoy that was there before: the examples of `envoy/examples/`, each with real requests."""

import contextlib
import json
from collections.abc import Iterator

import httpx
import pytest
import yaml
from conftest import until
from own_envoy import OwnEnvoy, Shop, before_it_was_attached, example, own_envoy
from split_gateway import Engines, SplitGateway

pytestmark = pytest.mark.envoy

CHAT = {"model": "sim-model", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
LOGIN = {"authorization": "Bearer let-me-in"}
"""The example per-route asks for it; the others do not look."""
NAMES = ["handwritten", "edge", "per-route"]
FORBIDDEN = {
    "x-pd-mode": "pd",
    "X-PD-Room": "7",
    "x-override-host": "evil",
    "x-data-parallel-rank": "1",
    "x-gateway-destination-endpoint": "1.2.3.4:5",
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Iterator[Engines]:
    with Engines(tmp_path_factory.mktemp("engines"), ["--time-scale", "20"]) as running:
        yield running


@pytest.fixture
def shop() -> Iterator[Shop]:
    with Shop() as running:
        yield running


@pytest.fixture
def gateway(tmp_path, engines) -> SplitGateway:
    """Not started."""
    return SplitGateway(tmp_path, engines, {"prometheus_host": "127.0.0.1"})


@contextlib.contextmanager
def attached(gateway: SplitGateway, shop: Shop, text: str) -> Iterator[OwnEnvoy]:
    """An Envoy with an example's text, for this gateway's service."""
    ports = {9002: gateway.grpc_port, 8080: gateway.port, 29000: gateway.status_port, 8000: shop.port}
    with own_envoy(gateway._folder, text, ports) as envoy:
        yield envoy


@contextlib.contextmanager
def everything(name: str, gateway: SplitGateway, shop: Shop) -> Iterator[OwnEnvoy]:
    """What an example needs, running; behind an edge that is a whole gateway."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(gateway.serve())
        if name == "edge":
            stack.enter_context(gateway.envoy())
        envoy = stack.enter_context(attached(gateway, shop, example(name)))
        if name == "edge":
            until(
                lambda: envoy.counter("cluster.pd_gateway.health_check.success"), "the edge has found the gateway well"
            )
        yield envoy


def both_legs(engines: Engines, response: httpx.Response) -> tuple[dict, dict]:
    """What prefill and decode got of a request that was answered."""
    assert response.status_code == 200, response.text
    completion = response.json()
    assert completion["choices"][0]["message"]["content"] == "tok0 tok1 tok2"
    room = int(response.headers["x-pd-room"])

    def legs(role: str) -> list[dict]:
        found = httpx.get(engines.urls[role] + "/sim/requests").json()
        return [record for record in found if record["bootstrap_room"] == room and record["outcome"] == "finished"]

    return tuple(until(lambda role=role: legs(role), f"the {role} leg")[0] for role in ("prefill", "decode"))


@pytest.mark.parametrize("name", NAMES)
def test_pd_works_and_filters_run_in_order(name, gateway, engines, shop):
    gateway.settings["response_headers"] = True
    with everything(name, gateway, shop) as envoy:
        response = envoy.post("llm.example", "/v1/chat/completions", CHAT, **LOGIN, **FORBIDDEN)
        order = {
            "handwritten": "before, mode pd; after, mode pd",  # what the client says is removed at il_pd
            "edge": "before, mode pd",  # and here by the gateway
            "per-route": "before, mode ; after, mode pd",
        }[name]
        for leg in both_legs(engines, response):
            assert leg["headers"]["x-own-order"] == order
            assert leg["headers"]["x-pd-room"] == response.headers["x-pd-room"] != FORBIDDEN["X-PD-Room"]
            assert not {"x-override-host", "x-data-parallel-rank", "x-gateway-destination-endpoint"} & set(
                leg["headers"]
            )
        assert "x-pd-retry" not in response.headers
        if name == "handwritten":
            assert response.headers["x-own-answer"] == "seen"
        if name == "per-route":
            arrived = len(httpx.get(engines.urls["decode"] + "/sim/requests").json())
            refused = envoy.post("llm.example", "/v1/chat/completions", CHAT)
            assert (refused.status_code, refused.text) == (401, "who are you?")
            assert len(httpx.get(engines.urls["decode"] + "/sim/requests").json()) == arrived


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_20_mb_and_streams_pass(name, gateway, engines, shop):
    gateway.settings["response_headers"] = True
    with everything(name, gateway, shop) as envoy:
        large = CHAT | {"user": "x" * 20_000_000}
        for leg in both_legs(engines, envoy.post("llm.example", "/v1/chat/completions", large, **LOGIN)):
            assert leg["body_length"] > 20_000_000
        text = envoy.post("llm.example", "/v1/chat/completions", CHAT | {"stream": True}, **LOGIN).text
        assert text.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize("name", NAMES)
def test_other_hosts_and_paths_are_as_before(name, gateway, shop):
    """The bytes that reach a foreign backend are those of the Envoy as it was; nobody asks the service about them."""
    hosts = [("shop.example", "/buy?x=1")] + ([("llm.example", "/other")] if name == "per-route" else [])

    def ask(envoy: OwnEnvoy) -> list[bytes]:
        seen = []
        for host, path in hosts:
            response = envoy.post(host, path, {"n": 1}, **LOGIN, x_mine="yes")
            assert (response.status_code, response.text, response.headers["x-shop"]) == (200, "shop", "yes")
            seen.append(shop.last)
        return seen

    with attached(gateway, shop, before_it_was_attached(name)) as envoy:
        before = ask(envoy)
    with everything(name, gateway, shop) as envoy:
        assert ask(envoy) == before
        assert envoy.counter("cluster.extproc.upstream_rq_total") == 0
    with attached(gateway, shop, example(name)) as envoy:  # no service, no gateway
        assert ask(envoy) == before
        refused = envoy.post("llm.example", "/v1/chat/completions", CHAT, **LOGIN)
        assert refused.status_code == 503
        if name != "edge":  # there, Envoy's own words
            assert refused.headers["retry-after"] == "1"
        assert shop.last == before[-1]


def test_by_way_of_il_pd_foreign_requests_keep_even_headers_that_look_like_ours(gateway, shop):
    with attached(gateway, shop, before_it_was_attached("handwritten")) as envoy:
        assert envoy.post("shop.example", "/", {}, **FORBIDDEN).status_code == 200
        before = shop.last
        assert b"x-pd-room: 7" in before
    with attached(gateway, shop, example("handwritten")) as envoy:
        assert envoy.post("shop.example", "/", {}, **FORBIDDEN).status_code == 200
        assert shop.last == before


@pytest.mark.parametrize("running", [True, False], ids=["service", "no service"])
@pytest.mark.parametrize("name", ["handwritten", "per-route"])
def test_no_client_says_where_envoy_connects_to(name, running, gateway, shop):
    victim = f"127.0.0.1:{shop.port}"
    with contextlib.ExitStack() as stack:
        if running:
            stack.enter_context(gateway.serve())
        envoy = stack.enter_context(attached(gateway, shop, example(name)))
        for mode in ("pd", "direct", "prefill"):
            steering = {"x-pd-mode": mode, "x-pd-decode-endpoint": victim, "X-Pd-Prefill-Endpoint": victim}
            response = envoy.post("llm.example", "/v1/chat/completions", CHAT, **LOGIN, **steering)
            assert response.status_code == (200 if running else 503)
        assert shop.requests == []


def test_without_strip_the_per_route_way_is_open(gateway, shop):
    """Why the snippet is not optional there: with the service away, a client picks where Envoy connects to."""
    with attached(gateway, shop, example("per-route", without="--snippet strip")) as envoy:
        steering = {"x-pd-mode": "direct", "x-pd-decode-endpoint": f"127.0.0.1:{shop.port}"}
        response = envoy.post("llm.example", "/v1/models", {}, **LOGIN, **steering)
        assert (response.status_code, len(shop.requests)) == (200, 1)


def test_it_is_il_pd_that_keeps_the_handwritten_way_closed(gateway, shop):
    """Without its part of the pasted listeners, the same request goes where the client says."""
    tree = yaml.safe_load(example("handwritten"))
    [il_pd] = [part for part in tree["static_resources"]["listeners"] if part["name"] == "il_pd"]
    del il_pd["filter_chains"][0]["filters"][0]["typed_config"]["early_header_mutation_extensions"]
    with attached(gateway, shop, yaml.safe_dump(tree)) as envoy:
        steering = {"x-pd-mode": "direct", "x-pd-decode-endpoint": f"127.0.0.1:{shop.port}"}
        assert envoy.post("llm.example", "/v1/models", {}, **steering).status_code == 200
        assert len(shop.requests) == 1


def test_a_line_of_the_access_log_says_who_had_the_request(gateway, engines, tmp_path):
    log = tmp_path / "access.log"
    gateway.settings["response_headers"] = True
    with gateway.serve(), gateway.envoy(flags=["--access-log", str(log)]):
        response = httpx.post(gateway.url + "/v1/chat/completions", json=CHAT, timeout=60)

        def lines() -> dict[str, dict]:
            found = [json.loads(line) for line in log.read_text().splitlines()]
            mine = [line for line in found if line["request_id"] == response.headers["x-request-id"]]
            return {line["listener"]: line for line in mine} if len(mine) == 2 else {}

        # Envoy writes to files once in 10 s by itself.
        seen = until(lines, "a line of each listener")
    prefill, decode = (response.headers[f"x-pd-{role}"].split(";dp_rank=") for role in ("prefill", "decode"))
    line = seen["il_pd"]
    assert line["room"] == response.headers["x-pd-room"]
    assert [line["prefill"], line["prefill_rank"]] == prefill
    assert [line["decode"], line["decode_rank"]] == decode
    assert (line["attempt"], line["status"], line["retry"], line["mode"]) == ("1", 200, None, "pd")
    assert seen["public"]["status"] == 200
