"""Which requests go to a decode worker as they are: those that generate nothing and steer nothing.

Pure. An engine has many more paths, some that only its operator may use (`/flush_cache`, `/update_weights_from_disk`,
`/abort_request`, which matches ids of other clients by prefix) and some that generate without a pair (`/v1/responses`
with a `bootstrap_host` of the client's choice). So what is not listed is not passed on.
"""

from collections.abc import Iterable
from typing import Final

from extproc.errors import ConfigError, NotServed
from extproc.parse import split_path
from extproc.request import ENDPOINTS

READ_METHODS: Final = {"HEAD": "GET"}
"""Who may GET may as well ask for the headers alone."""


class DirectPaths:
    """The list, `METHOD PATH` each; a path that ends in `/*` stands for all below it."""

    def __init__(self, entries: Iterable[str]) -> None:
        """Raises ConfigError for an entry of another shape."""
        self._exact = set[tuple[str, str]]()
        self._below = list[tuple[str, str]]()
        for entry in entries:
            method, _, path = entry.partition(" ")
            if not method.isupper() or not path.startswith("/"):
                raise ConfigError(f"direct_paths: {entry!r}: expected METHOD /path, for example 'GET /v1/models'")
            if path.endswith("/*"):
                self._below.append((method, path[:-1]))
            else:
                self._exact.add((method, path))

    def check(self, method: str, target: str) -> None:
        """Raise NotServed unless a request may be passed on. `target`: path and query."""
        path = split_path(target)
        if method == "OPTIONS":  # a browser asks before it posts; changes nothing anywhere
            return
        method = READ_METHODS.get(method, method)
        if (method, path) in self._exact:
            return
        if any(method == listed and path.startswith(prefix) for listed, prefix in self._below):
            return
        if path in ENDPOINTS:
            raise NotServed(f"{method} {path} is not served here: send a POST")
        raise NotServed(
            f"{method[:20]} {path[:200]} is not served by this gateway: generate with POST "
            f"{', '.join(ENDPOINTS)}; the operator lists what else is passed on (direct_paths)"
        )
