"""What the faults have in common."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import multiprocessing.forkserver as forkserver
import os
import sys

from samples import dicom

from dicomstore import DicomStore
from dicomstore.blobs import versions

SHORT_LEASE_MS = 300
CHUNK_SIZES = (700, 1000, 4096)


@functools.cache
def workers():
    """Starts processes that inherit no thread, connection or pipe, and need not import again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults"])
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    forkserver.ensure_running()
    os.environ["PYTHONPATH"] = before
    return context


@contextlib.contextmanager
def lease_of(milliseconds):
    before, versions.LEASE_MS = versions.LEASE_MS, milliseconds
    try:
        yield
    finally:
        versions.LEASE_MS = before


def store_of(client, chunk_size=1000, **options):
    # Without thumbnails: decoding has a part of its own, mutated files.
    return DicomStore(client, chunk_size=chunk_size, progress=False, thumbnails=False, **options)


def unreferenced(client):
    """The keys below chunk: that belong to no document's version."""
    named = set()
    for key in client.scan_iter("file:*", count=10_000):
        document = json.loads(client.execute_command("JSON.GET", key))
        version = f"chunk:{os.fsdecode(key)}:{document['version']}"
        named |= {*document["chunks"], *(f"{version}:{name}" for name in document["attachments"])}
    return {os.fsdecode(key) for key in client.scan_iter("chunk:*", count=10_000)} - named


def assert_whole(client):
    """Every file is whole and, after a sweep, no byte is without a document. Returns the swept."""
    swept = int(store_of(client).sweep()["size"].sum())
    report = store_of(client).verify()
    assert report["status"].eq("ok").all(), report.to_string()
    left = unreferenced(client)
    assert not left, f"without a document: {sorted(left)[:5]}"
    return swept


def versions_of(number, count=2):
    return [dicom(Rows=n + 1, pixels=bytes([n, number]) * 12_000) for n in range(count)]
