"""What files are: their headers, thumbnails and slide properties, found out by worker processes.

The decoders of compressed pixels, and OpenSlide, are C libraries that a file made to harm can keep
busy for ever or bring down. In a worker (worker.py) that costs one process, and its file is known
by its header only. Few headers are read in this process, in plain Python: a worker takes half a
second to start.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import itertools
import json
import math
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from dicomstore.errors import WorkerError
from dicomstore.imaging import header, locating, metadata, slide

Item = TypeVar("Item")
File = Path | bytes  # a file, or what it would hold

#: Fewer headers have been read here before workers have started.
WORTH_WORKERS = 400
MOST_WORKERS = 8
#: So many files wait at a worker, so that it does not wait for the next: headers are quickly read.
HEADERS_AHEAD = 8
PIXELS_AHEAD = 2
PROJECT = Path(__file__).resolve().parents[2]
WORKER = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "sys.modules['requests'] = None; "  # pydicom's for downloads, a fifth of the time to start
    "from dicomstore.imaging.worker import main; main()"
)
TOO_MUCH = "This file is not DICOM, and OpenSlide crashes on it or takes too long."
NO_WORKER = (
    "cannot start. Allow more memory and more processes, or load DICOM files with thumbnails=False."
)


class Description(NamedTuple):
    """What a file is.

    Attributes
    ----------
    members : dict or None
        The searchable part of its document; None if it is neither DICOM nor a slide.
    thumbnail : list of int or None
        As :func:`thumbnail.of_file` makes it; None if it was not asked for, or cannot be made.
    modified : int or None
        When the file was last modified before it was read, in ns; None for content in memory.
    given_up : bool
        Whether the pixels were too much for a worker.
    attachments : dict of bytes
        What is stored beside the chunks: ``json`` as :func:`metadata.compressed_json` and
        ``frames`` as :func:`locating.locate` make it.
    """

    members: dict[str, Any] | None
    thumbnail: list[int] | None
    modified: int | None
    given_up: bool
    attachments: dict[str, bytes]


class _Task(NamedTuple):
    item: Any
    file: File
    only_header: bool = False


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
        Whether to decode a frame of each for its thumbnail.

    Yields
    ------
    item, Description or OSError

    Raises
    ------
    WorkerError
        If a worker is needed and no process can be started.
    """
    tasks = (_Task(item, file) for item, file in files)
    if pixels or count >= WORTH_WORKERS:
        yield from _described_by_workers(tasks, count, pixels)
        return
    for task in tasks:
        answer = _described_here(task.file)
        if answer is None:
            yield from _described_by_workers(iter([task]), 1, False)
        else:
            yield task.item, answer


def by_header(file: BinaryIO, modified: int | None) -> Description:
    """Describe an open file by its header, in plain Python."""
    elements = header.read(file)
    if elements is None:
        return Description(None, None, modified, False, {})
    members = header.members(elements)
    attachments = {}
    where, table = locating.locate(file, members, elements)
    if where is not None:
        members["frames"] = where
    if table is not None:
        attachments["frames"] = table
    if json := metadata.compressed_json(elements):
        attachments["json"] = json
    return Description(members, None, modified, False, attachments)


@contextlib.contextmanager
def opened(file: File) -> Iterator[tuple[BinaryIO, int | None]]:
    """Open a file, and say when it was last modified (ns)."""
    if isinstance(file, bytes):
        yield io.BytesIO(file), None
    else:
        with open(file, "rb") as stream:
            yield stream, os.fstat(stream.fileno()).st_mtime_ns


def _described_here(file: File) -> Description | OSError | None:
    """Describe a file in this process; None if that needs a worker."""
    try:
        with opened(file) as (stream, modified):
            description = by_header(stream, modified)
            if description.members is None and isinstance(file, Path):
                return None if slide.begins_like_a_slide(stream) else description
            return description
    except Warning:  # where those are made errors
        return None
    except OSError as error:
        return error


def _described_by_workers(
    waiting: Iterator[_Task], count: int, pixels: bool
) -> Generator[tuple[Any, Description | OSError]]:
    answers: queue.SimpleQueue[tuple[_Worker, Description | OSError | None]] = queue.SimpleQueue()
    ahead = PIXELS_AHEAD if pixels else HEADERS_AHEAD
    with _team(min(cores(), count), answers) as team:
        while team:
            for worker in sorted(team, key=lambda each: len(each.asked)):
                if len(worker.asked) <= ahead // 2:
                    worker.ask(list(itertools.islice(waiting, ahead - len(worker.asked))), pixels)
            if not any(worker.asked for worker in team):
                return
            worker, answer = answers.get()
            if answer is not None:
                task = worker.asked.popleft()
                worker.answered += 1
                if task.only_header and isinstance(answer, Description):
                    is_dicom = answer.members is not None
                    answer = answer._replace(given_up=True) if is_dicom else _too_much()
                yield task.item, answer
            elif worker in team:
                team.remove(worker)
                worker.end()
                left = worker.asked
                if not worker.ready:
                    waiting = itertools.chain(left, waiting)
                    continue
                if left and worker.has_failed():
                    task = left.popleft()
                    if task.only_header:
                        yield task.item, _too_much()
                    else:
                        left.appendleft(task._replace(only_header=True))
                team.append(_Worker(answers))
                team[-1].ask(left, pixels)
    for task in waiting:  # no worker can start
        here = None if pixels else _described_here(task.file)
        if here is None:
            raise WorkerError(f"A worker process {NO_WORKER}")
        yield task.item, here


def _too_much() -> OSError:
    return OSError(errno.EIO, TOO_MUCH)


# --- messages ------------------------------------------------------------------------------------

_LENGTHS = struct.Struct("<IQ")


def send(pipe: io.FileIO, message: Any, content: bytes = b"") -> None:
    """Write a message, as JSON, and `content`."""
    text = json.dumps(message).encode()
    for piece in (_LENGTHS.pack(len(text), len(content)) + text, content):
        rest = memoryview(piece)
        while rest:
            rest = rest[pipe.write(rest) :]


def receive(pipe: io.FileIO) -> tuple[Any, bytes] | None:
    """Read what :func:`send` wrote; None if the other process has ended, whatever it was at."""
    head = _exactly(pipe, _LENGTHS.size)
    if head is None:
        return None
    text_length, content_length = _LENGTHS.unpack(head)
    text, content = _exactly(pipe, text_length), _exactly(pipe, content_length)
    return None if text is None or content is None else (json.loads(text), content)


def _exactly(pipe: io.FileIO, size: int) -> bytes | None:
    content = bytearray(size)
    rest = memoryview(content)
    while rest:
        count = pipe.readinto(rest)
        if not count:
            return None
        rest = rest[count:]
    return bytes(content)


# --- the processes -------------------------------------------------------------------------------


class _Worker:
    """One process, and the files that it has been asked about and has not answered yet."""

    def __init__(
        self, answers: queue.SimpleQueue[tuple[_Worker, Description | OSError | None]]
    ) -> None:
        self.answers = answers
        self.asked: deque[_Task] = deque()
        self.answered = 0
        self.ready = self.ended = False
        with _forks:
            try:
                # Without buffers, so that a fork never waits for their locks.
                self.process = subprocess.Popen(
                    [sys.executable, "-c", WORKER, os.fspath(PROJECT)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                    bufsize=0,
                )  # fmt: skip
            except OSError as error:
                raise WorkerError(f"A worker process {NO_WORKER}") from error
            _living.add(self)
        self._listener = threading.Thread(target=self._listen, name="workers", daemon=True)
        self._listener.start()

    def ask(self, tasks: Iterable[_Task], pixels: bool) -> None:
        requests = list(tasks)
        self.asked.extend(requests)
        with contextlib.suppress(OSError, ValueError):  # it has ended, which _listen notices
            for _, file, only_header in requests:
                path = "" if isinstance(file, bytes) else os.path.abspath(file)
                content = file if isinstance(file, bytes) else b""
                send(self._stdin, [path, pixels, only_header], content)

    def has_failed(self) -> bool:
        """Whether it ended for the file that it was at, not for what earlier ones left behind."""
        code = self.process.returncode
        return code != 0 and (not self.answered or code == -getattr(signal, "SIGPROF", 0))

    def end(self) -> None:
        """End the process now."""
        if self in _living:  # not in a fork of the process that it belongs to
            self.process.kill()
            self._listener.join()
            self.close()

    def close(self) -> None:
        """Close the pipes, which ends a process that has nothing to do."""
        self._stdin.close()
        self._stdout.close()
        _living.discard(self)

    def _listen(self) -> None:
        while message := receive(self._stdout):
            if self.ready:
                self.answers.put((self, _answer(*message)))
            self.ready = True
        self.process.wait()
        self.ended = True  # and then say so: _team looks at it after it has set `answers`
        self.answers.put((self, None))
        with contextlib.suppress(ValueError):  # it is not idle: who asks it notices
            _idle.remove(self)
            self.close()

    @property
    def _stdin(self) -> io.FileIO:
        return self.process.stdin  # type: ignore[return-value]

    @property
    def _stdout(self) -> io.FileIO:
        return self.process.stdout  # type: ignore[return-value]


def _answer(message: Any, content: bytes) -> Description | OSError:
    if "errno" in message:
        return OSError(message["errno"], message["strerror"], message["filename"])
    attachments, start = {}, 0
    for name, length in message.pop("attachments").items():
        attachments[name] = content[start : start + length]
        start += length
    return Description(**message, attachments=attachments)


#: The workers of this process: those without work, and all.
_idle: list[_Worker] = []
_living: set[_Worker] = set()
_forks = threading.RLock()


@contextlib.contextmanager
def _team(
    count: int, answers: queue.SimpleQueue[tuple[_Worker, Description | OSError | None]]
) -> Iterator[list[_Worker]]:
    """Lend up to `count` workers, which are then kept for the next load."""
    team: list[_Worker] = []
    try:
        with contextlib.suppress(WorkerError):
            while len(team) < count:
                try:
                    worker = _idle.pop()
                except IndexError:
                    worker = _Worker(answers)
                worker.answers = answers
                if worker.ended:
                    worker.end()
                else:
                    team.append(worker)
        yield team
    finally:
        for worker in team:
            if worker.asked or worker.ended or len(_idle) >= cores():
                worker.end()
            elif worker in _living:
                _idle.append(worker)


def end_idle_workers() -> None:
    """End the worker processes that have nothing to do; others start when they are needed."""
    while _idle:
        with contextlib.suppress(IndexError):
            _idle.pop().end()


def _forget_workers() -> None:
    """Leave the workers to the process that this one was forked from."""
    _forks.release()
    for worker in list(_living):
        worker.close()
    _idle.clear()


atexit.register(end_idle_workers)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_forks.acquire, after_in_parent=_forks.release, after_in_child=_forget_workers
    )


# --- processors ----------------------------------------------------------------------------------


def cores(root: Path = Path("/")) -> int:
    """Return how many processors this process may use, at most ``MOST_WORKERS``.

    Parameters
    ----------
    root : Path, optional
        Where ``proc`` and ``sys`` are found, to read what a container may use.
    """
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return max(1, math.ceil(min(allowed or 1, MOST_WORKERS, _quota(root))))


def _quota(root: Path) -> float:
    """Return the processors that the control groups of this process allow, or infinity."""
    groups = {Path()}
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            own = Path(line.split(":", 2)[2].lstrip("/"))
            groups |= {own, *own.parents}
    base, found = root / "sys/fs/cgroup", [math.inf]
    for group in groups:
        with contextlib.suppress(OSError, ValueError):  # no limit reads "max", and is no number
            quota, period = map(int, (base / group / "cpu.max").read_text().split())
            found.append(quota / period)
        for controller in ("cpu", "cpu,cpuacct"):
            with contextlib.suppress(OSError, ValueError):
                folder = base / controller / group
                quota = int((folder / "cpu.cfs_quota_us").read_text())
                period = int((folder / "cpu.cfs_period_us").read_text())
                found.append(quota / period if quota > 0 else math.inf)
    return min(found)
