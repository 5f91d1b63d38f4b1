"""Files into Redis and back: fidelity, the report, the keys, the index, round trips, races."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pandas as pd
import pydicom
import pytest
import redis
from blake3 import blake3
from conftest import PYDICOM_DATA, PYDICOM_FILES
from samples import PREAMBLE, dicom, element, sha256_of

import dicomstore.store as store_module
from dicomstore import DicomStore, connect
from dicomstore.blobs import manifest
from dicomstore.errors import (
    DicomRedisError,
    DifferentImageError,
    MissingChunkError,
    NotDicomError,
    NotStoredError,
    SearchError,
    ServerError,
)
from dicomstore.server.embedded import RedisServer

PUBLISHED_COUNTS = {
    "ANGIO Projected from C": 7,
    "T/S/C RF FAST PILOT": 6,
    "1.1 Routine Brain": 4,
    "FAST LOCALIZER": 4,
    "Whole Body Bone": 4,
    "194": 1,
    "t1_vibe_fs_tra_bh_dyn": 1,
}


def document_of(client, key):
    return json.loads(client.execute_command("JSON.GET", key))


def chunk_keys(client):
    return {os.fsdecode(key) for key in client.scan_iter("chunk:*", count=10_000)}


def assert_no_orphans(client):
    """Every key is a document or a chunk that one names, and no lease is left."""
    named = set()
    for key in client.scan_iter("file:*", count=10_000):
        named |= set(document_of(client, key)["chunks"])
    assert chunk_keys(client) == named


def row_of(report, path):
    (row,) = report[report["path"] == path].to_dict("records")
    return row


# --- fidelity ------------------------------------------------------------------------------------


def test_pydicoms_files_come_back_identical(store, tmp_path):
    """Every file of pydicom's data folder is reported; what is loaded is restored identical."""
    originals = sha256_of(PYDICOM_DATA)
    report = store.load(PYDICOM_DATA)
    assert set(report["path"]) == set(originals) and len(report) == len(originals)
    assert report["reason"][report["status"] == "skipped"].ne("").all()
    loaded = report[report["status"] == "loaded"]
    assert len(loaded) >= 190
    for name in ["rtstruct.dcm", "no_meta.dcm", "badVR.dcm", "dicomdirtests/DICOMDIR"]:
        assert row_of(report, f"test_files/{name}")["status"] == "loaded"
    for name in ["README.txt", "crayons.icc", "zipMR.gz", "test1.json", "rtplan.dump"]:
        assert "DICOM" in row_of(report, f"test_files/{name}")["reason"]
    assert store.restore(tmp_path)["status"].eq("restored").all()
    restored = sha256_of(tmp_path)
    assert restored == {path: originals[path] for path in loaded["path"]}


def test_larger_images_come_back_identical_and_cost_little(store, client, large_files, tmp_path):
    """All of pydicom-data is loaded, restored identical, and Redis spends under 1.5% on top."""
    originals = sha256_of(large_files)
    report = store.load(large_files)
    assert report["status"].eq("loaded").all() and set(report["path"]) == set(originals)
    assert len(store.find()) == len(report)
    assert store.restore(tmp_path)["status"].eq("restored").all()
    assert sha256_of(tmp_path) == originals
    with client.pipeline(transaction=False) as pipe:
        for key in chunk_keys(client):
            pipe.memory_usage(key)
        used = sum(pipe.execute())
    size = report["size"].sum()
    assert size > 50e6
    assert size < used < 1.015 * size


def test_published_answers(store):
    """On pydicom's bundled files the three scenarios have the published answers."""
    store.load(PYDICOM_DATA)
    assert len(store.read("JPGExtended.dcm")) == 9_844
    assert store.read("JPGExtended.dcm") == (PYDICOM_FILES / "JPGExtended.dcm").read_bytes()
    (found,) = store.find(protocolName="194", studyDate=("20190101", "20191231")).to_dict("records")
    assert found["imageName"] == "J2K_pixelrep_mismatch.dcm" and found["size"] == 138_518
    none = store.find(protocolName="194", studyDate=("20180101", "20181231"))
    assert none.empty and {"path", "key", "imageName"} <= set(none.columns)
    counts = store.count_by("protocolName")
    assert counts.to_dict() == PUBLISHED_COUNTS
    assert list(counts.index) == list(PUBLISHED_COUNTS)


def test_truncated_files_are_loaded(store, tmp_path):
    """A file cut off anywhere behind its first elements is loaded and comes back as it was."""
    whole = (PYDICOM_FILES / "CT_small.dcm").read_bytes()
    for length in (132, 140, 200, 700, 1500, len(whole) - 1):
        (tmp_path / f"{length:05}.dcm").write_bytes(whole[:length])
    report = store.load(tmp_path)
    assert report["status"].eq("loaded").all()
    for path, length in zip(report["path"], report["size"], strict=True):
        assert store.read(path) == whole[:length]
    assert len(store.find()) == 6


# --- what load reports ---------------------------------------------------------------------------


def test_every_kind_of_file_has_its_row(store, tmp_path):
    """Hidden, linked, broken, looping, empty and special files are each listed, in stable order."""
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    (folder / "b" / ".hidden").mkdir(parents=True)
    elsewhere.mkdir()
    image = dicom()
    (elsewhere / "image.dcm").write_bytes(image)
    (folder / ".hidden.dcm").write_bytes(image)
    (folder / "b" / ".hidden" / "image").write_bytes(image)
    (folder / "link.dcm").symlink_to(elsewhere / "image.dcm")
    (folder / "linked folder").symlink_to(elsewhere)
    (folder / "parent").symlink_to(folder)
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    (folder / "itself").symlink_to(folder / "itself")
    os.mkfifo(folder / "fifo")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "empty.dcm").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    report = store.load(folder)
    rows = {row["path"]: (row["status"], row["reason"]) for row in report.to_dict("records")}
    status, reason = rows.pop("notes.txt")
    assert status == "skipped" and "DICOM" in reason
    linked = "a link to a folder; links to folders are not followed"
    assert rows == {
        ".hidden.dcm": ("loaded", ""),
        "b/.hidden/image": ("loaded", ""),
        "broken": ("skipped", "No such file or directory"),
        "empty.dcm": ("skipped", "an empty file"),
        "fifo": ("skipped", "not a regular file"),
        "itself": ("skipped", "Too many levels of symbolic links"),
        "link.dcm": ("loaded", ""),
        "linked folder": ("skipped", linked),
        "parent": ("skipped", linked),
        "zero": ("skipped", "not a regular file"),
    }
    assert store.read("link.dcm") == image
    again = store.load(folder)
    assert list(again["path"]) == list(report["path"])
    assert list(report.columns) == ["path", "key", "size", "chunks", "status", "reason"]


def test_a_file_that_is_gone_when_its_turn_comes(store, tmp_path, monkeypatch):
    """A file that vanishes during the load is listed with the system's reason; the rest loads."""
    for name in ("a.dcm", "b.dcm"):
        (tmp_path / name).write_bytes(dicom())

    def vanishing(*arguments, **options):
        (tmp_path / "a.dcm").unlink()
        return load(*arguments, **options)

    load = store._load
    monkeypatch.setattr(store, "_load", vanishing)
    rows = store.load(tmp_path).set_index("path")
    assert list(rows["status"]) == ["skipped", "loaded"]
    assert rows["reason"]["a.dcm"] == "No such file or directory" and rows["size"]["a.dcm"] == 0


@pytest.fixture
def ordinary_user(tmp_path, monkeypatch):
    """Work in `tmp_path` as a user whom permissions bind; they do not bind root."""
    tmp_path.chmod(0o777)
    monkeypatch.chdir(tmp_path)  # relative paths: the folders above may be closed to this user
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)


def test_files_and_folders_without_permission(store, tmp_path, ordinary_user):
    """An unreadable file and an unreadable folder are skipped by name; the rest is loaded."""
    folder = Path("in")
    (folder / "closed").mkdir(parents=True)
    for name in ("a.dcm", "b.dcm", "closed/c.dcm"):
        (folder / name).write_bytes(dicom())
    (folder / "a.dcm").chmod(0)
    (folder / "closed").chmod(0)
    report = store.load(folder)
    (folder / "closed").chmod(0o700)
    rows = {row["path"]: (row["status"], row["reason"]) for row in report.to_dict("records")}
    assert rows == {
        "a.dcm": ("skipped", "Permission denied"),
        "b.dcm": ("loaded", ""),
        "closed": ("skipped", "Permission denied"),
    }
    with pytest.raises(PermissionError, match="closed"):
        (folder / "closed").chmod(0)
        store.load(folder / "closed" / "c.dcm")


def test_a_folder_that_does_not_exist(store, tmp_path):
    """A wrong path is one sentence with the path in it."""
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nowhere"):
        store.load(tmp_path / "nowhere")


def test_a_single_file_and_a_folder_in_the_store(store, tmp_path):
    """A file's path is its name; `under` puts it into a folder, unless that leads elsewhere."""
    (tmp_path / "IM1").write_bytes(dicom())
    assert list(store.load(tmp_path / "IM1")["key"]) == ["file:IM1"]
    assert list(store.load(tmp_path, under="cd2/x/")["key"]) == ["file:cd2/x/IM1"]
    for under in ("..", "a/../..", "a//b"):
        with pytest.raises(ValueError, match="no path"):
            store.load(tmp_path, under=under)


def test_loading_again_changes_nothing(store, client):
    """The same files again are `unchanged`, with every key as it was."""
    store.load(PYDICOM_DATA / "charset_files")
    store.load(PYDICOM_FILES / "dicomdirtests")
    before = {key: client.dump(key) for key in client.scan_iter(count=10_000)}
    again = store.load(PYDICOM_FILES / "dicomdirtests")
    assert set(again["status"]) == {"unchanged", "skipped"}
    assert {key: client.dump(key) for key in client.scan_iter(count=10_000)} == before


def test_loading_again_repairs(store, client):
    """A lost chunk is told by name, and loading again puts it back, with no key left over."""
    path = PYDICOM_FILES / "693_J2KI.dcm"
    store.load(path)
    lost = document_of(client, "file:693_J2KI.dcm")["chunks"][-1]
    client.delete(lost)
    with pytest.raises(MissingChunkError, match=re.escape(lost)):
        store.read("693_J2KI.dcm")
    assert list(store.load(path)["status"]) == ["replaced"]
    assert store.read("693_J2KI.dcm") == path.read_bytes()
    assert_no_orphans(client)


def test_another_chunk_size_cuts_anew(client, tmp_path):
    """With another chunk size the file is replaced, not taken for unchanged."""
    image = dicom(pixels=bytes(range(256)) * 40)
    (tmp_path / "a.dcm").write_bytes(image)
    for chunk_size, status in ((4096, "loaded"), (1000, "replaced"), (1000, "unchanged")):
        store = DicomStore(client, chunk_size=chunk_size, progress=False)
        assert list(store.load(tmp_path)["status"]) == [status]
        assert store.read("a.dcm") == image
    assert document_of(client, "file:a.dcm")["chunkSize"] == 1000
    assert_no_orphans(client)


@pytest.mark.parametrize("chunk_size", [0, -1, 16 * 2**20 + 1])
def test_chunk_sizes_that_cannot_be(client, chunk_size):
    """A chunk size outside 1 byte to 16 MiB is refused with its value."""
    with pytest.raises(ValueError, match=str(chunk_size)):
        DicomStore(client, chunk_size=chunk_size)


def test_a_chunk_size_of_one_byte(client):
    """The smallest chunk size works like any other."""
    store, image = DicomStore(client, chunk_size=1, progress=False), dicom()
    store.put("a", image)
    assert store.read("a") == image
    assert client.dbsize() == 1 + len(image)


def test_another_image_under_the_same_path(store, client, tmp_path):
    """Another SOP Instance UID is not a new version: skipped with the reason, unless replaced."""
    first, second = dicom(SOPInstanceUID="1.2.3"), dicom(SOPInstanceUID="1.2.4")
    (tmp_path / "IM1").write_bytes(first)
    store.load(tmp_path)
    (tmp_path / "IM1").write_bytes(second)
    row = row_of(store.load(tmp_path), "IM1")
    assert row["status"] == "skipped" and "SOP Instance UID" in row["reason"]
    assert store.read("IM1") == first
    with pytest.raises(DifferentImageError, match="file:IM1"):
        store.put("IM1", second)
    assert row_of(store.load(tmp_path, under="cd2"), "cd2/IM1")["status"] == "loaded"
    assert row_of(store.load(tmp_path, replace=True), "IM1")["status"] == "replaced"
    assert store.read("IM1") == second
    assert_no_orphans(client)


class WithHook(DicomStore):
    """Calls `hook(manifest)` when the chunks are sent and the document is not yet committed."""

    hook = None

    def _send(self, manifest, file, sent):
        digests = super()._send(manifest, file, sent)
        if self.hook:
            self.hook(manifest)
        return digests


@pytest.mark.parametrize("change", ["grown", "cut", "rewritten"])
def test_a_file_that_changes_while_it_is_read_is_not_stored(client, tmp_path, monkeypatch, change):
    """A large file that changes under the load is skipped with that reason, leaving nothing."""
    monkeypatch.setattr("dicomstore.blobs.manifest.BATCH_BYTES", 4000)
    monkeypatch.setattr("dicomstore.blobs.manifest.BATCH_BYTES", 4000)
    monkeypatch.setattr("dicomstore.loading.BATCH_BYTES", 4000)
    path = tmp_path / "a.dcm"
    path.write_bytes(dicom(pixels=bytes(50_000)))
    os.utime(path, (1, 1))

    class Disturbed(DicomStore):
        def _send(self, manifest, file, sent):
            if change == "grown":
                with path.open("ab") as other:
                    other.write(b"more")
            elif change == "cut":
                os.truncate(path, 20_000)
            else:
                with path.open("r+b") as other:
                    other.seek(30_000)
                    other.write(b"other")
            return super()._send(manifest, file, sent)

    store = Disturbed(client, chunk_size=1000, progress=False)
    row = row_of(store.load(tmp_path), "a.dcm")
    assert row["status"] == "skipped" and "changed while it was read" in row["reason"]
    assert client.dbsize() == 0


@pytest.mark.parametrize("more", [b"more", None])
def test_a_small_file_that_changes_between_stat_and_read(client, tmp_path, more):
    """A small file whose length is another than the system just said is skipped as well."""
    path = tmp_path / "a.dcm"
    path.write_bytes(dicom(pixels=bytes(5000)))

    class Disturbed(DicomStore):
        def _store(self, *arguments, **options):
            if more:
                with path.open("ab") as other:
                    other.write(more)
            else:
                os.truncate(path, 3000)
            return super()._store(*arguments, **options)

    row = row_of(Disturbed(client, chunk_size=1000, progress=False).load(tmp_path), "a.dcm")
    assert row["status"] == "skipped" and "changed while it was read" in row["reason"]
    assert client.dbsize() == 0


# --- one image from memory, reading, deleting ----------------------------------------------------


def test_put_takes_bytes_and_data_sets(store):
    """Bytes are stored verbatim; a data set is written as a file that pydicom reads again."""
    image = (PYDICOM_FILES / "CT_small.dcm").read_bytes()
    assert store.put("a/b.dcm", memoryview(image)) == "file:a/b.dcm"
    assert store.read("a/b.dcm") == image
    store.put("c.dcm", pydicom.dcmread(PYDICOM_FILES / "MR_small.dcm"))
    assert pydicom.dcmread(io.BytesIO(store.read("c.dcm"))).Modality == "MR"
    assert list(store.find()["path"]) == ["a/b.dcm", "c.dcm"]


def test_put_refuses_what_is_no_image(store, client):
    """Bytes that are not DICOM, a data set without UIDs and a path that leads out are refused."""
    for image in (b"", b"hello", b"\x1f\x8b" + bytes(500)):
        with pytest.raises(NotDicomError):
            store.put("a.dcm", image)
    with pytest.raises(NotDicomError, match=r"a\.dcm"):
        store.put("a.dcm", pydicom.Dataset())
    with pytest.raises(ValueError, match="no path"):
        store.put("../a.dcm", dicom())
    assert client.dbsize() == 0


def test_names_by_key_by_path_and_by_image_name(store):
    """A file is found by key, path or imageName; a path wins; two of a name are told apart."""
    one, two = dicom(Rows=1), dicom(Rows=2)
    store.put("x/a.dcm", one)
    assert store.read("file:x/a.dcm") == store.read("x/a.dcm") == store.read("a.dcm") == one
    store.put("y/a.dcm", two)
    with pytest.raises(DicomRedisError, match=r"2 stored files are named a\.dcm.*x/a\.dcm, y/a"):
        store.read("a.dcm")
    store.put("a.dcm", two)
    assert store.read("a.dcm") == two
    with pytest.raises(NotStoredError, match=r"'b\.dcm'"):
        store.read("b.dcm")


def test_read_into_a_buffer(store):
    """`into` is filled in place; one that is too short is refused before anything is written."""
    image = (PYDICOM_FILES / "693_J2KI.dcm").read_bytes()
    store.put("a", image)
    buffer = bytearray(b"\xff" * (len(image) + 3))
    view = store.read("a", into=buffer)
    assert bytes(view) == image and buffer[-3:] == b"\xff\xff\xff"
    short = bytearray(len(image) - 1)
    with pytest.raises(ValueError, match=f"{len(image) - 1} bytes"):
        store.read("a", into=short)
    assert not any(short)


def test_delete(store, client):
    """A deleted file is gone with all its chunks, and only it."""
    store.load(PYDICOM_FILES / "dicomdirtests")
    store.put("a/CT_small.dcm", dicom())
    before = client.dbsize()
    store.delete("CT_small.dcm")
    assert client.dbsize() == before - 2
    assert_no_orphans(client)
    with pytest.raises(NotStoredError):
        store.delete("CT_small.dcm")


# --- keys and documents --------------------------------------------------------------------------


def test_keys_and_members_are_as_designed(client):
    """Keys have exactly the designed form, and the storage members say where the bytes lie."""
    store = DicomStore(client, chunk_size=3000, progress=False)
    image = dicom(ProtocolName="Head  and\tneck", StudyDate="20190131", pixels=bytes(9000))
    store.put("a b/{1}%.dcm", image)
    key = "file:a b/%7B1%7D%25.dcm"
    document = document_of(client, key)
    version = document["version"]
    assert re.fullmatch("[0-9a-f]{12}", version)
    plan = manifest.Manifest(key, version, len(image), 3000, manifest.plan_tail(len(image), 3000))
    expected = [f"chunk:{key}:{version}:{number}" for number in range(plan.count)]
    assert document["chunks"] == expected
    assert {os.fsdecode(found) for found in client.scan_iter()} == {key, *expected}
    assert client.type(key) == b"ReJSON-RL" and client.type(expected[0]) == b"string"
    pieces = [client.get(chunk) for chunk in expected]
    assert b"".join(pieces) == image
    header = document.pop("header")
    assert header["ProtocolName"] and header["StudyDate"] == "20190131"
    assert document == {
        "imageName": "{1}%.dcm",
        "size": len(image),
        "blake3": blake3(image).hexdigest(),
        "version": version,
        "chunkSize": 3000,
        "tail": [len(piece) for piece in pieces[3:]],
        "crc": [zlib.crc32(piece) for piece in pieces],
        "chunks": expected,
        "protocolName": "Head and neck",
        "studyDate": 20190131,
        "sopInstanceUID": "1.2.3.4",
        "transferSyntaxUID": "1.2.840.10008.1.2.1",
    }
    assert client.ttl(key) == -1
    assert client.execute_command("FT._LIST") in ([b"file:idx"], {b"file:idx"})


def test_a_file_may_be_named_like_the_index(store):
    """The index `file:idx` is no key, so a file named idx is stored like any other."""
    image = dicom()
    store.put("idx", image)
    assert store.read("idx") == image and len(store.find(imageName="idx")) == 1


# --- the index -----------------------------------------------------------------------------------


def test_a_document_that_the_index_drops_is_reported(store, client, tmp_path):
    """If someone altered the index so that it drops documents, the report names the files."""
    store.find()
    client.execute_command(
        "FT.ALTER", "file:idx", "SCHEMA", "ADD", "$.protocolName", "AS", "n", "NUMERIC"
    )
    (tmp_path / "good").write_bytes(dicom())
    (tmp_path / "dropped").write_bytes(dicom(ProtocolName="text"))
    for status in ("loaded", "unchanged"):
        rows = store.load(tmp_path).set_index("path")
        assert rows["reason"]["good"] == ""
        assert rows["status"]["dropped"] == status
        assert "no search finds it" in rows["reason"]["dropped"]
    with pytest.raises(SearchError, match="no search finds it"):
        store.put("dropped too", dicom(ProtocolName="text"))


def test_the_index_made_over_stored_files_is_waited_for(store, client, tmp_path):
    """When the index has to be built over what is there, load and find wait for it."""
    for number in range(3000):
        client.execute_command("JSON.SET", f"file:{number}", "$", json.dumps({"imageName": "x"}))
    (tmp_path / "a.dcm").write_bytes(dicom())
    assert list(store.load(tmp_path)["status"]) == ["loaded"]
    assert len(store.find()) == 3001
    client.execute_command("FT.DROPINDEX", "file:idx")
    assert len(DicomStore(client, progress=False).find(imageName="x")) == 3000


def test_a_dropped_index_is_told_and_made_again(store, client):
    """A search without index is an error that says what to do, and doing it works."""
    store.put("a", dicom())
    client.execute_command("FT.DROPINDEX", "file:idx")
    with pytest.raises(SearchError, match="Search again"):
        store.find()
    assert len(store.find()) == 1


def test_two_make_the_index_at_once(server, client):
    """Many stores that start at the same moment end up with one index and no error."""
    for _ in range(5):
        client.flushall()
        start, failures = threading.Barrier(8), []

        def begin(number, start=start, failures=failures):
            own = connect(server.url)
            try:
                start.wait()
                DicomStore(own, progress=False).put(f"{number}", dicom())
            except Exception as error:
                failures.append(error)
            finally:
                own.close()

        threads = [threading.Thread(target=begin, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert len(DicomStore(client).find()) == 8


def test_more_files_than_one_answer_holds(store, monkeypatch):
    """Answers longer than a page are complete, and the same as in one page."""
    store.load(PYDICOM_FILES)
    whole, counts = store.find(), store.count_by("sopInstanceUID")
    assert len(whole) > 160 and len(counts) > 100
    monkeypatch.setattr("dicomstore.store.SEARCH_PAGE", 7)
    pd.testing.assert_frame_equal(store.find(), whole)
    pd.testing.assert_series_equal(store.count_by("sopInstanceUID"), counts)


def test_conditions(store):
    """Lists mean one of, tuples a range with open sides, several conditions all of them."""
    for number in range(1, 6):
        modality = "CT" if number % 2 else "MR"
        image = dicom(Rows=number, Modality=modality, StudyDate=f"2019010{number}")
        store.put(f"{number}", image)

    def paths(**conditions):
        return "".join(store.find(**conditions)["path"])

    assert paths(modality=["CT", "MR"]) == "12345"
    assert paths(modality="CT", rows=(2, None)) == "35"
    assert paths(rows=[1, 4]) == "14" and paths(rows=(None, 2)) == "12"
    assert paths(studyDate=("2019-01-02", 20190103)) == "23"
    assert paths(query="@rows:[5 5] | @modality:{MR}", rows=(4, None)) == "45"
    assert paths(rows=store.find(modality="CT")["rows"].iloc[1]) == "3"  # a numpy number
    assert paths(rows=pd.Series([2.0])[0]) == "2"
    for conditions, words in [
        ({"row": 1}, "Did you mean rows"),
        ({"rows": "1"}, "number"),
        ({"rows": float("nan")}, "number"),
        ({"rows": (1, 2, 3)}, "range"),
        ({"modality": 5}, "text"),
        ({"modality": []}, "modality"),
        ({"rows": []}, "rows"),
        ({"studyDate": "01.02.2019"}, "20190131"),
    ]:
        with pytest.raises(ValueError, match=words):
            store.find(**conditions)


# --- the keys of others --------------------------------------------------------------------------


def test_foreign_keys_stay_untouched(store, client, tmp_path):
    """Keys of every type outside and beside ours are the same, byte for byte, after everything."""
    for prefix in ("", "foreign:", "files:", "chunks:", "file", "chunk", "CHUNK:file:", "x:file:"):
        client.set(f"{prefix}string", b"\0\xff")
        client.hset(f"{prefix}hash", mapping={"a": "1"})
        client.rpush(f"{prefix}list", "a", "b")
        client.sadd(f"{prefix}set", "a")
        client.zadd(f"{prefix}zset", {"a": 1})
        client.xadd(f"{prefix}stream", {"a": "1"}, id="1-1")
        client.execute_command("JSON.SET", f"{prefix}json", "$", '{"chunks": ["foreign:string"]}')
    # Within our prefixes, what is not a document is not ours either.
    client.hset("file:taken.dcm", mapping={"imageName": "taken.dcm"})
    client.set("file:string", "x")
    client.rpush("chunk:file:CT_small.dcm:0123456789ab:0", "not a chunk")
    client.set("chunk:other", "x")
    before = {key: client.dump(key) for key in client.scan_iter(count=1000)}
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(PYDICOM_FILES / "CT_small.dcm", folder / "CT_small.dcm")
    shutil.copy(PYDICOM_FILES / "CT_small.dcm", folder / "taken.dcm")
    report = store.load(folder)
    row = row_of(report, "taken.dcm")
    assert row["status"] == "skipped" and "file:taken.dcm holds something else" in row["reason"]
    assert row_of(report, "CT_small.dcm")["status"] == "loaded"
    store.load(folder, replace=True)
    assert list(store.find()["path"]) == ["CT_small.dcm"]
    assert list(store.verify()["path"]) == ["CT_small.dcm"]
    assert list(store.restore(tmp_path / "out")["path"]) == ["CT_small.dcm"]
    assert os.listdir(tmp_path / "out") == ["CT_small.dcm"]
    with pytest.raises(DicomRedisError, match=r"file:taken\.dcm"):
        store.delete("taken.dcm")
    store.delete("CT_small.dcm")
    assert {key: client.dump(key) for key in client.scan_iter(count=1000)} == before


# --- round trips ---------------------------------------------------------------------------------


def commands(client):
    """Return how often the server ran each command since CONFIG RESETSTAT."""
    found = {}
    for name, figures in client.info("commandstats").items():
        command = name.removeprefix("cmdstat_")
        if command not in ("info", "config|resetstat"):
            found[command.lower()] = figures["calls"]
    return found


def test_reading_by_path_takes_two_commands(client):
    """One JSON.GET and one MGET, however many chunks; the server counts."""
    store = DicomStore(client, chunk_size=1000, progress=False)
    image = dicom(pixels=bytes(100_000))
    store.put("x/a.dcm", image)
    client.config_resetstat()
    assert store.read("x/a.dcm") == image
    assert commands(client) == {"json.get": 1, "mget": 1}
    client.config_resetstat()
    assert store.read("a.dcm") == image
    assert commands(client) == {"json.get": 2, "ft.info": 1, "ft.search": 1, "mget": 1}


def test_searching_takes_two_commands_in_one_round_trip(store, client):
    """`find` is one FT.INFO and one FT.SEARCH; `count_by` the same with FT.AGGREGATE."""
    store.load(PYDICOM_FILES / "dicomdirtests")
    client.config_resetstat()
    assert len(store.find(modality="CT"))
    assert commands(client) == {"ft.info": 1, "ft.search": 1}
    client.config_resetstat()
    assert len(store.count_by("modality"))
    assert commands(client) == {"ft.info": 1, "ft.aggregate": 1}


def test_no_command_a_chunk_except_the_sets(client, tmp_path):
    """Restoring, verifying, loading again and deleting send no command once per chunk."""
    store = DicomStore(client, chunk_size=1000, progress=False)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.dcm").write_bytes(dicom(pixels=bytes(500_000)))
    client.config_resetstat()
    store.load(folder)
    sent = commands(client)
    assert sent.pop("set") == 501 + 1  # and the lease
    assert max(sent.values()) <= 4
    # Pipelined: the server reads from its sockets far less often than once a chunk.
    assert client.info("stats")["total_reads_processed"] < 150
    for action in (
        lambda: store.load(folder),
        lambda: store.restore(tmp_path / "out"),
        store.verify,
        lambda: store.delete("a.dcm"),
    ):
        client.config_resetstat()
        action()
        assert max(commands(client).values()) <= 4


# --- the lease, the commit, races ----------------------------------------------------------------


def test_the_lease_lasts_as_long_as_the_load(client):
    """While chunks are sent, the lease of this version has a time to live of at most 5 s."""
    store, seen = WithHook(client, progress=False), []

    def look(manifest):
        assert manifest.lease == f"chunk:{{file:a}}:{manifest.version}"
        seen.append((client.type(manifest.lease), client.pttl(manifest.lease)))

    store.hook = look
    store.put("a", dicom())
    ((kind, ttl),) = seen
    assert kind == b"string" and 0 < ttl <= 5000
    assert_no_orphans(client)


@pytest.mark.parametrize("forked", [False, True])
def test_the_lease_is_renewed(client, monkeypatch, forked):
    """A load that takes longer than a lease keeps it, also after a time without any load.

    After a fork as well, which leaves of the thread that renews leases only its object.
    """
    monkeypatch.setattr("dicomstore.blobs.versions.LEASE_MS", 300)
    store, versions = WithHook(client, progress=False), []

    def linger(manifest):
        versions.append(manifest.version)
        renewals = 0
        while renewals < 4:  # each takes 100 ms: together longer than a lease
            before = client.pttl(manifest.lease)
            assert before > 0
            renewals += any(client.pttl(manifest.lease) > before for _ in range(50))

    store.put("idle", dicom())
    while any(thread.name == "leases" for thread in threading.enumerate()):
        threading.Event().wait(0.01)
    if forked:
        store._leases._renewer = threading.Thread()
        store._leases._renewer.start()
        store._leases._renewer.join()
    store.hook = linger
    store.put("a", dicom())
    assert len(versions) == 1 and document_of(client, "file:a")["version"] == versions[0]


def test_a_lost_lease_starts_the_load_again(client):
    """If the lease is gone at the commit, nothing is committed; a new version is."""
    store, versions = WithHook(client, progress=False), []

    def lose(manifest):
        versions.append(manifest.version)
        if len(versions) < 3:
            client.delete(manifest.lease)
            client.delete(manifest.chunk_key(0))  # a sweeper may have taken chunks as well

    store.hook = lose
    image = dicom()
    store.put("a", image)
    assert len(set(versions)) == 3
    assert document_of(client, "file:a")["version"] == versions[-1]
    assert store.read("a") == image
    assert_no_orphans(client)


def test_a_lease_that_never_lasts_ends_the_load(client):
    """A load whose lease always lapses gives up with a sentence, and leaves nothing."""
    store = WithHook(client, progress=False)
    store.hook = lambda manifest: client.delete(manifest.lease)
    with pytest.raises(ServerError, match="file:a could not be stored: its lease"):
        store.put("a", dicom())
    assert client.dbsize() == 0


@pytest.mark.parametrize("same", [True, False])
def test_the_loser_of_a_race_cleans_up(client, tmp_path, same):
    """Another loader commits first: the same bytes stay as they are, others are replaced."""
    first, second = dicom(Rows=1), dicom(Rows=1 if same else 2)
    other, store = DicomStore(client, progress=False), WithHook(client, progress=False)
    store.hook = lambda manifest: other.put("a", first)
    (tmp_path / "a").write_bytes(second)
    row = row_of(store.load(tmp_path), "a")
    assert row["status"] == ("unchanged" if same else "replaced")
    assert store.read("a") == second
    assert_no_orphans(client)


def test_a_race_with_another_image(client):
    """Another image that takes the path during the load is not overwritten."""
    other, store = DicomStore(client, progress=False), WithHook(client, progress=False)
    image = dicom(SOPInstanceUID="1.2.3")
    store.hook = lambda manifest: other.put("a", image)
    with pytest.raises(DifferentImageError):
        store.put("a", dicom(SOPInstanceUID="1.2.4"))
    assert store.read("a") == image
    assert_no_orphans(client)


def test_a_race_at_the_very_commit(client):
    """A document that changes between the last look and the commit is looked at again."""
    other, contested = DicomStore(client, progress=False), []

    class Contested(DicomStore):
        def _current(self, key, client=None):
            current = super()._current(key, client)
            if client is not None and not contested:  # within the commit
                contested.append(other.put("a", dicom(Rows=1)))
            return current

    store, image = Contested(client, progress=False), dicom(Rows=2)
    store.put("a", image)
    assert contested == ["file:a"] and store.read("a") == image
    assert_no_orphans(client)


@pytest.mark.parametrize("lost", ["the reply", "the connection"])
def test_a_commit_whose_outcome_is_not_known(client, lost):
    """A commit that happened though its reply was lost is found out; its chunks are not deleted."""

    class Unsure(DicomStore):
        def _commit(self, *arguments):
            assert super()._commit(*arguments) == "loaded"
            if lost == "the connection":
                raise redis.ConnectionError("lost")

    store, image = Unsure(client, progress=False), dicom()
    if lost == "the reply":
        store.put("a", image)
    else:
        with pytest.raises(ServerError, match=r"file:a could not be stored: lost"):
            store.put("a", image)
    assert store.read("a") == image
    assert_no_orphans(client)


def test_a_race_with_a_foreign_key(client):
    """A foreign key that takes the place during the load stays, and no chunk is left."""
    store = WithHook(client, progress=False)
    store.hook = lambda manifest: client.hset("file:a", "x", "y")
    with pytest.raises(DicomRedisError, match="something else"):
        store.put("a", dicom())
    assert client.keys() == [b"file:a"] and client.hgetall("file:a") == {b"x": b"y"}


def test_many_loaders_of_the_same_names(server, client, tmp_path):
    """Threads that load the same files at once leave each stored once, and no chunk over."""
    for name in range(3):
        (tmp_path / str(name)).write_bytes(dicom(pixels=bytes(5000), Rows=name))
    reports, start = [], threading.Barrier(4)

    def work():
        own = connect(server.url)
        start.wait()
        reports.append(DicomStore(own, chunk_size=500, progress=False).load(tmp_path))
        own.close()

    for _ in range(5):
        client.flushall()
        reports.clear()
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = pd.concat(reports).groupby("path")["status"].apply(sorted)
        assert len(reports) == 4
        assert all(found == ["loaded"] + ["unchanged"] * 3 for found in statuses)
        assert_no_orphans(client)
        assert DicomStore(client, progress=False).verify()["status"].eq("ok").all()


def test_a_reader_sees_the_old_or_the_new_version(server, client, monkeypatch):
    """While two versions replace one another, every read gives one of them whole."""
    monkeypatch.setattr("dicomstore.blobs.manifest.BATCH_BYTES", 2000)  # many MGETs a read
    versions = [dicom(Rows=n, pixels=bytes([n]) * 9000) for n in (1, 2)]
    store = DicomStore(client, chunk_size=1000, progress=False)
    store.put("a", versions[0])
    done, failures = threading.Event(), []

    def keep_replacing():
        own = connect(server.url)
        writer = DicomStore(own, chunk_size=1000, progress=False)
        try:
            for turn in range(120):
                writer.put("a", versions[(turn + 1) % 2])
        except Exception as error:
            failures.append(error)
        finally:
            done.set()
            own.close()

    thread = threading.Thread(target=keep_replacing)
    thread.start()
    seen = []
    while not done.is_set() or len(seen) < 100:
        seen.append(versions.index(store.read("a")))
    thread.join()
    assert failures == [] and set(seen) == {0, 1}
    assert_no_orphans(client)


def test_a_full_server_keeps_the_old_version(tmp_path):
    """When Redis has no memory left, the load ends with its words, and the old file is whole."""
    limits = ["maxmemory 24mb", "maxmemory-policy noeviction"]
    old, new = dicom(pixels=bytes(1_000_000)), dicom(Rows=1, pixels=os.urandom(40_000_000))
    with RedisServer(config=limits) as full, connect(full.url) as client:
        store = DicomStore(client, progress=False)
        store.put("a", old)
        with pytest.raises(ServerError, match=r"file:a.*maxmemory"):
            store.put("a", new)
        assert store.read("a") == old
        assert_no_orphans(client)
        # Without room for even the lease, the sentence is the same.
        client.config_set("maxmemory", "1mb")
        (tmp_path / "b").write_bytes(dicom())
        with pytest.raises(ServerError, match=r"file:b.*maxmemory"):
            store.load(tmp_path)
        assert client.dbsize() == 1 + len(document_of(client, "file:a")["chunks"])


def test_a_refused_document_leaves_no_chunk(client):
    """When the document itself is refused, its chunks are taken back and nothing is quoted."""
    store = DicomStore(client, progress=False)
    store.find()
    client.acl_setuser("w", enabled=True, nopass=True, commands=["+@all", "-json.set"], keys=["*"])
    arguments = client.connection_pool.connection_kwargs
    own = redis.Redis(port=arguments["port"], username="w", password="x")
    try:
        with pytest.raises(ServerError, match=r"file:a") as caught:
            DicomStore(own, progress=False).put("a", dicom(PatientName="Secret^Name"))
        assert "Secret" not in str(caught.value) and "json.set" in str(caught.value)
        assert client.dbsize() == 0
    finally:
        own.close()
        client.acl_deluser("w")


def test_an_interrupt_while_sending_leaves_nothing(client, monkeypatch):
    """Ctrl-C in the middle of the chunks takes back those sent, and the old version stays."""
    monkeypatch.setattr("dicomstore.blobs.manifest.BATCH_BYTES", 4000)
    old, new = dicom(), dicom(Rows=1, pixels=bytes(30_000))
    DicomStore(client, chunk_size=1000, progress=False).put("a", old)
    sent_when_interrupted = []

    class Interrupted(DicomStore):
        def _send(self, manifest, file, sent):
            class File(io.BytesIO):
                def readinto(self, view):
                    if self.tell() > 15_000:
                        sent_when_interrupted.append(len(chunk_keys(client)))
                        raise KeyboardInterrupt
                    return super().readinto(view)

            return super()._send(manifest, File(file.getvalue()), sent)

    with pytest.raises(KeyboardInterrupt):
        Interrupted(client, chunk_size=1000, progress=False).put("a", new)
    assert sent_when_interrupted[0] > 10
    assert DicomStore(client, progress=False).read("a") == old
    assert_no_orphans(client)


# --- memory --------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import dicomstore.store as store_module
store = store_module.DicomStore(store_module.connect(sys.argv[2]), progress=False)
store.find()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
folder = Path(sys.argv[3])
assert list(store.load(folder)["status"]) == ["loaded"]
loaded = peak()
assert list(store.load(folder)["status"]) == ["unchanged"]
(folder / "large.dcm").unlink()
assert list(store.restore(folder)["status"]) == ["restored"]
print(loaded - before, peak() - before)
"""


def test_large_files_are_never_held_whole(server, client, tmp_path):
    """Loading and restoring 512 MiB adds less than 100 MiB to the resident memory."""
    size = 512 * 2**20
    with (tmp_path / "large.dcm").open("wb") as file:
        head = PREAMBLE + element(0x00080016, "UI", b"1.2.840.10008.5.1.4.1.1.2\0")
        file.write(head + element(0x7FE00010, "OB", b"", length=size))
        file.truncate(len(head) + 12 + size)
    project = str(Path(store_module.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, project, server.url, os.fspath(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    client.flushall()
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "large.dcm").stat().st_size == len(head) + 12 + size
    assert all(int(added) < 100 for added in run.stdout.split()), run.stdout
