"""What the store has to survive, each fault as a function of how often it is done.

`make faults` runs them at length and writes the report; tests/test_faults.py runs them briefly.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
import time
from pathlib import Path

from faults_of_chunks import damage, mended_damage, refills
from faults_of_clusters import failovers, slot_moves
from faults_of_files import hostile_values, mutated_files
from faults_of_loaders import eviction, killed_loaders, killed_server, racing_loaders
from faults_of_servers import failing_servers, full_disk
from faults_of_tiers import tiers
from faults_shared import store_of

from dicomstore import connect
from dicomstore.server.embedded import RedisServer

REPORT = Path(__file__).parent.parent / "benchmarks" / "faults.md"

NOT_RUN = (
    "Not run: power cuts, nodes on several machines, networks that split, and searches on a "
    "cluster, for which this build has no coordinator. `TEST_REDIS_HOME` points the test suite at "
    "the files of another build; this run did not. The property tests, which `make faults` runs "
    "next, are not in this table."
)

#: Each fault, how often in the test suite, and how often in the long run (seconds: `slot_moves`).
FAULTS = {
    killed_loaders: (12, 500),
    killed_server: (2, 50),
    damage: (60, 2000),
    mended_damage: (4, 200),
    refills: (6, 300),
    tiers: (3, 60),
    racing_loaders: (8, 500),
    eviction: (40, 200),
    mutated_files: (150, 10_000),
    hostile_values: (300, 5000),
    failing_servers: (2, 50),
    full_disk: (1, 10),
    # In the test suite, tests/test_moving_cluster.py holds the same once.
    slot_moves: (0, 60),
    failovers: (0, 10),
}


def main(names):
    """Run the faults of these names, all by default; write the report if it was all."""
    rows, failed = [], False
    for fault, (_, count) in FAULTS.items():
        if names and fault.__name__ not in names:
            continue
        started = time.monotonic()
        try:
            found = fault(count)
        except Exception as error:
            found, failed = f"**failed**: {type(error).__name__}: {error}", True
        seconds = time.monotonic() - started
        rows.append(f"| {fault.__doc__} | {count:,} | {found} | {seconds:.0f} |")
        print(rows[-1], flush=True)
    if not names:
        with RedisServer() as server, connect(server.url) as client:
            redis_version = store_of(client).server()["Redis"]
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(
            f"# Faults\n\n`make faults` on {datetime.date.today()}: "
            f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, "
            f"Python {platform.python_version()}, Redis {redis_version}.\n\n"
            "| fault | times | what came of it | s |\n|---|--:|---|--:|\n"
            + "".join(f"{row}\n" for row in rows)
            + f"\n{NOT_RUN}\n"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
