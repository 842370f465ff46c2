"""What clients must not set is taken off before Envoy itself reads any of it.

Twice: where clients come in, and again at `il_pd`. There it holds whatever listener the request came by, so that an
Envoy of somebody's own is safe by having `il_pd` (docs/attach.md).
"""

from envoy_data_plane.envoy.config.common.mutation_rules.v3 import HeaderMutation, HeaderMutationRemoveOnMatch
from envoy_data_plane.envoy.config.core.v3 import TypedExtensionConfig
from envoy_data_plane.envoy.extensions.http.early_header_mutation.header_mutation.v3 import (
    HeaderMutation as EarlyHeaderMutation,
)
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.google.protobuf import Any

from extproc.mutation import RESERVED_NAMES, RESERVED_PREFIXES

STRIPPED_PREFIXES = (*RESERVED_PREFIXES, "x-envoy-")
"""Headers no client may set: what steers us or an engine, and Envoy's own knobs (timeouts, retries)."""


def strip_from_clients() -> TypedExtensionConfig:
    """For the listener that clients reach."""
    return _early([_prefix(prefix) for prefix in STRIPPED_PREFIXES])


def strip_between_listeners() -> TypedExtensionConfig:
    """For `il_pd`. Not Envoy's own: the count of attempts is wanted, and a router takes off the knobs that it heeds."""
    return _early([_prefix(prefix) for prefix in RESERVED_PREFIXES])


def _early(by_prefix: list[HeaderMutation]) -> TypedExtensionConfig:
    # Envoy has made names lower case by then.
    names = [HeaderMutation(remove=name) for name in sorted(RESERVED_NAMES)]
    return TypedExtensionConfig(
        name="envoy.http.early_header_mutation.header_mutation",
        typed_config=Any.pack(EarlyHeaderMutation(mutations=[*by_prefix, *names])),
    )


def _prefix(prefix: str) -> HeaderMutation:
    matcher = StringMatcher(prefix=prefix)
    return HeaderMutation(remove_on_match=HeaderMutationRemoveOnMatch(key_matcher=matcher))
