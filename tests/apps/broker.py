"""A data broker for tests, on the servicers that kuksa-client carries: real messages and a real gRPC server, in this process.

It is no databroker: it keeps the newest value of each signal that it knows and sends it to whoever subscribes, by v2 or v1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from kuksa.val.v1 import types_pb2 as types_v1
from kuksa.val.v1 import val_pb2 as val_v1
from kuksa.val.v1 import val_pb2_grpc as grpc_v1
from kuksa.val.v2 import types_pb2 as types_v2
from kuksa.val.v2 import val_pb2 as val_v2
from kuksa.val.v2 import val_pb2_grpc as grpc_v2


class Broker:
    """Signals by path: what they are, None where nothing was sent yet, and how old that is when it is read."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[Any, float]] = {}
        self.port, self.token, self.silent_s = 0, "", 0.0

    def send(self, path: str, value: Any, age_s: float = 0.0) -> None:
        self.values[path] = (value, age_s)

    def checked(self, paths: Any, context: grpc.ServicerContext) -> None:
        """Ends the call where the token or a path is wrong; a silent broker first takes its time."""
        time.sleep(self.silent_s)
        told = dict(context.invocation_metadata()).get("authorization")
        if self.token and told != f"Bearer {self.token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
        if unknown := [path for path in paths if path not in self.values]:
            context.abort(grpc.StatusCode.NOT_FOUND, f"{unknown[0]} not found")


def _ago(age_s: float) -> Timestamp:
    seconds = time.time() - age_s
    return Timestamp(seconds=int(seconds), nanos=int(1e9 * (seconds % 1)))


class V2(grpc_v2.VALServicer):
    """Subscribe, and ListMetadata, by which the client looks for branches."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker

    def Subscribe(self, request, context):
        self.broker.checked(request.signal_paths, context)
        entries = {}
        for path in request.signal_paths:
            value, age_s = self.broker.values[path]
            kind = "float" if isinstance(value, float) else "string" if isinstance(value, str) else "int32"
            typed = types_v2.Value(**{kind: value}) if value is not None else None
            entries[path] = types_v2.Datapoint(timestamp=_ago(age_s), value=typed)
        yield val_v2.SubscribeResponse(entries=entries)
        while context.is_active():  # as a broker whose signals rest
            time.sleep(0.01)

    def ListMetadata(self, request, context):
        self.broker.checked([request.root], context)
        return val_v2.ListMetadataResponse(metadata=[types_v2.Metadata(path=request.root, id=1)])


class V1(grpc_v1.VALServicer):
    """Subscribe, as older brokers have it."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker

    def Subscribe(self, request, context):
        paths = [entry.path for entry in request.entries]
        self.broker.checked(paths, context)
        updates = []
        for path in paths:
            value, age_s = self.broker.values[path]
            kind = "float" if isinstance(value, float) else "string" if isinstance(value, str) else "int32"
            entry = types_v1.DataEntry(path=path)
            if value is not None:
                entry.value.CopyFrom(types_v1.Datapoint(timestamp=_ago(age_s), **{kind: value}))
            updates.append(val_v1.EntryUpdate(entry=entry, fields=[types_v1.FIELD_VALUE]))
        yield val_v1.SubscribeResponse(updates=updates)
        while context.is_active():
            time.sleep(0.01)


@contextmanager
def serving(protocols: tuple[str, ...] = ("v1", "v2"), port: int = 0) -> Iterator[Broker]:
    """A broker on a port of this machine as long as the block runs."""
    broker, server = Broker(), grpc.server(ThreadPoolExecutor(8))
    if "v1" in protocols:
        grpc_v1.add_VALServicer_to_server(V1(broker), server)
    if "v2" in protocols:
        grpc_v2.add_VALServicer_to_server(V2(broker), server)
    broker.port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield broker
    finally:
        server.stop(None).wait()
