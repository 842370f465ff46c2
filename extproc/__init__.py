"""Envoy ext_proc service that places LLM requests on the least loaded prefill and decode DP ranks."""

from importlib.util import find_spec

__version__ = "0.1.0"


def is_compiled() -> bool:
    """Whether the core is extension modules (`setup.py`)."""
    core = find_spec("extproc.exchange")
    return core is not None and not (core.origin or "").endswith(".py")


def version() -> str:
    """The version and how it is built, for people."""
    return f"{__version__} ({'compiled' if is_compiled() else 'pure Python'})"
