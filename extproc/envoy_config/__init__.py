"""The Envoy bootstrap for a `Config`, built from envoy-data-plane's typed messages and printed as YAML.

No I/O. Only what an operator may set varies: addresses, limits, timeouts. The list of workers is not in it: the service
names `ip:port` per request and the ORIGINAL_DST clusters dial that, so workers come and go without touching Envoy.
The commented twin of what this prints is `envoy/envoy.yaml`; `docs/` and `envoy/README.md` explain the topology.

Importing this module takes about a second (pydantic dataclasses), so import it only where a bootstrap is printed.
"""

from pathlib import PurePosixPath

import betterproto2
import yaml
from betterproto2 import Casing
from envoy_data_plane.envoy.config.bootstrap.v3 import Admin, Bootstrap, BootstrapStaticResources
from envoy_data_plane.envoy.config.core.v3 import Node

from extproc.config import Config
from extproc.envoy_config.addresses import socket_address
from extproc.envoy_config.clusters import clusters
from extproc.envoy_config.listeners import public_listener, route_listener
from extproc.envoy_config.overload import overload_manager
from extproc.envoy_config.service_tls import secret_files
from extproc.envoy_config.snippets import Variables, internal_listeners, list_of_snippets, snippet_text
from extproc.errors import ConfigError

__all__ = ["Variables", "bootstrap", "from_yaml", "list_of_snippets", "secret_files", "snippet_text", "to_yaml"]

NODE = "extproc"


def bootstrap(
    config: Config,
    *,
    admin: str | None = None,
    grpc_target: str | None = None,
    access_log: str | None = None,
    secrets: PurePosixPath | None = None,
) -> Bootstrap:
    """The whole bootstrap.

    `admin` is `host:port` of the admin interface (none when absent), `grpc_target` where Envoy finds the service
    (`host:port` or `unix:PATH`; default from the configuration), `access_log` a file for JSON lines of each
    request (`/dev/stdout` works), `secrets` the folder with `secret_files` that Envoy is to watch (default: it reads
    certificates once). Raises ConfigError for what Envoy cannot express.
    """
    return Bootstrap(
        # Envoy takes secrets from files only when it has a name (or `--service-node` and `--service-cluster`).
        node=Node(id=NODE, cluster=NODE) if secrets else None,
        # Whoever looks after Envoy has to reach it when clients have taken all connections.
        admin=Admin(address=socket_address(admin, "admin"), ignore_global_conn_limit=True) if admin else None,
        overload_manager=overload_manager(config),
        bootstrap_extensions=[internal_listeners()],
        static_resources=BootstrapStaticResources(
            listeners=[
                public_listener(config, access_log=access_log),
                route_listener(config, access_log=access_log),
            ],
            clusters=clusters(config, grpc_target=grpc_target, secrets=secrets),
        ),
    )


def to_yaml(message: betterproto2.Message) -> str:
    """The message as YAML with proto field names, as Envoy's own documentation writes it."""
    return yaml.safe_dump(message.to_dict(casing=Casing.SNAKE), sort_keys=False, width=120)


def from_yaml(text: str) -> Bootstrap:
    """Parse a bootstrap. Raises ConfigError for anything that is not one (unknown fields included)."""
    try:
        return Bootstrap.from_dict(yaml.safe_load(text))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"not an Envoy bootstrap: {error}") from error
