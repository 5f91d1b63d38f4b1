"""What the benchmarks have in common: the clock, and their tables."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

import psutil


def timed(work: Callable[[], object]) -> float:
    """Return how long `work` takes (s); what it returns is freed after that."""
    start = time.perf_counter()
    kept = work()
    taken = time.perf_counter() - start
    del kept
    return taken


def milliseconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes (ms)."""
    return 1000 * timed(work)


def extent(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Return the shortest, the median and the longest time in ms."""
    times = (min(seconds), statistics.median(seconds), max(seconds))
    low, median, high = (1000 * taken for taken in times)
    return low, median, high


def machine() -> str:
    """Return date, processor, memory and versions."""
    memory = psutil.virtual_memory().total // 1024**3
    return (
        f"{date.today()}, {psutil.cpu_count()} cores of {_processor()}, {memory} GiB, Python "
        f"{platform.python_version()}, Redis Stack 7.4.1 on the same machine, not idle otherwise."
    )


def ratios(seconds: Mapping[str, Sequence[float]], pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Return a table of how many times as fast one method is as the other, round by round."""
    lines = ["| ratio of speeds, round by round | median | lowest to highest |", "|---|---:|---:|"]
    for ours, theirs in pairs:
        found = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
        lines.append(
            f"| {ours}, to {theirs} | {statistics.median(found):.2f} | {min(found):.2f} to "
            f"{max(found):.2f} |"
        )
    return lines


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor()
