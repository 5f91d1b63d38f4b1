"""Studies, series and instances found, and what is said of them in DICOM JSON (PS3.18 Annex F)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any, NamedTuple

from dicomstore.catalogue.query import build_query
from dicomstore.catalogue.schema import Index
from dicomstore.web.asking import OPTIONS, Asking, Row, whole
from dicomstore.web.fetching import Attached, Fetching, inflated
from dicomstore.web.matching import IN_STUDY, INSTANCE, MOST_VALUES, SERIES, STUDY, UIDS, Wanted

#: Where more instances than this fit, only those of the latest days are grouped into studies.
GROUPED = 20_000
#: So many days at first; then twice as many, until there are studies enough.
FIRST_DAYS = 8
#: Of the first so many studies at first, if series or instances of all are looked for.
FIRST_STUDIES = 8
#: A date before any study's.
EARLIEST = date(1950, 1, 1)
#: Where a document has the CRC-32 of its DICOM JSON.
JSON_CRC = "$.attachments.json"


class TooBroadError(ValueError):
    """More values fit than can be looked for."""


class Found(NamedTuple):
    """An instance: its UIDs, the key of its document, and what is attached to it."""

    uid: str
    key: str
    series: str
    attached: Attached | None  # None: another program's document


class Searching:
    """Finds studies, series and instances.

    Parameters
    ----------
    fetching : Fetching
    """

    def __init__(self, fetching: Fetching) -> None:
        self._fetching = fetching
        self._asking = Asking(fetching)
        self._latest: date | None = None

    async def instances(self, uids: dict[str, str]) -> list[Found]:
        """Return the instances that have these UIDs, in order of their paths.

        Of files that share all three UIDs it is the one whose path comes first.
        """
        conditions = {**dict.fromkeys(UIDS.values(), ...), **uids}
        loaded = ("@__key", "@seriesInstanceUID", "@sopInstanceUID", "$.version", JSON_CRC)
        stages = ("LOAD", str(len(loaded)), *loaded)
        if UIDS[INSTANCE] in uids:
            rows = await self._asking.rows_at_once(conditions, stages)
        else:
            rows = await self._asking.rows(await self._asking.index(), conditions, stages)
        found: dict[tuple[bytes, bytes], Found] = {}
        for row in sorted(rows, key=lambda row: row[b"__key"]):
            series, uid = row[b"seriesInstanceUID"], row[b"sopInstanceUID"]
            key = os.fsdecode(row[b"__key"])
            one = Found(uid.decode(), key, series.decode(), _attached(row))
            found.setdefault((series, uid), one)
        return list(found.values())

    async def find(self, wanted: Wanted) -> tuple[list[dict[str, Any]], int | None]:
        """Return what is asked for as data sets in DICOM JSON, and how many more there are.

        None says that there are more, and that they were not counted.
        """
        index = await self._asking.index()
        # Only what has all three UIDs can be retrieved.
        conditions = {**dict.fromkeys(UIDS.values(), ...), **wanted.conditions}
        for name, fits in wanted.fits.items():
            field = IN_STUDY.get(name) or index.field(name)
            fitting = [value for value in await self._asking.values(index, field) if fits(value)]
            if len(fitting) > MOST_VALUES:
                raise TooBroadError(f"{name}: over {MOST_VALUES} values fit; give more of it.")
            if not fitting:
                return [], 0
            conditions[name] = fitting
        for name in IN_STUDY.keys() & conditions.keys():
            conditions[IN_STUDY[name]] = conditions.pop(name)
        most = wanted.offset + wanted.limit
        if wanted.level == STUDY:
            rows, are_all = await self._latest_studies(index, conditions, most)
        else:
            rows, are_all = await self._first_matches(index, wanted.level, conditions, most)
        page = rows[wanted.offset : wanted.offset + wanted.limit]
        more = max(0, len(rows) - wanted.offset - len(page)) if are_all else None
        return await self._described(index, wanted, page), more

    async def _latest_studies(
        self, index: Index, conditions: dict[str, Any], most: int
    ) -> tuple[list[Row], bool]:
        """Return the studies that fit, the latest first, and whether these are all.

        Grouping takes time for each instance. So of many instances only those of the latest days
        are looked at, if there are more than `most` studies in them: no older study comes before
        these.
        """
        reduced = ("REDUCE", "MAX", "1", "@studyDate", "AS", "date")
        stages = ("GROUPBY", "1", "@studyInstanceUID", *reduced)
        if await self._asking.count(index, conditions) > GROUPED:
            latest = self._latest = self._latest or await self._latest_date(index)
            days = FIRST_DAYS
            while (latest - EARLIEST).days > days:
                since = {"studyDate": (latest - timedelta(days), None)}
                rows = await self._asking.rows(index, conditions | since, stages)
                if len(rows) > most:
                    return _latest_first(rows), False
                days *= 2
        return _latest_first(await self._asking.rows(index, conditions, stages)), True

    async def _latest_date(self, index: Index) -> date:
        # Remembered for good: from an older one, a search is no less right, and soon as fast.
        reduced = ("GROUPBY", "0", "REDUCE", "MAX", "1", "@studyDate", "AS", "date")
        (row,) = await self._asking.rows(index, {"studyDate": ...}, reduced) or [{}]
        try:
            return date.fromisoformat(str(int(_number(row, b"date"))))
        except ValueError:
            return EARLIEST

    async def _first_matches(
        self, index: Index, level: str, conditions: dict[str, Any], most: int
    ) -> tuple[list[Row], bool]:
        """Return series or instances that fit, in order of UIDs and numbers; whether it is all.

        Of many instances only those of the studies that come first are read, if there are more
        than `most` series or instances in them.
        """
        uid = UIDS[STUDY]
        if conditions[uid] is ... and await self._asking.count(index, conditions) > GROUPED:
            studies = sorted(await self._asking.values(index, uid))
            rows: list[Row] = []
            at, step = 0, FIRST_STUDIES
            while at < len(studies):
                some = {uid: studies[at : at + step]}
                rows += await self._matches(index, level, conditions | some)
                if len(rows) > most:
                    return rows, False
                at, step = at + step, min(2 * step, MOST_VALUES)
            return rows, True
        return await self._matches(index, level, conditions), True

    async def _matches(self, index: Index, level: str, conditions: dict[str, Any]) -> list[Row]:
        """Return the UIDs of what fits, in order of UIDs and numbers."""
        if level == SERIES:
            reduced = ("REDUCE", "MIN", "1", "@seriesNumber", "AS", "number")
            by = ("GROUPBY", "2", "@studyInstanceUID", "@seriesInstanceUID")
            rows = await self._asking.rows(index, conditions, (*by, *reduced))
            return sorted(
                rows,
                key=lambda row: (
                    row[b"studyInstanceUID"],
                    _number(row, b"number"),
                    row[b"seriesInstanceUID"],
                ),
            )
        loaded = ("__key", "studyInstanceUID", "seriesInstanceUID", "sopInstanceUID",
                  "instanceNumber")  # fmt: skip
        rows = await self._asking.rows(
            index, conditions, ("LOAD", "5", *(f"@{name}" for name in loaded))
        )
        first: dict[tuple[bytes, ...], Row] = {}
        for row in sorted(rows, key=lambda row: row[b"__key"]):
            first.setdefault(tuple(row[UIDS[level].encode()] for level in UIDS), row)
        return sorted(
            first.values(),
            key=lambda row: (
                row[b"studyInstanceUID"],
                row[b"seriesInstanceUID"],
                _number(row, b"instanceNumber"),
                row[b"sopInstanceUID"],
            ),
        )

    # --- what is said of them ---

    async def _described(
        self, index: Index, wanted: Wanted, page: Sequence[Row]
    ) -> list[dict[str, Any]]:
        counted: dict[bytes, dict[str, Any]] = {}
        field = UIDS[wanted.level].encode()
        if wanted.level == INSTANCE:
            keys = [os.fsdecode(row[b"__key"]) for row in page]
        else:
            counted = await self._counted(index, wanted.level, page) if page else {}
            page = [row for row in page if row[field] in counted]  # the others are deleted
            keys = [counted[row[field]]["key"] for row in page]
        texts = await self._fetching.json(await self._fetching.attached(keys)) if keys else {}
        answers = []
        for row, key in zip(page, keys, strict=True):
            text = texts[key]
            dataset = json.loads(inflated(text)) if text else {}
            if wanted.attributes is None:
                shown = {tag: e for tag, e in dataset.items() if "BulkDataURI" not in e}
            else:
                shown = {tag: dataset[tag] for tag in sorted(wanted.attributes & dataset.keys())}
            for level, tag in zip(UIDS, ("0020000D", "0020000E", "00080018"), strict=True):
                if name := row.get(UIDS[level].encode()):
                    shown[tag] = _element("UI", name.decode())
            shown |= counted.get(row[field], {}).get("elements", {})
            answers.append(shown)
        return answers

    async def _counted(
        self, index: Index, level: str, page: Sequence[Row]
    ) -> dict[bytes, dict[str, Any]]:
        """Return by UID what a study or series comes to, and the key of one of its instances."""
        field = UIDS[level]
        uids = [row[field.encode()].decode() for row in page]
        conditions: dict[str, Any] = dict.fromkeys(UIDS.values(), ...)
        conditions[UIDS[STUDY]] = sorted({row[UIDS[STUDY].encode()].decode() for row in page})
        conditions[field] = sorted(uids)
        stages = ["GROUPBY", "1", f"@{field}", "REDUCE", "COUNT", "0", "AS", "instances"]
        if level == STUDY:
            stages += ["REDUCE", "COUNT_DISTINCT", "1", "@seriesInstanceUID", "AS", "series"]
            stages += ["REDUCE", "TOLIST", "1", "@modality", "AS", "modalities"]
        rows = {
            row[field.encode()]: row for row in await self._asking.rows(index, conditions, stages)
        }
        keys = await self._keys(index, field, uids)
        found: dict[bytes, dict[str, Any]] = {}
        for uid, row in rows.items():
            if (key := keys.get(uid.decode())) is None:
                continue
            instances = _element("IS", int(row[b"instances"]))
            elements = {"00201209": instances}
            if level == STUDY:
                modalities = sorted({each.decode() for each in row[b"modalities"] if each})
                elements = {
                    "00080061": _element("CS", *modalities),
                    "00201206": _element("IS", int(row[b"series"])),
                    "00201208": instances,
                }
            found[uid] = {"key": key, "elements": elements}
        return found

    async def _keys(self, index: Index, field: str, uids: Sequence[str]) -> dict[str, str]:
        """Return the key of the first instance that was stored, by the UID of its study or series.

        A search for each takes a tenth of the time that reading all keys of a group does.
        """
        every: dict[str, Any] = dict.fromkeys(UIDS.values(), ...)
        queries = [build_query("", {**every, field: uid}, index) for uid in uids]
        commands = [
            ("FT.SEARCH", index.name, query.text, "NOCONTENT", "LIMIT", "0", "1",
             *query.parameters, *OPTIONS)
            for query in queries
        ]  # fmt: skip
        found = {}
        for uid, reply in zip(uids, await self._fetching.replies(commands), strict=True):
            for result in whole(reply)[b"results"]:
                found[uid] = os.fsdecode(result[b"id"])
        return found


def _attached(row: Row) -> Attached | None:
    version, crc = row.get(b"$.version"), row.get(JSON_CRC.encode())
    if version is None:
        return None
    if crc is None:
        return Attached(version.decode(), None)
    return Attached(version.decode(), int(crc) if crc.isdigit() else -1)  # -1 is no CRC-32


def _latest_first(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (-_number(row, b"date"), row[b"studyInstanceUID"]))


def _element(vr: str, *values: Any) -> dict[str, Any]:
    return {"vr": vr, "Value": list(values)} if values else {"vr": vr}


def _number(row: Row, name: bytes) -> float:
    try:
        return float(row.get(name) or 0)
    except ValueError:
        return 0.0
