"""Processes that say what files are: headers read and pixels decoded, on all cores.

The decoders of compressed pixels, and OpenSlide, are C libraries that a file made to harm can keep
busy for ever or bring down. Here that ends one worker, and its file is known by its header alone.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import io
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import psutil

from dicomstore.errors import WorkerError
from dicomstore.imaging import header, slide, thumbnail

Item = TypeVar("Item")
File = Path | bytes  # a file, or what it would hold

#: So much processor time (s) a worker may spend on a file, and more for each MiB of it.
CPU_LIMIT_S = 1.0
CPU_S_PER_MIB = 1.0
#: So long (s) it may be at a file in all, waiting for disks and for other processes among it.
TIME_LIMIT_S = 60
#: So much memory (bytes) a worker may take beside what it needs to be there.
MEMORY_LIMIT = 300 * 1024**2
#: Fewer files have been described before workers have started.
WORTH_WORKERS = 64
MOST_WORKERS = 8
#: So many files wait at a worker, so that it does not wait for the next: headers are quickly read.
HEADERS_AHEAD = 8
PIXELS_AHEAD = 2
PROJECT = Path(__file__).resolve().parents[2]
WORKER = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from dicomstore.imaging.describing import main; main()"
)
WITHOUT_WORKERS = "Load with descriptors=False, or allow more memory and more processes."


class Description(NamedTuple):
    """What a file is.

    Attributes
    ----------
    members : dict or None
        The searchable part of its document; None if it is neither DICOM nor a slide.
    descriptor : list of int or None
        As :func:`thumbnail.of_file` makes it; None if it was not asked for, or has none.
    modified : int or None
        When it had been modified last as it was opened, in ns; None for content in memory.
    given_up : bool
        Whether its pixels were too much for a worker.
    """

    members: dict[str, Any] | None
    thumbnail: list[int] | None
    modified: int | None
    given_up: bool = False
    attachments: dict[str, bytes] = {}


def describe_all(
    files: Iterable[tuple[Item, File]], count: int, pixels: bool
) -> Generator[tuple[Item, Description | OSError]]:
    """Say what files are, each as soon as that is known.

    Parameters
    ----------
    files : iterable of (item, Path or bytes)
        `item` is given back with the answer. No more are taken than the workers need next.
    count : int
        How many they are at most.
    pixels : bool
        Whether to decode a frame of each for its descriptor.

    Yields
    ------
    item, Description or OSError

    Raises
    ------
    WorkerError
        If pixels are wanted and no process can be started.
    """
    waiting = iter(files)
    answers: queue.SimpleQueue[tuple[_Worker, bytes]] = queue.SimpleQueue()
    ahead = PIXELS_AHEAD if pixels else HEADERS_AHEAD
    own_part = 0 if pixels else 1  # this process reads headers as well
    wanted = max(1, _cores() - own_part) if pixels or count >= WORTH_WORKERS else 0
    with _team(min(wanted, count), answers, needed=pixels) as team:
        while True:
            for worker in sorted(team, key=lambda each: len(each.asked)):
                if len(worker.asked) <= ahead // 2:
                    worker.ask(list(itertools.islice(waiting, ahead - len(worker.asked))), pixels)
            # While the workers are busy, or start, this process does a part; but decodes nothing.
            if not pixels and answers.empty() and (following := next(waiting, None)):
                item, file = following
                yield item, _described_here(file)
                continue
            if not any(worker.asked for worker in team):
                return
            worker, line = answers.get()
            if line:
                item, file = worker.asked.popleft()
                worker.answered += 1
                answer = json.loads(line)
                yield item, Description(*answer) if answer else _described_here(file)
            elif worker in team:
                team.remove(worker)
                worker.end()
                if worker.ready:
                    if worker.asked and worker.has_failed_at_the_first():
                        item, file = worker.asked.popleft()
                        yield item, _by_header_alone(file)
                    team.append(_Worker(answers))
                    team[-1].ask(worker.asked, pixels)
                elif pixels and not team:
                    raise WorkerError(f"A worker ends as it starts. {WITHOUT_WORKERS}")
                else:
                    waiting = itertools.chain(worker.asked, waiting)


def _describe(file: File, pixels: bool) -> Description:
    with _opened(file) as (opened, modified):
        members = header.describe(opened)
        if members is None and isinstance(file, Path):
            members = slide.describe(file)
        seen = thumbnail.of_file(opened, members) if pixels and members else None
        return Description(members, seen, modified)


def _described_here(file: File) -> Description | OSError:
    try:
        return _describe(file, False)
    except OSError as error:
        return error


def _by_header_alone(file: File) -> Description | OSError:
    """Describe what was too much for a worker, with Python alone."""
    try:
        with _opened(file) as (opened, modified):
            members = header.describe(opened)
    except OSError as error:
        return error
    if members is None:
        return OSError(errno.EIO, "no DICOM, and as a slide it is too much for OpenSlide")
    return Description(members, None, modified, given_up=True)


@contextlib.contextmanager
def _opened(file: File) -> Iterator[tuple[Any, int | None]]:
    if isinstance(file, bytes):
        yield io.BytesIO(file), None
    else:
        with open(file, "rb") as opened:
            yield opened, os.fstat(opened.fileno()).st_mtime_ns


# --- the processes -------------------------------------------------------------------------------


class _Worker:
    """One process, and the files that it has been asked about and has not answered yet."""

    def __init__(self, answers: queue.SimpleQueue[tuple[_Worker, bytes]]) -> None:
        self.answers = answers
        self.asked: deque[tuple[Any, File]] = deque()
        self.answered = 0
        self.ready = self.ended = False
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WORKER, os.fspath(PROJECT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise WorkerError(f"No worker can start: {error}. {WITHOUT_WORKERS}") from error
        self._listener = threading.Thread(target=self._listen, name="workers", daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        self.ready = bool(self.process.stdout.readline())
        for line in self.process.stdout:
            if line.endswith(b"\n"):  # not of a worker that was killed in the middle of it
                self.answers.put((self, line))
        self.ended = True  # and then say so: _team looks at it after it has set `answers`
        self.answers.put((self, b""))

    def has_failed_at_the_first(self) -> bool:
        """Whether it ended for the file that it was at, not for what earlier ones left behind."""
        return not self.answered or self.process.returncode == -getattr(signal, "SIGPROF", 0)

    def ask(self, files: Iterable[tuple[Any, File]], pixels: bool) -> None:
        assert self.process.stdin is not None
        self.asked += files
        with contextlib.suppress(BrokenPipeError):  # then it has ended, which _listen notices
            for _, file in files:
                content = file if isinstance(file, bytes) else b""
                path = "" if isinstance(file, bytes) else os.path.abspath(file)
                request = json.dumps([path, len(content), pixels])
                self.process.stdin.write(request.encode() + b"\n")
                self.process.stdin.write(content)
            self.process.stdin.flush()

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self._listener.join()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


#: Workers without work, by the process that they belong to: a fork has none.
_idle: dict[int, list[_Worker]] = {}


@contextlib.contextmanager
def _team(
    count: int, answers: queue.SimpleQueue[tuple[_Worker, bytes]], *, needed: bool
) -> Iterator[list[_Worker]]:
    """Lend `count` workers, which stay for the next who wants some; fewer unless `needed`."""
    idle = _idle.setdefault(os.getpid(), [])
    team: list[_Worker] = []
    try:
        with contextlib.nullcontext() if needed else contextlib.suppress(WorkerError):
            while len(team) < count:
                worker = idle.pop() if idle else _Worker(answers)
                worker.answers = answers
                if worker.ended:
                    worker.end()
                else:
                    team.append(worker)
        yield team
    finally:
        for worker in team:
            if worker.asked or worker.ended or len(idle) >= _cores():
                worker.end()
            else:
                idle.append(worker)


def _cores() -> int:
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return min(allowed or 1, MOST_WORKERS)


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


def main() -> None:
    """Answer requests, one JSON line each, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the asking process that Ctrl-C interrupts
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not answer
    if sys.platform == "linux":
        import resource

        limit = psutil.Process().memory_info().vms + MEMORY_LIMIT
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    answers.write(b"ready\n")
    answers.flush()
    with open(os.devnull, "wb") as nowhere:
        for line in requests:
            path, size, pixels = json.loads(line)
            file = Path(path) if path else requests.read(size)
            try:
                with _limited(file, nowhere):
                    answer: Description | None = _describe(file, pixels)
            except OSError:
                answer = None  # the asking process tries, and sees why
            answers.write(json.dumps(answer).encode() + b"\n")
            answers.flush()


def end_idle_workers() -> None:
    for worker in _idle.pop(os.getpid(), []):
        worker.end()
