"""`extproc envoy`: prints the Envoy configuration that goes with the service, whole or in parts to paste."""

import argparse
import os
import sys
from pathlib import Path

from extproc.cli.flags import add_config_flags, config_from
from extproc.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, and where Envoy finds the service."""
    add_config_flags(parser)
    group = parser.add_argument_group("envoy")
    group.add_argument("--grpc-target", metavar="TARGET", help="where Envoy finds the service: host:port or unix:PATH")
    group.add_argument("--admin", metavar="HOST:PORT", help="Envoy's admin interface (default: none)")
    group.add_argument(
        "--secrets",
        type=Path,
        metavar="DIR",
        help="write files there by which Envoy watches its certificates (SDS; default: it reads them once)",
    )
    group.add_argument("--access-log", metavar="FILE", help="Envoy's access log, JSON lines (/dev/stdout works)")
    parts = group.add_mutually_exclusive_group()
    parts.add_argument(
        "--snippet", metavar="NAME", help="print one part, to paste into an Envoy that is there (docs/attach.md)"
    )
    group.add_argument("--domain", metavar="NAME", help="of the snippet virtual-host (default: *, any)")
    group.add_argument("--prefix", metavar="PATH", help="of paths that a snippet's routes take (default: /v1/)")
    parts.add_argument("--list-snippets", action="store_true", help="say which parts there are, and where each goes")


def run(args: argparse.Namespace) -> int:
    """Print the bootstrap as YAML, or a part of it, and write the files it names. Raises ConfigError."""
    from extproc import envoy_config  # noqa: PLC0415 - takes a second to import
    from extproc.envoy_config.snippets import BY_NAME  # noqa: PLC0415

    if args.list_snippets:
        sys.stdout.write(envoy_config.list_of_snippets())
        return 0
    if args.snippet and args.snippet not in BY_NAME:
        raise ConfigError(f"--snippet {args.snippet}: there is none of that name, but {', '.join(BY_NAME)}")
    config = config_from(args, need_workers=False)  # the bootstrap does not depend on them
    secrets = args.secrets.absolute() if args.secrets else None
    if args.snippet:
        given = {name: value for name in ("domain", "prefix") if (value := getattr(args, name)) is not None}
        variables = envoy_config.Variables(config, args.grpc_target, args.access_log, secrets, **given)
        printed = envoy_config.snippet_text(args.snippet, variables)
    else:
        bootstrap = envoy_config.bootstrap(
            config, admin=args.admin, grpc_target=args.grpc_target, access_log=args.access_log, secrets=secrets
        )
        printed = envoy_config.to_yaml(bootstrap)
    if secrets:
        for name, content in envoy_config.secret_files(config, grpc_target=args.grpc_target).items():
            _replace(secrets / name, envoy_config.to_yaml(content))
    sys.stdout.write(printed)
    return 0


def _replace(path: Path, text: str) -> None:
    """In one step: an Envoy that runs already looks when a file is moved into the folder."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text)
        os.replace(fresh, path)
    except OSError as error:
        raise ConfigError(f"--secrets: {error.filename or path}: {error.strerror}") from None
