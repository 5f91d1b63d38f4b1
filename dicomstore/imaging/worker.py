"""A worker process: says what one file after another is, within limits of time and memory."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dicomstore.imaging import slide, thumbnail
from dicomstore.imaging.describing import Description, File, by_header, opened, receive, send
from dicomstore.imaging.values import quietly

#: A worker that has had nothing to do for so long (s) ends.
IDLE_LIMIT_S = 30
#: So much processor time (s) a worker may spend on a file, and more for each MiB of it.
CPU_LIMIT_S = 1.0
CPU_S_PER_MIB = 1.0
#: So long (s) it may be at a file in all, also while it waits for disks and other processes.
TIME_LIMIT_S = 60
#: So much memory (bytes) it may take beside what it has when it starts.
MEMORY_LIMIT = 300 * 1024**2


def main() -> None:
    """Answer requests on standard input until there are no more, or none for a while."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the asking process that Ctrl-C interrupts
    requests = open(os.dup(0), "rb", buffering=0)  # noqa: SIM115  both are open to the end
    answers = open(os.dup(1), "wb", buffering=0)  # noqa: SIM115
    os.dup2(2, 1)  # a library that prints must not answer
    _limit_memory()
    send(answers, "ready")
    with open(os.devnull, "wb") as nowhere, quietly():
        while _has_request(requests.fileno()) and (request := receive(requests)):
            (path, pixels, only_header), content = request
            file = Path(path) if path else content
            try:
                with _limited(file, nowhere):
                    description = _describe(file, pixels, only_header)
            except OSError as error:
                problem = {"errno": error.errno, "strerror": error.strerror, "filename": path}
                send(answers, problem)
            else:
                attached = description.attachments
                lengths = {name: len(content) for name, content in attached.items()}
                message = description._asdict() | {"attachments": lengths}
                send(answers, message, b"".join(attached.values()))


def _describe(file: File, pixels: bool, only_header: bool) -> Description:
    with opened(file) as (stream, modified):
        description = by_header(stream, modified)
        if only_header:
            return description
        if description.members is None:
            members = slide.searchable(file) if isinstance(file, Path) else None
            return description._replace(members=members)
        if pixels:
            seen = thumbnail.of_file(stream, description.members)
            return description._replace(thumbnail=seen)
        return description


def _has_request(descriptor: int) -> bool:
    """Whether there is a request before ``IDLE_LIMIT_S`` is over."""
    if sys.platform == "win32":  # where pipes cannot be waited for
        return True
    return bool(select.select([descriptor], [], [], IDLE_LIMIT_S)[0])


def _limit_memory() -> None:
    if sys.platform == "linux":
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_LIMIT
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@contextlib.contextmanager
def _limited(file: File, nowhere: BinaryIO) -> Iterator[None]:
    """End this process if the block takes too long, also where a library never returns."""
    size = file.stat().st_size if isinstance(file, Path) else len(file)
    faulthandler.dump_traceback_later(TIME_LIMIT_S, exit=True, file=nowhere)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S + CPU_S_PER_MIB * size / 1024**2)
    try:
        yield
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
