"""`extproc envoy`: prints the Envoy bootstrap that goes with the service."""

import argparse
import sys

from extproc.cli.flags import add_config_flags, config_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, and where Envoy finds the service."""
    add_config_flags(parser)
    group = parser.add_argument_group("envoy")
    group.add_argument("--grpc-target", metavar="TARGET", help="where Envoy finds the service: host:port or unix:PATH")
    group.add_argument("--admin", metavar="HOST:PORT", help="Envoy's admin interface (default: none)")
    group.add_argument("--access-log", metavar="FILE", help="Envoy's access log, JSON lines (/dev/stdout works)")


def run(args: argparse.Namespace) -> int:
    """Print the bootstrap as YAML. Raises ConfigError."""
    from extproc import envoy_config  # noqa: PLC0415 - takes a second to import

    config = config_from(args, need_workers=False)  # the bootstrap does not depend on them
    bootstrap = envoy_config.bootstrap(
        config, admin=args.admin, grpc_target=args.grpc_target, access_log=args.access_log
    )
    sys.stdout.write(envoy_config.to_yaml(bootstrap))
    return 0
