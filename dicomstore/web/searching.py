"""Studies, series and instances found, and what is said of them in DICOM JSON (PS3.18 Annex F)."""

from __future__ import annotations

import json
import os
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import redis

from dicomstore.catalogue.engine import PAGE, SEARCH_TIMEOUT_MS
from dicomstore.catalogue.query import build_query
from dicomstore.catalogue.schema import INDEX, Index, named
from dicomstore.errors import SearchError, SearchTimeoutError
from dicomstore.web.fetching import Command, Fetching, inflated
from dicomstore.web.matching import INSTANCE, MOST_VALUES, SERIES, STUDY, UIDS, Wanted

#: So many answers of the index are remembered for as long as it does not change.
REMEMBERED = 64
#: An answer of more rows is not.
REMEMBERED_ROWS = 20_000

Row = dict[bytes, Any]


class TooBroadError(ValueError):
    """More values fit than can be looked for."""


class Searching:
    """Asks the index.

    Parameters
    ----------
    fetching : Fetching
    """

    def __init__(self, fetching: Fetching) -> None:
        self._fetching = fetching
        self._remembered: OrderedDict[Command, list[Row]] = OrderedDict()
        self._state: Any = None

    async def keys(self, uids: dict[str, str]) -> list[tuple[str, str]]:
        """Return SOP Instance UID and key of instances, in order of their paths.

        Of files that share all three UIDs it is the one whose path comes first.
        """
        rows = await self._rows(
            await self._index(), {**uids, "sopInstanceUID": uids.get("sopInstanceUID", ...)},
            ("LOAD", "2", "@__key", "@sopInstanceUID"),
        )  # fmt: skip
        found: dict[str, str] = {}
        for row in sorted(rows, key=lambda row: row[b"__key"]):
            found.setdefault(row[b"sopInstanceUID"].decode(), os.fsdecode(row[b"__key"]))
        return list(found.items())

    async def find(self, wanted: Wanted) -> tuple[list[dict[str, Any]], int]:
        """Return what is asked for as data sets in DICOM JSON, and how many more there are."""
        index = await self._index()
        conditions = dict(wanted.conditions)
        for level in (STUDY, SERIES, INSTANCE):
            conditions.setdefault(UIDS[level], ...)
            if level == wanted.level:
                break
        for name, fits in wanted.fits.items():
            field = "modality" if name == "ModalitiesInStudy" else index.field(name)
            groups = await self._rows(index, {}, ("GROUPBY", "1", f"@{field}"))
            values = [row[field.encode()] for row in groups if row.get(field.encode()) is not None]
            fitting = [text for value in values if fits(text := value.decode())]
            if len(fitting) > MOST_VALUES:
                raise TooBroadError(f"{name}: over {MOST_VALUES} values fit; give more of it.")
            if not fitting:
                return [], 0
            conditions[name] = fitting
        if "ModalitiesInStudy" in conditions:
            conditions["modality"] = conditions.pop("ModalitiesInStudy")
        if "SOPClassesInStudy" in conditions:
            conditions["sopClassUID"] = conditions.pop("SOPClassesInStudy")
        rows = await self._matches(index, wanted.level, conditions)
        page = rows[wanted.offset : wanted.offset + wanted.limit]
        more = max(0, len(rows) - wanted.offset - len(page))
        return await self._described(index, wanted, page), more

    async def _matches(self, index: Index, level: str, conditions: dict[str, Any]) -> list[Row]:
        """Return the UIDs of what fits: the latest studies first, the others by number."""
        if level == STUDY:
            reduced = ("REDUCE", "MAX", "1", "@studyDate", "AS", "date")
            rows = await self._rows(
                index, conditions, ("GROUPBY", "1", "@studyInstanceUID", *reduced)
            )
            return sorted(rows, key=lambda row: (-_number(row, b"date"), row[b"studyInstanceUID"]))
        if level == SERIES:
            reduced = ("REDUCE", "MIN", "1", "@seriesNumber", "AS", "number")
            by = ("GROUPBY", "2", "@studyInstanceUID", "@seriesInstanceUID")
            rows = await self._rows(index, conditions, (*by, *reduced))
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
        rows = await self._rows(index, conditions, ("LOAD", "5", *(f"@{name}" for name in loaded)))
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
        if wanted.level != INSTANCE and page:
            counted = await self._counted(index, wanted.level, page)
        keys = [
            counted[row[field]]["key"] if counted else os.fsdecode(row[b"__key"]) for row in page
        ]
        texts = await self._fetching.json(keys) if keys else []
        answers = []
        for row, text in zip(page, texts, strict=True):
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
        """Return by UID what a study or series comes to, and the key of its first instance."""
        field = UIDS[level]
        # As of instances: only what has all three UIDs can be retrieved.
        conditions: dict[str, Any] = dict.fromkeys(UIDS.values(), ...)
        for name in (UIDS[STUDY], field):
            conditions[name] = sorted({row[name.encode()].decode() for row in page})
        by = [f"@{field}"] if level == SERIES else [f"@{field}", "@seriesInstanceUID", "@modality"]
        counting = ("REDUCE", "COUNT", "0", "AS", "n")
        first = ("REDUCE", "FIRST_VALUE", "4", "@__key", "BY", "@__key", "ASC", "AS", "k")
        stages = ("LOAD", "1", "@__key", "GROUPBY", str(len(by)), *by, *counting, *first)
        groups: defaultdict[bytes, list[Row]] = defaultdict(list)
        for row in await self._rows(index, conditions, stages):
            groups[row[field.encode()]].append(row)
        found: dict[bytes, dict[str, Any]] = {}
        for uid, rows in groups.items():
            instances = sum(int(row[b"n"]) for row in rows)
            key = os.fsdecode(min(row[b"k"] for row in rows))
            elements = {"00201209": _element("IS", instances)}
            if level == STUDY:
                modalities = sorted({row[b"modality"].decode() for row in rows if row[b"modality"]})
                series = len({row[b"seriesInstanceUID"] for row in rows})
                elements = {
                    "00080061": _element("CS", *modalities),
                    "00201206": _element("IS", series),
                    "00201208": _element("IS", instances),
                }
            found[uid] = {"key": key, "elements": elements}
        return found

    # --- the index ---

    async def _index(self) -> Index:
        """Return the index that answers now; forget its answers if anything in it has changed."""
        (info,) = await self._fetching.replies([("FT.INFO", INDEX)])
        if isinstance(info, redis.ResponseError):
            raise SearchError("There is no index: load a file, or search once, to have it made.")
        if isinstance(info, Exception):
            raise info
        # Every document that is added or changed takes a new number.
        by_name = named(info)
        state = [by_name[name] for name in (b"index_name", b"max_doc_id", b"num_docs")]
        if state != self._state:
            self._remembered.clear()
            self._state = state
        return Index.of(info)

    async def _rows(
        self, index: Index, conditions: dict[str, Any], stages: Sequence[str]
    ) -> list[Row]:
        """Return all rows of an aggregation over what meets the conditions."""
        query = build_query("", conditions, index)
        options = ("TIMEOUT", str(SEARCH_TIMEOUT_MS), "DIALECT", "2")
        cursor_options = ("WITHCURSOR", "COUNT", str(PAGE))
        words = ("FT.AGGREGATE", index.name, query.text, *stages, *cursor_options,
                 *query.parameters, *options)  # fmt: skip
        if (known := self._remembered.get(words)) is not None:
            return known
        state = self._state
        reply, cursor = _complete(*await self._fetching.replies([words]))
        rows = [result[b"extra_attributes"] for result in reply[b"results"]]
        while cursor:
            read = ("FT.CURSOR", "READ", index.name, cursor)
            reply, cursor = _complete(*await self._fetching.replies([read]))
            rows += [result[b"extra_attributes"] for result in reply[b"results"]]
        if state == self._state and len(rows) <= REMEMBERED_ROWS:
            self._remembered[words] = rows
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        return rows


def _complete(reply: Any) -> tuple[Any, Any]:
    """Return a reply and its cursor, if the answer is complete."""
    if isinstance(reply, redis.ResponseError):
        if "timeout" in str(reply).lower():
            raise SearchTimeoutError("The search engine did not finish in time: ask for less.")
        raise SearchError("The search engine refused the query.") from reply
    if isinstance(reply, Exception):
        raise reply
    found, cursor = reply
    if found.get(b"warning"):
        raise SearchError("The search engine warns that its answer is not complete.")
    return found, cursor


def _element(vr: str, *values: Any) -> dict[str, Any]:
    return {"vr": vr, "Value": list(values)} if values else {"vr": vr}


def _number(row: Row, name: bytes) -> float:
    try:
        return float(row.get(name) or 0)
    except ValueError:
        return 0.0
