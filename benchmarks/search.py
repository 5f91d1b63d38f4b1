"""Searching, beside what one has otherwise: cost against size, and the three scenarios, in one run.

Synthetic documents of the same shape as ours show what a search costs among 1,000 to 200,000 of
them; the scenarios run on pydicom's real files, beside the published method and an SQLite table.
Run it with `make bench-search`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sqlite3
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pydicom
from redis.commands.search.aggregation import AggregateRequest
from redis.commands.search.query import Query
from redis.commands.search.reducers import count
from reporting import machine

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from dicomstore import DicomStore, connect, words  # noqa: E402 - run in place, not installed
from dicomstore.server.embedded import RedisServer  # noqa: E402

SIZES = (1_000, 10_000, 100_000, 200_000)
BATCH = 1000
PUBLISHED_CHUNK = 5 * 1024
TABLE = PROJECT / "benchmarks" / "search.md"
FIGURE = PROJECT / "images" / "search_scale.png"
MODALITIES = {"CT": 45, "MR": 30, "CR": 8, "DX": 6, "US": 6, "PT": 3, "MG": 2}
BODY_PARTS = ("HEAD", "CHEST", "ABDOMEN", "PELVIS", "CSPINE", "KNEE", "HEART", "BREAST")
PROTOCOLS = tuple(f"{part} {way}" for part in BODY_PARTS for way in ("Routine", "T1", "T2", "Thin"))
WORDS = ("with contrast", "without contrast", "axial", "follow-up", "screening", "post op", "thin")
MAKERS = ("SIEMENS", "GE MEDICAL SYSTEMS", "PHILIPS MEDICAL SYSTEMS", "TOSHIBA", "CANON")


def documents(first: int, last: int, *, descriptors: bool = True) -> Iterator[tuple[str, str]]:
    """Yield key and text of documents as loading makes them, without `header`.

    Ten to a series, five series to a study, two studies to a patient; modalities, protocols and
    dates are as unevenly distributed as in a hospital.
    """
    for number in range(first, last):
        series, study, patient = number // 10, number // 50, number // 100
        of_study, of_series = random.Random(study), random.Random(f"series {series}")
        body_part = of_study.choice(BODY_PARTS)
        day = date(2015, 1, 1) + timedelta(days=int(3650 * of_study.random() ** 0.5))
        key = f"file:archive/{patient:05}/{series:06}/IM{number % 10:06}.dcm"
        version = f"{number:012x}"
        document = {
            "imageName": f"IM{number % 10:06}.dcm", "size": 526_400, "sha256": f"{number:064x}",
            "version": version, "chunkSize": 262_080, "tail": [2240],
            "crc": [number * 2_654_435_761 % 2**32, number * 40_503 % 2**32, number],
            "chunks": [f"chunk:{key}:{version}:{n}" for n in range(3)],
            "protocolName": f"{of_series.choice(PROTOCOLS)} {of_series.randrange(1, 6)}",
            "patientSex": of_study.choice("FM"), "studyDate": int(f"{day:%Y%m%d}"),
            "manufacturer": of_study.choice(MAKERS),
            "modality": of_study.choices(tuple(MODALITIES), tuple(MODALITIES.values()))[0],
            "patientID": f"P{patient:07}", "studyInstanceUID": f"1.2.826.0.1.3680043.8.498.{study}",
            "seriesInstanceUID": f"1.2.826.0.1.3680043.8.498.{study}.{series}",
            "sopInstanceUID": f"1.2.826.0.1.3680043.8.498.{study}.{series}.{number}",
            "studyDescription": f"{body_part} {of_study.choice(WORDS)}",
            "seriesDescription": f"{of_series.choice(WORDS)} {of_series.randrange(1, 9)} mm",
            "bodyPartExamined": body_part, "rows": 512, "columns": 512, "numberOfFrames": 1,
            "transferSyntaxUID": "1.2.840.10008.1.2.1",
        }  # fmt: skip
        if descriptors:
            document["descriptor"] = [of_series.randrange(256) for _ in range(64)]
        yield key, json.dumps(document)


def fill(client: Any, first: int, last: int, *, descriptors: bool = True) -> float:
    """Store documents and return the seconds that Redis took, without the making of them."""
    taken = 0.0
    for start in range(first, last, BATCH):
        batch = list(documents(start, min(start + BATCH, last), descriptors=descriptors))
        with client.pipeline(transaction=False) as pipe:
            for key, text in batch:
                pipe.execute_command("JSON.SET", key, "$", text)
            taken += timed(pipe.execute)
    return taken


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def searches(store: DicomStore) -> dict[str, Callable[[], Any]]:
    series = "1.2.826.0.1.3680043.8.498.10.52"
    return {
        "exact: the 10 images of a series": lambda: store.find(seriesInstanceUID=series),
        "patient and year": lambda: store.find(patientID="P0000005", studyDate=("2015", "2024")),
        "10 latest by date": lambda: store.find(order_by="-studyDate", limit=10, modality="MG"),
        "words, 10 of them": lambda: store.find(studyDescription=words("thin bre*"), limit=10),
        "count by modality": lambda: store.count_by("modality"),
        "count by protocol": lambda: store.count_by("protocolName"),
        "modality by year": lambda: store.count_by("modality", "studyDate", by="year"),
        "5 most alike": lambda: store.similar("archive/00005/000052/IM000003.dcm"),
        "5 most alike of CT": lambda: store.similar(
            "archive/00005/000052/IM000003.dcm", modality="CT"
        ),
    }


Costs = dict[str, dict[int, list[float]]]


def scale(sizes: tuple[int, ...], rounds: int) -> tuple[Costs, dict[int, float]]:
    """Return the seconds of each search at each size, and documents loaded per second."""
    costs: Costs = {}
    rates = {}
    with RedisServer() as server:
        client = connect(server.url)
        store = DicomStore(client, progress=False)
        store.find()
        stored = 0
        for size in sizes:
            rates[size] = (size - stored) / fill(client, stored, size)
            stored = size
            for number in range(rounds + 1):
                for name, search in searches(store).items():
                    taken = timed(search)
                    if number:  # not the first, which warms up
                        costs.setdefault(name, {}).setdefault(size, []).append(taken)
            print(f"{size} documents measured", flush=True)
        client.close()
    return costs, rates


def memory(documents_each: int = 20_000) -> dict[str, float]:
    """Return bytes of Redis memory for a document with its part of the index."""
    found = {}
    for name, descriptors in (("without descriptor", False), ("with descriptor", True)):
        with RedisServer() as server:
            client = connect(server.url)
            DicomStore(client, progress=False).find()
            before = client.info("memory")["used_memory"]
            fill(client, 0, documents_each, descriptors=descriptors)
            found[name] = (client.info("memory")["used_memory"] - before) / documents_each
            client.close()
    return found


# --- the three scenarios -------------------------------------------------------------------------


class Published:
    """The published method: 5 KB chunks, one GET for each, the whole document for a search."""

    FIELDS = ("protocolName", "patientSex", "studyDate", "manufacturer")

    def __init__(self, client: Any, files: dict[str, tuple[dict[str, Any], bytes]]) -> None:
        self.client = client
        schema = ["$.protocolName", "AS", "protocolName", "TAG", "$.patientSex", "AS", "patientSex",
                  "TAG", "$.studyDate", "AS", "studyDate", "NUMERIC", "$.manufacturer", "AS",
                  "manufacturer", "TAG"]  # fmt: skip
        client.execute_command(
            "FT.CREATE", "published", "ON", "JSON", "PREFIX", "1", "image:", "SCHEMA", *schema
        )
        for name, (members, content) in files.items():
            pieces = range(0, len(content), PUBLISHED_CHUNK)
            chunks = [f"piece:{name}:{n}" for n in range(len(pieces))]
            for chunk, start in zip(chunks, pieces, strict=True):
                client.set(chunk, content[start : start + PUBLISHED_CHUNK])
            fields = {field: members[field] for field in self.FIELDS if field in members}
            document = {"imageName": name, **fields, "chunks": chunks}
            client.json().set(f"image:{name}", "$", document)

    def _chunks(self, keys: list[str]) -> bytes:
        return b"".join(self.client.get(key) for key in keys)

    def known(self, name: str) -> bytes:
        return self._chunks(self.client.json().get(f"image:{name}")["chunks"])

    def search(self) -> bytes:
        query = Query("@protocolName:{194} @studyDate:[20190101 20191231]")
        (found,) = self.client.ft("published").search(query).docs
        return self._chunks(json.loads(found.json)["chunks"])

    def count(self) -> dict[str, int]:
        request = AggregateRequest("*").group_by("@protocolName", count().alias("count"))
        rows = self.client.ft("published").aggregate(request).rows
        found = {row[1]: int(row[3]) for row in rows if row[1] is not None}
        return {name.decode(): number for name, number in found.items()}


class Table:
    """The same files in an SQLite table on disk, with an index on what is searched."""

    def __init__(self, path: Path, files: dict[str, tuple[dict[str, Any], bytes]]) -> None:
        self.database = sqlite3.connect(path)
        self.database.execute("CREATE TABLE image (name TEXT PRIMARY KEY, protocol, day, content)")
        self.database.execute("CREATE INDEX searched ON image (protocol, day)")
        rows = [
            (name, members.get("protocolName"), members.get("studyDate"), content)
            for name, (members, content) in files.items()
        ]
        self.database.executemany("INSERT INTO image VALUES (?, ?, ?, ?)", rows)
        self.database.commit()

    def known(self, name: str) -> Any:
        query = "SELECT content FROM image WHERE name = ?"
        return self.database.execute(query, [name]).fetchone()[0]

    def search(self) -> Any:
        query = "SELECT content FROM image WHERE protocol = ? AND day BETWEEN ? AND ?"
        return self.database.execute(query, ["194", 20190101, 20191231]).fetchone()[0]

    def count(self) -> dict[str, int]:
        query = "SELECT protocol, count(*) FROM image WHERE protocol NOT NULL GROUP BY protocol"
        return dict(self.database.execute(query).fetchall())


def scenarios(rounds: int) -> tuple[dict[str, dict[str, list[float]]], dict[str, int], str]:
    """Return the seconds of each scenario by method, the files of each, and what `similar` finds.

    The published method has the files of its published counts and the known file; the others have
    all files.
    """
    known = "test_files/JPGExtended.dcm"
    root = Path(pydicom.__file__).parent / "data"
    with TemporaryDirectory() as folder, RedisServer() as server:
        client = connect(server.url)
        store = DicomStore(client, progress=False)
        store.load(root)
        files: dict[str, tuple[dict[str, Any], bytes]] = {}
        for row in store.find().to_dict("records"):
            members = {str(name): value for name, value in row.items() if pd.notna(value)}
            files[row["path"]] = (members, (root / row["path"]).read_bytes())
        its_own = {
            name: file
            for name, file in files.items()
            if name == known or file[0].get("protocolName") not in (None, "t1_vibe_fs_tra_bh_dyn")
        }
        # A client of its own: json() changes how a client reads replies.
        published = Published(connect(server.url), its_own)
        table = Table(Path(folder) / "images.db", files)

        def ours_search() -> Any:
            days = ("2019-01-01", "2019-12-31")
            found = store.find(protocolName="194", studyDate=days, columns=())
            return store.read(found["key"].iloc[0])

        methods: dict[str, dict[str, Callable[[], Any]]] = {
            "1. known file": {
                "published": lambda: published.known(known),
                "this project": lambda: store.read(known),
                "SQLite": lambda: table.known(known),
            },
            "2. find, then read": {
                "published": published.search,
                "this project": ours_search,
                "SQLite": table.search,
            },
            "3. count by protocol": {
                "published": published.count,
                "this project": lambda: store.count_by("protocolName").to_dict(),
                "SQLite": table.count,
            },
        }
        for name, ways in methods.items():  # every method has the same answer
            answers = [way() for way in ways.values()]
            if name.startswith("3."):
                answers = [{key: n for key, n in a.items() if key[:2] != "t1"} for a in answers]
            if any(answer != answers[0] for answer in answers):
                raise AssertionError(f"{name}: the methods differ")
        seconds: dict[str, dict[str, list[float]]] = {name: {} for name in methods}
        for number in range(rounds + 1):
            for name, ways in methods.items():
                for way, work in ways.items():
                    taken = timed(work)
                    if number:
                        seconds[name].setdefault(way, []).append(taken)
        published.client.close()
        client.close()
    counts = {"published": len(its_own), "this project": len(files), "SQLite": len(files)}
    return seconds, counts, likeness(root)


def likeness(root: Path) -> str:
    """Return for how many real images the nearest other is of the same series or body part."""
    spec = importlib.util.find_spec("data_store")  # the package pydicom-data
    with RedisServer() as server:
        client = connect(server.url)
        store = DicomStore(client, progress=False)
        store.load(root)
        if spec is not None and spec.origin is not None:
            store.load(Path(spec.origin).parent / "data", under="pydicom-data")
        rows = store.find().set_index("key")
        described = [
            key
            for key in rows.index
            if "descriptor" in (store._members(key, ("descriptor", "size")) or {})
        ]
        rows = rows.loc[described]
        alike = others = 0
        for key, row in rows.iterrows():
            part = (rows["modality"] == row["modality"]) & (
                rows["bodyPartExamined"] == row["bodyPartExamined"]
            )
            same = (rows["seriesInstanceUID"] == row["seriesInstanceUID"]) | part
            if same.drop(key).any():
                others += 1
                alike += bool(same[store.similar(str(key), 1)["key"].iloc[0]])
        client.close()
    return (
        f"Of {len(rows)} real images with a descriptor, {others} have another one of the same "
        f"series, or of the same body part and modality; for {alike} of these "
        f"({alike / others:.2f}) the nearest other image is such a one."
    )


# --- results -------------------------------------------------------------------------------------


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """Return the 10th, 50th and 90th percentile in milliseconds."""
    cuts = statistics.quantiles(seconds, n=10)
    return 1000 * cuts[0], 1000 * statistics.median(seconds), 1000 * cuts[-1]


def report(
    costs: Costs,
    rates: dict[int, float],
    bytes_each: dict[str, float],
    seconds: dict[str, dict[str, list[float]]],
    counts: dict[str, int],
    alike: str,
) -> str:
    """Return the results as Markdown."""
    sizes = list(rates)
    lines = [
        f"{machine()} Medians, with the 10th to 90th percentile where there is room.",
        "",
        "| ms among so many documents | " + " | ".join(f"{size:,}" for size in sizes) + " |",
        "|---|" + "---:|" * len(sizes),
    ]
    for name, by_size in costs.items():
        cells = [f"{quantiles(by_size[size])[1]:.2f}" for size in sizes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cells = [f"{rate:,.0f}" for rate in rates.values()]
    lines.append(f"| documents loaded per second | {' | '.join(cells)} |")
    lines += ["", "| Redis memory of a document and its part of the index | bytes |", "|---|---:|"]
    lines += [f"| 16 fields, without `header`, {n} | {b:,.0f} |" for n, b in bytes_each.items()]
    lines += [
        "",
        "| scenario | method | files | ms | 10% to 90% | published / this, round by round |",
    ]
    lines += ["|---|---|---:|---:|---:|---:|"]
    for name, ways in seconds.items():
        for way, times in ways.items():
            low, median, high = quantiles(times)
            ratios = [b / a for a, b in zip(times, ways["published"], strict=True)]
            lines.append(
                f"| {name} | {way} | {counts[way]} | {median:.3f} | {low:.3f} to {high:.3f} | "
                f"{statistics.median(ratios):.2f} |"
            )
    first, last = sizes[0], sizes[-1]
    exact = next(iter(costs.values()))
    growth = quantiles(exact[last])[1] / quantiles(exact[first])[1]
    lines += [
        "",
        f"An exact search for 10 documents takes {growth:.2f} times as long among {last:,} as "
        f"among {first:,}. {alike}",
    ]
    return "\n".join(lines) + "\n"


#: What is drawn, with colours that differ in lightness as well.
DRAWN = {
    "exact: the 10 images of a series": ("#1b3a6b", "o"),
    "patient and year": ("#7a7a7a", "s"),
    "count by modality": ("#c0561a", "^"),
    "modality by year": ("#e0a030", "D"),
    "5 most alike": ("#4f9d8f", "v"),
}


def draw(costs: Costs) -> None:
    """Draw the cost of searches against the number of documents."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained", facecolor="white")
    for name, (colour, marker) in DRAWN.items():
        sizes = list(costs[name])
        low, median, high = zip(*(quantiles(costs[name][size]) for size in sizes), strict=True)
        axes.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(sizes, median, color=colour, marker=marker, label=name)
    exact = costs["exact: the 10 images of a series"]
    first, last = min(exact), max(exact)
    axes.set(
        title=f"Among {last:,} images a series is found in {quantiles(exact[last])[1]:.1f} ms, "
        f"among {first:,} in {quantiles(exact[first])[1]:.1f} ms",
        xscale="log",
        yscale="log",
        xlabel="documents",
        ylabel="ms (median, 10th to 90th percentile)",
    )
    axes.grid(which="major", color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(FIGURE, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="documents (200000)")
    parser.add_argument("--rounds", type=int, default=20, help="counted rounds a size (20)")
    arguments = parser.parse_args(argv)
    sizes = tuple(size for size in SIZES if size <= arguments.largest)
    if not sizes or arguments.rounds < 2:
        print(f"--largest is at least {SIZES[0]}, --rounds at least 2.", file=sys.stderr)
        return 2
    seconds, counts, alike = scenarios(5 * arguments.rounds)
    costs, rates = scale(sizes, arguments.rounds)
    TABLE.write_text(report(costs, rates, memory(), seconds, counts, alike))
    draw(costs)
    print(f"\n{TABLE.read_text()}\nFigure: {FIGURE.relative_to(PROJECT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
