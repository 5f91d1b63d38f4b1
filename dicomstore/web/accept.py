"""What a client accepts, and what it is sent of that (PS3.18 8.7); knows no server."""

from __future__ import annotations

import re
from typing import NamedTuple

from pydicom import uid

#: Explicit VR Little Endian, which is sent where a client names no transfer syntax.
PLAIN = str(uid.ExplicitVRLittleEndian)
STREAM = "application/octet-stream"
#: The media type of a compressed frame, by transfer syntax (PS3.18 8.7.3.3.2).
MEDIA_TYPES = {
    uid.RLELossless: "image/dicom-rle",
    uid.JPEGBaseline8Bit: "image/jpeg",
    uid.JPEGExtended12Bit: "image/jpeg",
    uid.JPEGLossless: "image/jpeg",
    uid.JPEGLosslessSV1: "image/jpeg",
    uid.JPEGLSLossless: "image/jls",
    uid.JPEGLSNearLossless: "image/jls",
    uid.JPEG2000Lossless: "image/jp2",
    uid.JPEG2000: "image/jp2",
    uid.JPEG2000MCLossless: "image/jpx",
    uid.JPEG2000MC: "image/jpx",
    uid.HTJ2KLossless: "image/jphc",
    uid.HTJ2KLosslessRPCL: "image/jphc",
    uid.HTJ2K: "image/jphc",
}
#: Their pixels lie in a file as they would in Explicit VR Little Endian.
PLAIN_PIXELS = (None, uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian)
_PARAMETER = re.compile(r'\s*;\s*([\w-]+)\s*=\s*("[^"]*"|[^;,"\s]*)')
_MEDIA_TYPE = re.compile(r"\s*([\w*.+-]+/[\w*.+-]+)")
#: No more alternatives of an Accept header are looked at.
ALTERNATIVES = 64


class Accepted(NamedTuple):
    """A media type that a client takes: of each part, if it wants several in one answer."""

    type: str
    syntax: str | None
    multipart: bool

    def matches(self, media_type: str) -> bool:
        """Whether `media_type` is this one, or among these."""
        family, _, kind = self.type.partition("/")
        return self.type in ("*/*", media_type) or (
            kind == "*" and family == media_type.partition("/")[0]
        )


def parse(header: str) -> list[Accepted]:
    """Return the alternatives of an Accept header, the preferred ones first.

    Raises
    ------
    ValueError
        If it is not one.
    """
    found: list[tuple[float, Accepted]] = []
    position = 0
    while position < len(header) and len(found) < ALTERNATIVES:
        head = _MEDIA_TYPE.match(header, position)
        if head is None:
            raise ValueError("The Accept header cannot be read.")
        position = head.end()
        parameters: dict[str, str] = {}
        while parameter := _PARAMETER.match(header, position):
            parameters[parameter[1].lower()] = parameter[2].strip('"')
            position = parameter.end()
        rest = re.compile(r"\s*(,|$)").match(header, position)
        if rest is None:
            raise ValueError("The Accept header cannot be read.")
        position = rest.end()
        media_type = head[1].lower()
        several = media_type == "multipart/related"
        if several:
            media_type = parameters.get("type", "*/*").lower()
        accepted = Accepted(media_type, parameters.get("transfer-syntax"), several)
        found.append((_quality(parameters.get("q", "1")), accepted))
    found.sort(key=lambda pair: -pair[0])
    return [accepted for quality, accepted in found if quality > 0]


def _quality(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("The Accept header cannot be read.") from None


class Answer(NamedTuple):
    """What a frame is sent as."""

    type: str
    syntax: str
    multipart: bool
    decoded: bool


def choose_frame(accepted: list[Accepted], stored: str | None) -> Answer | None:
    """Return what the frames of a transfer syntax are sent as; None if nothing is acceptable."""
    plain = stored in PLAIN_PIXELS
    syntax = PLAIN if plain else str(stored)
    own_type = STREAM if plain else MEDIA_TYPES.get(uid.UID(syntax), STREAM)
    for one in accepted:
        several = one.multipart or one.type == "*/*"
        if one.type == "*/*" and one.syntax in (None, "*", syntax):
            return Answer(own_type, syntax, several, False)
        if one.matches(own_type) and (
            one.syntax in ("*", syntax) or (one.syntax is None and own_type != STREAM)
        ):
            return Answer(own_type, syntax, several, False)
        if one.matches(STREAM):
            if one.syntax in ("*", syntax):
                return Answer(STREAM, syntax, several, False)
            if one.syntax in (None, PLAIN):
                return Answer(STREAM, PLAIN, several, not plain)
    return None
