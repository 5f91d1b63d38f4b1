"""Removes what killed loaders leave behind: chunks that no document names."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Iterable, Sequence

from dicomstore.blobs import versions
from dicomstore.blobs.manifest import ATTACHMENTS, Manifest
from dicomstore.keys import CHUNK_PREFIX, DOCUMENT_PREFIX, document_key, path_of, shown_path
from dicomstore.server.connection import Server

#: So many chunk keys are looked at together.
PAGE = 10_000
CHUNK_KEY = re.compile(
    rf"{CHUNK_PREFIX}({DOCUMENT_PREFIX}.+):([0-9a-f]{{12}}):(0|[1-9]\d*|{'|'.join(ATTACHMENTS)})",
    re.S,
)


def sweep(server: Server, folder: str) -> list[tuple[str, str, int, int]]:
    """Remove chunks below a folder that no document names; of each path, version, 1, bytes."""
    start = re.sub(r"([*?\[\]\\^])", r"\\\1", CHUNK_PREFIX + document_key(folder))
    keys = server.scan(f"{start}*", "string")
    rows, leased = [], []
    while page := [os.fsdecode(key) for key in itertools.islice(keys, PAGE)]:
        unnamed, in_use = _unnamed(server, page)
        rows += _remove(server, unnamed)
        leased += in_use
    if leased:
        time.sleep(versions.LEASE_MS / 1000)
        rows += _remove(server, _unnamed(server, leased)[0])
    return rows


def _unnamed(server: Server, keys: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the chunks that no document names, and those whose version has a lease.

    The lease is looked for before the document: a load that has neither will never commit.
    """
    candidates: dict[Manifest, list[str]] = {}
    for key in keys:
        match = CHUNK_KEY.fullmatch(key)
        if match and document_key(path_of(match[1])) == match[1]:
            candidates.setdefault(Manifest(match[1], match[2], 0, 1, ()), []).append(key)
    leases = server.commands([("EXISTS", each.lease) for each in candidates])
    leased = dict(zip(candidates, leases, strict=True))
    documents = server.replies(
        [("JSON.GET", each.key, "$.version", "$.chunks[0]") for each in candidates]
    )
    unnamed = []
    for (manifest, chunks), document in zip(candidates.items(), documents, strict=True):
        if isinstance(document, Exception) and not versions.is_foreign(document):
            raise document
        # Of a damaged document one of the two is enough: the chunks may be all that is left.
        found = json.loads(document) if isinstance(document, bytes) else {}
        named = set(map(str, itertools.chain.from_iterable(found.values())))
        if not leased[manifest] and not {manifest.version, manifest.chunk_key(0)} & named:
            unnamed += chunks
    return unnamed, [key for each, own in candidates.items() if leased[each] for key in own]


def _remove(server: Server, keys: Sequence[str]) -> list[tuple[str, str, int, int]]:
    """Unlink chunks; return path, version, count and bytes of what was there."""
    commands = [(name, key) for key in keys for name in ("STRLEN", "UNLINK")]
    replies = server.commands(commands)
    rows = []
    for key, size, was_there in zip(keys, replies[::2], replies[1::2], strict=True):
        document, version, _ = key.removeprefix(CHUNK_PREFIX).rsplit(":", 2)
        rows.append((shown_path(path_of(document)), version, was_there, size * was_there))
    return rows
