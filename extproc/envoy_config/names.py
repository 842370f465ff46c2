"""Names of the configuration: listeners, clusters, and what tells the service's two filters apart.

The headers of the contract are named in `extproc.mutation`.
"""

LEG_METADATA = "x-pd-leg"
"""gRPC metadata of an ext_proc stream: which of the two filters opened it (a `Leg`)."""
MODE_PD = "pd"
MODE_DIRECT = "direct"
MODE_PREFILL = "prefill"
"""Values of the header `mutation.MODE`."""

# Statistics, access logs, snippets and docs use these.
PUBLIC = "public"
ROUTE_LISTENER = "il_pd"
PREFILL_LISTENER = "il_p"
DECODE_CLUSTER = "decode"
PREFILL_CLUSTER = "prefill"
SERVICE_CLUSTER = "extproc"
PROCESS_CLUSTER = "extproc_{}"
"""One of the service's processes, where there are several."""
GATEWAY_CLUSTER = "pd_gateway"
"""In an edge Envoy: this gateway as a whole."""
