"""Values of data elements, as plain JSON for searching and as DICOM JSON for viewers.

Both are made at once. Files of a series share most of their values, so short ones are remembered
by their bytes.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import logging
import math
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydicom import config
from pydicom.charset import CODES_TO_ENCODINGS, default_encoding, handled_encodings
from pydicom.errors import BytesLengthException
from pydicom.multival import MultiValue
from pydicom.valuerep import AMBIGUOUS_VR, BYTES_VR, FLOAT_VR, INT_VR
from pydicom.values import converters

NUMBER_VRS = frozenset(["DS", "FD", "FL", "IS", "SL", "SS", "SV", "UL", "US", "UV"])
BULK_VRS = frozenset(["OB", "OD", "OF", "OL", "OV", "OW", "UN"])
BINARY_VRS = frozenset(map(str, BYTES_VR | AMBIGUOUS_VR)) - {"US or SS"}
INTEGER_VRS = frozenset(map(str, INT_VR)) | {"US or SS"} - {"AT"}
FLOAT_VRS = frozenset(map(str, FLOAT_VR))
#: Text in the default character repertoire, whatever the file's character set (PS3.5 6.2).
BASIC_TEXT_VRS = frozenset(["AE", "AS", "CS", "DA", "DT", "TM", "UI", "UR"])
TEXT_VRS = frozenset(["LO", "LT", "PN", "SH", "ST", "UC", "UT"])
SINGLE_TEXT_VRS = frozenset(["LT", "ST", "UR", "UT"])
INTEGER_TEXT = re.compile(r" *[+-]?[0-9]{1,18} *")
#: A text (PS3.5 6.1.2.5) up to its first escape sequence, or from one to the next; and a line of
#: it, at whose end the first character set returns.
FRAGMENT = re.compile(rb"^[^\x1b]+|\x1b[^\x1b]*")
LINE = re.compile(rb"([^\t\n\f\r]*)(.*)", re.S)
#: Longer values (bytes) are not remembered: few of them come again.
REMEMBERED_LENGTH = 256
REMEMBERED_VALUES = 8192
#: Binary values that are longer (bytes) are given by URI in DICOM JSON.
INLINE_LIMIT = 1024

#: What pydicom raises for elements that break the standard, depending on where they do.
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    BytesLengthException,
    struct.error,
    zlib.error,
)


class Value(NamedTuple):
    """One element's value.

    Attributes
    ----------
    plain : str, int, float, list or None
        Of the type that the dictionary's VR calls for; None if the value is empty, or has none.
    length : int
        Of `plain` as JSON text.
    readable : bool
        Whether the value is what the dictionary's VR calls for.
    json : str or None
        The element in the DICOM JSON Model (PS3.18 F.2); None if it is not readable as its own VR.
    """

    plain: Any
    length: int
    readable: bool
    json: str | None


NOTHING = Value(None, 0, True, None)
UNREADABLE_VALUE = Value(None, 0, False, None)

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep pydicom from warning and logging: it quotes values, which may be a patient's.

    Warnings belong to the whole process, so this is only for processes without other threads.
    """
    level = config.logger.level
    with warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        config.logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            config.logger.setLevel(level)


def from_bytes(
    vr: str, dictionary_vr: str, raw: bytes, little_endian: bool, charsets: tuple[str, ...]
) -> Value:
    """Return the value of an element as it stands in a file.

    Parameters
    ----------
    vr : str
        The element's own, or the dictionary's if it has none.
    dictionary_vr : str
        What `plain` has to be; empty for attributes that are not in the dictionary.
    raw : bytes
    little_endian : bool
    charsets : tuple of str
        Python's names of the encodings in Specific Character Set.
    """
    if len(raw) > REMEMBERED_LENGTH:
        return _from_bytes(vr, dictionary_vr, raw, little_endian, charsets)
    return _remembered(vr, dictionary_vr, raw, little_endian, charsets)


def _from_bytes(
    vr: str, dictionary_vr: str, raw: bytes, little_endian: bool, charsets: tuple[str, ...]
) -> Value:
    try:
        value = _decoded(vr, raw, little_endian, charsets) if raw else None
    except UNREADABLE:
        return UNREADABLE_VALUE
    return from_decoded(vr, dictionary_vr, value)


_remembered = functools.lru_cache(maxsize=REMEMBERED_VALUES)(_from_bytes)


def from_decoded(vr: str, dictionary_vr: str, value: Any) -> Value:
    """Return the value of an element that has been decoded, by pydicom or here."""
    plain, length, readable = None, 0, True
    if dictionary_vr and not is_bulk(dictionary_vr):
        try:
            plain = _plain(dictionary_vr, value)
            if isinstance(plain, list):
                length = sum(len(_as_json(one)) + 2 for one in plain)
            else:
                length = len(_as_json(plain))
        except UNREADABLE:
            plain, readable = None, False
    try:
        return Value(plain, length, readable, _json(vr, value))
    except UNREADABLE:
        return Value(plain, length, readable, None)


# --- decoding ------------------------------------------------------------------------------------


def _decoded(vr: str, raw: bytes, little_endian: bool, charsets: tuple[str, ...]) -> Any:
    """Return what pydicom makes of `raw`, in less time and without its classes."""
    if vr in BASIC_TEXT_VRS:
        return _split(vr, raw.decode(default_encoding))
    if vr in TEXT_VRS:
        return _split(vr, _text(raw, charsets))
    if vr in ("DS", "IS"):
        texts = raw.decode(default_encoding).strip().rstrip(" \0").split("\\")
        numbers = [_number(vr, text) for text in texts]
        return numbers[0] if len(numbers) == 1 else numbers
    if vr in BULK_VRS:
        return raw
    converter: Any = converters[vr]  # type: ignore[index]
    convert, *form = converter if isinstance(converter, tuple) else (converter,)
    return convert(raw, little_endian, *form)


def _text(raw: bytes, charsets: tuple[str, ...]) -> str:
    """Return a text as pydicom decodes it; that warns of odd ones, quoting them."""
    try:
        return "".join([_fragment(piece, charsets) for piece in FRAGMENT.findall(raw)])
    except LookupError:  # the first one is a codec of Python's that gives no text, as "hex"
        return _text(raw, (default_encoding, *charsets[1:]))


def _fragment(raw: bytes, charsets: tuple[str, ...]) -> str:
    """Decode a piece of a text that has no escape sequence, or begins with its only one."""
    length = 4 if raw.startswith((b"\x1b$(", b"\x1b$)")) else 3
    charset = CODES_TO_ENCODINGS.get(raw[:length])
    with contextlib.suppress(UnicodeError):
        if not raw.startswith(b"\x1b") or (charset in handled_encodings and charset in charsets):
            return raw.decode(charset or charsets[0])
        if charset in (default_encoding, *charsets):
            extended, rest = LINE.fullmatch(raw[length:]).groups()  # type: ignore[union-attr]
            return extended.decode(charset) + rest.decode(charsets[0])
    return raw.decode(charsets[0], "replace")


def _split(vr: str, text: str) -> str | list[str]:
    """Return the values of a text without what is padding in their VR (PS3.5 6.2)."""
    if vr in SINGLE_TEXT_VRS:
        return text.rstrip() if vr == "UR" else text.rstrip("\0 ")
    if vr == "AE":
        values = [value.strip() for value in text.split("\\")]
    elif vr == "PN":
        values = [value.rstrip("=") for value in text.rstrip("\0 ").split("\\")]
    elif vr in BASIC_TEXT_VRS:
        values = text.rstrip("\0 ").split("\\")
    else:
        values = [value.rstrip("\0 ") for value in text.split("\\")]
    if vr == "UI":
        values = [value.strip() for value in values]
    return values[0] if len(values) == 1 else values


def _number(vr: str, text: str) -> int | float | str:
    if not text or text.isspace():
        return ""
    if vr == "IS" and INTEGER_TEXT.fullmatch(text):
        return int(text)
    if vr == "IS" and "e" in text.lower():
        raise ValueError("an integer has no exponent")
    return float(text)


# --- for searching -------------------------------------------------------------------------------


def _plain(vr: str, value: Any) -> Any:
    """Return `value` as the JSON type that the dictionary's `vr` calls for, or None."""
    if _is_multiple(value):
        plain = [_plain_one(vr, one) for one in value]
        return [one for one in plain if one is not None] or None
    return _plain_one(vr, value)


@functools.cache
def _is_number(vr: str) -> bool:
    return not NUMBER_VRS.isdisjoint(vr.split(" or "))


@functools.cache
def is_bulk(vr: str) -> bool:
    """Whether a dictionary's VR is one of binary values, which are never searched."""
    return not BULK_VRS.isdisjoint(vr.split(" or "))


def _plain_one(vr: str, value: Any) -> str | int | float | None:
    if value is None or isinstance(value, bytes):
        return None
    if _is_number(vr):
        number = int(value) if isinstance(value, int) else float(value)
        fits = abs(number) < 2**63 if isinstance(number, int) else math.isfinite(number)
        return number if fits else None
    if vr == "AT":
        return f"{int(value):08X}"
    # NUL ends a value in RediSearch, and RedisJSON takes no lone surrogates.
    text = str(value).replace("\0", "").strip()
    return text.encode("utf-8", "replace").decode() or None


# --- for viewers ---------------------------------------------------------------------------------


def _json(vr: str, value: Any) -> str:
    if value is None or (value != 0 and not value):  # 0 is a number, not an empty value
        return f'{{"vr":"{vr}"}}'
    if vr in BINARY_VRS:
        return f'{{"vr":"{vr}","InlineBinary":"{base64.b64encode(value).decode()}"}}'
    several = value if _is_multiple(value) else [value]
    items = ",".join([_as_json(_json_value(vr, one)) for one in several])
    return f'{{"vr":"{vr}","Value":[{items}]}}'


def _json_value(vr: str, value: Any) -> Any:
    if vr == "PN":
        groups = str(value).split("=")[:3]
        names = ("Alphabetic", "Ideographic", "Phonetic")
        return dict(zip(names, groups, strict=False)) if any(groups) else None
    if vr == "AT":
        return f"{value:08X}"
    if vr in INTEGER_VRS:
        return None if value == "" else int(value)
    if vr in FLOAT_VRS:
        number = None if value == "" else float(value)
        return None if number is None or not math.isfinite(number) else number
    return str(value)


def _as_json(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)  # in a quarter of the time
    return _encode(value)


def _is_multiple(value: Any) -> bool:
    return isinstance(value, list | tuple | MultiValue)
