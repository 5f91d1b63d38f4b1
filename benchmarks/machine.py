"""What the benchmarks ran on, in one line for their tables."""

from __future__ import annotations

import platform
from datetime import date
from pathlib import Path

import psutil


def machine() -> str:
    """Return date, processor, memory and versions."""
    memory = psutil.virtual_memory().total // 1024**3
    return (
        f"{date.today()}, {psutil.cpu_count()} cores of {_processor()}, {memory} GiB, Python "
        f"{platform.python_version()}, Redis Stack 7.4.1 on the same machine, not idle otherwise."
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor()
