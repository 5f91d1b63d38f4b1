"""Redis as a hot tier: chunks that expire, and a source that lost ones come from."""

import builtins
import io
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from samples import dicom

from dicomstore import DicomStore, connect
from dicomstore.errors import DamagedError, MissingChunkError, NotStoredError
from dicomstore.server.embedded import RedisServer

IMAGE = dicom(pixels=bytes(range(256)) * 20, Rows=1)
OTHER = dicom(pixels=bytes(range(255, -1, -1)) * 20, Rows=1)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.dcm").write_bytes(IMAGE)
    (tmp_path / "in" / "sub" / "a.dcm").write_bytes(dicom(Rows=2))
    return tmp_path / "in"


def tier_of(client, **options):
    return DicomStore(client, chunk_size=1000, progress=False, **options)


def times(client, store, name):
    """Return the times to live of a file's document, and of its chunks (s; -1 is for good)."""

    def left(key):
        return -1 if (ms := client.pttl(key)) == -1 else round(ms / 1000)

    manifest = store.manifest(name)
    return left(manifest.key), {left(key) for key in manifest.chunk_keys()}


def lose(client, store, name, numbers=None):
    """Remove chunks of a file, as Redis does when its memory is short."""
    client.delete(*store.manifest(name).chunk_keys(numbers))


@pytest.fixture
def fetched(monkeypatch):
    """Count the bytes that are read from each file of the source."""
    counts, opened = {}, builtins.open

    def counting(file, *arguments, **options):
        stream = opened(file, *arguments, **options)
        if options.get("buffering") != 0:
            return stream
        name = os.path.basename(file)

        class Counting(io.BufferedReader):
            def read(self, size=-1):
                piece = super().read(size)
                counts[name] = counts.get(name, 0) + len(piece)
                return piece

        return Counting(stream)

    monkeypatch.setattr("dicomstore.source.open", counting, raising=False)
    return counts


# --- time to live --------------------------------------------------------------------------------


def test_chunks_expire_and_documents_stay(client):
    """With a ttl every chunk gets it; the document and what lies beside the chunks never expire."""
    tier = tier_of(client, ttl=100)
    tier.put("a", IMAGE)
    assert times(client, tier, "a") == (-1, {100})
    assert client.ttl(tier.manifest("a").attachment_key("json")) == -1
    tier_of(client).put("b", IMAGE)
    assert times(client, tier, "b") == (-1, {-1})


def test_an_expired_file_can_still_be_found(client):
    """After its time a file is found as before, and reading it says what is missing."""
    tier = tier_of(client, ttl=0.05)
    tier.put("a", dicom(Modality="CT"))
    while client.exists(*tier.manifest("a").chunk_keys()):
        threading.Event().wait(0.01)
    assert len(tier.find(modality="CT")) == 1
    with pytest.raises(MissingChunkError, match="chunk:file:a:"):
        tier.read("a")


def test_large_files_expire_too(client):
    """Large files, which go to the server over connections of their own, get their time too."""
    tier, image = DicomStore(client, progress=False, ttl=100), dicom(pixels=bytes(17 * 2**20))
    tier.put("large", image)
    assert times(client, tier, "large") == (-1, {100})
    DicomStore(client, progress=False).put("large", image)
    assert times(client, tier, "large") == (-1, {-1})


@pytest.mark.parametrize("image", [IMAGE, OTHER], ids=["same bytes", "other bytes"])
def test_a_load_without_ttl_is_for_good(client, image):
    """Loaded again without a ttl, a file's chunks stay."""
    tier_of(client, ttl=100).put("a", IMAGE)
    store = tier_of(client)
    store.put("a", image)
    assert times(client, store, "a") == (-1, {-1}) and store.read("a") == image


def test_a_load_with_ttl_shortens_nothing(client):
    """The same bytes loaded again with a ttl live as long as before or longer, never less."""
    tier = tier_of(client, ttl=100)
    tier.put("a", IMAGE)
    tier_of(client, ttl=9).put("a", IMAGE)
    assert times(client, tier, "a") == (-1, {100})
    tier_of(client, ttl=500).put("a", IMAGE)
    assert times(client, tier, "a") == (-1, {500})
    tier_of(client).put("b", IMAGE)
    tier.put("b", IMAGE)
    assert times(client, tier, "b") == (-1, {-1})


def test_reading_renews_below_half_the_time(client):
    """With `renew`, a read with less than half of the time left gives the whole again."""
    tier = tier_of(client, ttl=100, renew=True)
    tier.put("a", IMAGE)
    for left, expected in ((60, 60), (40, 100)):
        for key in tier.manifest("a").chunk_keys():
            client.pexpire(key, left * 1000)
        assert tier.read("a") == IMAGE
        assert times(client, tier, "a") == (-1, {expected})


@pytest.mark.parametrize(
    "options, words",
    [
        ({"ttl": 0}, "ttl is 0"),
        ({"ttl": float("inf")}, "ttl is inf"),
        ({"renew": True}, "needs a ttl"),
        ({"prefetch": "series"}, "needs a source"),
        ({"prefetch": "patient", "source": "."}, "'series' or 'study'"),
        ({"source": "no-such-protocol://x"}, "source cannot be used"),
    ],
)
def test_options_that_cannot_be(client, options, words):
    """An option out of its range is refused with what it can be."""
    with pytest.raises(ValueError, match=words):
        tier_of(client, **options)


# --- chunks from the source ----------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["gone", "damaged"])
@pytest.mark.parametrize("way", ["read", "read_many", "into", "open"])
def test_a_lost_chunk_comes_from_the_source(client, folder, fetched, damage, way):
    """Whichever way a file is read, exactly the lost chunk is fetched, and put back."""
    tier = tier_of(client, source=folder, ttl=100)
    tier.load(folder)
    chunk = tier.manifest("a.dcm").chunk_key(2)
    original = client.get(chunk)
    if damage == "gone":
        client.delete(chunk)
    else:
        client.set(chunk, b"x" * 1000)
    if way == "read":
        found = tier.read("a.dcm")
    elif way == "read_many":
        found = tier.read_many(["a.dcm"])["file:a.dcm"]
    elif way == "into":
        found = bytes(tier.read("a.dcm", into=bytearray(len(IMAGE))))
    else:
        with tier.open("a.dcm") as file:
            found = file.read()
    assert found == IMAGE and fetched == {"a.dcm": 1000}
    assert client.get(chunk) == original and 90_000 < client.pttl(chunk) <= 100_000


def test_frames_come_from_the_source(client, tmp_path):
    """A frame whose chunks are gone is fetched as well, and nothing but its chunks."""
    (tmp_path / "in").mkdir()
    image = dicom(
        pixels=bytes(range(250)) * 40, Rows=50, Columns=50, NumberOfFrames=4, SamplesPerPixel=1,
        BitsStored=8, HighBit=7, PixelRepresentation=0, PhotometricInterpretation="MONOCHROME2",
    )  # fmt: skip
    (tmp_path / "in" / "m.dcm").write_bytes(image)
    tier = tier_of(client, source=tmp_path / "in")
    tier.load(tmp_path / "in")
    lose(client, tier, "m.dcm")
    assert tier.frame_bytes("m.dcm", 1) == bytes(range(250)) * 10
    there = [client.exists(key) for key in tier.manifest("m.dcm").chunk_keys()]
    assert 3 <= sum(there) <= 4 < len(there)


def test_large_files_are_mended(client, tmp_path):
    """In a file that goes over connections of its own, only what is lost is fetched."""
    image = dicom(pixels=os.urandom(17 * 2**20))
    (tmp_path / "large.dcm").write_bytes(image)
    tier = DicomStore(client, progress=False, source=tmp_path)
    tier.load(tmp_path)
    lose(client, tier, "large.dcm", [3, 40])
    client.set(tier.manifest("large.dcm").chunk_key(20), b"x")
    assert tier.read("large.dcm") == image and (tier.hits, tier.misses) == (0, 1)
    assert tier.read("large.dcm") == image and (tier.hits, tier.misses) == (1, 1)


def test_many_readers_fetch_a_gap_once(client, folder, fetched):
    """Sixteen threads that meet the same gap read it from the source once."""
    tier = tier_of(client, source=folder)
    tier.load(folder)
    lose(client, tier, "a.dcm", [1, 2])
    start = threading.Barrier(16)

    def read(_):
        start.wait()
        return tier.read("a.dcm")

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(read, range(16))) == {IMAGE}
    assert fetched == {"a.dcm": 2000} and tier.hits + tier.misses == 16


def test_a_changed_source_is_loaded_anew(client, folder):
    """If the source's file has other bytes now, it becomes a new version, never a mixture."""
    tier = tier_of(client, source=folder)
    tier.load(folder)
    version = tier.manifest("a.dcm").version
    (folder / "a.dcm").write_bytes(OTHER)
    lose(client, tier, "a.dcm", [1])
    assert tier.read("a.dcm") == OTHER
    assert tier.manifest("a.dcm").version != version
    assert not list(client.scan_iter(f"*{version}*"))


def test_an_open_reader_is_told_of_a_changed_source(client, folder):
    """A reader of the old version is told to open the file again."""
    tier = tier_of(client, source=folder)
    tier.load(folder)
    with tier.open("a.dcm") as file:
        (folder / "a.dcm").write_bytes(OTHER)
        lose(client, tier, "a.dcm")
        with pytest.raises(MissingChunkError, match="Open it again"):
            file.read()


@pytest.mark.parametrize("problem", ["gone", "link", "short"])
def test_a_source_that_cannot_help(client, folder, tmp_path, problem):
    """Without the file in the source, the error names the chunk and the reason; nothing is lost."""
    tier = tier_of(client, source=folder)
    tier.load(folder)
    lose(client, tier, "a.dcm", [1])
    if problem == "short":
        os.truncate(folder / "a.dcm", 300)
        words = "not DICOM|changed|a different|neither"
    else:
        (folder / "a.dcm").unlink()
        words = r"chunk:file:a\.dcm:.*no such file"
        if problem == "link":
            (tmp_path / "secret").write_bytes(IMAGE)
            (folder / "a.dcm").symlink_to(tmp_path / "secret")
    before = sorted(client.scan_iter())
    if problem == "short":  # still a DICOM file: its new version takes the place
        assert tier.read("a.dcm") == IMAGE[:300]
        return
    with pytest.raises(MissingChunkError, match=words):
        tier.read("a.dcm")
    assert sorted(client.scan_iter()) == before


def test_a_different_image_in_the_source(client, folder):
    """A different image under the same path in the source does not replace the stored one."""
    tier = tier_of(client, source=folder)
    tier.load(folder)
    (folder / "a.dcm").write_bytes(dicom(SOPInstanceUID="1.2.9"))
    lose(client, tier, "a.dcm", [1])
    with pytest.raises(MissingChunkError, match="different SOP Instance UID"):
        tier.read("a.dcm")
    assert tier.find()["path"].tolist() == ["a.dcm", "sub/a.dcm"]
    assert client.execute_command("JSON.GET", "file:a.dcm", "sopInstanceUID") == b'"1.2.3.4"'


def test_an_evicted_document_comes_from_the_source(client, folder):
    """A file whose document is gone is loaded again, and before a file of the same imageName."""
    tier = tier_of(client, source=folder)
    tier.load(folder)
    for ask, answer in (
        (tier.read, IMAGE),
        (lambda name: tier.manifest(name).size, len(IMAGE)),
        (lambda name: tier.open(name).read(), IMAGE),
    ):
        client.delete("file:a.dcm")
        assert ask("a.dcm") == answer
        with pytest.raises(NotStoredError):
            ask("nowhere.dcm")


def test_a_file_that_changes_while_it_comes_back(client, folder, monkeypatch):
    """It is not said to be unknown: the source has it, and cannot give it now."""
    tier = tier_of(client, source=folder)
    tier.load(folder)
    client.delete("file:a.dcm")
    monkeypatch.setattr("dicomstore.loading._modified", lambda _: time.monotonic_ns())
    with pytest.raises(MissingChunkError, match=r"a\.dcm.*source cannot help.*changed"):
        tier.read("a.dcm")
    monkeypatch.undo()
    assert tier.read("a.dcm") == IMAGE


def test_without_a_source_nothing_is_mended(client, folder):
    """A store without a source names the lost chunk, whichever it is."""
    store = tier_of(client)
    store.load(folder)
    key = store.manifest("a.dcm").chunk_key(1)
    client.set(key, b"x")
    with pytest.raises(DamagedError, match=key):
        store.read("a.dcm")
    client.delete(key)
    with pytest.raises(MissingChunkError, match=key):
        store.read("a.dcm")


def test_memory_that_is_too_short(tmp_path):
    """In a Redis that evicts all the time, every read gives the right bytes."""
    images = {f"{n}.dcm": dicom(Rows=n, pixels=os.urandom(2_000_000)) for n in range(12)}
    for name, image in images.items():
        (tmp_path / name).write_bytes(image)
    limits = ["maxmemory 12mb", "maxmemory-policy allkeys-lru"]
    with RedisServer(config=limits) as small, connect(small.url) as client:
        tier = DicomStore(client, progress=False, source=tmp_path)
        tier.load(tmp_path)
        for _ in range(2):
            for name, image in images.items():
                assert tier.read(name) == image
        assert tier.misses > 0


def test_documents_outlive_pixels(tmp_path):
    """With `ttl` and volatile-lru, every document stays findable while pixels come and go."""
    for n in range(20):
        (tmp_path / f"{n}.dcm").write_bytes(dicom(Rows=n + 1, pixels=os.urandom(1_000_000)))
    limits = ["maxmemory 12mb", "maxmemory-policy volatile-lru"]
    with RedisServer(config=limits) as small, connect(small.url) as client:
        tier = DicomStore(client, progress=False, source=tmp_path, ttl=3600)
        tier.load(tmp_path)
        for n in range(20):
            assert len(tier.read(f"{n}.dcm")) > 1_000_000
        assert len(tier.find()) == 20
        hot = tier.verify()["hot"]
        assert 0 < hot.sum() < 12


# --- cold documents ------------------------------------------------------------------------------


def test_cold_documents_are_found_and_filled_by_reading(client, folder):
    """`pixels=False` stores everything but the chunks; reading brings those, bit for bit."""
    tier = tier_of(client, source=folder)
    report = tier.load(folder, pixels=False)
    assert list(report["status"]) == ["loaded", "loaded"]
    assert not [key for key in client.scan_iter("chunk:*:[0-9]*") if not key.endswith(b":json")]
    assert len(tier.find(rows=2)) == 1
    table = tier.verify()
    assert list(table["status"]) == ["cold", "cold"] and table["hot"].sum() == 0
    assert tier.read("a.dcm") == IMAGE
    table = tier.verify().set_index("path")
    assert table["status"].to_dict() == {"a.dcm": "ok", "sub/a.dcm": "cold"}
    assert list(tier.load(folder, pixels=False)["status"]) == ["unchanged"] * 2
    assert list(tier.load(folder)["status"]) == ["unchanged", "repaired"]
    assert tier.verify()["status"].eq("ok").all()


def test_verify_says_what_share_is_hot(client, folder):
    """A file with some chunks in the source only is cold; one with a damaged chunk is damaged."""
    tier = tier_of(client, source=folder)
    tier.load(folder)
    lose(client, tier, "a.dcm", [0])
    row = tier.verify(["a.dcm"]).iloc[0]
    assert row["status"] == "cold" and row["hot"] == pytest.approx(1 - 1000 / len(IMAGE))
    client.set(tier.manifest("a.dcm").chunk_key(1), b"x")
    row = tier.verify(["a.dcm"]).iloc[0]
    assert row["status"] == "damaged" and "is damaged" in row["reason"]


# --- other places --------------------------------------------------------------------------------


def test_any_place_that_fsspec_opens(client, folder):
    """A source may be a URL: chunks come by ranges, evicted documents by the whole file."""
    memory = fsspec.filesystem("memory")
    memory.pipe({"/archive/a.dcm": IMAGE, "/archive/sub/a.dcm": dicom(Rows=2)})
    try:
        tier = tier_of(client, source="memory://archive")
        tier.load(folder)
        lose(client, tier, "a.dcm", [1, 3])
        assert tier.read("a.dcm") == IMAGE
        client.delete("file:sub/a.dcm")
        assert tier.read("sub/a.dcm") == dicom(Rows=2)
        memory.rm("/archive/a.dcm")
        lose(client, tier, "a.dcm", [1])
        with pytest.raises(MissingChunkError, match="no such file"):
            tier.read("a.dcm")
    finally:
        memory.rm("/archive", recursive=True)


def test_what_fails_in_a_source_is_not_quoted(client, folder, monkeypatch):
    """A file system's own error may hold a secret: only its name is told."""

    def refuse(*_, **__):
        raise RuntimeError("https://user:secret@example.org refused")

    tier = tier_of(client, source="memory://secrets")
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.store", {})
    fsspec.filesystem("memory").pipe("/secrets/a.dcm", IMAGE)
    tier.load(folder)
    lose(client, tier, "a.dcm", [1])
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.cat_ranges", refuse)
    with pytest.raises(MissingChunkError, match="RuntimeError") as caught:
        tier.read("a.dcm")
    assert "secret" not in str(caught.value) and caught.value.__cause__.__cause__ is None
