"""The embedded server's watchdog: starts it, and ends it when its owner is gone.

It runs as a file of its own and imports only the standard library. So it starts quickly, and no
folder or environment of the user's can change it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from select import select

STOP_TIMEOUT_S = 10.0
SHOWN_LINES = 12


def _watch(build: Path, owner: int, folder: str) -> None:
    """Run a server until the owner writes, closes the pipe or is gone; print the end of its log."""
    configuration = sys.stdin.buffer.read(int(sys.stdin.buffer.readline()))
    os.umask(0o077)  # only the owner may read what Redis writes
    if folder:
        _lock(folder)
    # SIGTERM ends this process through `finally`, so that the server goes with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="dicom-redis-") as scratch:
        log = Path(scratch) / "log"
        with log.open("wb") as output:
            # The configuration holds the password. It goes through standard input, where no process
            # list and no file shows it.
            server = subprocess.Popen(
                [build / "redis-server", "-"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=scratch,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        try:
            assert server.stdin is not None
            server.stdin.write(configuration)
            server.stdin.close()
            # The pipe says at once that the owner is gone. Where a forked child still holds the
            # pipe, the parent's process number says so.
            while server.poll() is None and os.getppid() == owner:
                if select([sys.stdin], [], [], 0.25)[0]:
                    break
        except BrokenPipeError:
            pass  # the server ended before it read its configuration; the log says why
        finally:
            server.terminate()
            try:
                server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            if os.getppid() == owner:
                lines = log.read_bytes().splitlines()
                sys.stdout.buffer.write(b"\n".join(lines[-SHOWN_LINES:]))


def _lock(folder: str) -> None:
    """Lock `folder` for as long as this process lives: two servers would mix their files."""
    import fcntl  # Windows has none, and has to import this module to say that it has no build

    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(
            f"Another server keeps its data in {folder!r}: stop it, or choose a different folder."
        ) from None


def _die_with_parent() -> None:
    # PR_SET_PDEATHSIG: the watchdog has one thread, so it fires only when the watchdog is gone.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    try:
        _watch(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    except OSError as error:  # a locked folder, or a build for another machine
        print(error)
