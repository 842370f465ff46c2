"""What Envoy may hold: memory and connections, and what it refuses when that is nearly used up.

The rule (https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/operations/overload_manager/overload_manager):
between `SHED_FROM` and `SHED_ALL` of the heap, a growing share of what clients send is refused, new requests and
uploads under way alike; what is already answered goes on. Only on the public listener: a leg refused between the
listeners would fail a request that was let in (`bypass_overload_manager` there).
"""

from datetime import timedelta

from envoy_data_plane.envoy.config.overload.v3 import (
    BufferFactoryConfig,
    LoadShedPoint,
    OverloadAction,
    OverloadManager,
    ResourceMonitor,
    ScaledTrigger,
    ThresholdTrigger,
    Trigger,
)
from envoy_data_plane.envoy.extensions.resource_monitors.downstream_connections.v3 import DownstreamConnectionsConfig
from envoy_data_plane.envoy.extensions.resource_monitors.fixed_heap.v3 import FixedHeapConfig
from envoy_data_plane.google.protobuf import Any

from extproc.config import Config

HEAP = "envoy.resource_monitors.fixed_heap"
CONNECTIONS = "envoy.resource_monitors.global_downstream_max_connections"

REFRESH_S = 0.02
"""How often the heap is looked at. Envoy's default of 1 s lets in 2.5 GB on a 20 Gbit/s link; with this an
idle Envoy takes 0.5 % of a core, all told."""
SHED_FROM, SHED_ALL = 0.6, 0.9
"""Shares of the heap. What is let in takes more before it is done: a body is there twice while it is uploaded (for a
retry and for the service), and up to four times while the service answers and both legs are sent."""
RESET_FROM, RESET_ALL = 0.9, 1.0
"""Shares of the heap between which HTTP/2 uploads are reset, the largest first: a reset says nothing to the client, so
only when refusing new requests has not helped."""
TRACKED_STREAM_POWER_OF_TWO = 20
"""Streams that hold 1 MiB or more may be reset."""


def overload_manager(config: Config) -> OverloadManager:
    """Bounds of the heap (`envoy_max_heap_bytes`) and of clients' connections (`max_connections`)."""
    shed = _scaled(SHED_FROM, SHED_ALL)
    return OverloadManager(
        refresh_interval=timedelta(seconds=REFRESH_S),
        resource_monitors=[
            ResourceMonitor(
                name=HEAP, typed_config=Any.pack(FixedHeapConfig(max_heap_size_bytes=config.envoy_max_heap_bytes))
            ),
            ResourceMonitor(
                name=CONNECTIONS,
                typed_config=Any.pack(
                    DownstreamConnectionsConfig(max_active_downstream_connections=config.max_connections)
                ),
            ),
        ],
        actions=[
            OverloadAction(
                name="envoy.overload_actions.shrink_heap",
                triggers=[Trigger(name=HEAP, threshold=ThresholdTrigger(value=0.0))],  # always
                # Every 10 s, beyond 100 MB. Envoy 1.36 knows no `ShrinkHeapConfig`, and does not start with one.
            ),
            # A growing share of new requests: 503.
            OverloadAction(name="envoy.overload_actions.stop_accepting_requests", triggers=[shed]),
            # HTTP/2 uploads under way. Has no effect on HTTP/1.1.
            OverloadAction(
                name="envoy.overload_actions.reset_high_memory_stream", triggers=[_scaled(RESET_FROM, RESET_ALL)]
            ),
        ],
        # HTTP/1.1 uploads under way, at each read: so the longer, the likelier. Not once the answer has begun.
        loadshed_points=[LoadShedPoint(name="envoy.load_shed_points.http1_server_abort_dispatch", triggers=[shed])],
        buffer_factory_config=BufferFactoryConfig(minimum_account_to_track_power_of_two=TRACKED_STREAM_POWER_OF_TWO),
    )


def _scaled(begin: float, full: float) -> Trigger:
    return Trigger(name=HEAP, scaled=ScaledTrigger(scaling_threshold=begin, saturation_threshold=full))
