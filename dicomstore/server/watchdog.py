"""The embedded server's watchdog: starts it, and ends it when its owner is gone.

Run as a file of its own with nothing but the standard library, so that it starts quickly and no
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
LAST_WORDS_LINES = 12


def _watch(build: Path, owner: int, folder: str) -> None:
    """Run a server until the owner says so, closes the pipe or is gone; print its last words."""
    configuration = sys.stdin.buffer.read(int(sys.stdin.buffer.readline()))
    os.umask(0o077)  # what Redis writes is for nobody else to read
    if folder:
        _lock(folder)
    # SIGTERM ends this process through `finally`, so that the server goes with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="dicom-redis-") as scratch:
        log = Path(scratch) / "log"
        with log.open("wb") as output:
            # The configuration, and with it the password, goes through standard input: no process
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
            # The pipe says at once that the owner is gone; its process number says so too where a
            # forked child still holds the pipe.
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
                sys.stdout.buffer.write(b"\n".join(lines[-LAST_WORDS_LINES:]))


def _lock(folder: str) -> None:
    """Lock `folder` for as long as this process lives: two servers would mix their files."""
    import fcntl  # not on Windows, where this module must load to say that it has no build

    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(
            f"Another server keeps its data in {folder!r}: stop it, or choose another folder."
        ) from None


def _die_with_parent() -> None:
    # PR_SET_PDEATHSIG: the watchdog has one thread, so it fires only when the watchdog is gone.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    try:
        _watch(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    except OSError as error:  # a locked folder, or a build for another machine
        print(error)
