"""What each kind of request is answered with (PS3.18 chapters 8 and 10)."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import secrets
from collections.abc import AsyncIterator, Collection
from typing import Any
from urllib.parse import parse_qsl, quote

from starlette.types import Scope

from dicomstore.errors import (
    FrameError,
    MissingChunkError,
    NotIndexedError,
    NotStoredError,
)
from dicomstore.imaging.locating import Span
from dicomstore.web import accept, matching, reading
from dicomstore.web.accept import PLAIN, STREAM, Accepted
from dicomstore.web.fetching import Stored, inflated
from dicomstore.web.searching import Found
from dicomstore.web.services import Answered, Problem, Services

JSON = "application/dicom+json"
DICOM = "application/dicom"
#: So many frames can be asked for at once, and so many bytes of them (PS3.18 8.5: 413).
MOST_FRAMES = 1000
MOST_BYTES = 256 * 1024 * 1024
#: The metadata of so many instances is fetched at a time.
TOGETHER = 100
#: So much of it, compressed, is joined at once; more of it in a thread (bytes).
SHORT_BYTES = 100_000
#: Without a token only a browser or program on this machine is answered, under these names; else
#: a page from anywhere could have its own name lead here (DNS rebinding).
LOCAL_HOSTS = {"localhost", "127.0.0.1", "[::1]"}
LONGEST_QUERY = 64 * 1024
_LEVELS = ("study", "series", "instance")
_FIELDS = dict(zip(_LEVELS, matching.UIDS.values(), strict=True))


# --- QIDO-RS -------------------------------------------------------------------------------------


async def search(services: Services, scope: Scope) -> Answered:
    """Answer a search for studies, series or instances."""
    _accept(scope, JSON, "application/json")
    level = scope["path"].rpartition("/")[2]
    uids = _uids(scope)
    try:
        wanted = matching.parse(level, uids, _parameters(scope))
        found, more = await services.searching.find(wanted)
    except (ValueError, NotIndexedError) as error:
        if type(error) is not ValueError and not isinstance(error, NotIndexedError):
            raise
        words = str(error) if type(error) is ValueError else _not_indexed()
        raise Problem(400, words) from error
    base = _base(scope)
    for one in found:
        one["00081190"] = {"vr": "UR", "Value": [_url(base, one)]}
    warnings = list(wanted.warnings)
    if more != 0:
        number = "" if more is None else f"{more} "
        warnings.append(f"There are {number}additional results that can be requested.")
    headers = [(b"warning", f'299 dicomstore "{text}"'.encode()) for text in warnings]
    if not found:
        return Answered(204, "", b"", headers)
    return Answered(200, JSON, reading.dumped(found), headers)


def _not_indexed() -> str:
    return "An attribute in this query is not indexed: see docs/dicomweb.md."


def _url(base: str, dataset: dict[str, Any]) -> str:
    """Return where a study, series or instance is retrieved from."""
    parts = (("studies", "0020000D"), ("series", "0020000E"), ("instances", "00080018"))
    uids = [
        f"/{name}/{dataset[tag]['Value'][0]}"
        for name, tag in parts
        if dataset.get(tag, {}).get("Value")
    ]
    return base + "".join(uids)


# --- WADO-RS -------------------------------------------------------------------------------------


async def metadata(services: Services, scope: Scope) -> Answered:
    """Answer with the data sets of instances as DICOM JSON, bulk data by URI."""
    _accept(scope, JSON, "application/json")
    uids = _uids(scope)
    instances = await _instances(services, uids)
    study = f"{_base(scope)}/studies/{uids['studyInstanceUID']}"
    has_none = (one.key for one in instances if one.attached and one.attached.json_crc is None)
    _check_json(instances, set(has_none))
    # Files may have UIDs that are none: quoted, they do no harm in the answer.
    urls = [f"{study}/series/{quote(one.series)}/instances/{quote(one.uid)}" for one in instances]
    pieces = _metadata(services, instances, urls)
    if len(instances) <= TOGETHER:
        return Answered(200, JSON, b"".join([piece async for piece in pieces]))
    return Answered(200, JSON, pieces)


async def _metadata(
    services: Services, instances: list[Found], urls: list[str]
) -> AsyncIterator[bytes]:
    opening = b"["
    for first in range(0, len(instances), TOGETHER):
        group = instances[first : first + TOGETHER]
        found = await services.fetching.json({one.key: one.attached for one in group})
        _check_json(group, {key for key, text in found.items() if text == b""})
        texts = [found[one.key] for one in group]
        own = urls[first : first + TOGETHER]
        work = functools.partial(_joined, list(zip(texts, own, strict=True)))
        is_short = sum(len(text or b"") for text in texts) < SHORT_BYTES
        joined = work() if is_short else await asyncio.to_thread(work)
        if joined:
            yield opening + joined
            opening = b","
    yield b"[]" if opening == b"[" else b"]"


def _check_json(instances: list[Found], lacking: Collection[str]) -> None:
    for one in instances:
        if one.key in lacking:
            raise Problem(
                500,
                f"The instance {one.uid} has no metadata: its data set cannot be read to its end, "
                "or is too large. Ask for the instance itself.",
            )


def _joined(parts: list[tuple[bytes | None, str]]) -> bytes:
    """Return data sets' JSON with whole addresses, joined without parsing."""
    texts = []
    for compressed, url in parts:
        if compressed is None:
            continue
        text = inflated(compressed)
        # In a text, quotes are escaped: this is found only where it is a member.
        whole = f'"BulkDataURI":"{url}/bulkdata/'.encode()
        texts.append(text.replace(b'"BulkDataURI":"bulkdata/', whole))
    return b",".join(texts)


async def frames(services: Services, scope: Scope) -> Answered:
    """Answer with frames, as they are stored or decoded."""
    numbers = _frame_numbers(scope)
    key, stored, first = await _frames(services, _uids(scope), numbers[:1])
    answer = accept.choose_frame(_accepted(scope), stored.syntax)
    if answer is None or not (answer.multipart or len(numbers) == 1):
        raise Problem(406, "The frames cannot be sent in a form that is accepted.")
    try:
        size = sum(stored.frames.span(k).length for k in numbers)
    except FrameError as error:
        raise Problem(404, "There is no such frame.") from error
    if size > MOST_BYTES:
        raise Problem(413, "So many frames are too large for one answer.")

    async def one(k: int, raw: bytes) -> bytes:
        return await services.compute(reading.decoded, stored, k, raw) if answer.decoded else raw

    kind = f"{answer.type}; transfer-syntax={answer.syntax}"
    if not answer.multipart:
        return Answered(200, kind, await one(numbers[0], first[0]))
    if len(numbers) == 1:
        return _whole_multipart(answer.type, kind, await one(numbers[0], first[0]))

    async def parts() -> AsyncIterator[AsyncIterator[bytes]]:
        # Inflated once for all of them.
        step = len(numbers) if stored.is_inflated else 1
        for at in range(0, len(numbers), step):
            group = numbers[at : at + step]
            version, fetched = await services.fetching.frames(key, group)
            if version.manifest != stored.manifest:
                raise MissingChunkError("The instance was replaced meanwhile.")
            for k, raw in zip(group, fetched, strict=True):
                yield _once(await one(k, raw))

    return _multipart(answer.type, kind, parts())


async def _frames(
    services: Services, uids: dict[str, str], numbers: list[int]
) -> tuple[str, Stored, list[bytes]]:
    """Return the key of an instance, its version, and frames of it as they are stored."""
    name = tuple(uids.values())
    try:
        if (key := services.known(name)) is not None:
            with contextlib.suppress(NotStoredError):
                stored, fetched = await services.fetching.frames(key, numbers)
                if stored.uid == uids["sopInstanceUID"]:
                    return key, stored, fetched
            services.forget(name)  # deleted, or another instance has taken its path
        key = await _instance(services, uids)
        stored, fetched = await services.fetching.frames(key, numbers)
        services.remember(name, key)
        return key, stored, fetched
    except FrameError as error:
        raise Problem(404, "There is no such frame.") from error


async def retrieve(services: Services, scope: Scope) -> Answered:
    """Answer with whole instances, as files, streamed."""
    wanted = [one for one in _accepted(scope) if one.matches(DICOM)]
    if not wanted:
        raise Problem(406, "Instances are sent only as application/dicom.")
    instances = await _instances(services, _uids(scope))
    syntaxes = {one.syntax for one in wanted}
    if len(instances) == 1:
        stored = await services.fetching.stored(instances[0].key, anew=True)
        if syntaxes.isdisjoint({None, "*", stored.syntax}):
            raise Problem(406, "The instance is not stored in an accepted transfer syntax.")

    async def file(key: str) -> AsyncIterator[bytes]:
        stored = await services.fetching.stored(key, anew=True)
        async for piece in services.fetching.stream(stored):
            yield piece

    single = next((one for one in wanted if not one.multipart and one.type == DICOM), None)
    if single is not None and len(instances) == 1:
        return Answered(200, DICOM, file(instances[0].key))

    async def is_accepted(key: str) -> bool:
        if syntaxes & {None, "*"}:
            return True
        return (await services.fetching.stored(key)).syntax in syntaxes

    async def parts() -> AsyncIterator[AsyncIterator[bytes]]:
        for one in instances:
            if await is_accepted(one.key):
                yield file(one.key)

    return _multipart(DICOM, DICOM, parts())


async def rendered(services: Services, scope: Scope) -> Answered:
    """Answer with an image as it is shown, as JPEG or PNG."""
    return await _image(services, scope, None)


async def thumbnail(services: Services, scope: Scope) -> Answered:
    """Answer with a small image."""
    return await _image(services, scope, (128, 128))


async def _image(services: Services, scope: Scope, size: tuple[int, int] | None) -> Answered:
    accepted = _accepted(scope) or [Accepted("*/*", None, False)]
    kinds = [kind for one in accepted for kind in reading.IMAGES if one.matches(kind)]
    if (
        not kinds
        and size is not None
        and any("multipart" in v for v in [_header(scope, b"accept")])
    ):
        kinds = ["image/jpeg"]
    if not kinds:
        raise Problem(406, "Images are sent as image/jpeg or image/png.")
    parameters = dict(_parameters(scope))
    try:
        shown = reading.Shown.of(parameters, size)
    except ValueError as error:
        raise Problem(400, str(error)) from error
    uids = _uids(scope)
    if "sopInstanceUID" in uids:
        key = await _instance(services, uids)
    else:
        instances = await _instances(services, uids)
        key = instances[len(instances) // 2].key
    k = _frame_numbers(scope)[0] if "frames" in scope["path_params"] else 0
    try:
        image = await services.compute(reading.image, services.store, key, k, kinds[0], shown)
    except reading.NotShownError as error:
        raise Problem(404 if error.is_absent else 406, str(error)) from error
    return Answered(200, kinds[0], image)


async def bulkdata(services: Services, scope: Scope) -> Answered:
    """Answer with the value that a BulkDataURI of the metadata leads to."""
    key = await _instance(services, _uids(scope))
    accepted = _accepted(scope)
    where = scope["path_params"]["where"]
    if not re.fullmatch(r"([0-9A-F]{8}/\d{1,9}/){0,32}[0-9A-F]{8}", where):
        raise Problem(404, "There is no such bulk data.")
    stored = await services.fetching.stored(key, anew=True)
    member = stored.frames.member or {}
    if where in ("7FE00008", "7FE00009", "7FE00010") and "count" in member:
        if "bits" not in member:
            scope["path_params"]["frames"] = ",".join(
                str(k + 1) for k in range(min(stored.frames.count, MOST_FRAMES + 1))
            )
            return await frames(services, scope)
        _must_match(accepted, STREAM)
        last = stored.frames.span(stored.frames.count - 1)
        span = Span(member["start"], last.offset + last.length - member["start"])
        body = services.fetching.stream(stored, span)
    else:
        _must_match(accepted, STREAM)
        value = await services.compute(reading.bulk, services.store, key, where, MOST_BYTES)
        if value is None:
            raise Problem(404, "There is no such bulk data.")
        body = _once(value)
    several = any(one.multipart or one.type == "*/*" for one in accepted)
    if not several:
        return Answered(200, STREAM, body)

    async def part() -> AsyncIterator[AsyncIterator[bytes]]:
        yield body

    return _multipart(STREAM, f"{STREAM}; transfer-syntax={PLAIN}", part())


async def unknown(_: Services, scope: Scope) -> Answered:
    """Answer a request for what is not there."""
    raise Problem(404, "There is no such resource.")


# --- of a request --------------------------------------------------------------------------------


def _uids(scope: Scope) -> dict[str, str]:
    """Return the UIDs in the path, by field."""
    found = {}
    for level in _LEVELS:
        if (uid := scope["path_params"].get(level)) is not None:
            if not re.fullmatch(r"[0-9.]{1,64}", uid):
                raise Problem(400, f"The {level} is not named by a UID.")
            found[_FIELDS[level]] = uid
    return found


async def _instances(services: Services, uids: dict[str, str]) -> list[Found]:
    """Return the instances with these UIDs, one or more."""
    found = await services.searching.instances(uids)
    if not found:
        raise Problem(404, "There is nothing with these UIDs.")
    return found


async def _instance(services: Services, uids: dict[str, str]) -> str:
    """Return the key of the instance with these UIDs."""
    (one,) = await _instances(services, uids)
    return one.key


def _frame_numbers(scope: Scope) -> list[int]:
    """Return the frames in the path, counted from 0."""
    text = scope["path_params"]["frames"]
    if len(text) > 10 * MOST_FRAMES or not re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", text):
        raise Problem(400, "Frames are named by their numbers, from 1, with commas between them.")
    numbers = [int(one) - 1 for one in text.split(",")]
    if len(numbers) > MOST_FRAMES:
        raise Problem(413, f"At most {MOST_FRAMES} frames are sent at once.")
    return numbers


def _parameters(scope: Scope) -> list[tuple[str, str]]:
    query = scope["query_string"]
    if len(query) > LONGEST_QUERY:
        raise Problem(413, "The query is too long.")
    try:
        return parse_qsl(
            query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=200
        )
    except ValueError as error:
        raise Problem(400, "The query cannot be read.") from error


def _header(scope: Scope, name: bytes) -> str:
    return ",".join(value.decode("latin-1") for key, value in scope["headers"] if key == name)


def _accepted(scope: Scope) -> list[Accepted]:
    """Return what the client accepts; a parameter of the query counts before the header."""
    text = ""
    if b"accept=" in scope["query_string"]:
        text = dict(_parameters(scope)).get("accept", "")
    try:
        return accept.parse(text or _header(scope, b"accept")) or [Accepted("*/*", None, True)]
    except ValueError as error:
        raise Problem(400, str(error)) from error


def _accept(scope: Scope, *types: str) -> None:
    if not any(one.matches(kind) for one in _accepted(scope) for kind in types):
        raise Problem(406, f"This is sent only as {types[0]}.")


def _must_match(accepted: list[Accepted], kind: str) -> None:
    if not any(one.matches(kind) for one in accepted):
        raise Problem(406, f"This is sent only as {kind}.")


def _base(scope: Scope) -> str:
    """Return the address of this service as the client knows it."""
    host = _header(scope, b"host")
    if not re.fullmatch(r"[\w.\-\[\]:]{1,255}", host, re.ASCII):
        raise Problem(400, "The Host header cannot be read.")
    if host.lower() in LOCAL_HOSTS:  # some clients leave the port out
        host = f"{host}:{scope['server'][1]}"
    return f"{scope['scheme']}://{host}/dicom-web"


# --- several in one answer -----------------------------------------------------------------------


async def _once(value: bytes) -> AsyncIterator[bytes]:
    yield value


def _whole_multipart(kind: str, part: str, value: bytes) -> Answered:
    boundary = secrets.token_hex(16)
    body = b"".join((_part_head(boundary, part, first=True), value, _end(boundary)))
    return Answered(200, f'multipart/related; type="{kind}"; boundary={boundary}', body)


def _multipart(kind: str, part: str, parts: AsyncIterator[AsyncIterator[bytes]]) -> Answered:
    boundary = secrets.token_hex(16)

    async def body() -> AsyncIterator[bytes]:
        first = True
        async for pieces in parts:
            head = _part_head(boundary, part, first=first)
            first = False
            async for piece in pieces:
                yield head + piece if head else piece
                head = b""
        yield _end(boundary)

    return Answered(200, f'multipart/related; type="{kind}"; boundary={boundary}', body())


def _part_head(boundary: str, kind: str, *, first: bool) -> bytes:
    # Viewers look for this very spelling.
    head = f"--{boundary}\r\nContent-Type: {kind}\r\n\r\n".encode()
    return head if first else b"\r\n" + head


def _end(boundary: str) -> bytes:
    return f"\r\n--{boundary}--\r\n".encode()
