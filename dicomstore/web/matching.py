"""What a QIDO-RS request asks for (PS3.18 10.6, PS3.4 C.2.2.2); knows no server."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from pydicom import datadict

from dicomstore.imaging import header
from dicomstore.imaging.values import NUMBER_VRS

STUDY, SERIES, INSTANCE = "studies", "series", "instances"
#: The field that tells one study, series or instance from the others.
UIDS = {
    STUDY: "studyInstanceUID",
    SERIES: "seriesInstanceUID",
    INSTANCE: "sopInstanceUID",
}
#: What an answer has when nothing more is asked for (PS3.18 10.6.3.3).
RETURNED = {
    STUDY: [
        "00080005",
        "00080020",
        "00080030",
        "00080050",
        "00080061",
        "00080090",
        "00080201",
        "00081030",
        "00100010",
        "00100020",
        "00100030",
        "00100040",
        "0020000D",
        "00200010",
    ],
    SERIES: [
        "00080005",
        "00080021",
        "00080031",
        "00080060",
        "00080201",
        "0008103E",
        "0020000D",
        "0020000E",
        "00200011",
        "00400244",
        "00400245",
        "00400275",
    ],
    INSTANCE: [
        "00080005",
        "00080016",
        "00080018",
        "00080201",
        "0020000D",
        "0020000E",
        "00200013",
        "00280008",
        "00280010",
        "00280011",
        "00280100",
    ],
}
#: Asked for by these keywords, a study is found by any of its series or instances.
IN_STUDY = {"ModalitiesInStudy": "modality", "SOPClassesInStudy": "sopClassUID"}
MOST_ROWS = 5000
MOST_VALUES = 1000

Fits = Callable[[str], bool]


class Wanted(NamedTuple):
    """What is looked for, and what is to be returned of it.

    Attributes
    ----------
    level : str
        Studies, series or instances.
    conditions : dict
        As the catalogue takes them.
    fits : dict
        By field, what its values have to fit that the catalogue cannot express.
    attributes : frozenset of str or None
        Tags; None for all.
    """

    level: str
    conditions: dict[str, Any]
    fits: dict[str, Fits]
    attributes: frozenset[str] | None
    limit: int
    offset: int
    warnings: Sequence[str]


def parse(level: str, scope: dict[str, str], parameters: Iterable[tuple[str, str]]) -> Wanted:
    """Return what a request asks for.

    Parameters
    ----------
    level : str
    scope : dict
        The UIDs in the path, by field.
    parameters : iterable of (str, str)
        Of the query, decoded.

    Raises
    ------
    ValueError
        If it is not a request of the standard, or asks for what is not indexed.
    """
    conditions: dict[str, Any] = dict(scope)
    fits: dict[str, Fits] = {}
    included: list[str] = []
    counts = {"limit": MOST_ROWS, "offset": 0}
    warnings = []
    seen = set()
    for name, value in parameters:
        if name == "includefield":
            included += value.split(",")
            continue
        if name in seen:
            raise ValueError(f"{_shown(name)} is given twice.")
        seen.add(name)
        if name in counts:
            if not re.fullmatch(r"\d{1,9}", value):
                raise ValueError(f"{name} is a number, 0 or more.")
            counts[name] = int(value)
        elif name == "fuzzymatching":
            if value == "true":
                warnings.append("The fuzzymatching parameter is not supported.")
            elif value != "false":
                raise ValueError("fuzzymatching is true or false.")
        elif name == "emptyvaluematching":
            raise ValueError("emptyvaluematching is not supported.")
        else:
            _add_match(level, name, value, conditions, fits, included)
    attributes = _attributes(level, scope, included)
    return Wanted(
        level, conditions, fits, attributes, min(counts["limit"], MOST_ROWS), counts["offset"],
        warnings,
    )  # fmt: skip


def _add_match(
    level: str,
    name: str,
    value: str,
    conditions: dict[str, Any],
    fits: dict[str, Fits],
    included: list[str],
) -> None:
    keyword = _keyword(name)
    included.append(name)
    if keyword in IN_STUDY and level != STUDY:
        raise ValueError(f"{keyword} is a key only for studies.")
    field = IN_STUDY.get(keyword) or _FIELDS.get(keyword, keyword)
    if keyword in conditions or keyword in fits:
        raise ValueError(f"{keyword} is given twice.")
    if value in ("", "*"):
        return
    if len(value) > 64 * MOST_VALUES or "\0" in value:
        raise ValueError(f"The value of {keyword} is not one.")
    tag = datadict.tag_for_keyword(keyword)
    vr = (
        "UI" if keyword in IN_STUDY and field == "sopClassUID" else datadict.dictionary_VR(tag or 0)
    )
    condition: Any
    if vr == "UI" or keyword == "ModalitiesInStudy":
        condition = re.split(r"[,\\]", value)
        if len(condition) > MOST_VALUES:
            raise ValueError(f"{keyword}: at most {MOST_VALUES} values.")
        if keyword == "ModalitiesInStudy" and any(map(_is_pattern, condition)):
            fits[keyword] = _any_of([_like(one) for one in condition])
            return
    elif vr == "DA" and field == "studyDate":
        condition = _dates(keyword, value)
    elif vr in ("TM", "DA", "DT") and "-" in value:
        fits[keyword] = _between(keyword, value)
        return
    elif vr in NUMBER_VRS:
        condition = _number(keyword, value)
    elif _is_pattern(value) or vr == "PN":
        fits[keyword] = _like(value)
        return
    else:
        own = header.FIELDS.get(field)
        condition = own.convert(value) if own else value
    conditions[keyword] = condition


_FIELDS = {field.keyword: name for name, field in header.FIELDS.items()}


def _keyword(name: str) -> str:
    """Return the keyword of an attribute that is named by it or by its tag."""
    if re.fullmatch("[0-9A-Fa-f]{8}", name):
        keyword = datadict.keyword_for_tag(int(name, 16))
    else:
        keyword = name if datadict.tag_for_keyword(name) is not None else ""
    if not keyword:
        raise ValueError(f"{_shown(name)} is not an attribute of the DICOM dictionary.")
    return keyword


def _shown(name: str) -> str:
    """Return a name of a request as it may stand in an answer."""
    return re.sub(r"[^\w.]", "?", name, flags=re.ASCII)[:64]


def _is_pattern(value: str) -> bool:
    return "*" in value or "?" in value


def _like(pattern: str) -> Fits:
    """Return whether a value fits ``*`` and ``?``, whatever the case (PS3.4 C.2.2.2.4)."""
    literal = pattern.replace("[", "[[]")
    expression = re.compile(fnmatch.translate(re.sub(r"\*+", "*", literal).casefold()))
    return lambda value: expression.match(value.casefold()) is not None


def _any_of(fits: list[Fits]) -> Fits:
    return lambda value: any(one(value) for one in fits)


def _dates(keyword: str, value: str) -> Any:
    low, dash, high = value.partition("-")
    for date in (low, high):
        if not re.fullmatch(r"(\d{8})?", date):
            raise ValueError(f"{keyword}: write a date as 20190131, a range as 20190101-20191231.")
    return (low or None, high or None) if dash else low


def _between(keyword: str, value: str) -> Fits:
    """Return whether a time or a date lies in a range; what is not given of it counts as any."""
    low, _, high = value.partition("-")
    if not re.fullmatch(r"[\d.]*", low + high) or not low + high:
        raise ValueError(f"{keyword}: write a range as 100000-120000.")

    def fits(text: str) -> bool:
        return low <= text.ljust(len(low), "0") and (not high or text[: len(high)] <= high)

    return fits


def _number(keyword: str, value: str) -> Any:
    try:
        number = float(value)
        return int(number) if number.is_integer() else number
    except (ValueError, OverflowError):
        raise ValueError(f"{keyword} is a number.") from None


def _attributes(
    level: str, scope: dict[str, str], included: Sequence[str]
) -> frozenset[str] | None:
    if "all" in included:
        return None
    tags = set(RETURNED[level])
    # What is above is said as well, unless the path says what it is.
    for upper in {STUDY: (), SERIES: (STUDY,), INSTANCE: (STUDY, SERIES)}[level]:
        if UIDS[upper] not in scope:
            tags.update(RETURNED[upper])
    for name in included:
        first = name.partition(".")[0]
        if not first:
            continue
        if re.fullmatch("[0-9A-Fa-f]{8}", first):
            tags.add(first.upper())
            continue
        tag = datadict.tag_for_keyword(first)
        if tag is None:
            raise ValueError(f"{_shown(first)} is not an attribute of the DICOM dictionary.")
        tags.add(f"{tag:08X}")
    return frozenset(tags)
