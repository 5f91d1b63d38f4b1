"""Keys, chunks and offsets, computed without a server, and compared with a real one's memory."""

import copy
import os
import random

import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from dicomstore.blobs.manifest import (
    BATCH_BYTES,
    DEFAULT_CHUNK_SIZE,
    Manifest,
    parse_document,
    plan_tail,
)
from dicomstore.errors import DamagedError
from dicomstore.keys import checked_path, document_key, path_of, shown_path

SIZES = st.integers(1, 3_000_000)
CHUNK_SIZES = st.integers(1, 600_000) | st.sampled_from([30 * 1024, 2**18, DEFAULT_CHUNK_SIZE])
VERSION = "0123456789ab"


def layout_of(size, chunk_size, path="a/b.dcm"):
    return Manifest(document_key(path), VERSION, size, chunk_size, plan_tail(size, chunk_size))


def members_of(manifest):
    return {
        "imageName": "b.dcm",
        "size": manifest.size,
        "blake3": "0" * 64,
        "version": manifest.version,
        "chunkSize": manifest.chunk_size,
        "tail": list(manifest.tail),
        "crc": [0] * manifest.count,
        "chunks": [manifest.chunk_key(number) for number in range(manifest.count)],
    }


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=40))
def test_every_file_name_has_a_key_of_its_own(raw):
    """Any bytes that the system takes as a name make a UTF-8 key that leads back to the name."""
    path = os.fsdecode(raw)
    key = document_key(path)
    assert path_of(key) == path
    key.encode("utf-8")
    assert key.startswith("file:") and not set("{}") & set(key)
    shown_path(path).encode("utf-8")


def test_names_are_written_as_they_are_wherever_possible():
    """Only `%`, braces and bytes that are not UTF-8 are escaped in a key."""
    assert document_key("a b/ü*'\".dcm") == "file:a b/ü*'\".dcm"
    assert document_key("50%{x}\udcff") == "file:50%25%7Bx%7D%FF"


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/./b", "a/", "a\0b"]
)
def test_a_path_that_leads_elsewhere_is_refused(path):
    """What is not a plain relative path is refused with its name in the message."""
    with pytest.raises(ValueError, match="no path for a stored file"):
        checked_path(path)


@settings(deadline=None)
@given(SIZES, CHUNK_SIZES)
def test_chunks_cover_the_file_exactly(size, chunk_size):
    """The chunks' lengths add up to the file, the tail is at most two pieces, none is empty."""
    manifest = layout_of(size, chunk_size)
    assert len(manifest.tail) <= 2
    assert 0 not in manifest.tail
    assert sum(manifest.tail) == size % chunk_size
    assert manifest.count == size // chunk_size + len(manifest.tail)
    ends = {0, size // 2, manifest.count - 1} & set(range(manifest.count))
    assert all(1 <= manifest.length(number) <= chunk_size for number in ends)


@settings(max_examples=examples(20), deadline=None)
@given(st.integers(1, 400_000), st.integers(64, 300_000))
def test_batches_hold_every_chunk_once(size, chunk_size):
    """Batches take the chunks in order and stay within 16 MiB."""
    manifest = layout_of(size, chunk_size)
    assert manifest.chunk_keys() == [manifest.chunk_key(number) for number in range(manifest.count)]
    batches = list(manifest.batches())
    assert [number for batch in batches for number in batch] == list(range(manifest.count))
    assert all(sum(map(manifest.length, batch)) <= BATCH_BYTES for batch in batches)


def test_large_files_take_several_batches():
    """A batch ends at 16 MiB."""
    manifest = layout_of(100 * 2**20, DEFAULT_CHUNK_SIZE)
    sums = [sum(map(manifest.length, batch)) for batch in manifest.batches()]
    assert len(sums) == 7 and max(sums) <= BATCH_BYTES and sum(sums) == manifest.size


def test_a_tail_is_cut_where_that_saves_memory(client):
    """By MEMORY USAGE: a cut saves over 256 bytes, and no cut that would save more is missed."""
    numbers = random.Random(7)
    rests = [numbers.randrange(1, DEFAULT_CHUNK_SIZE) for _ in range(150)]
    rests += [2**n + extra for n in range(4, 18) for extra in (-64, -10, -9, 0, 1, 200)]

    def usage(*lengths):
        for number, length in enumerate(lengths):
            client.set(f"chunk:file:x:{VERSION}:{number}", bytes(length))
        return sum(client.memory_usage(f"chunk:file:x:{VERSION}:{n}") for n in range(len(lengths)))

    cut = 0
    for rest in (rest for rest in rests if 0 < rest < DEFAULT_CHUNK_SIZE):
        tail = plan_tail(rest, DEFAULT_CHUNK_SIZE)
        whole, planned = usage(rest), usage(*tail)
        if len(tail) == 2:
            cut += 1
            assert whole - planned > 256
        else:
            largest_class = max(n for n in classes() if n <= rest + 10) - 10
            if 0 < largest_class < rest:
                # 64 bytes of difference: how MEMORY USAGE counts a key's own name.
                assert whole - usage(largest_class, rest - largest_class) <= 256 + 64
    assert cut > 20


def classes():
    """Return jemalloc's size classes up to 512 KiB, by its own rule: four a doubling."""
    yield from range(16, 129, 16)
    for power in range(7, 19):
        yield from (2**power + step * 2 ** (power - 2) for step in range(1, 5))


def test_a_sound_document_is_accepted():
    """What the manifest computes is what a document must say."""
    for size in (1, 1000, 10_000, 12_345):
        manifest = layout_of(size, 1000)
        document = parse_document(manifest.key, members_of(manifest))
        assert document.manifest == manifest and document.key == "file:a/b.dcm"


HUGE = 10**30
EDITS = [
    ("size", [0, -1, 1, 12_344, 12_346, 2**63, HUGE, 12_345.0, "12345", None, True, [12_345]]),
    ("chunkSize", [0, -1, 1, 999, 1001, HUGE, 1000.0, "1000", None, [], {}]),
    ("tail", [[], [344], [346], [0, 345], [345, 0], [-1, 346], [346, -1], [115] * 3, [HUGE], 345]),
    ("tail", [["345"], [345.0], None, {"0": 345}, [True, 344]]),
    ("version", ["", "0123456789a", "0123456789AB", "0123456789ab\n", "../../..", 1, None]),
    ("crc", [[], [0], [0] * 14, None, {}, "0" * 13, HUGE]),
    ("chunks", [[], ["foreign"], ["foreign"] * 13, None, {}, "c" * 13, [1] * 13]),
    ("blake3", [None, 5, "", ["0" * 64]]),
]


@pytest.mark.parametrize(
    ("member", "value"),
    [
        pytest.param(member, value, id=f"{member}={value!r:.30}")
        for member, values in EDITS
        for value in values
    ],
)
def test_an_edited_document_is_refused(member, value):
    """Whatever storage member is edited in whatever way, the document is refused by its key."""
    manifest = layout_of(12_345, 1000)
    members = members_of(manifest)
    assert repr(members[member]) != repr(value)
    with pytest.raises(DamagedError, match=r"file:a/b\.dcm"):
        parse_document(manifest.key, {**members, member: value})
    del members[member]
    with pytest.raises(DamagedError, match=r"file:a/b\.dcm"):
        parse_document(manifest.key, members)


def test_a_tail_of_two_pieces_is_checked():
    """Two pieces have to be positive and to add up, even where their number is right."""
    manifest = layout_of(140_000, DEFAULT_CHUNK_SIZE)
    members = members_of(manifest)
    assert len(manifest.tail) == 2 and parse_document(manifest.key, members)
    for tail in ([-1, 140_001], [140_001, -1], [0, 140_000], [140_000, 0], [1, 1]):
        with pytest.raises(DamagedError):
            parse_document(manifest.key, {**members, "tail": tail})


@pytest.mark.parametrize("number", [0, 5, 12])
@pytest.mark.parametrize(
    "other", ["foreign", "file:a/b.dcm", f"chunk:file:a/c.dcm:{VERSION}:0", None, ["x"]]
)
def test_a_document_cannot_point_at_a_foreign_key(number, other):
    """A single chunk key that is not the computed one is refused, wherever it stands."""
    manifest = layout_of(12_345, 1000)
    members = copy.deepcopy(members_of(manifest))
    members["chunks"][number] = other
    with pytest.raises(DamagedError, match="do not agree"):
        parse_document(manifest.key, members)


def test_huge_numbers_cost_nothing():
    """A document that claims 10^18 bytes in chunks of one is refused without counting them."""
    members = {**members_of(layout_of(10, 10)), "size": 10**18, "chunkSize": 1, "tail": []}
    with pytest.raises(DamagedError):
        parse_document("file:a", members)
