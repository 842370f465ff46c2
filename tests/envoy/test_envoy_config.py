"""The bootstrap that is printed: what varies with the configuration, and what must never appear."""

import pytest
import yaml

from extproc.config import MIB, Config, WorkerConfig
from extproc.envoy_config import bootstrap, from_yaml, to_yaml
from extproc.errors import ConfigError


def tree(**kwargs) -> dict:
    """The bootstrap as the YAML says it; keywords of `bootstrap` apart, they are settings."""
    extra = {name: kwargs.pop(name) for name in ("admin", "grpc_target", "access_log") if name in kwargs}
    return yaml.safe_load(to_yaml(bootstrap(Config(**kwargs), **extra)))


def listener(name: str, **kwargs) -> dict:
    return next(part for part in tree(**kwargs)["static_resources"]["listeners"] if part["name"] == name)


def manager(name: str, **kwargs) -> dict:
    return listener(name, **kwargs)["filter_chains"][0]["filters"][0]["typed_config"]


def cluster(name: str, **kwargs) -> dict:
    return next(part for part in tree(**kwargs)["static_resources"]["clusters"] if part["name"] == name)


def http_options(name: str, **kwargs) -> dict:
    [options] = cluster(name, **kwargs)["typed_extension_protocol_options"].values()
    return options


def service_address(**kwargs) -> dict:
    endpoint = cluster("extproc", **kwargs)["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    return endpoint["address"]


def test_workers_are_not_in_it() -> None:
    with_workers = Config(prefill=(WorkerConfig(url="http://p:1"),), decode=(WorkerConfig(url="http://d:2"),))
    assert to_yaml(bootstrap(with_workers)) == to_yaml(bootstrap(Config()))


def test_what_is_printed_parses_back_to_the_same() -> None:
    text = to_yaml(bootstrap(Config(), admin="127.0.0.1:9901", access_log="/dev/stdout"))
    assert to_yaml(from_yaml(text)) == text


@pytest.mark.parametrize("text", ["a: [", "no_such_field: 1", "[1]", "static_resources: 3", "3"])
def test_what_is_no_bootstrap_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not an Envoy bootstrap"):
        from_yaml(text)


def test_listens_where_the_configuration_says() -> None:
    assert listener("public", host="::1", port=81)["address"] == {
        "socket_address": {"address": "::1", "port_value": 81}
    }


def test_admin_only_on_request() -> None:
    assert "admin" not in tree()
    assert tree(admin="127.0.0.1:0")["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"


@pytest.mark.parametrize("admin", ["127.0.0.1", ":1", "h:x", "h:70000", "9901"])
def test_a_bad_admin_address_is_named(admin: str) -> None:
    with pytest.raises(ConfigError, match="admin: expected HOST:PORT"):
        bootstrap(Config(), admin=admin)


@pytest.mark.parametrize(
    ("settings", "address"),
    [
        ({"grpc_host": "127.0.0.1", "grpc_port": 1}, {"socket_address": {"address": "127.0.0.1", "port_value": 1}}),
        # What a server listens on is not always what a client can dial.
        ({"grpc_host": "0.0.0.0"}, {"socket_address": {"address": "127.0.0.1", "port_value": 9002}}),
        ({"grpc_host": "::"}, {"socket_address": {"address": "::1", "port_value": 9002}}),
        ({"grpc_target": "unix:/run/x.sock"}, {"pipe": {"path": "/run/x.sock"}}),
        ({"grpc_target": "[::1]:7"}, {"socket_address": {"address": "::1", "port_value": 7}}),
        ({"grpc_target": "extproc:7"}, {"socket_address": {"address": "extproc", "port_value": 7}}),
    ],
)
def test_the_service_is_found_at_its_address(settings: dict, address: dict) -> None:
    assert service_address(**settings) == address


def test_only_a_name_is_resolved() -> None:
    assert cluster("extproc", grpc_target="extproc:7")["type"] == "STRICT_DNS"
    assert cluster("extproc", grpc_target="127.0.0.1:7")["type"] == "STATIC"


def test_the_body_limit_leaves_room_for_what_is_spliced_in() -> None:
    assert listener("il_pd", max_payload_size=5 * MIB)["per_connection_buffer_limit_bytes"] == 6 * MIB
    host = manager("public", max_payload_size=5 * MIB)["route_config"]["virtual_hosts"][0]
    assert int(host["request_body_buffer_limit"]) == 6 * MIB


def test_memory_and_connections_have_the_configured_end() -> None:
    overload = tree(envoy_max_heap_bytes=3 * MIB, max_connections=7)["overload_manager"]
    heap, connections = (monitor["typed_config"] for monitor in overload["resource_monitors"])
    assert int(heap["max_heap_size_bytes"]) == 3 * MIB
    assert int(connections["max_active_downstream_connections"]) == 7


def test_only_clients_are_refused_for_want_of_memory_or_connections() -> None:
    assert listener("il_pd")["bypass_overload_manager"] is True
    assert listener("il_pd")["ignore_global_conn_limit"] is True
    assert "bypass_overload_manager" not in listener("public")
    assert tree(admin="127.0.0.1:0")["admin"]["ignore_global_conn_limit"] is True


def test_headers_that_the_public_listener_takes_pass_the_internal_one() -> None:
    added = 20
    """About a dozen come from Envoy and the service."""
    outer, inner = manager("public"), manager("il_pd")
    assert inner["max_request_headers_kb"] > outer["max_request_headers_kb"]
    most = outer["common_http_protocol_options"]["max_headers_count"] + added
    assert inner["common_http_protocol_options"]["max_headers_count"] >= most


def test_a_body_longer_than_a_grpc_message_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_payload_size: at most"):
        bootstrap(Config(max_payload_size=2**31))


def test_timeouts_and_retries_follow_the_configuration() -> None:
    http = manager("public", request_timeout_secs=120.5, retry_max_retries=7)
    route = http["route_config"]["virtual_hosts"][0]["routes"][0]["route"]
    assert route["timeout"] == http["stream_idle_timeout"] == http["request_timeout"] == "120.500s"
    assert route["retry_policy"]["num_retries"] == 7


def test_a_failing_service_never_fails_a_request_by_itself() -> None:
    ext_proc, router = manager("il_pd")["http_filters"]
    assert ext_proc["typed_config"]["failure_mode_allow"] is True
    assert router["name"] == "envoy.filters.http.router"
    # Whatever was not marked by the service ends here, not at an engine.
    assert "direct_response" in manager("il_pd")["route_config"]["virtual_hosts"][0]["routes"][-1]


def test_nor_does_decodes_body_reach_prefill_then() -> None:
    ext_proc, guard, codec = http_options("prefill")["http_filters"]
    assert ext_proc["typed_config"]["failure_mode_allow"] is True
    assert 'get("x-pd-mode") ~= "prefill"' in guard["typed_config"]["default_source_code"]["inline_string"]
    assert codec["name"] == "envoy.filters.http.upstream_codec"


def test_a_prefill_that_neither_reads_nor_answers_has_an_end() -> None:
    # Later than the service's own, which tells the client.
    options = http_options("prefill", prefill_timeout_secs=7.5)["common_http_protocol_options"]
    assert options["max_stream_duration"] == "12.500s"
    assert "max_stream_duration" not in http_options("decode")["common_http_protocol_options"]


def test_the_prefill_legs_calls_name_the_room_for_grpcio_only() -> None:
    for transport, expected in (("lean", []), ("grpcio", [{"key": "x-pd-room", "value": "%REQ(x-pd-room)%"}])):
        service = http_options("prefill", transport=transport)["http_filters"][0]["typed_config"]["grpc_service"]
        assert service.get("initial_metadata", []) == expected


def test_access_logs_only_on_request() -> None:
    for name in ("public", "il_pd"):
        to_service = manager(name).get("access_log", [])
        assert len(to_service) == (name == "il_pd")  # what broke off, for the service
        log, *others = manager(name, access_log="/tmp/log")["access_log"]
        assert others == to_service
        assert log["typed_config"]["path"] == "/tmp/log"
        assert log["typed_config"]["log_format"]["json_format"]["listener"] == name
