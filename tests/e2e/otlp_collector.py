"""A collector: takes spans over OTLP/HTTP and keeps them."""

import asyncio
import threading
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """Serves in a thread of its own while the context is open."""

    def __init__(self) -> None:
        self.spans: dict[str, list[Span]] = {}
        """By the name of the service that sent them, in the order they came."""
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def of(self, service: str, trace_id: bytes) -> list[Span]:
        """A service's spans of one trace."""
        return [span for span in self.spans.get(service, []) if span.trace_id == trace_id]

    def __enter__(self) -> "Collector":
        app = web.Application()
        app.router.add_post("/v1/traces", self._take)
        self._runner = web.AppRunner(app, access_log=None)
        self._thread.start()
        self._call(self._runner.setup())
        self._call(web.TCPSite(self._runner, "127.0.0.1", 0).start())
        self.port = self._runner.addresses[0][1]
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _take(self, request: web.Request) -> web.Response:
        for resource_spans in ExportTraceServiceRequest.FromString(await request.read()).resource_spans:
            service = said(resource_spans.resource.attributes)["service.name"]
            for scope_spans in resource_spans.scope_spans:
                self.spans.setdefault(service, []).extend(scope_spans.spans)
        return web.Response(content_type="application/x-protobuf")


def said(attributes: Any) -> dict[str, Any]:
    """OTLP's attributes as a dictionary."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
