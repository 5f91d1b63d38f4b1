"""DICOMweb, asked by dicomweb-client; its answers are compared with pydicom's of the files."""

import asyncio
import contextlib
import http.client
import io
import json
import socket
import threading
import time
import warnings

import numpy as np
import pydicom
import pytest
from dicomweb_client.api import DICOMwebClient
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.uid import ExplicitVRLittleEndian

from dicomstore import DicomStore
from dicomstore.web import accept, matching
from dicomstore.web.__main__ import listen, main, parser, server
from dicomstore.web.app import application
from tests.samples import dicom
from tests.test_metadata import by_pydicom

#: One instance for each way in which pixels are stored.
NAMES = [
    "CT_small.dcm",
    "MR_small.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_implicit.dcm",
    "MR_small_RLE.dcm",
    "JPEG2000.dcm",
    "JPEG-LL.dcm",
    "SC_rgb_jpeg_dcmtk.dcm",
    "color3d_jpeg_baseline.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "liver_1frame.dcm",
    "rtdose.dcm",
    "waveform_ecg.dcm",
    "examples_overlay.dcm",
    "image_dfl.dcm",
]


@contextlib.contextmanager
def serving(store, **options):
    """Serve a store on a free port; yield the address."""
    listening = listen("127.0.0.1", 0)
    web = server(application(store, **options))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not web.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/dicom-web"
    finally:
        web.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="module")
def images(server_of_module):
    """The store, and the data sets of the files in it by SOP Instance UID."""
    folder, store = server_of_module
    found = {}
    for file in sorted(folder.iterdir()):
        dataset = pydicom.dcmread(file)
        found.setdefault(dataset.SOPInstanceUID, dataset)
    return store, found


@pytest.fixture(scope="module")
def server_of_module(server, tmp_path_factory):
    """A store of its own for this module, in an embedded server of its own."""
    from dicomstore import connect
    from dicomstore.server.embedded import RedisServer

    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate(NAMES):
        path = get_testdata_file(name, download=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path)
        # Some of them share UIDs: here each is an instance of its own.
        dataset.SOPInstanceUID = f"1.2.3.{number + 1}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        if not dataset.get("StudyInstanceUID"):
            dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.7", "1.2.7.1"
        dataset.save_as(folder / name)
    del server
    with RedisServer() as own:
        client = connect(own.url)
        with DicomStore(client, progress=False, thumbnails=False) as store:
            store.load(folder)
            yield folder, store
        client.close()


@pytest.fixture(scope="module")
def address(images):
    with serving(images[0]) as found:
        yield found


@pytest.fixture
def web(address):
    return DICOMwebClient(address)


def uids(dataset):
    return dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID


def get(address, path, **headers):
    """Return status, headers and body of a GET."""
    host, _, prefix = address.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", (f"/{prefix}" if prefix else "") + path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


# --- QIDO-RS -------------------------------------------------------------------------------------


def test_studies_are_found(web, images):
    """All studies are found, with their own attributes and the right counts."""
    _, datasets = images
    found = {s["0020000D"]["Value"][0]: s for s in web.search_for_studies()}
    assert found.keys() == {d.StudyInstanceUID for d in datasets.values()}
    for name, study in found.items():
        own = [d for d in datasets.values() if d.StudyInstanceUID == name]
        assert study["00201208"]["Value"] == [len(own)]
        assert study["00201206"]["Value"] == [len({d.SeriesInstanceUID for d in own})]
        assert study["00080061"]["Value"] == sorted({d.Modality for d in own})
        assert study["00081190"]["Value"][0].endswith(f"/studies/{name}")


def test_series_and_instances_are_found(web, images):
    """Series and instances are found at every level of the path."""
    _, datasets = images
    every = {uids(d) for d in datasets.values()}
    series = web.search_for_series()
    assert {(s["0020000D"]["Value"][0], s["0020000E"]["Value"][0]) for s in series} == {
        each[:2] for each in every
    }
    instances = web.search_for_instances()
    tags = ("0020000D", "0020000E", "00080018")
    assert {tuple(i[tag]["Value"][0] for tag in tags) for i in instances} == every
    one = next(iter(every))
    (found,) = web.search_for_instances(one[0], one[1], search_filters={"SOPInstanceUID": one[2]})
    assert found["00080018"]["Value"] == [one[2]]
    for study in {each[0] for each in every}:
        assert len(web.search_for_series(study)) == len({e[1] for e in every if e[0] == study})


@pytest.mark.parametrize(
    ("filters", "fits"),
    [
        ({"Modality": "CT"}, lambda d: d.Modality == "CT"),
        ({"00080060": "MR"}, lambda d: d.Modality == "MR"),
        ({"PatientName": "*compressed*"}, lambda d: "compressed" in str(d.PatientName).lower()),
        ({"PatientName": "?ompressedsamples*"}, lambda d: "Compressed" in str(d.PatientName)),
        ({"PatientID": "*"}, lambda _: True),
        ({"StudyDate": "20040101-20041231"}, lambda d: str(d.get("StudyDate"))[:4] == "2004"),
        ({"StudyDate": "-20040119"}, lambda d: "0" < str(d.get("StudyDate", "")) <= "20040119"),
        ({"Rows": "64"}, lambda d: d.get("Rows") == 64),
        ({"SOPInstanceUID": "1.2.3.1,1.2.3.2"}, lambda d: d.SOPInstanceUID in "1.2.3.1 1.2.3.2"),
        ({"SOPInstanceUID": "1.2.3.1\\1.2.3.3"}, lambda d: d.SOPInstanceUID in "1.2.3.1 1.2.3.3"),
        ({"PatientName": 'x" | @modality:{CT} *'}, lambda _: False),
        ({"PatientID": "]*[a-z]"}, lambda _: False),
    ],
)
def test_what_fits_is_found(web, images, filters, fits):
    """A search finds just the instances that fit."""
    found = {i["00080018"]["Value"][0] for i in web.search_for_instances(search_filters=filters)}
    wanted = {uid for uid, d in images[1].items() if fits(d)}
    if "SOPInstanceUID" in filters:
        wanted = set(filters["SOPInstanceUID"].replace("\\", ",").split(","))
    assert found == wanted


def test_a_time_range_is_matched(web, images):
    """A range of times is compared as times, whatever their precision."""
    found = web.search_for_studies(search_filters={"StudyTime": "07-1100"})
    times = {s["0020000D"]["Value"][0] for s in found}
    assert times == {
        d.StudyInstanceUID
        for d in images[1].values()
        if d.get("StudyTime") and d.StudyTime >= "07" and d.StudyTime[:4] <= "1100"
    }


def test_modalities_in_study(web, images):
    """A study is found by any of its modalities, and all of them are said."""
    found = web.search_for_studies(search_filters={"ModalitiesInStudy": "CT"})
    assert {s["0020000D"]["Value"][0] for s in found} == {
        d.StudyInstanceUID for d in images[1].values() if d.Modality == "CT"
    }


def test_pages(web):
    """Limit and offset cut the same list into pages, and a header says what is left."""
    every = web.search_for_studies()
    pages = [one for at in range(len(every)) for one in web.search_for_studies(limit=1, offset=at)]
    assert pages == every
    assert web.search_for_studies(limit=5, offset=10_000) == []


def test_an_empty_answer_has_no_content(web, address):
    """A search that finds nothing is answered with 204 and no body (PS3.18 Table 10.6.3-1)."""
    for path in ("/studies?PatientID=nobody", "/studies/1.2.99/series", "/instances?offset=10000"):
        status, headers, body = get(address, path)
        assert (status, body) == (204, b"")
        assert "Content-Type" not in headers
    assert web.search_for_studies(search_filters={"PatientID": "nobody"}) == []
    status, headers, _ = get(address, "/studies?limit=0&fuzzymatching=true")
    assert status == 204
    told = " ".join(headers.get_all("Warning"))
    assert "additional" in told and "fuzzymatching" in told


def test_fields_are_included(web, address, images):
    """Attributes are included by keyword or tag, repeated or listed, or all of them."""
    study = images[1]["1.2.3.1"].StudyInstanceUID
    for fields in (["PatientWeight", "Manufacturer"], ["00101030", "00080070"]):
        (found,) = web.search_for_studies(fields=fields, search_filters={"StudyInstanceUID": study})
        assert {"00101030", "00080070"} <= found.keys()
    query = f"/studies?StudyInstanceUID={study}&includefield="
    assert "00101030" in json.loads(get(address, query + "00101030,PatientID")[2])[0]
    everything = json.loads(get(address, query + "all")[2])[0]
    assert "00180050" in everything


@pytest.mark.parametrize(
    "query",
    [
        "Nonsense=1",
        "00100099=1",
        "StudyDate=yesterday",
        "limit=-1",
        "limit=x",
        "PatientID=1&PatientID=2",
        "PatientID=1&00100020=1",
        "KVP=1",
        "fuzzymatching=perhaps",
        "Rows=many",
        "includefield=Nonsense",
    ],
)
def test_what_is_not_a_query_is_refused(address, query):
    """A request that cannot be answered says why, and does not repeat what was sent."""
    status, _, body = get(address, f"/studies?{query}")
    assert status == 400
    assert json.loads(body)["error"].endswith(".")


def test_fuzzy_matching_is_refused_with_a_warning(address):
    """Who asks for fuzzy matching is told that there is none."""
    status, headers, _ = get(address, "/studies?fuzzymatching=true")
    assert status == 200
    assert "fuzzymatching" in headers["Warning"]


def test_answers_follow_the_store(server, client, store):
    """What is loaded, replaced or deleted later changes the answers at once."""

    def put(number, **more):
        more = {"StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.3", **more}
        return store.put(f"{number}.dcm", dicom(SOPInstanceUID=f"1.4.{number}", **more))

    put(1)
    with serving(store) as address:
        web = DICOMwebClient(address)
        for count in (2, 3):
            assert web.search_for_studies()[0]["00201208"]["Value"] == [count - 1]
            assert web.search_for_studies()[0]["00201208"]["Value"] == [count - 1]
            put(count)
        store.delete("3.dcm")
        assert web.search_for_studies()[0]["00201208"]["Value"] == [2]
        put(2, PatientID="new")
        (found,) = web.search_for_instances(search_filters={"PatientID": "new"})
        assert found["00080018"]["Value"] == ["1.4.2"]


def test_only_the_latest_studies_are_looked_at(store, monkeypatch):
    """Of many instances only the latest are grouped; every page is as if all had been."""

    days = [None, "20200101", "20200101", "20191231", "20191215", "20150601", "19990101", None]
    for number in range(16):
        store.put(f"{number}.dcm", dicom(
            StudyInstanceUID=f"1.2.{number % 8}", SeriesInstanceUID=f"1.3.{number}",
            SOPInstanceUID=f"1.4.{number}", Modality="CT" if number < 8 else "PT",
            **{"StudyDate": days[number % 8]} if days[number % 8] else {},
        ))  # fmt: skip
    store.put("no_series.dcm", dicom(StudyInstanceUID="1.2.99", SOPInstanceUID="1.4.99"))
    with serving(store) as address:
        web = DICOMwebClient(address)
        whole = web.search_for_studies()
        names = [one["0020000D"]["Value"][0][-1] for one in whole]
        assert names == ["1", "2", "3", "4", "5", "6", "0", "7"]
        for one in whole:
            assert one["00080061"]["Value"] == ["CT", "PT"]
            assert (one["00201206"]["Value"], one["00201208"]["Value"]) == ([2], [2])
        monkeypatch.setattr("dicomstore.web.searching.GROUPED", 0)
        for offset in range(9):
            for limit in range(1, 9):
                found = web.search_for_studies(limit=limit, offset=offset)
                assert found == whole[offset : offset + limit]
        told = [get(address, f"/studies?limit={n}")[1].get("Warning", "") for n in (2, 7, 8)]
        assert "There are additional" in told[0] and "There are 1 additional" in told[1]
        assert not told[2]
        old = web.search_for_studies(limit=2, search_filters={"StudyDate": "-20180101"})
        assert old == whole[4:6]


def test_only_the_first_studies_are_looked_at(store, monkeypatch):
    """Of many instances only the first studies' are read; every page is as if all had been."""

    for number in range(24):
        store.put(f"{number}.dcm", dicom(
            StudyInstanceUID=f"1.2.{number % 12}",
            SeriesInstanceUID=f"1.3.{number % 12}.{number // 18}",
            SOPInstanceUID=f"1.4.{23 - number}", Modality="CT" if number < 20 else "PT",
            **{"InstanceNumber": number % 5} if number % 7 else {},
        ))  # fmt: skip
    store.put("same.dcm", dicom(
        StudyInstanceUID="1.2.0", SeriesInstanceUID="1.3.0.0", SOPInstanceUID="1.4.23"
    ))  # fmt: skip
    with serving(store) as address:
        web = DICOMwebClient(address)
        for filters in ({}, {"Modality": "CT"}, {"StudyInstanceUID": "1.2.1,1.2.5"}):
            for search in (web.search_for_series, web.search_for_instances):
                whole = search(search_filters=filters)
                with monkeypatch.context() as patch:
                    patch.setattr("dicomstore.web.searching.GROUPED", 0)
                    patch.setattr("dicomstore.web.searching.FIRST_STUDIES", 1)
                    for offset in range(0, len(whole) + 1, 3):
                        for limit in (1, 4, 30):
                            found = search(limit=limit, offset=offset, search_filters=filters)
                            assert found == whole[offset : offset + limit]
        monkeypatch.setattr("dicomstore.web.searching.GROUPED", 0)
        told = [get(address, f"/instances?limit={n}")[1].get("Warning", "") for n in (2, 23, 24)]
        assert "There are additional" in told[0] and "There are" in told[1]
        assert not told[2]


# --- WADO-RS -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_metadata_is_that_of_the_file(web, address, images):
    """Metadata equals pydicom's DICOM JSON of the file, numbers and sequences too."""
    for dataset in images[1].values():
        found = web.retrieve_instance_metadata(*uids(dataset))
        path = "/studies/{}/series/{}/instances/{}".format(*uids(dataset))
        expected = by_pydicom(dataset, f"{address}{path}/bulkdata/")
        assert found == json.loads(json.dumps(expected))


def test_metadata_of_series_and_study(web, images):
    """The metadata of a series or study is that of its instances, with their own addresses."""
    dataset = images[1]["1.2.3.1"]
    for found in (
        web.retrieve_series_metadata(*uids(dataset)[:2]),
        web.retrieve_study_metadata(dataset.StudyInstanceUID),
    ):
        (one,) = [f for f in found if f["00080018"]["Value"] == ["1.2.3.1"]]
        assert one == web.retrieve_instance_metadata(*uids(dataset))


def pixels_of(dataset):
    """Return the frames as pydicom gives them, stored."""
    count = int(dataset.get("NumberOfFrames") or 1)
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        from pydicom.encaps import generate_frames

        return list(generate_frames(dataset.PixelData, number_of_frames=count))
    length = dataset.Rows * dataset.Columns * dataset.SamplesPerPixel * dataset.BitsAllocated // 8
    return [dataset.PixelData[k * length : (k + 1) * length] for k in range(count)]


def test_frames_as_stored(web, images):
    """Every frame, single and in lists, has the bytes that the file has."""
    seen = 0
    for dataset in images[1].values():
        syntax = dataset.file_meta.TransferSyntaxUID
        if "PixelData" not in dataset or syntax.endswith(".2.2"):
            continue
        expected = pixels_of(dataset)
        numbers = [1, len(expected)]
        found = web.retrieve_instance_frames(
            *uids(dataset), numbers, media_types=(("application/octet-stream", "*"),)
        )
        assert found == [expected[k - 1] for k in numbers]
        assert web.retrieve_instance_frames(*uids(dataset), [len(expected)]) == [expected[-1]]
        seen += 1
    assert seen > 6


def test_frames_decoded(web, images):
    """A client that takes only Explicit VR Little Endian gets the pixels that pydicom decodes."""
    for dataset in images[1].values():
        if "PixelData" not in dataset or dataset.BitsAllocated == 1:
            continue
        (found,) = web.retrieve_instance_frames(
            *uids(dataset),
            [1],
            media_types=(("application/octet-stream", ExplicitVRLittleEndian),),
        )
        expected = pydicom.pixels.pixel_array(dataset, index=0)
        values = np.frombuffer(found, expected.dtype.newbyteorder("<"))
        assert np.array_equal(values, expected.ravel())


@pytest.mark.parametrize(
    ("path", "accepted", "status"),
    [
        ("/frames/1", "image/png", 406),
        ("/frames/1", 'multipart/related; type="image/jls"', 406),
        ("/frames/1", "(", 400),
        ("/frames/0", "*/*", 400),
        ("/frames/x", "*/*", 400),
        ("/frames/99", "*/*", 404),
        ("/frames/" + ",".join(["1"] * 1001), "*/*", 413),
        ("/nothing", "*/*", 404),
        ("", "application/dicom+xml", 406),
        ("/metadata", "application/dicom+xml", 406),
        ("/rendered", "video/mp4", 406),
        ("/bulkdata/00100010/x", "*/*", 404),
        ("/bulkdata/00990010", "*/*", 404),
    ],
)
def test_statuses(address, images, path, accepted, status):
    """Each mistake has the status that the standard prescribes."""
    study, series, instance = uids(images[1]["1.2.3.1"])
    found = get(address, f"/studies/{study}/series/{series}/instances/{instance}{path}",
                Accept=accepted)  # fmt: skip
    assert found[0] == status


def test_what_is_not_there(address):
    """UIDs that nothing has are not found, and what is no UID is refused."""
    assert get(address, "/studies/1.2.99/metadata")[0] == 404
    assert get(address, "/studies/@modality/metadata")[0] == 400
    host = address.removeprefix("http://").partition("/")[0]
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("POST", "/dicom-web/studies", body=b"x")
    assert connection.getresponse().status == 405
    connection.close()


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_instances_are_retrieved(web, images, server_of_module):
    """Instances, a series and a study come as the files that were loaded."""
    folder, _ = server_of_module
    stored = {pydicom.dcmread(f).SOPInstanceUID: f.read_bytes() for f in folder.iterdir()}
    for dataset in images[1].values():
        if dataset.file_meta.TransferSyntaxUID.is_deflated:
            continue
        found = web.retrieve_instance(*uids(dataset))
        assert found == pydicom.dcmread(io.BytesIO(stored[dataset.SOPInstanceUID]))
        series = web.retrieve_series(*uids(dataset)[:2])
        assert dataset.SOPInstanceUID in {one.SOPInstanceUID for one in series}
    study = web.retrieve_study(images[1]["1.2.3.1"].StudyInstanceUID)
    assert "1.2.3.1" in {one.SOPInstanceUID for one in study}


def test_bulk_data(web, images):
    """What the metadata gives by URI has the bytes of the file, also within sequences."""
    seen = 0
    for dataset in images[1].values():
        stack = [(dataset, web.retrieve_instance_metadata(*uids(dataset)))]
        while stack:
            own, found = stack.pop()
            for tag, element in found.items():
                if "BulkDataURI" in element:
                    value = own[int(tag, 16)].value
                    parts = web.retrieve_bulkdata(element["BulkDataURI"])
                    if own is dataset and dataset.file_meta.TransferSyntaxUID.is_encapsulated:
                        assert parts == pixels_of(dataset)
                    else:
                        assert b"".join(parts).rstrip(b"\0") == value.rstrip(b"\0")
                    seen += 1
                elif element["vr"] == "SQ":
                    items = zip(own[int(tag, 16)].value, element.get("Value", ()), strict=True)
                    stack.extend(items)
    assert seen > 10


def test_rendered(web, address, images):
    """A rendered image is windowed as asked, has the size asked for, and is JPEG or PNG."""
    dataset = images[1]["1.2.3.1"]
    png = web.retrieve_instance_rendered(
        *uids(dataset), media_types=("image/png",), params={"window": "50,400,linear-exact"}
    )
    shown = np.asarray(Image.open(io.BytesIO(png)))
    values = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    expected = np.clip((values - 50) / 400 + 0.5, 0, 1) * 255
    assert np.abs(shown - expected).max() <= 0.5
    path = "/studies/{}/series/{}/instances/{}".format(*uids(dataset))
    jpeg = get(address, f"{path}/thumbnail")[2]
    assert max(Image.open(io.BytesIO(jpeg)).size) == 128
    path += "/rendered"
    status, headers, body = get(address, path + "?viewport=32,32", Accept="image/jpeg")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(body)).size == (32, 32)
    for wrong in ("window=1", "window=1,0", "viewport=0,1", "viewport=99999,1", "quality=0"):
        assert get(address, f"{path}?{wrong}", Accept="image/jpeg")[0] == 400


def test_the_query_counts_before_the_header(address, images):
    """A viewer's <img> says in the query what it accepts."""
    path = "/studies/{}/series/{}/instances/{}/thumbnail".format(*uids(images[1]["1.2.3.1"]))
    found = get(address, path + "?accept=image%2Fjpeg", Accept='multipart/related; type="x/y"')
    assert found[1]["Content-Type"] == "image/jpeg"


def test_a_replaced_instance_is_never_mixed_up(store):
    """A path that another instance has taken does not answer for the first one."""

    def image(uid, grey):
        return dicom(
            SOPInstanceUID=uid, StudyInstanceUID="1.2", SeriesInstanceUID="1.3", Rows=2, Columns=2,
            SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", pixels=bytes([grey] * 4),
        )  # fmt: skip

    store.put("a.dcm", image("1.4.1", 1))
    with serving(store) as address:
        web = DICOMwebClient(address)
        assert web.retrieve_instance_frames("1.2", "1.3", "1.4.1", [1]) == [b"\1" * 4]
        store.put("a.dcm", image("1.4.1", 2))
        assert web.retrieve_instance_frames("1.2", "1.3", "1.4.1", [1]) == [b"\2" * 4]
        store.put("a.dcm", image("1.4.2", 3), replace=True)
        assert web.retrieve_instance_frames("1.2", "1.3", "1.4.2", [1]) == [b"\3" * 4]
        assert get(address, "/studies/1.2/series/1.3/instances/1.4.1/frames/1")[0] == 404
        store.delete("a.dcm")
        assert get(address, "/studies/1.2/series/1.3/instances/1.4.2/frames/1")[0] == 404


def test_metadata_follows_the_store(store):
    """What is said of a series is of the files stored now, also of what was asked for before."""

    def put(number, name):
        uids = {"StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.3"}
        store.put(f"{number}.dcm", dicom(SOPInstanceUID=f"1.4.{number}", PatientName=name, **uids))

    def names():
        found = web.retrieve_series_metadata("1.2", "1.3")
        return [one["00100010"]["Value"][0]["Alphabetic"] for one in found]

    put(1, "A")
    put(2, "B")
    with serving(store) as address:
        web = DICOMwebClient(address)
        assert names() == names() == ["A", "B"]
        put(2, "C")
        assert names() == ["A", "C"]
        put(3, "D")
        assert names() == ["A", "C", "D"]
        store.delete("1.dcm")
        assert names() == ["C", "D"]


def test_a_document_of_another_program_has_no_metadata(store, client):
    """It is left out of a series' metadata, and keeps nobody from the others'."""
    uids = {"StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.3"}
    store.put("1.dcm", dicom(SOPInstanceUID="1.4.1", PatientName="A", **uids))
    theirs = {"studyInstanceUID": "1.2", "seriesInstanceUID": "1.3", "sopInstanceUID": "1.4.2"}
    client.json().set("file:theirs", "$", theirs)
    with serving(store) as address:
        (found,) = DICOMwebClient(address).retrieve_series_metadata("1.2", "1.3")
        assert found["00100010"]["Value"] == [{"Alphabetic": "A"}]


def test_an_instance_is_found_without_asking_which_index(store, client):
    """FT.INFO is sent for the first instance, and again when another index answers."""

    def put(number):
        uids = {"StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.3"}
        store.put(f"{number}.dcm", dicom(SOPInstanceUID=f"1.4.{number}", **uids))

    def asked():
        return client.info("commandstats").get("cmdstat_FT.INFO", {}).get("calls", 0)

    for number in range(4):
        put(number)
    with serving(store) as address:
        web = DICOMwebClient(address)
        for number, has_asked in enumerate((True, False, True, False)):
            if number == 2:
                store.index_also("StationName")
            before = asked()
            web.retrieve_instance_metadata("1.2", "1.3", f"1.4.{number}")
            assert (asked() > before) == has_asked
        put(4)
        web.retrieve_instance_metadata("1.2", "1.3", "1.4.4")


def test_the_first_path_answers_for_shared_uids(store):
    """Of files that share all UIDs, the one whose path comes first is served."""

    same = {"StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.3", "SOPInstanceUID": "1.4"}
    store.put("b.dcm", dicom(**same, PatientID="second"))
    store.put("a.dcm", dicom(**same, PatientID="first"))
    store.put("none.dcm", dicom(SOPInstanceUID="1.5", StudyInstanceUID="1.2"))
    with serving(store) as address:
        web = DICOMwebClient(address)
        (found,) = web.retrieve_series_metadata("1.2", "1.3")
        assert found["00100020"]["Value"] == ["first"]
        assert len(web.search_for_instances()) == 1


def test_damage_is_no_picture(store, client):
    """A damaged chunk is an error of the server, not a wrong image."""

    key = store.put("a.dcm", dicom(
        StudyInstanceUID="1.2", SeriesInstanceUID="1.3", Rows=2, Columns=2, SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2", pixels=b"abcd",
    ))  # fmt: skip
    chunk = store.manifest(key).chunk_key(0)
    path = "/studies/1.2/series/1.3/instances/1.2.3.4/frames/1"
    with serving(store) as address:
        assert get(address, path)[0] == 200
        client.setrange(chunk, 200, b"?")
        assert get(address, path)[0] == 500
        client.delete(chunk)
        assert get(address, path)[0] == 500


# --- who may ask ---------------------------------------------------------------------------------


def test_only_this_machine_without_a_token(address):
    """A page whose name was made to lead here is not answered."""
    assert get(address, "/studies", Host="evil.example")[0] == 403
    assert get(address, "/studies", Host="localhost:1")[0] == 200


def test_a_token_is_asked_for(store):
    """With a token, only who has it is answered."""
    store.count_by("modality")
    with serving(store, token="correct horse battery") as address:
        assert get(address, "/studies")[0] == 401
        assert get(address, "/studies", Authorization="Bearer wrong")[0] == 401
        found = get(
            address, "/studies", Authorization="Bearer correct horse battery", Host="x.example"
        )
        assert found[0] == 204


def test_other_origins_only_by_name(store):
    """Pages of other origins may read answers only where they are named."""
    store.count_by("modality")
    with serving(store) as address:
        headers = get(address, "/studies", Origin="https://a.example")[1]
        assert "Access-Control-Allow-Origin" not in headers
    with serving(store, origins=["https://a.example"]) as address:
        headers = get(address, "/studies", Origin="https://a.example")[1]
        assert headers["Access-Control-Allow-Origin"] == "https://a.example"
        headers = get(address, "/studies", Origin="https://b.example")[1]
        assert "Access-Control-Allow-Origin" not in headers


def test_nothing_of_a_patient_is_logged(store, caplog, capfd):
    """Neither a request nor its failure leaves a patient's name in a log."""
    store.count_by("modality")
    with serving(store) as address:
        get(address, "/studies?PatientName=SECRET")
        get(address, "/studies?PatientName=SECRET&Rows=SECRET")
        get(address, "/studies/1.2/series/1.3/instances/SECRET")
    assert "SECRET" not in caplog.text + "".join(capfd.readouterr())


def test_the_viewer_lies_beside(store, tmp_path):
    """The viewer's files are served, its page for its own routes, and nothing beside its folder."""
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "viewer"
    folder.mkdir()
    (folder / "index.html").write_text("the page")
    (folder / "app.js").write_text("the code")
    store.count_by("modality")
    with serving(store, viewer=folder) as address:
        root = address.removesuffix("/dicom-web")
        assert get(root, "/")[2] == get(root, "/viewer?x=1")[2] == b"the page"
        assert get(root, "/app.js")[2] == b"the code"
        assert b'"wadoRoot": "/dicom-web"' in get(root, "/app-config.js")[2]
        assert get(root, "/missing.js")[0] == 404
        assert get(root, "/../secret.txt")[0] == 404
        assert get(root, "/dicom-web/studies")[0] == 204


def test_who_leaves_costs_nothing(store, client):
    """A client that leaves in the middle of an answer ends what was fetched for it."""
    store.put("a.dcm", dicom(
        StudyInstanceUID="1.2", SeriesInstanceUID="1.3", pixels=bytes(64 * 1024 * 1024)
    ))  # fmt: skip
    with serving(store) as address:
        host = address.removeprefix("http://").partition("/")[0]
        for _ in range(3):
            connection = http.client.HTTPConnection(host, timeout=60)
            connection.request("GET", "/dicom-web/studies/1.2")
            connection.getresponse().read(1000)
            connection.close()
        before = client.info("commandstats")["cmdstat_mget"]["calls"]
        asyncio.run(asyncio.sleep(0.5))
        assert client.info("commandstats")["cmdstat_mget"]["calls"] - before < 64


def test_who_leaves_at_once_costs_nothing(store, client):
    """Many clients that go before an answer has begun leave nothing behind that is still read."""
    store.put("a.dcm", dicom(
        StudyInstanceUID="1.2", SeriesInstanceUID="1.3", pixels=bytes(64 * 1024 * 1024)
    ))  # fmt: skip
    with serving(store) as address:
        host, _, port = address.removeprefix("http://").partition("/")[0].partition(":")
        assert get(address, "/studies")[0] == 200
        before = client.info("commandstats")["cmdstat_mget"]["calls"]
        request = f"GET /dicom-web/studies/1.2 HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        for _ in range(64):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(request)
        for _ in range(200):  # what is answered last is asked last
            assert get(address, "/studies")[0] == 200
        fetched = client.info("commandstats")["cmdstat_mget"]["calls"] - before
        assert fetched < 64 * 8  # each file takes 64


# --- the command line, and what knows no server --------------------------------------------------


def test_a_foreign_address_needs_a_token(capsys):
    """Another address than this machine's own is refused without a token."""
    assert main(["--host", "0.0.0.0", "--port", "0"]) == 1
    assert "--token-file" in capsys.readouterr().err


def test_a_port_in_use_is_named(capsys):
    """A port that is taken is named, with the way out."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port)]) == 1
    assert f"Port {port}" in (words := capsys.readouterr().err) and "--port" in words


@pytest.mark.parametrize("port", ["-1", "65536", "99999"])
def test_what_is_no_port_is_refused(port, capsys):
    """A number that is no port is named, and no other one is taken in its place."""
    assert main(["--port", port]) == 1
    assert f"{port} is not a port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--allow-origin", "viewer.example"], "viewer.example is no origin"),
        (["--allow-origin", "https://viewer.example/"], "is no origin"),
        (["--source", "nowhere"], "There is no folder nowhere"),
        (["--token-file", "nowhere"], "No token can be read from nowhere: No such file"),
        (["--viewer", "nowhere"], "nowhere is not a built viewer"),
    ],
)
def test_what_cannot_be_used_is_said_at_once(options, words, capsys):
    """An option that would be of no use is refused before anything is served."""
    assert main(["--port", "0", *options]) == 1
    assert words in capsys.readouterr().err


def test_a_token_has_some_length(tmp_path, capsys):
    """An empty token file is not a token."""
    (tmp_path / "token").write_text("\n")
    assert main(["--token-file", str(tmp_path / "token"), "--port", "0"]) == 1
    assert "token" in capsys.readouterr().err


def test_help_names_every_option():
    """The help says what can be said."""
    words = parser().format_help()
    for option in (
        "--source",
        "--host",
        "--port",
        "--token-file",
        "--allow-origin",
        "--viewer",
        "REDIS_URL",
    ):
        assert option in words


def test_accept_headers():
    """Alternatives are told apart, quoted or not, and ordered by preference."""
    found = accept.parse(
        'multipart/related; type="image/jpeg"; transfer-syntax=1.2.840.10008.1.2.4.50, '
        "multipart/related; type=application/octet-stream; transfer-syntax=*; q=0.5, "
        "image/png;q=0.9, text/html;q=0"
    )
    assert [one.type for one in found] == ["image/jpeg", "image/png", "application/octet-stream"]
    assert found[0].syntax == "1.2.840.10008.1.2.4.50"
    for wrong in ("x", "a/b; c", "a/b;q=x", 'a/b; c="', "a/b c/d"):
        with pytest.raises(ValueError, match="Accept"):
            accept.parse(wrong)


def test_a_wildcard_takes_no_time():
    """No pattern makes a search take long."""
    wanted = matching.parse("studies", {}, [("PatientName", "*a" * 200)])
    begun = time.process_time()
    assert not wanted.fits["PatientName"]("a" * 199 + "b" * 2000)
    assert time.process_time() - begun < 5
