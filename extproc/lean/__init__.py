"""A lean HTTP/2 server for gRPC streams on asyncio: what the hot path needs of gRPC, and nothing else.

`http2` (frames, flow control) and `grpc` (messages, statuses) do no I/O; `server` owns sockets, `coroutines` the tasks.
"""
