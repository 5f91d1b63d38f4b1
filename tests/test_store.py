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
from pydicom.uid import CTImageStorage
from samples import PREAMBLE, before_commit, dicom, element, sha256_of

from dicomstore import DicomStore, connect, loading
from dicomstore.blobs import manifest
from dicomstore.blobs.chunks import Chunks
from dicomstore.blobs.versions import Versions
from dicomstore.errors import (
    DicomRedisError,
    DifferentImageError,
    MissingChunkError,
    NotDicomError,
    NotStoredError,
    SearchError,
    ServerError,
)
from dicomstore.loading import Loader
from dicomstore.server.connection import Server
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
        document = document_of(client, key)
        version = f"chunk:{os.fsdecode(key)}:{document['version']}"
        named |= {*document["chunks"], *(f"{version}:{name}" for name in document["attachments"])}
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
    assert found["path"] == "test_files/J2K_pixelrep_mismatch.dcm"
    assert len(store.read(found["key"])) == 138_518
    none = store.find(protocolName="194", studyDate=("20180101", "20181231"))
    assert none.empty and list(none.columns) == list(found)
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

    load = Loader.load
    monkeypatch.setattr(Loader, "load", vanishing)
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
    assert list(store.load(path)["status"]) == ["repaired"]
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
    assert len(chunk_keys(client)) == len(image) + 1  # and its data set as JSON


def test_another_image_under_the_same_path(store, client, tmp_path):
    """Another SOP Instance UID is not a new version: skipped with the reason, unless replaced."""
    first, second = dicom(SOPInstanceUID="1.2.3"), dicom(SOPInstanceUID="1.2.4")
    (tmp_path / "IM1").write_bytes(first)
    store.load(tmp_path)
    (tmp_path / "IM1").write_bytes(second)
    row = row_of(store.load(tmp_path), "IM1")
    assert row["status"] == "skipped" and "SOP Instance UID" in row["reason"]
    assert store.read("IM1") == first
    with pytest.raises(DifferentImageError, match="IM1"):
        store.put("IM1", second)
    assert row_of(store.load(tmp_path, under="cd2"), "cd2/IM1")["status"] == "loaded"
    assert row_of(store.load(tmp_path, replace=True), "IM1")["status"] == "replaced"
    assert store.read("IM1") == second
    assert_no_orphans(client)


@pytest.mark.parametrize("change", ["grown", "cut", "rewritten"])
def test_a_file_that_changes_while_it_is_read_is_not_stored(client, tmp_path, monkeypatch, change):
    """A large file that changes under the load is skipped with that reason, leaving nothing."""
    path = tmp_path / "a.dcm"
    path.write_bytes(dicom(pixels=bytes(17 * 2**20)))
    os.utime(path, (1, 1))
    send = Chunks.send

    def disturbed(*arguments, **options):
        if change == "grown":
            with path.open("ab") as other:
                other.write(b"more")
        elif change == "cut":
            os.truncate(path, 20_000)
        else:
            with path.open("r+b") as other:
                other.seek(30_000)
                other.write(b"other")
        return send(*arguments, **options)

    monkeypatch.setattr(Chunks, "send", disturbed)
    row = row_of(DicomStore(client, progress=False).load(tmp_path), "a.dcm")
    assert row["status"] == "skipped" and "changed while it was read" in row["reason"]
    assert client.dbsize() == 0


@pytest.mark.parametrize("change", ["grown", "cut"])
def test_a_file_that_changes_after_it_is_described(client, tmp_path, monkeypatch, change):
    """A small file that changed since its header was read is skipped as well."""
    path = tmp_path / "a.dcm"
    path.write_bytes(dicom(pixels=bytes(5000)))
    os.utime(path, (1, 1))
    describe_all = loading.describe_all

    def disturbed(*arguments):
        for answer in describe_all(*arguments):
            if change == "grown":
                with path.open("ab") as other:
                    other.write(b"more")
            else:
                os.truncate(path, 3000)
            yield answer

    monkeypatch.setattr(loading, "describe_all", disturbed)
    row = row_of(DicomStore(client, chunk_size=1000, progress=False).load(tmp_path), "a.dcm")
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
    assert client.dbsize() == before - 3  # the document, a chunk, and the data set as JSON
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
    data_set = f"chunk:{key}:{version}:json"
    assert {os.fsdecode(found) for found in client.scan_iter()} == {key, *expected, data_set}
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
        "folders": ["a b"],
        "attachments": {"json": zlib.crc32(client.get(data_set))},
        "frames": document["frames"],
        "protocolName": "Head and neck",
        "studyDate": 20190131,
        "sopClassUID": CTImageStorage,
        "sopInstanceUID": "1.2.3.4",
        "transferSyntaxUID": "1.2.840.10008.1.2.1",
    }
    assert client.ttl(key) == -1


def test_a_file_may_be_named_like_the_index(store):
    """The index `file:idx` is no key, so a file named idx is stored like any other."""
    image = dicom()
    store.put("idx", image)
    assert store.read("idx") == image and len(store.find(imageName="idx")) == 1


# --- the index -----------------------------------------------------------------------------------


def test_a_document_that_the_index_drops_is_reported(store, client, tmp_path):
    """If someone altered the index so that it drops documents, the report names the files."""
    store.find()
    index = client.execute_command("FT.INFO", "file:idx")[b"index_name"]
    client.execute_command(
        "FT.ALTER", index, "SCHEMA", "ADD", "$.protocolName", "AS", "n", "NUMERIC"
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
    assert (
        row["status"] == "skipped"
        and "file:taken.dcm holds something that is not a document" in row["reason"]
    )
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
    store.find()
    client.config_resetstat()
    assert store.read("a.dcm") == image
    assert commands(client) == {"json.get": 2, "ft.search": 1, "mget": 1}


def test_a_file_that_was_read_or_found_takes_one_round_trip(client):
    """Its document's version comes with the chunks, in one pipeline; the server counts."""
    store = DicomStore(client, chunk_size=1000, progress=False)
    image = dicom(pixels=bytes(100_000), ProtocolName="194")
    store.put("x/a.dcm", image)
    fresh = DicomStore(client, progress=False)
    fresh.find()
    client.config_resetstat()
    found = fresh.find(protocolName="194")
    assert fresh.read(found) == image
    assert commands(client) == {"ft.search": 1, "json.get": 1, "mget": 1}
    reads = client.info("stats")["total_reads_processed"]
    assert fresh.read("x/a.dcm") == image
    assert client.info("stats")["total_reads_processed"] == reads + 2  # and this INFO
    assert fresh.read(found.iloc[0]) == image
    store.put("x/b.dcm", image, replace=True)
    with pytest.raises(ValueError, match=r"2 files.*read_many"):
        fresh.read(fresh.find(protocolName="194"))
    with pytest.raises(ValueError, match=r"0 files"):
        fresh.read(fresh.find(protocolName="none"))


def test_many_files_take_as_many_commands_as_one(store, client):
    """Documents come in one request, and the chunks of all files together."""
    store.load(PYDICOM_FILES / "dicomdirtests")
    table = store.find()
    client.config_resetstat()
    many = store.read_many(table)
    assert commands(client) == {"json.get": len(table), "mget": 1}
    assert list(many) == list(table["key"])
    assert all(content == store.read(key) for key, content in many.items())


def test_searching_takes_one_command(store, client):
    """`find` is one FT.SEARCH and `count_by` one FT.AGGREGATE; nothing is asked twice."""
    store.load(PYDICOM_FILES / "dicomdirtests")
    store.find()
    client.config_resetstat()
    assert len(store.find(modality="CT"))
    assert commands(client) == {"ft.search": 1}
    client.config_resetstat()
    assert len(store.count_by("modality"))
    assert commands(client) == {"ft.aggregate": 1}


def test_no_command_a_chunk_except_the_sets(client, tmp_path):
    """Restoring, verifying, loading again and deleting send no command once per chunk."""
    store = DicomStore(client, chunk_size=1000, progress=False)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.dcm").write_bytes(dicom(pixels=bytes(500_000)))
    store.find()  # makes the index, whose lease is renewed as often as the engine needs
    client.config_resetstat()
    store.load(folder)
    sent = commands(client)
    assert sent.pop("set") <= 501 + 5  # and the leases, and the data set as JSON
    assert max(sent.values()) <= 6
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
        assert max(commands(client).values()) <= 6


# --- the lease, the commit, races ----------------------------------------------------------------


def test_the_lease_lasts_as_long_as_the_load(client):
    """While chunks are sent, the lease of this version has a time to live of at most 5 s."""
    store, seen = DicomStore(client, progress=False), []

    def look(manifest):
        assert manifest.lease == f"chunk:{{file:a}}:{manifest.version}"
        seen.append((client.type(manifest.lease), client.pttl(manifest.lease)))

    with before_commit(look):
        store.put("a", dicom())
    ((kind, ttl),) = seen
    assert kind == b"string" and 0 < ttl <= 5000
    assert_no_orphans(client)


def test_the_lease_is_renewed(client, monkeypatch):
    """A load that takes longer than a lease keeps it, also after a time without any load."""
    monkeypatch.setattr("dicomstore.blobs.versions.LEASE_MS", 300)
    store, versions = DicomStore(client, progress=False), []

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
    with before_commit(linger):
        store.put("a", dicom())
    assert len(versions) == 1 and document_of(client, "file:a")["version"] == versions[0]


def test_a_fork_renews_its_own_leases(server, client, monkeypatch):
    """A process that is forked during a load has no thread that renews leases, and starts one."""
    monkeypatch.setattr("dicomstore.blobs.versions.LEASE_MS", 1000)
    store, ended = DicomStore(client, progress=False), []

    def fork(manifest):
        if (child := os.fork()) == 0:
            with before_commit(lambda manifest: threading.Event().wait(2)):
                store.put("child", dicom())
            os._exit(0 if client.exists("file:child") else 1)
        ended.append(os.waitpid(child, 0)[1])

    with before_commit(fork):
        store.put("a", dicom())
    assert ended == [0] and store.read("child") == store.read("a") == dicom()


def test_a_lost_lease_starts_the_load_again(client):
    """If the lease is gone at the commit, nothing is committed; a new version is."""
    store, versions = DicomStore(client, progress=False), []

    def lose(manifest):
        versions.append(manifest.version)
        if len(versions) < 3:
            client.delete(manifest.lease)
            client.delete(manifest.chunk_key(0))  # a sweeper may have taken chunks as well

    image = dicom()
    with before_commit(lose):
        store.put("a", image)
    assert len(set(versions)) == 3
    assert document_of(client, "file:a")["version"] == versions[-1]
    assert store.read("a") == image
    assert_no_orphans(client)


def test_a_lease_that_never_lasts_ends_the_load(client):
    """A load whose lease always lapses gives up with a sentence, and leaves nothing."""
    store = DicomStore(client, progress=False)
    losing = before_commit(lambda manifest: client.delete(manifest.lease))
    with losing, pytest.raises(ServerError, match="file:a could not be stored: its lease"):
        store.put("a", dicom())
    assert client.dbsize() == 0


@pytest.mark.parametrize("same", [True, False])
def test_the_loser_of_a_race_cleans_up(client, tmp_path, same):
    """Another loader commits first: the same bytes stay as they are, others are replaced."""
    first, second = dicom(Rows=1), dicom(Rows=1 if same else 2)
    other, store = DicomStore(client, progress=False), DicomStore(client, progress=False)
    (tmp_path / "a").write_bytes(second)
    with before_commit(lambda manifest: other.put("a", first)):
        row = row_of(store.load(tmp_path), "a")
    assert row["status"] == ("unchanged" if same else "replaced")
    assert store.read("a") == second
    assert_no_orphans(client)


def test_a_race_with_another_image(client):
    """Another image that takes the path during the load is not overwritten."""
    other, store = DicomStore(client, progress=False), DicomStore(client, progress=False)
    image = dicom(SOPInstanceUID="1.2.3")
    racing = before_commit(lambda manifest: other.put("a", image))
    with racing, pytest.raises(DifferentImageError):
        store.put("a", dicom(SOPInstanceUID="1.2.4"))
    assert store.read("a") == image
    assert_no_orphans(client)


def test_a_race_at_the_very_commit(client, monkeypatch):
    """A document that changes between the last look and the commit is looked at again."""
    other, contested = DicomStore(client, progress=False), []
    transaction = Server.transaction

    def racing(self, keys, body):
        def and_then(pipe):
            result = body(pipe)
            if not contested:
                contested.append("now")
                contested.append(other.put("a", dicom(Rows=1)))
            return result

        return transaction(self, keys, and_then)

    store, image = DicomStore(client, progress=False), dicom(Rows=2)
    monkeypatch.setattr(Server, "transaction", racing)
    store.put("a", image)
    assert contested == ["now", "file:a"] and store.read("a") == image
    assert_no_orphans(client)


@pytest.mark.parametrize("lost", ["the reply", "the connection"])
def test_a_commit_whose_outcome_is_not_known(client, monkeypatch, lost):
    """A commit that happened though its reply was lost is found out; its chunks are not deleted."""
    commit = Versions.commit

    def unsure(self, writes):
        commit(self, writes)
        assert writes[0].outcome == "loaded"
        writes[0].outcome = None
        if lost == "the connection":
            raise ServerError("lost")

    monkeypatch.setattr(Versions, "commit", unsure)
    store, image = DicomStore(client, progress=False), dicom()
    if lost == "the reply":
        store.put("a", image)
    else:
        with pytest.raises(ServerError, match=r"file:a could not be stored\. lost"):
            store.put("a", image)
    assert store.read("a") == image
    assert_no_orphans(client)


def test_a_race_with_a_foreign_key(client):
    """A foreign key that takes the place during the load stays, and no chunk is left."""
    store = DicomStore(client, progress=False)
    racing = before_commit(lambda manifest: client.hset("file:a", "x", "y"))
    with racing, pytest.raises(DicomRedisError, match="something that is not a document"):
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


@pytest.mark.parametrize("large", [False, True])
def test_a_reader_sees_the_old_or_the_new_version(server, client, large):
    """While two versions replace one another, every read gives one of them whole."""
    if large:  # over connections of their own
        versions = [dicom(Rows=n, pixels=bytes([n]) * 17 * 2**20) for n in (1, 2)]
    else:
        versions = [dicom(Rows=n, pixels=bytes([n]) * 9000) for n in (1, 2)]
    chunk_size, turns = (262_080, 12) if large else (1000, 120)
    store = DicomStore(client, chunk_size=chunk_size, progress=False)
    store.put("a", versions[0])
    done, failures = threading.Event(), []

    def keep_replacing():
        own = connect(server.url)
        writer = DicomStore(own, chunk_size=chunk_size, progress=False)
        try:
            for turn in range(turns):
                writer.put("a", versions[(turn + 1) % 2])
        except Exception as error:
            failures.append(error)
        finally:
            done.set()
            own.close()

    thread = threading.Thread(target=keep_replacing)
    thread.start()
    seen = []
    while not done.is_set() or len(seen) < turns:
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
        store.sweep()  # of a large file, what was on the way may arrive after it was taken back
        assert_no_orphans(client)
        # Without room for even the lease, the sentence is the same.
        client.config_set("maxmemory", "1mb")
        (tmp_path / "b").write_bytes(dicom())
        with pytest.raises(ServerError, match=r"file:b.*maxmemory"):
            store.load(tmp_path)
        assert not [key for key in client.scan_iter() if b"file:b" in key]


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
    old, new = dicom(), dicom(Rows=1, pixels=bytes(30_000_000))
    DicomStore(client, progress=False).put("a", old)
    sent_when_interrupted = []
    send = Chunks.send

    def interrupted(self, manifest, read_into, *arguments, **options):
        def read(view):
            read_into(view)
            if (sent := len(chunk_keys(client))) > 10:
                sent_when_interrupted.append(sent)
                raise KeyboardInterrupt

        return send(self, manifest, read, *arguments, **options)

    monkeypatch.setattr(Chunks, "send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        DicomStore(client, progress=False).put("a", new)
    assert sent_when_interrupted[0] > 10
    assert DicomStore(client, progress=False).read("a") == old
    assert_no_orphans(client)


# --- memory --------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import dicomstore
store = dicomstore.DicomStore(dicomstore.connect(sys.argv[2]), progress=False)
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
    project = str(Path(loading.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, project, server.url, os.fspath(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    client.flushall()
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "large.dcm").stat().st_size == len(head) + 12 + size
    assert all(int(added) < 100 for added in run.stdout.split()), run.stdout


def test_the_progress_bar_counts_each_file_once(client, tmp_path, capsys):
    """Large files, small ones and what is skipped are all counted, and none of them twice."""
    for name, size in {"small.dcm": 10, "large.dcm": 5_000_000}.items():
        (tmp_path / name).write_bytes(dicom(pixels=bytes(size)))
    (tmp_path / "note.txt").write_text("no image")
    for _ in range(2):
        DicomStore(client).load(tmp_path)
        assert re.findall(r"(\d+) of 3 files", capsys.readouterr().out)[-1] == "3"
