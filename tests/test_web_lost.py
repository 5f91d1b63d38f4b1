"""DICOMweb over a store that Redis has lost something of, and over what is hard to read."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian

from dicomstore import DicomStore
from dicomstore.imaging import header, values
from dicomstore.web import answers
from tests.conftest import PYDICOM_FILES
from tests.samples import PREAMBLE, dicom, element
from tests.test_metadata import READ_DIFFERENTLY, by_pydicom
from tests.test_web import get, serving

#: Native, with a table of frames, and deflated.
NAMES = ("CT_small.dcm", "rtdose_rle.dcm", "image_dfl.dcm")
#: The path below an instance, and what is accepted, so that answers can be compared.
ASKED = [
    ("/metadata", "application/dicom+json"),
    ("/frames/1", "application/octet-stream; transfer-syntax=*"),
    ("/frames/1", "application/octet-stream"),
    ("", "application/dicom"),
    ("/rendered", "image/png"),
    ("/bulkdata/7FE00010", "*/*"),
]
UIDS = {"StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.3"}
SERIES = "/studies/1.2/series/1.3"


def path_of(dataset):
    return (
        f"/studies/{dataset.StudyInstanceUID}/series/{dataset.SeriesInstanceUID}"
        f"/instances/{dataset.SOPInstanceUID}"
    )


def answer(address, path, accepted):
    """Return the status, and the body without the boundary of its parts and the port."""
    status, headers, body = get(address, path, Accept=accepted)
    body = body.replace(address.encode(), b"")
    boundary = re.search("boundary=(.*)", headers["Content-Type"] or "")
    return status, body.replace(boundary[1].encode(), b"") if boundary else body


def remove(client):
    client.delete(*client.keys("chunk:*"))


def damage(client):
    for key in client.keys("chunk:*"):
        client.setrange(key, client.strlen(key) // 2, b"????????")


# --- lost chunks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lose", [remove, damage])
@pytest.mark.parametrize("is_known", [True, False], ids=["served before", "never served"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_lost_comes_from_the_source(client, tmp_path, name, lose, is_known):
    """With a source, every answer is as before after all that lay beside the documents is lost."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes((PYDICOM_FILES / name).read_bytes())
    store = DicomStore(client, chunk_size=1000, progress=False, thumbnails=False, source=folder)
    store.load(folder)
    path = path_of(pydicom.dcmread(folder / name, stop_before_pixels=True))
    with serving(store) as address:
        before = [answer(address, path + end, accepted) for end, accepted in ASKED]
        study = path.partition("/series")[0]
        before.append(answer(address, f"{study}/metadata", "*/*"))
    assert [status for status, _ in before if status != 200] == []
    asked = [*((path + end, accepted) for end, accepted in ASKED), (f"{study}/metadata", "*/*")]
    for (where, accepted), expected in zip(asked, before, strict=True):
        with serving(store) as address:
            for _ in range(2 if is_known else 1):
                if is_known:
                    answer(address, where, accepted)
                lose(client)
                found = answer(address, where, accepted)
                if "metadata" in where and expected[1] != found[1]:
                    assert json.loads(found[1]) == json.loads(expected[1])
                else:
                    assert found == expected, where


@pytest.mark.parametrize("lose", [remove, damage])
def test_lost_metadata_of_odd_text_is_made_again(client, tmp_path, lose):
    """Text that only a process of its own may decode is in the metadata again after a loss."""
    name = b"Secret^Name\x1b$Z" + b"\xff" * 3 + b"x" * 80
    content = PREAMBLE + b"".join((
        element(0x00080005, "CS", b"ISO 2022 IR 100 "), element(0x00080018, "UI", b"1.4\0"),
        element(0x00100010, "PN", name), element(0x0020000D, "UI", b"1.2\0"),
        element(0x0020000E, "UI", b"1.3\0"),
    ))  # fmt: skip
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "odd.dcm").write_bytes(content)
    store = DicomStore(client, chunk_size=1000, progress=False, thumbnails=False, source=folder)
    store.load(folder)
    with serving(store) as address:
        before = answer(address, f"{SERIES}/instances/1.4/metadata", "*/*")
        assert before[0] == 200 and b"Secret" in before[1]
        lose(client)
        assert answer(address, f"{SERIES}/instances/1.4/metadata", "*/*") == before
    assert client.exists(store.manifest("odd.dcm").attachment_key("json"))


@pytest.mark.parametrize("lose", [remove, damage])
def test_what_is_lost_for_good_is_an_error(client, tmp_path, lose):
    """Without a source, what is lost is an error of the server that names no path."""
    store = DicomStore(client, chunk_size=1000, progress=False, thumbnails=False)
    paths = []
    for number, name in enumerate(NAMES):
        content = (PYDICOM_FILES / name).read_bytes()
        store.put(f"SMITH^JOHN/{number}.dcm", content)
        paths.append(path_of(pydicom.dcmread(PYDICOM_FILES / name, stop_before_pixels=True)))
    with serving(store) as address:
        answer(address, paths[0] + "/frames/1", "*/*")
        lose(client)
        for path in paths:
            for end, accepted in ASKED:
                status, body = answer(address, path + end, accepted)
                assert status == 500, (path + end, body)
                words = json.loads(body)["error"]
                assert "repair=True" in words and "SMITH" not in words and "chunk:" not in words


def test_an_old_version_is_not_served(client):
    """Chunks of a replaced version that are still there do not answer for it."""
    store = DicomStore(client, chunk_size=1000, progress=False, thumbnails=False)

    def image(uid):
        return dicom(
            **UIDS, SOPInstanceUID=uid, Rows=50, Columns=100, SamplesPerPixel=1,
            PhotometricInterpretation="MONOCHROME2", NumberOfFrames=2, pixels=bytes(10_000),
        )  # fmt: skip

    store.put("a.dcm", image("1.4.1"))
    kept = {key: client.get(key) for key in store.manifest("a.dcm").chunk_keys()}
    with serving(store) as address:
        path = f"{SERIES}/instances/1.4.1/frames/2"
        assert get(address, path)[0] == 200
        store.put("a.dcm", image("1.4.2"), replace=True)
        client.mset(kept)
        assert get(address, path)[0] == 404
        assert get(address, path.replace("1.4.1", "1.4.2"))[0] == 200


# --- what is hard to read ------------------------------------------------------------------------


@pytest.mark.parametrize("together", [100, 1], ids=["at once", "streamed"])
def test_an_instance_without_metadata_is_not_left_out(store, monkeypatch, together):
    """A series whose metadata would lack an instance is an error that names the instance."""
    monkeypatch.setattr(answers, "TOGETHER", together)
    store.put("a.dcm", dicom(**UIDS, SOPInstanceUID="1.4.1"))
    store.put("b.dcm", dicom(**UIDS, SOPInstanceUID="1.4.2", TextValue="x" * 5 * 2**20))
    with serving(store) as address:
        assert get(address, f"{SERIES}/instances/1.4.1/metadata")[0] == 200
        for path in (SERIES, f"{SERIES}/instances/1.4.2"):
            status, _, body = get(address, f"{path}/metadata")
            assert status == 500
            assert "1.4.2 has no metadata" in json.loads(body)["error"]
        assert len(json.loads(get(address, f"{SERIES}/instances")[2])) == 2
        store.delete("b.dcm")
        status, _, body = get(address, f"{SERIES}/metadata")
        assert status == 200 and len(json.loads(body)) == 1


def test_frames_of_deflated_instances(store, monkeypatch):
    """A deflated instance's frames are those of its inflated data set, in Explicit VR."""
    pixels = np.arange(3 * 40 * 50, dtype=np.uint8).reshape(3, 40, 50)
    made = dicom(
        **UIDS, syntax=DeflatedExplicitVRLittleEndian, Rows=40, Columns=50, SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2", BitsStored=8, HighBit=7, PixelRepresentation=0,
        NumberOfFrames=3, pixels=pixels.tobytes(),
    )  # fmt: skip
    store.put("made.dcm", made)
    real = pydicom.dcmread(PYDICOM_FILES / "image_dfl.dcm")
    store.load(PYDICOM_FILES / "image_dfl.dcm")
    with serving(store) as address:
        path = f"{SERIES}/instances/1.2.3.4/frames"
        status, headers, body = get(address, f"{path}/1,3,2")
        boundary = headers["Content-Type"].partition("boundary=")[2].encode()
        parts = [part.partition(b"\r\n\r\n") for part in body.split(b"--" + boundary)[1:-1]]
        assert status == 200
        assert [part[2][:-2] for part in parts] == [pixels[k].tobytes() for k in (0, 2, 1)]
        assert {re.search(rb"transfer-syntax=(\S+)", part[0])[1] for part in parts} == {
            b"1.2.840.10008.1.2.1"
        }
        assert get(address, f"{path}/4")[0] == get(address, f"{path}/1,4")[0] == 404
        plain = "application/octet-stream"
        status, _, body = get(address, f"{path_of(real)}/frames/1", Accept=plain)
        assert (status, body) == (200, real.pixel_array.tobytes())
        monkeypatch.setattr("dicomstore.web.inflating.INFLATED_BYTES", 500)
        assert get(address, f"{path}/1")[0] == 413


@pytest.mark.filterwarnings("ignore")
def test_metadata_of_every_real_file(store):
    """The metadata of each of pydicom's files that can be served is pydicom's DICOM JSON of it."""
    compared = 0
    store.count_by("modality")
    with serving(store) as address:
        for file in sorted(PYDICOM_FILES.rglob("*")):
            if not file.is_file() or file.name in READ_DIFFERENTLY:
                continue
            with file.open("rb") as opened:
                if header.dataset_start(opened) is None:
                    continue
            with values.quietly():
                dataset = pydicom.dcmread(file, force=True)
                names = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
                if not all(dataset.get(name) for name in names):
                    continue
                path = path_of(dataset)
                expected = by_pydicom(dataset, f"{address}{path}/bulkdata/")
            store.put("one.dcm", file.read_bytes(), replace=True)
            status, _, body = get(address, f"{path}/metadata")
            assert status == 200, file.name
            assert json.loads(body) == json.loads(json.dumps([expected])), file.name
            compared += 1
    assert compared > 60


@pytest.mark.parametrize("has_source", [True, False])
def test_the_command_line_serves_what_its_source_has(server, client, tmp_path, has_source):
    """`--source` brings back a file whose chunks were deleted; without it that is an error."""
    content = (PYDICOM_FILES / "CT_small.dcm").read_bytes()
    (tmp_path / "CT_small.dcm").write_bytes(content)
    DicomStore(client, progress=False, thumbnails=False).load(tmp_path)
    remove(client)
    source = ["--source", tmp_path] if has_source else []
    web = subprocess.Popen(
        [sys.executable, "-m", "dicomstore.web", "--port=0", *source],
        cwd=Path(__file__).parent.parent, env={**os.environ, "REDIS_URL": server.url},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        address = web.stdout.readline().split()[-1]
        path = path_of(pydicom.dcmread(tmp_path / "CT_small.dcm"))
        found = get(address, path, Accept="application/dicom")
        assert (found[0], found[2] == content) == ((200, True) if has_source else (500, False))
    finally:
        web.terminate()
        web.communicate(timeout=30)


# --- docs/dicomweb.md ----------------------------------------------------------------------------


def test_the_documented_requests_are_answered(store, tmp_path):
    """Each curl line of the page, as it is printed, finds something."""
    page = (Path(__file__).parent.parent / "docs" / "dicomweb.md").read_text()
    lines = re.findall(r"^curl .*$", page, re.MULTILINE)
    assert lines
    (tmp_path / ".curlrc").write_text("fail\nsilent\nmax-time = 60\n")
    store.put("a.dcm", dicom(**UIDS, PatientName="Smith^John", Modality="CT"))
    with serving(store) as address:
        here = re.match("http://127.0.0.1(:[0-9]+)/", address)[1]
        for line in lines:
            assert "localhost:8042/" in line
            done = subprocess.run(
                ["sh", "-c", line.replace(":8042", here)], capture_output=True,
                env={"CURL_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)


def test_a_study_is_described_by_the_instance_stored_first(store):
    """What is said of a study or series is what the instance says that was stored first."""
    for name, patient in (("b.dcm", "first"), ("a.dcm", "second"), ("c.dcm", "third")):
        number = len(patient)
        store.put(name, dicom(**UIDS, SOPInstanceUID=f"1.4.{number}", PatientID=patient))
    with serving(store) as address:
        for path in ("/studies?includefield=PatientID", "/series?includefield=PatientID"):
            (found,) = json.loads(get(address, path)[2])
            assert found["00100020"]["Value"] == ["first"]
