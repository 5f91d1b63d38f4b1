"""The notebook's three scenarios beside other methods, for `search.py`."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sqlite3
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import pydicom
from redis.commands.search.aggregation import AggregateRequest
from redis.commands.search.query import Query
from redis.commands.search.reducers import count
from reporting import timed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dicomstore import DicomStore, connect
from dicomstore.errors import NoThumbnailError
from dicomstore.server.embedded import RedisServer

PUBLISHED_CHUNK = 5 * 1024


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


class Bare:
    """The commands alone that this project sends, by redis-py, with nothing checked or shown."""

    def __init__(self, client: Any, store: DicomStore, known: str) -> None:
        self.client = client
        self.index: bytes = client.execute_command("FT.INFO", "file:idx")[b"index_name"]
        self.manifest = store.manifest(known)

    def _chunks(self, key: str, version: str, count: int) -> bytes:
        keys = [f"chunk:{key}:{version}:{number}" for number in range(count)]
        with self.client.pipeline(transaction=False) as pipe:
            pipe.execute_command("MGET", *keys)
            pipe.execute_command("JSON.GET", key, "$.version", "$.crc")
            return b"".join(pipe.execute()[0])

    def known(self) -> bytes:
        return self._chunks(self.manifest.key, self.manifest.version, self.manifest.count)

    def search(self) -> bytes:
        members = ["$.version", "$.size", "$.chunkSize", "$.tail"]
        reply = self.client.execute_command(
            "FT.SEARCH", self.index, "@protocolName:{$name} @studyDate:[$low $high]", "RETURN", "4",
            *members, "PARAMS", "6", "name", "194", "low", "20190101", "high", "20191231",
            "DIALECT", "2",
        )  # fmt: skip
        (hit,) = reply[b"results"]
        of = hit[b"extra_attributes"]
        count = int(of[b"$.size"]) // int(of[b"$.chunkSize"]) + len(json.loads(of[b"$.tail"]))
        return self._chunks(hit[b"id"].decode(), of[b"$.version"].decode(), count)

    def count(self) -> dict[str, int]:
        reply, _ = self.client.execute_command(
            "FT.AGGREGATE", self.index, "-(ismissing(@protocolName))", "GROUPBY", "1",
            "@protocolName", "REDUCE", "COUNT", "0", "AS", "n", "WITHCURSOR", "COUNT", "10000",
            "DIALECT", "2",
        )  # fmt: skip
        rows = [row[b"extra_attributes"] for row in reply[b"results"]]
        return {row[b"protocolName"].decode(): int(row[b"n"]) for row in rows}


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
        bare = Bare(client, store, known)

        def ours_search() -> Any:
            days = ("2019-01-01", "2019-12-31")
            found = store.find(protocolName="194", studyDate=days, columns=())
            return store.read(found)

        methods: dict[str, dict[str, Callable[[], Any]]] = {
            "1. known file": {
                "published": lambda: published.known(known),
                "this project": lambda: store.read(known),
                "bare commands": bare.known,
                "SQLite": lambda: table.known(known),
            },
            "2. find, then read": {
                "published": published.search,
                "this project": ours_search,
                "bare commands": bare.search,
                "SQLite": table.search,
            },
            "3. count by protocol": {
                "published": published.count,
                "this project": lambda: store.count_by("protocolName").to_dict(),
                "bare commands": bare.count,
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
                    # In a row, so that a method does not pay for what the others left in caches.
                    taken = statistics.median(timed(work) for _ in range(5))
                    if number:
                        seconds[name].setdefault(way, []).append(taken)
        published.client.close()
        client.close()
    counts = {**dict.fromkeys(seconds["1. known file"], len(files)), "published": len(its_own)}
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
        columns = ("modality", "bodyPartExamined", "seriesInstanceUID")
        rows = store.find(columns=columns).set_index("key")
        nearest = {}
        for key in rows.index:
            with contextlib.suppress(NoThumbnailError):
                nearest[key] = store.similar(str(key), 1)["key"].iloc[0]
        rows = rows.loc[list(nearest)]
        alike = others = 0
        for key, row in rows.iterrows():
            part = (rows["modality"] == row["modality"]) & (
                rows["bodyPartExamined"] == row["bodyPartExamined"]
            )
            same = (rows["seriesInstanceUID"] == row["seriesInstanceUID"]) | part
            if same.drop(key).any():
                others += 1
                alike += bool(same[nearest[key]])
        client.close()
    return (
        f"Of {len(rows)} real images with a thumbnail, {others} have another one of the same "
        f"series, or of the same body part and modality; for {alike} of these "
        f"({alike / others:.2f}) the nearest other image is such a one."
    )
