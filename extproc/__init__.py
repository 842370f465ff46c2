"""Envoy ext_proc service that places LLM requests on the least loaded prefill and decode DP ranks."""

__version__ = "0.1.0"
