"""Serve a store as DICOMweb: python -m dicomstore.web"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from dicomstore import DicomStore, connect
from dicomstore.errors import DicomRedisError
from dicomstore.web.app import PREFIX, application

#: More connections at once are answered with 503.
CONNECTIONS = 256
#: A client that takes nothing for so long is left (s).
STALLED_S = 60


def parser() -> argparse.ArgumentParser:
    """Return what the command line can say."""
    found = argparse.ArgumentParser(
        prog="python -m dicomstore.web",
        description="Serve the images in Redis as DICOMweb (QIDO-RS and WADO-RS), to read. "
        "The Redis is that of $REDIS_URL, else an embedded one.",
    )
    found.add_argument("folder", nargs="*", type=Path, help="load this first: a file or a folder")
    found.add_argument(
        "--source",
        metavar="FOLDER",
        help="folder or URL that the files were loaded from: what Redis has lost comes from there",
    )
    found.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    found.add_argument(
        "--port", type=int, default=8042, help="port to listen at, 0 for any free one (%(default)s)"
    )
    found.add_argument(
        "--token-file",
        type=Path,
        help="file with the token that every request carries (Authorization: Bearer ...); "
        "needed to listen at another address than this machine's own",
    )
    found.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin read answers, as https://viewer.example; can be repeated",
    )
    found.add_argument(
        "--viewer", type=Path, metavar="FOLDER", help="folder of the built viewer OHIF, served at /"
    )
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C; return the exit status."""
    options = parser().parse_args(words)
    try:
        check(options)
        token = _token(options.token_file)
        with (
            listen(options.host, options.port, token) as listening,
            connect() as client,
            DicomStore(client, source=options.source) as store,
        ):
            for folder in options.folder:
                store.load(folder)
            store.count_by("modality")  # makes the index, if there is none
            app = application(
                store, token=token, origins=options.allow_origin, viewer=options.viewer
            )
            host, port = listening.getsockname()[:2]
            name = "localhost" if ipaddress.ip_address(host).is_loopback else host
            print(f"DICOMweb is at http://{name}:{port}{PREFIX}", flush=True)
            if options.viewer is not None:
                print(f"The viewer is at http://{name}:{port}/", flush=True)
            serve(app, listening)
    except (OSError, ValueError, DicomRedisError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def check(options: argparse.Namespace) -> None:
    """Raise ValueError if an option would be of no use."""
    if options.viewer is not None and not (options.viewer / "index.html").is_file():
        raise ValueError(f"{options.viewer} is not a built viewer: it has no index.html.")
    for origin in options.allow_origin:
        if not re.fullmatch(r"https?://[^/\s]+", origin):
            raise ValueError(f"{origin} is no origin: write it as https://viewer.example.")
    if options.source and "://" not in options.source and not Path(options.source).is_dir():
        raise ValueError(f"There is no folder {options.source} to fetch from.")


def serve(app: object, listening: socket.socket) -> None:
    """Answer requests that come to a socket until the process is asked to end."""
    server(app).run(sockets=[listening])


def server(app: object) -> uvicorn.Server:
    """Return the server that answers with `app`."""
    # Without an access log: paths and queries name patients.
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,
        ws="none",
        loop="asyncio",  # uvloop does not end in a thread
    )
    return uvicorn.Server(config)


def _token(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        token = file.read_text().strip()
    except OSError as error:
        raise ValueError(f"No token can be read from {file}: {error.strerror}.") from error
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"{file} has no token: write one line of 16 or more letters into it.")
    return token


def listen(host: str, port: int, token: str | None = None) -> socket.socket:
    """Return a socket that listens at an address; without a token, only at this machine's own."""
    if not 0 <= port < 2**16:  # getaddrinfo would take the rest of it
        raise ValueError(f"{port} is not a port: give --port 0 to {2**16 - 1}.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"{host} port {port} is not an address to listen at.") from error
    if not ipaddress.ip_address(address[0]).is_loopback:
        if token is None:
            raise ValueError(
                f"{host} can be reached from other machines: give --token-file as well, or listen "
                "at 127.0.0.1."
            )
        print(
            "Token and images travel unencrypted: let a proxy with TLS answer other machines.",
            file=sys.stderr,
        )
    # Only where this is said, asyncio sends at once: else a short answer waits 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections that are accepted have it, too
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_S * 1000)
    try:
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise ValueError(
            f"Port {port} at {host} cannot be used: {error.strerror}. Choose another with --port."
        ) from error
    listening.listen(128)
    return listening


if __name__ == "__main__":
    sys.exit(main())
