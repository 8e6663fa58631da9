"""Send requests to a server at a fixed rate: python load.py PORT RATE SECONDS CONNECTIONS KEYS.json

An open loop: a request is sent when it is due, whatever became of earlier ones, and timed from then. If all connections wait
for answers, it waits for one, and its time counts that. The protocol is written out, so that the client takes little of the
CPUs that it shares with the server.
"""

import asyncio
import json
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np


class _Connection(asyncio.Protocol):
    """One request at a time. `done(connection, status, body)` is called with its answer; status 0: it was closed."""

    def __init__(self, load: "Load") -> None:
        self.load, self.due, self._buffer = load, 0.0, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if found:
            length = int(head.lower().split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
            if len(rest) >= length:
                self._buffer = b""
                self.load.done(self, int(head[9:12]), rest)

    def connection_lost(self, _: Exception | None) -> None:
        self.load.lost(self)


class Load:
    def __init__(self, port: int, rate: float, seconds: float, connections: int, users: list[object]) -> None:
        self.port, self.rate, self.number, self.connections = port, rate, int(rate * seconds), connections
        self.users = users
        self.free: deque[_Connection] = deque()
        self.waiting: deque[float] = deque()
        self.sent = 0
        self.found: list[tuple[int, float, str]] = []
        self.finished = asyncio.Event()

    async def run(self) -> dict[str, object]:
        loop = asyncio.get_running_loop()
        for _ in range(self.connections):
            _, connection = await loop.create_connection(lambda: _Connection(self), "127.0.0.1", self.port)
            self.free.append(connection)
        begin = time.perf_counter() + 0.1
        for at in range(self.number):
            due = begin + at / self.rate
            if (early := due - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            self.waiting.append(due)
            self._send()
        await asyncio.wait_for(self.finished.wait(), 120)
        return self._figures(time.perf_counter() - begin)

    def done(self, connection: _Connection, status: int, body: bytes) -> None:
        model = str(json.loads(body)["model"]) if status == 200 else ""
        self.found.append((status, time.perf_counter() - connection.due, model))
        connection.due = 0.0
        self.free.append(connection)
        self._send()
        if len(self.found) == self.number:
            self.finished.set()

    def lost(self, connection: _Connection) -> None:
        """A closed connection is an error if it owed an answer."""
        if connection.due:
            self.found.append((0, 0.0, ""))
        elif connection in self.free:
            self.free.remove(connection)
        if len(self.found) == self.number or not self.free:
            self.finished.set()

    def _send(self) -> None:
        while self.free and self.waiting:
            connection, due = self.free.popleft(), self.waiting.popleft()
            connection.due = due
            body = json.dumps({"user": self.users[self.sent * 7919 % len(self.users)], "k": 10}).encode()
            self.sent += 1
            head = f"POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            assert isinstance(connection.transport, asyncio.Transport)
            connection.transport.write(head.encode() + b"\r\n\r\n" + body)

    def _figures(self, elapsed: float) -> dict[str, object]:
        good = np.array([took for status, took, _ in self.found if status == 200])
        shed = np.array([took for status, took, _ in self.found if status == 429])
        figures: dict[str, object] = {
            "requests": len(self.found),
            "answered_a_second": round(len(good) / elapsed, 1),
            "shed": len(shed),
            "errors": self.number - len(good) - len(shed),
            "models": len({model for status, _, model in self.found if status == 200}),
            "client_cpu_ms": round(1000 * time.process_time() / max(len(self.found), 1), 3),
        }
        figures |= {f"p{q}_ms": round(1000 * float(np.percentile(good, q)), 1) for q in (50, 99) if len(good)}
        return figures | ({"shed_p99_ms": round(1000 * float(np.percentile(shed, 99)), 1)} if len(shed) else {})


if __name__ == "__main__":
    port, rate, seconds, connections, keys = sys.argv[1:]
    users = json.loads(Path(keys).read_text())
    load = Load(int(port), float(rate), float(seconds), int(connections), users)
    print(json.dumps(asyncio.run(load.run())))
