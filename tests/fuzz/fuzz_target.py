"""What can be fuzzed, and what a finding is."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """One piece of the service behind a function of bytes."""

    name: str
    check: Callable[[bytes], Hashable]
    """Feeds one input and checks what must hold. Raises when it does not; returns what kind of outcome it was, so that
    inputs with a new kind can be kept. Deterministic."""
    seeds: tuple[bytes, ...]
    """Inputs to begin with: ordinary ones."""
    words: tuple[bytes, ...]
    """Pieces that inputs are made of."""
    share: float
    """Of all inputs."""
    modules: tuple[str, ...] = ()
    """Whose coverage guides the search; none: coverage says little here, and kinds of outcome guide it."""
