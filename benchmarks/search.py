"""Searching, beside what one has otherwise: cost against size, and the three scenarios, in one run.

Synthetic documents of the same shape as ours show what a search costs among 1,000 to 1,000,000 of
them; the scenarios run on pydicom's real files, beside the published method, the bare commands and
an SQLite table.
Run it with `make bench-search`.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from reporting import machine, timed
from scenarios import scenarios

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from dicomstore import DicomStore, connect, words  # noqa: E402 - run in place, not installed
from dicomstore.server.embedded import RedisServer  # noqa: E402

SIZES = (1_000, 10_000, 100_000, 200_000, 1_000_000, 2_000_000)
#: The graph of more documents takes too long to build.
GRAPHED = 1_000_000
BATCH = 1000
TABLE = PROJECT / "benchmarks" / "search.md"
FIGURE = PROJECT / "images" / "search_scale.png"
METHODS = (
    "The published method is that of the demonstration redis-dicom of 2023: one GET for each 5 KB "
    "chunk, with the 26 files of its published counts. The bare commands are those that this "
    "project sends, with nothing checked or shown. SQLite is a table on the local disk."
)
MODALITIES = {"CT": 45, "MR": 30, "CR": 8, "DX": 6, "US": 6, "PT": 3, "MG": 2}
BODY_PARTS = ("HEAD", "CHEST", "ABDOMEN", "PELVIS", "CSPINE", "KNEE", "HEART", "BREAST")
PROTOCOLS = tuple(f"{part} {way}" for part in BODY_PARTS for way in ("Routine", "T1", "T2", "Thin"))
WORDS = ("with contrast", "without contrast", "axial", "follow-up", "screening", "post op", "thin")
MAKERS = ("SIEMENS", "GE MEDICAL SYSTEMS", "PHILIPS MEDICAL SYSTEMS", "TOSHIBA", "CANON")


def documents(
    first: int, last: int, *, thumbnails: bool = True, series_each: int = 5
) -> Iterator[tuple[str, str]]:
    """Yield key and text of documents as loading makes them, without `header`.

    Ten to a series, `series_each` series to a study, two studies to a patient; modalities,
    protocols and dates are as unevenly distributed as in a hospital.
    """
    in_study = 10 * series_each
    for number in range(first, last):
        series, study, patient = number // 10, number // in_study, number // (2 * in_study)
        of_study, of_series = random.Random(study), random.Random(f"series {series}")
        body_part = of_study.choice(BODY_PARTS)
        day = date(2015, 1, 1) + timedelta(days=int(3650 * of_study.random() ** 0.5))
        key = f"file:archive/{patient:05}/{series:06}/IM{number % 10:06}.dcm"
        version = f"{number:012x}"
        document = {
            "imageName": f"IM{number % 10:06}.dcm", "size": 526_400, "blake3": f"{number:064x}",
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
        if thumbnails:
            document["thumbnail"] = likeness_of(
                body_part, str(document["modality"]), series, number
            )
        yield key, json.dumps(document)


@functools.lru_cache(maxsize=1000)
def pattern(seed: str, squares: int, spread: float) -> Any:
    """Return 8 x 8 random grey levels around zero, in so many squares a side."""
    levels = np.random.default_rng(zlib.crc32(seed.encode())).normal(0, spread, (squares, squares))
    return np.kron(levels, np.ones((8 // squares, 8 // squares)))


def likeness_of(body_part: str, modality: str, series: int, number: int) -> list[int]:
    """Return a thumbnail of 8 x 8 grey levels, about as alike as those of real images.

    A body part looks about the same in a modality, a series differs, and each image a little more.
    """
    levels = pattern(f"{body_part} {modality}", 4, 60) + pattern(f"series {series}", 4, 20)
    noise = np.random.default_rng(number).normal(110, 5, (8, 8))
    found: list[int] = (levels + noise).clip(0, 255).astype(int).ravel().tolist()
    return found


def fill(client: Any, first: int, last: int, *, thumbnails: bool = True) -> float:
    """Store documents and return the seconds that Redis took, without the making of them."""
    taken = 0.0
    for start in range(first, last, BATCH):
        batch = list(documents(start, min(start + BATCH, last), thumbnails=thumbnails))
        with client.pipeline(transaction=False) as pipe:
            for key, text in batch:
                pipe.execute_command("JSON.SET", key, "$", text)
            taken += timed(pipe.execute)
    return taken


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


def graph_beside(client: Any, size: int) -> str:
    """Return as Markdown what the other kind of vector index, HNSW, does with the same documents.

    FLAT compares with every thumbnail; HNSW walks a graph of them, and may miss some. Each is asked
    for the 10 nearest of thumbnails that no document has.
    """
    flat = client.execute_command("FT.INFO", "file:idx")[b"index_name"]
    before = client.info("memory")["used_memory"]
    vector = ["TYPE", "FLOAT32", "DIM", "64", "DISTANCE_METRIC", "L2", "M", "16"]
    kind = ["VECTOR", "HNSW", str(len(vector) + 2), *vector, "EF_CONSTRUCTION", "200"]
    schema = ["$.thumbnail", "AS", "thumbnail", *kind]

    def build() -> None:
        create = ["FT.CREATE", "graph", "ON", "JSON", "PREFIX", "1", "file:", "SCHEMA"]
        client.execute_command(*create, *schema)
        while client.execute_command("FT.INFO", "graph")[b"indexing"]:
            time.sleep(0.1)

    built = timed(build)
    bytes_each = (client.info("memory")["used_memory"] - before) / size
    wanted = [
        np.array(likeness_of(body_part, "CT", size + number, size + number), dtype="<f4").tobytes()
        for number, body_part in enumerate(BODY_PARTS * 10)
    ]

    def nearest(index: str | bytes, vector: bytes, effort: int | None) -> list[bytes]:
        attributes = f"EF_RUNTIME {effort}" if effort else ""
        reply = client.execute_command(
            "FT.SEARCH", index, f"*=>[KNN 10 @thumbnail $v {attributes}]", "SORTBY",
            "__thumbnail_score", "NOCONTENT", "LIMIT", "0", "10", "PARAMS", "2", "v", vector,
            "DIALECT", "2", "TIMEOUT", "60000",
        )  # fmt: skip
        return [hit[b"id"] for hit in reply[b"results"]]

    exact = [set(nearest(flat, sought, None)) for sought in wanted]
    ways = {"FLAT": (flat, None), **{f"HNSW, EF_RUNTIME {n}": ("graph", n) for n in (10, 50, 200)}}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = dict.fromkeys(ways, 0)
    for sought, right in zip(wanted, exact, strict=True):
        for name, (index, effort) in ways.items():
            start = time.perf_counter()
            keys = nearest(index, sought, effort)
            seconds[name].append(time.perf_counter() - start)
            found[name] += len(right.intersection(keys))
    client.execute_command("FT.DROPINDEX", "graph")
    lines = [
        "",
        f"| the 10 most alike of {size:,} | ms | 10% to 90% | of them found |",
        "|---|---:|---:|---:|",
    ]
    for name in ways:
        low, median, high = quantiles(seconds[name])
        share = found[name] / (10 * len(seconds[name]))
        lines.append(f"| {name} | {median:.2f} | {low:.2f} to {high:.2f} | {share:.3f} |")
    lines += [
        "",
        f"The HNSW index (M 16, EF_CONSTRUCTION 200) was built at {size / built:,.0f} documents a "
        f"second and takes {bytes_each:,.0f} bytes a document.",
    ]
    return "\n".join(lines)


Costs = dict[str, dict[int, list[float]]]


def scale(sizes: tuple[int, ...], rounds: int) -> tuple[Costs, dict[int, float], str]:
    """Return the seconds of each search at each size, documents loaded per second, and HNSW's."""
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
            if size == max(each for each in sizes if each <= GRAPHED):
                graph = graph_beside(client, size)
        client.close()
    return costs, rates, graph


def memory(documents_each: int = 20_000) -> dict[str, float]:
    """Return bytes of Redis memory for a document with its part of the index."""
    found = {}
    for name, thumbnails in (("without thumbnail", False), ("with thumbnail", True)):
        with RedisServer() as server:
            client = connect(server.url)
            DicomStore(client, progress=False).find()
            before = client.info("memory")["used_memory"]
            fill(client, 0, documents_each, thumbnails=thumbnails)
            found[name] = (client.info("memory")["used_memory"] - before) / documents_each
            client.close()
    return found


# --- results -------------------------------------------------------------------------------------


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """Return the 10th, 50th and 90th percentile in milliseconds."""
    cuts = statistics.quantiles(seconds, n=10)
    return 1000 * cuts[0], 1000 * statistics.median(seconds), 1000 * cuts[-1]


def ratio(these: list[float], those: list[float]) -> float:
    """Return the median of the ratios, round by round."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def report(
    costs: Costs,
    rates: dict[int, float],
    bytes_each: dict[str, float],
    seconds: dict[str, dict[str, list[float]]],
    counts: dict[str, int],
    graph: str,
    alike: str,
) -> str:
    """Return the results as Markdown."""
    sizes = list(rates)
    lines = [
        f"{machine()} Medians, with the 10th to 90th percentile where there is room. {METHODS}",
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
        graph,
        "",
        "| scenario | method | files | ms | 10% to 90% | published / this | this / bare commands |",
    ]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    for name, ways in seconds.items():
        for way, times in ways.items():
            low, median, high = quantiles(times)
            lines.append(
                f"| {name} | {way} | {counts[way]} | {median:.3f} | {low:.3f} to {high:.3f} | "
                f"{ratio(ways['published'], times):.2f} | "
                f"{ratio(times, ways['bare commands']):.2f} |"
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
    parser.add_argument(
        "--largest",
        type=int,
        default=1_000_000,
        help="documents (1000000, which takes 6 GB, and 20 minutes for HNSW; 2000000 takes 12 GB)",
    )
    parser.add_argument("--rounds", type=int, default=20, help="counted rounds a size (20)")
    arguments = parser.parse_args(argv)
    sizes = tuple(size for size in SIZES if size <= arguments.largest)
    if not sizes or arguments.rounds < 2:
        print(f"--largest is at least {SIZES[0]}, --rounds at least 2.", file=sys.stderr)
        return 2
    seconds, counts, alike = scenarios(5 * arguments.rounds)
    costs, rates, graph = scale(sizes, arguments.rounds)
    TABLE.write_text(report(costs, rates, memory(), seconds, counts, graph, alike))
    draw(costs)
    print(f"\n{TABLE.read_text()}\nFigure: {FIGURE.relative_to(PROJECT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
