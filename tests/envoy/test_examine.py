"""`extproc check --envoy-admin`: a real Envoy, as it should be and with one thing wrong."""

import asyncio
import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any as Json

import pytest
import yaml
from aiohttp import web
from envoy_stub import bench, free_port, run

from extproc.cli.main import main
from extproc.config import Config
from extproc.envoy_config import bootstrap, to_yaml
from extproc.envoy_config.examine import LACKS, examine
from extproc.envoy_config.running import RunningEnvoy
from extproc.envoy_process import EnvoyProcess

EXAMPLES = Path(__file__).parents[2] / "envoy" / "examples"


def check(admin: str, *flags: str) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = main(["check", "--envoy-admin", admin, *flags])
    return status, out.getvalue()


def look_at(text: str, *flags: str) -> tuple[int, str]:
    """Run an Envoy with this configuration, and check it."""
    found = []

    async def scenario() -> None:
        async with EnvoyProcess(text, concurrency=1) as envoy:
            found.append(await asyncio.to_thread(check, envoy.admin_address, *flags))

    run(scenario())
    return found[0]


def generated() -> Json:
    return yaml.safe_load(to_yaml(bootstrap(Config(host="127.0.0.1", port=free_port()), admin="127.0.0.1:0")))


def listener(tree: Json, name: str) -> Json:
    return next(part for part in tree["static_resources"]["listeners"] if part["name"] == name)


def manager(tree: Json, name: str) -> Json:
    return listener(tree, name)["filter_chains"][0]["filters"][0]["typed_config"]


def http_options(tree: Json, name: str) -> Json:
    cluster = next(part for part in tree["static_resources"]["clusters"] if part["name"] == name)
    (options,) = cluster["typed_extension_protocol_options"].values()
    return options


def prefill_ext_proc(tree: Json) -> Json:
    return http_options(tree, "prefill")["http_filters"][0]["typed_config"]


def ext_proc(tree: Json, name: str) -> Json:
    return manager(tree, name)["http_filters"][0]["typed_config"]


def host(tree: Json, name: str) -> Json:
    return manager(tree, name)["route_config"]["virtual_hosts"][0]


def action(tree: Json, name: str) -> Json:
    return host(tree, name)["routes"][0]["route"]


def problems(said: str) -> list[str]:
    return re.findall(r"^    problem: (.*)$", said, re.MULTILINE)


@pytest.mark.envoy
def test_what_extproc_prints_is_well() -> None:
    status, said = look_at(yaml.safe_dump(generated()))
    assert (status, problems(said)) == (0, [])
    for words in (
        "about the route leg in il_pd",
        "about the prefill leg in prefill",
        "il_pd: clients' steering headers",
    ):
        assert words in said
    assert re.search(r"Envoy 1\.\d+\.\d+ is ", said)


@pytest.mark.envoy
def test_a_running_service_is_seen_to_be_connected() -> None:
    async def scenario() -> None:
        async with bench() as b:
            await b.post()
            flags = ("--grpc-port", str(b.relay.port))
            status, said = await asyncio.to_thread(check, f"http://{b.envoy.admin_address}/", *flags)
            assert status == 0
            assert f"the service at 127.0.0.1:{b.relay.port} is connected" in said
            b.relay.cut()
            await b.post()
            status, said = await asyncio.to_thread(check, b.envoy.admin_address, *flags)
            assert status == 1
            assert "could not connect to the service" in problems(said)[0]
            assert len(problems(said)) == 1

    run(scenario())


@pytest.mark.envoy
@pytest.mark.parametrize("name", ["handwritten", "per-route"])
def test_the_examples_are_well(name: str) -> None:
    text = (EXAMPLES / f"{name}.yaml").read_text()
    status, said = look_at(text.replace("9901", "0").replace("10000", str(free_port())))
    assert (status, problems(said)) == (0, [])


@pytest.mark.envoy
def test_what_comes_by_xds_is_found_as_well(tmp_path: Path) -> None:
    """Listeners, routes and clusters from files (LDS, RDS, CDS) instead of the bootstrap."""
    tree = generated()
    routes = manager(tree, "public").pop("route_config")
    source = {"path_config_source": {"path": str(tmp_path / "routes.yaml")}, "resource_api_version": "V3"}
    manager(tree, "public")["rds"] = {"route_config_name": "public", "config_source": source}
    resources = {
        "listeners": ("envoy.config.listener.v3.Listener", tree["static_resources"].pop("listeners")),
        "clusters": ("envoy.config.cluster.v3.Cluster", tree["static_resources"].pop("clusters")),
        "routes": ("envoy.config.route.v3.RouteConfiguration", [routes]),
    }
    for name, (kind, parts) in resources.items():
        typed = [{"@type": f"type.googleapis.com/{kind}"} | part for part in parts]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"resources": typed}))
    tree["node"] = {"id": "test", "cluster": "test"}
    tree["dynamic_resources"] = {
        f"{kind}_config": {
            "path_config_source": {"path": str(tmp_path / f"{name}.yaml")},
            "resource_api_version": "V3",
        }
        for kind, name in (("lds", "listeners"), ("cds", "clusters"))
    }
    status, said = look_at(yaml.safe_dump(tree))
    assert (status, problems(said)) == (0, [])
    assert "the route leg in il_pd" in said


def without_stripping(tree: Json) -> None:
    for name in ("public", "il_pd"):
        del manager(tree, name)["early_header_mutation_extensions"]


def with_stripping_of_one(tree: Json) -> None:
    for name in ("public", "il_pd"):
        [early] = manager(tree, name)["early_header_mutation_extensions"]
        early["typed_config"]["mutations"] = [{"remove_on_match": {"key_matcher": {"prefix": "x-pd-"}}}]


def with_another_service(tree: Json) -> None:
    service = next(part for part in tree["static_resources"]["clusters"] if part["name"] == "extproc")
    address = service["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]
    address["socket_address"]["port_value"] = 9003


def without_its_prefill_filter(tree: Json) -> None:
    del http_options(tree, "prefill")["http_filters"][0]


def without_the_guard(tree: Json) -> None:
    del http_options(tree, "prefill")["http_filters"][1]


def impatient_with_prefill(tree: Json) -> None:
    http_options(tree, "prefill")["common_http_protocol_options"]["max_stream_duration"] = "60s"


def with_prefill_elsewhere(tree: Json) -> None:
    cluster = next(part for part in tree["static_resources"]["clusters"] if part["name"] == "prefill")
    cluster["original_dst_lb_config"]["http_header_name"] = "x-pd-decode-endpoint"


def with_little_room_for_the_service(tree: Json) -> None:
    cluster = next(part for part in tree["static_resources"]["clusters"] if part["name"] == "extproc")
    del cluster["per_connection_buffer_limit_bytes"]


WRONG: dict[str, tuple[Callable[[Json], object], str]] = {
    "no prefill filter": (without_its_prefill_filter, "nothing asks the service about the prefill leg"),
    "no route filter": (lambda t: manager(t, "il_pd")["http_filters"].pop(0), "asks the service about the route leg"),
    "no body": (
        lambda t: ext_proc(t, "il_pd")["processing_mode"].pop("request_body_mode"),
        "request_body_mode is NONE",
    ),
    "headers skipped": (
        lambda t: prefill_ext_proc(t)["processing_mode"].update(response_header_mode="SKIP"),
        "prefill: response_header_mode is SKIP, not SEND: failures are not seen",
    ),
    "fails closed": (lambda t: ext_proc(t, "il_pd").pop("failure_mode_allow"), "failure_mode_allow is off: running"),
    "hasty": (lambda t: ext_proc(t, "il_pd").pop("message_timeout"), "message_timeout is 0.2 s"),
    "cannot wait": (lambda t: ext_proc(t, "il_pd").pop("max_message_timeout"), "max_message_timeout is 0 s"),
    "no guard": (without_the_guard, "mirrored while the service dies reaches prefill with decode's body"),
    "prefill filter tells all": (
        lambda t: prefill_ext_proc(t).pop("forward_rules"),
        "prefill: forward_rules are others",
    ),
    "prefill elsewhere": (with_prefill_elsewhere, "prefill: it does not dial x-pd-prefill-endpoint"),
    "impatient with prefill": (impatient_with_prefill, "ends a prefill after 60 s"),
    "little room for the service": (
        with_little_room_for_the_service,
        "extproc: NOT SAFE: Envoy can crash when 1,048,576 bytes wait for the service",
    ),
    "default timeout": (lambda t: action(t, "public").pop("timeout"), "ends requests after 15 s (timeout)"),
    "default idle timeout": (
        lambda t: (action(t, "public").pop("idle_timeout"), manager(t, "public").pop("stream_idle_timeout")),
        "ends requests after 300 s (idle_timeout)",
    ),
    "no retry": (lambda t: action(t, "public").pop("retry_policy"), "a failed pair is not retried"),
    "attempts not counted": (lambda t: host(t, "public").pop("include_request_attempt_count"), "that have just failed"),
    "small retry buffer": (
        lambda t: host(t, "public").pop("request_body_buffer_limit"),
        "1,048,576 bytes are not retried",
    ),
    "small buffer": (
        lambda t: listener(t, "il_pd").pop("per_connection_buffer_limit_bytes"),
        "1,048,576 bytes get 413",
    ),
    "no mirror": (lambda t: action(t, "il_pd").pop("request_mirror_policies"), "no route mirrors requests to prefill"),
    "nobody comes": (lambda t: action(t, "public").update(cluster="decode"), "no route leads to il_pd"),
    "no access log": (lambda t: manager(t, "il_pd").pop("access_log"), "who broke off a response"),
    "no retry mark": (lambda t: manager(t, "il_pd").pop("local_reply_config"), "refuses the connection is not retried"),
    "open to clients": (without_stripping, "NOT SAFE: clients can set x-pd-*, x-override-*"),
    "half open to clients": (with_stripping_of_one, "NOT SAFE: clients can set x-override-*, x-data-parallel-rank"),
    "another port": (with_another_service, "at 127.0.0.1:9003, but it is at 127.0.0.1:9002"),
    "off": (lambda t: manager(t, "il_pd")["http_filters"][0].update(disabled=True), "is off, and no route turns it on"),
}


@pytest.mark.envoy
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    spoil, words = WRONG[name]
    tree = generated()
    spoil(tree)
    status, said = look_at(yaml.safe_dump(tree))
    assert status == 1
    assert any(words in problem for problem in problems(said)), said


@pytest.mark.envoy
@pytest.mark.parametrize("flags", [("--transport", "grpcio"), ()])
def test_a_configuration_for_another_transport(flags: tuple[str, ...]) -> None:
    status, said = look_at(yaml.safe_dump(generated()), *flags)
    assert (status, "do not name x-pd-room" in said) == ((1, True) if flags else (0, False))


@pytest.mark.envoy
def test_several_processes() -> None:
    config = Config(host="127.0.0.1", port=free_port(), processes=2)
    status, said = look_at(to_yaml(bootstrap(config, admin="127.0.0.1:0")), "--processes", "2")
    assert (status, problems(said)) == (0, [])
    assert "the prefill leg in prefill_0, prefill_1" in said


@pytest.mark.envoy
def test_settings_of_the_service_that_envoy_does_not_follow_are_named() -> None:
    flags = ("--prefill-timeout-secs", "900", "--request-timeout-secs", "3600", "--max-payload-size", "100000000")
    status, said = look_at(yaml.safe_dump(generated()), *flags)
    assert status == 1
    for words in ("prefill_timeout_secs", "request_timeout_secs", "max_payload_size", "max_message_timeout"):
        assert any(words in problem for problem in problems(said)), words


@pytest.mark.parametrize(
    ("version", "words", "problem"),
    [
        ("1.35.9", "is older than 1.36.2: use 1.36.2 to 1.40.0", True),
        ("1.36.4", LACKS[0][1], False),
        ("1.36.4", LACKS[1][1], False),
        ("1.36.2", "1.36.2 is supported", False),
        ("1.37.0", "1.37.0 is supported", False),
        ("1.40.9", "1.40.9 is supported", False),
        ("1.41.0-dev", "newer than what was tried", False),
    ],
)
def test_versions(version: str, words: str, problem: bool) -> None:
    findings = examine(RunningEnvoy(version, "LIVE", [], {}), Config())
    [found] = [finding for finding in findings if words in finding.text]
    assert found.problem is problem


def test_what_came_later_is_not_missed_there() -> None:
    said = [finding.text for finding in examine(RunningEnvoy("1.37.0", "LIVE", [], {}), Config())]
    assert not any(lack in text for text in said for _, lack in LACKS)


@pytest.mark.envoy
def test_nothing_there_and_something_else_there_are_told() -> None:
    status, said = check(f"127.0.0.1:{free_port()}")
    assert status == 1
    assert "does not answer" in said

    async def scenario() -> None:
        async with bench() as b:
            b.decode.behave = answer_with_json
            status, said = await asyncio.to_thread(check, b.decode.endpoint)
            assert status == 1
            assert "is not Envoy's admin interface" in said

    async def answer_with_json(_call):
        return web.json_response({"ok": True})

    run(scenario())
