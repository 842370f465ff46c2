"""Names of the configuration: listeners and clusters. The headers of the contract are named in `extproc.mutation`."""

MODE_PD = "pd"
MODE_DIRECT = "direct"
MODE_PREFILL = "prefill"
"""Values of the header `mutation.MODE`."""

# Statistics, access logs, snippets and docs use these.
PUBLIC = "public"
ROUTE_LISTENER = "il_pd"
DECODE_CLUSTER = "decode"
PREFILL_CLUSTER = "prefill"
SERVICE_CLUSTER = "extproc"
PROCESS_CLUSTER = "extproc_{}"
"""One of the service's processes, where there are several; the way to prefill of what it has placed is
`mutation.process_mark`."""
GATEWAY_CLUSTER = "pd_gateway"
"""In an edge Envoy: this gateway as a whole."""
