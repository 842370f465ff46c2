"""The committed `envoy/`: the same as what the generator gives, and usable as it says."""

import asyncio
from pathlib import Path
from typing import Any as Json

import pytest
import yaml
from betterproto2 import Message
from envoy_data_plane.envoy.config.cluster.v3 import Cluster
from envoy_data_plane.envoy.config.core.v3 import TypedExtensionConfig
from envoy_data_plane.envoy.config.listener.v3 import Listener
from envoy_data_plane.envoy.config.route.v3 import Route, VirtualHost
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter

from extproc.config import Config
from extproc.envoy_config import bootstrap, from_yaml, to_yaml
from extproc.envoy_process import validate

ENVOY = Path(__file__).parents[2] / "envoy"
SETTINGS = Config(port=8080)
"""The settings that `envoy.yaml` states at its top."""
ADMIN = "127.0.0.1:9901"


def snippet(name: str) -> list[Json]:
    return yaml.safe_load((ENVOY / "filters" / f"{name}.yaml").read_text())


def generated() -> Json:
    return yaml.safe_load(to_yaml(bootstrap(SETTINGS, admin=ADMIN)))


def listener(name: str) -> Json:
    return next(part for part in generated()["static_resources"]["listeners"] if part["name"] == name)


def manager(name: str) -> Json:
    return listener(name)["filter_chains"][0]["filters"][0]["typed_config"]


def host(name: str) -> Json:
    return manager(name)["route_config"]["virtual_hosts"][0]


def normal(kind: type[Message], parts: list[Json]) -> list[Json]:
    """Different ways to write the same message become one."""
    return [yaml.safe_load(to_yaml(kind.from_dict(part))) for part in parts]


def test_envoy_yaml_is_what_is_printed_for_its_settings() -> None:
    assert to_yaml(from_yaml((ENVOY / "envoy.yaml").read_text())) == to_yaml(bootstrap(SETTINGS, admin=ADMIN))


def test_every_snippet_is_the_generated_part() -> None:
    static = generated()["static_resources"]
    parts = {
        "bootstrap_extensions": (TypedExtensionConfig, generated()["bootstrap_extensions"]),
        "clusters": (Cluster, static["clusters"]),
        "internal_listeners": (Listener, [listener("il_pd"), listener("il_p")]),
        "early_header_mutation": (TypedExtensionConfig, manager("public")["early_header_mutation_extensions"]),
        "virtual_host": (VirtualHost, [{**host("public"), "name": "pd"}]),
        "ext_proc_route": (HttpFilter, manager("il_pd")["http_filters"][:1]),
        "routes": (Route, host("il_pd")["routes"]),
    }
    assert set(parts) == {path.stem for path in (ENVOY / "filters").iterdir()}
    for name, (kind, expected) in parts.items():
        assert normal(kind, snippet(name)) == normal(kind, expected), name


def own_envoy() -> Json:
    """A small Envoy as somebody may have it: a listener, a filter and a virtual host of its own."""
    text = """
        static_resources:
          listeners:
            - name: mine
              address: {socket_address: {address: 127.0.0.1, port_value: 10000}}
              filter_chains:
                - filters:
                    - name: envoy.filters.network.http_connection_manager
                      typed_config:
                        "@type": HTTP_CONNECTION_MANAGER
                        stat_prefix: mine
                        http_filters:
                          - name: envoy.filters.http.cors
                            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors}
                          - name: envoy.filters.http.router
                            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
                        route_config:
                          virtual_hosts:
                            - name: mine
                              domains: [mine.example]
                              routes: [{match: {prefix: /}, direct_response: {status: 200}}]
          clusters:
            - name: something_else
              type: STATIC
    """
    manager_url = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
    return yaml.safe_load(text.replace("HTTP_CONNECTION_MANAGER", f"type.googleapis.com/{manager_url}"))


def with_the_common_snippets() -> tuple[Json, Json]:
    """Somebody's Envoy with what is always needed pasted in, and its HttpConnectionManager."""
    envoy = own_envoy()
    static = envoy["static_resources"]
    http = static["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    envoy["bootstrap_extensions"] = snippet("bootstrap_extensions")
    static["clusters"] += snippet("clusters")
    static["listeners"] += snippet("internal_listeners")
    http["early_header_mutation_extensions"] = snippet("early_header_mutation")
    return envoy, http


@pytest.mark.envoy
def test_envoy_accepts_envoy_yaml() -> None:
    asyncio.run(validate((ENVOY / "envoy.yaml").read_text()))


@pytest.mark.envoy
def test_envoy_accepts_the_snippets_by_way_of_il_pd() -> None:
    envoy, http = with_the_common_snippets()
    http["route_config"]["virtual_hosts"] += snippet("virtual_host")
    asyncio.run(validate(yaml.safe_dump(envoy)))


@pytest.mark.envoy
def test_envoy_accepts_the_snippets_without_the_hop() -> None:
    envoy, http = with_the_common_snippets()
    http["http_filters"][-1:-1] = snippet("ext_proc_route")
    http["route_config"]["virtual_hosts"].append({"name": "pd", "domains": ["*"], "routes": snippet("routes")})
    asyncio.run(validate(yaml.safe_dump(envoy)))
