"""The store as a cache: files that expire, reading that renews them, evicted files loaded again."""

import os
import threading

import pytest
from samples import dicom

import dicomstore.store as store_module
from dicomstore import DicomStore, connect
from dicomstore.errors import MissingChunkError, NotStoredError, ServerError
from dicomstore.server.embedded import RedisServer

IMAGE = dicom(pixels=bytes(range(256)) * 20)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.dcm").write_bytes(IMAGE)
    (tmp_path / "in" / "sub" / "a.dcm").write_bytes(dicom(Rows=2))
    return tmp_path / "in"


def cache_of(client, **options):
    return DicomStore(client, chunk_size=1000, progress=False, **options)


def times(client, store, name):
    """The time to live (s, -1 for ever) of a file's document, and the set of its chunks'."""
    manifest = store.manifest(name)
    chunks = {round(client.pttl(key) / 1000) if client.pttl(key) > 0 else -1
              for key in manifest.chunk_keys()}  # fmt: skip
    return round(client.pttl(manifest.key) / 1000) if client.pttl(manifest.key) > 0 else -1, chunks


# --- expiry --------------------------------------------------------------------------------------


def test_document_and_chunks_expire_together(client):
    """With a ttl the document gets it, and every chunk a minute more; without, none expires."""
    cache = cache_of(client, ttl=100)
    cache.put("a", IMAGE)
    document, chunks = times(client, cache, "a")
    assert document == 100 and chunks == {160}
    cache_of(client).put("b", IMAGE)
    assert times(client, cache, "b") == (-1, {-1})


def test_an_expired_file_is_gone_whole(client):
    """After its time neither document nor, a little later, any chunk is there."""
    cache = cache_of(client, ttl=0.05)
    cache.put("a", IMAGE)
    keys = cache.manifest("a").chunk_keys() if client.exists("file:a") else []
    while client.exists("file:a"):
        pass
    with pytest.raises(NotStoredError):
        cache.read("a")
    assert len(cache.find()) == 0
    assert all(0 < client.pttl(key) <= 60_050 for key in keys)


def test_streamed_files_expire_too(client, tmp_path):
    """Large files, which go another way to the server, get their time all the same."""
    cache = DicomStore(client, progress=False, ttl=100)
    image = dicom(pixels=bytes(17 * 2**20))
    cache.put("large", image)
    assert times(client, cache, "large") == (100, {160})
    DicomStore(client, progress=False).put("large", image)
    assert times(client, cache, "large") == (-1, {-1})


@pytest.mark.parametrize("image", [IMAGE, dicom(Rows=9)], ids=["same bytes", "other bytes"])
def test_a_permanent_reload_becomes_permanent(client, image):
    """Loaded again without a ttl, a file stays for good: its document and every chunk."""
    cache_of(client, ttl=100).put("a", IMAGE)
    store = cache_of(client)
    store.put("a", image)
    assert times(client, store, "a") == (-1, {-1}) and store.read("a") == image


def test_a_cached_reload_shortens_nothing(client):
    """The same bytes loaded again with a ttl live as long as before or longer, never less."""
    cache, shorter, store = cache_of(client, ttl=100), cache_of(client, ttl=9), cache_of(client)
    cache.put("a", IMAGE)
    shorter.put("a", IMAGE)
    assert times(client, cache, "a") == (100, {160})
    cache_of(client, ttl=500).put("a", IMAGE)
    assert times(client, cache, "a") == (500, {560})
    store.put("b", IMAGE)
    cache.put("b", IMAGE)
    assert times(client, cache, "b") == (-1, {-1})


def test_other_bytes_with_a_ttl_expire(client):
    """Replaced by other bytes with a ttl, a permanent file expires: the last load decides."""
    cache_of(client).put("a", IMAGE)
    cache = cache_of(client, ttl=100)
    cache.put("a", dicom(Rows=9))
    assert times(client, cache, "a") == (100, {160})


def test_reading_renews_below_half_the_time(client):
    """A read with less than half left gives the whole time again, chunks included; else nothing."""
    cache = cache_of(client, ttl=100, renew=True)
    cache.put("a", IMAGE)
    for left, expected in ((60, 60), (40, 100)):
        client.pexpire("file:a", left * 1000)
        for key in cache.manifest("a").chunk_keys():
            client.pexpire(key, (left + 60) * 1000)
        assert cache.read("a") == IMAGE
        assert times(client, cache, "a") == (expected, {expected + 60})
    client.pexpire("file:a", 40_000)
    assert cache_of(client, ttl=100).read("a") == IMAGE
    assert times(client, cache, "a")[0] == 40


def test_renewing_never_reaches_another_version(client, monkeypatch):
    """A file that is replaced while a read renews it keeps the new version's own time."""
    cache = cache_of(client, ttl=100, renew=True)
    cache.put("a", IMAGE)
    client.pexpire("file:a", 1000)
    expire, short = DicomStore._expire, cache_of(client, ttl=7)

    def replaced_meanwhile(self, manifest, *, longer=False):
        expire(self, manifest, longer=longer)
        if longer:
            monkeypatch.undo()
            short.put("a", dicom(Rows=9))

    monkeypatch.setattr(DicomStore, "_expire", replaced_meanwhile)
    assert cache.read("a") == IMAGE
    assert times(client, cache, "a") == (7, {67})


def test_a_file_that_expires_while_it_is_found_unchanged(client, monkeypatch):
    """A reload that finds the same bytes, which then expire, stores them again."""
    cache_of(client, ttl=100).put("a", IMAGE)
    expire, store = DicomStore._expire, cache_of(client)

    def gone_meanwhile(self, manifest, *, longer=False):
        client.delete("file:a")
        expire(self, manifest, longer=longer)

    monkeypatch.setattr(DicomStore, "_expire", gone_meanwhile)
    store.put("a", IMAGE)
    assert store.read("a") == IMAGE and times(client, store, "a") == (-1, {-1})


@pytest.mark.parametrize(
    "options", [{"ttl": 0}, {"ttl": -1}, {"ttl": float("nan")}, {"ttl": float("inf")},
                {"renew": True}], ids=str
)  # fmt: skip
def test_times_that_make_no_sense(client, options):
    """A time that is none, and renewal without one, are refused in a sentence."""
    with pytest.raises(ValueError, match="ttl"):
        cache_of(client, **options)


# --- eviction ------------------------------------------------------------------------------------


def test_missing_chunks_come_from_the_source(client, folder):
    """A read that finds a chunk gone loads the file again, and counts a miss."""
    cache = cache_of(client, source=folder)
    cache.load(folder)
    assert cache.read("a.dcm") == IMAGE and (cache.hits, cache.misses) == (1, 0)
    client.unlink(cache.manifest("a.dcm").chunk_key(2))
    assert cache.read("a.dcm") == IMAGE and (cache.hits, cache.misses) == (1, 1)
    assert cache.read("a.dcm") == IMAGE and (cache.hits, cache.misses) == (2, 1)
    assert cache.verify()["status"].eq("ok").all()


def test_a_file_evicted_whole_comes_from_the_source(client, folder):
    """By path or key it is loaded again; by imageName alone no other image takes its place."""
    cache = cache_of(client, source=folder)
    cache.load(folder)
    client.delete("file:a.dcm")
    # `sub/a.dcm` has the same imageName and is there: the path wins all the same.
    assert cache.read("a.dcm") == IMAGE
    client.delete("file:sub/a.dcm")
    assert cache.read("file:sub/a.dcm") == dicom(Rows=2)
    assert cache.misses == 2 and cache.hits == 0


def test_only_reading_loads_again(client, folder):
    """Verify reports what is gone, and delete does not bring a file back."""
    cache = cache_of(client, source=folder)
    cache.load(folder)
    client.unlink(cache.manifest("a.dcm").chunk_key(0))
    assert sorted(cache.verify()["status"]) == ["damaged", "ok"]
    client.delete("file:sub/a.dcm")
    with pytest.raises(NotStoredError):
        cache.delete("sub/a.dcm")
    assert cache.misses == 0


def test_without_a_source_the_chunks_are_named(client, folder):
    """Without a source, and where the source has no such file, the read names what is gone."""
    cache = cache_of(client)
    cache.load(folder)
    key = cache.manifest("a.dcm").chunk_key(1)
    client.unlink(key)
    with pytest.raises(MissingChunkError, match=key):
        cache.read("a.dcm")
    (folder / "a.dcm").unlink()
    with pytest.raises(MissingChunkError, match=f"(?s){key}.*source.*no such file"):
        cache_of(client, source=folder).read("a.dcm")


def test_the_source_holds_another_image_now(client, folder):
    """A source file that was replaced by another image is not taken for the one that was stored."""
    cache = cache_of(client, source=folder)
    cache.load(folder)
    client.unlink(cache.manifest("a.dcm").chunk_key(1))
    (folder / "a.dcm").write_bytes(dicom(SOPInstanceUID="1.9"))
    with pytest.raises(MissingChunkError, match="another image"):
        cache.read("a.dcm")
    (folder / "a.dcm").write_bytes(b"no image at all")
    with pytest.raises(MissingChunkError, match="neither DICOM"):
        cache.read("a.dcm")


def test_nothing_outside_the_source_is_loaded(client, folder, tmp_path):
    """Names and links that lead out of the source folder, pipes and folders load nothing."""
    (tmp_path / "secret.dcm").write_bytes(IMAGE)
    (folder / "link.dcm").symlink_to(tmp_path / "secret.dcm")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "inner").symlink_to(folder / "a.dcm")
    os.mkfifo(folder / "pipe")
    cache = cache_of(client, source=folder)
    for name in ("../secret.dcm", "file:../secret.dcm", "link.dcm", "linked/secret.dcm", "pipe",
                 os.fspath(tmp_path / "secret.dcm"), "sub", "sub/../a.dcm", ""):  # fmt: skip
        with pytest.raises(NotStoredError):
            cache.read(name)
    assert cache.misses == 0 and client.dbsize() == 0
    assert cache.read("inner") == IMAGE  # a link that stays inside, as `load` takes it


def test_many_readers_fill_one_gap(server, client, folder):
    """Readers that find the same chunk gone at once all get the bytes, and leave one version."""
    cache_of(client).load(folder)
    read, start = [], threading.Barrier(6)

    def work():
        with connect(server.url) as own:
            cache = cache_of(own, source=folder)
            start.wait()
            read.append(cache.read("a.dcm"))

    for number in range(5):
        manifest = cache_of(client).manifest("a.dcm")
        client.unlink(manifest.chunk_key(number))
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert read == [IMAGE] * 30
    assert len(cache_of(client).sweep()) == 0


def test_a_cache_that_is_too_small(tmp_path, monkeypatch):
    """A file that evicts its own chunks while it is loaded ends in a sentence, not in a loop."""
    monkeypatch.setattr("dicomstore.reading.ATTEMPTS", 3)
    (tmp_path / "a").write_bytes(dicom(pixels=os.urandom(30_000_000)))
    lines = ["maxmemory 24mb", "maxmemory-policy allkeys-lru"]
    with RedisServer(config=lines) as small, connect(small.url) as client:
        cache = DicomStore(client, progress=False, source=tmp_path)
        with pytest.raises((MissingChunkError, ServerError)) as caught:
            cache.read("a")
        assert str(caught.value).count("\n") == 0
        client.config_set("maxmemory", "0")
        assert cache.read("a") == (tmp_path / "a").read_bytes()


def test_expiring_files_are_swept_of_nothing(client):
    """A sweep leaves the chunks of a file that expires, and takes those whose document is gone."""
    cache = cache_of(client, ttl=100)
    cache.put("a", IMAGE)
    assert len(cache.sweep()) == 0
    client.delete("file:a")
    assert cache.sweep()["size"].sum() == len(IMAGE)
    assert store_module.CHUNKS_OUTLIVE_MS > store_module.LEASE_MS
