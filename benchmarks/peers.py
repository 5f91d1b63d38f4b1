"""Two DICOMweb servers, each in a process of its own, and the client that asks both."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import httptools

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from dicomstore.web.app import PREFIX  # noqa: E402 - the project is run in place

OURS, ORTHANC = "this project", "Orthanc"
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


class Client(asyncio.Protocol):
    """A connection that is kept, with one request under way at a time.

    A server that has ended it is connected to again.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._transport: Any = None
        self.received = 0  # bytes of all bodies

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_exception(error or ConnectionError("The server ended an answer."))

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self.type = value.decode()

    def on_body(self, body: bytes) -> None:
        self.received += len(body)
        if self._is_kept:
            self._pieces.append(body)

    def on_message_complete(self) -> None:
        if not self._answer.done():  # given up
            self._answer.set_result(self._parser.get_status_code())

    async def get(self, path: str, accept: str, *, is_kept: bool = True) -> bytes:
        """Return the body of an answer; nothing if it is not to be kept."""
        self._pieces: list[bytes] = []
        self._is_kept, self.type = is_kept, ""
        loop = asyncio.get_running_loop()
        self._answer = loop.create_future()
        if self._transport is None or self._transport.is_closing():
            await loop.create_connection(lambda: self, "127.0.0.1", self._port)
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\n\r\n"
        self._transport.write(head.encode())
        if (status := await self._answer) != 200:
            raise RuntimeError(f"{path} was answered with {status}.")
        return b"".join(self._pieces)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class Peer(NamedTuple):
    """A server that is measured."""

    name: str
    port: int
    pid: int


# --- the servers ---------------------------------------------------------------------------------


@contextlib.contextmanager
def ours(url: str) -> Iterator[Peer]:
    """Serve what is in a Redis, in a process of its own."""
    command = [sys.executable, "-m", "dicomstore.web", "--port=0"]
    environment = {**os.environ, "REDIS_URL": url}
    with subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline().removesuffix(f"{PREFIX}\n")
            if not said:
                raise RuntimeError("The server has not started.")
            yield Peer(OURS, int(said.rpartition(":")[2]), process.pid)
        finally:
            process.terminate()


@contextlib.contextmanager
def orthanc(folder: Path, program: str) -> Iterator[Peer]:
    """Serve what is sent to it, from a folder, in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    configuration = {
        "Name": "benchmark", "StorageDirectory": str(folder), "IndexDirectory": str(folder),
        "Plugins": [str(PLUGIN)], "HttpPort": port, "DicomServerEnabled": False,
        "RemoteAccessAllowed": False, "AuthenticationEnabled": False, "KeepAlive": True,
        "TcpNoDelay": True, "DicomWeb": {"Enable": True, "Root": f"{PREFIX}/"},
    }  # fmt: skip
    file = folder / "orthanc.json"
    file.write_text(json.dumps(configuration))
    with subprocess.Popen(
        [program, str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            for _ in range(100):
                with contextlib.suppress(URLError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/system").close()
                    break
                if process.poll() is not None:
                    break
                time.sleep(0.1)
            else:
                raise RuntimeError("Orthanc does not answer.")
            yield Peer(ORTHANC, port, process.pid)
        finally:
            process.terminate()


def send(peer: Peer, folder: Path) -> None:
    """Have Orthanc store the files below a folder."""
    for path in sorted(folder.rglob("*.dcm")):
        request = urllib.request.Request(f"http://127.0.0.1:{peer.port}/instances")
        request.data = path.read_bytes()
        urllib.request.urlopen(request).close()
