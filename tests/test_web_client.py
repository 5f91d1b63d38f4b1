"""Every method of dicomweb-client that reads, beside pydicom's reading of the files."""

import inspect
import io
import json
import re
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicomweb_client.api import DICOMwebClient
from PIL import Image

from tests.test_metadata import by_pydicom
from tests.test_web import (  # noqa: F401 - the fixtures are found by their names
    address,
    images,
    pixels_of,
    server_of_module,
    uids,
    web,
)

# ruff: noqa: F811
pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR UI")

FILES = [Path(__file__), Path(__file__).with_name("test_web.py")]


@pytest.fixture
def stored(server_of_module):
    """The data set of each file, by SOP Instance UID."""
    datasets = map(pydicom.dcmread, server_of_module[0].iterdir())
    return {dataset.SOPInstanceUID: dataset for dataset in datasets}


def test_every_method_that_reads_is_called():
    """None of the client's methods is left out, here or beside."""
    called = set(re.findall(r"\bweb\.(\w+)\b", "".join(file.read_text() for file in FILES)))
    methods = [name for name, _ in inspect.getmembers(DICOMwebClient, inspect.isfunction)]
    reading = {name for name in methods if re.match("search_for|retrieve|iter", name)}
    assert len(reading) > 15
    assert reading - called == set()


@pytest.mark.parametrize("level", ["studies", "series", "instances"])
def test_what_is_found_is_said_as_pydicom_reads_it(web, address, stored, level):
    """Each attribute of each study, series and instance found is that of a file of it."""
    search = getattr(web, f"search_for_{level}")
    depth = ["studies", "series", "instances"].index(level) + 1
    counted = {"00081190", "00080061", "00201206", "00201208", "00201209"}
    found = search(fields=["PatientName", "00280030", "StudyTime", "BitsStored"], limit=100)
    assert len(found) == len({uids(dataset)[:depth] for dataset in stored.values()})
    for one in found:
        names = [one[tag]["Value"][0] for tag in ("0020000D", "0020000E", "00080018")[:depth]]
        files = [by_pydicom(d) for d in stored.values() if [*uids(d)[:depth]] == names]
        said = {tag: element for tag, element in one.items() if tag not in counted}
        assert len(said) > 4
        of_files = [json.loads(json.dumps({tag: f.get(tag) for tag in said})) for f in files]
        assert said in of_files


def test_pages_are_joined(web):
    """A client that asks for what is left, page after page, has the whole list once."""
    for search in (web.search_for_studies, web.search_for_series, web.search_for_instances):
        every = search()
        assert search(limit=2, get_remaining=True, fuzzymatching=True) == every
        assert len({json.dumps(one, sort_keys=True) for one in every}) == len(every) > 3


def test_metadata_of_whole_series_and_studies(web, address, stored):
    """The metadata of a series or study is pydicom's DICOM JSON of each of its files."""
    for depth, retrieve in ((2, web.retrieve_series_metadata), (1, web.retrieve_study_metadata)):
        for names in {uids(dataset)[:depth] for dataset in stored.values()}:
            expected = {}
            for uid, dataset in stored.items():
                if uids(dataset)[:depth] == names:
                    path = "/studies/{}/series/{}/instances/{}".format(*uids(dataset))
                    expected[uid] = by_pydicom(dataset, f"{address}{path}/bulkdata/")
            found = retrieve(*names)
            assert len(found) == len(expected)
            for one in found:
                own = expected[one["00080018"]["Value"][0]]
                assert one == json.loads(json.dumps(own))


@pytest.mark.parametrize("syntax", ["*", None])
def test_instances_of_series_and_studies(web, stored, syntax):
    """A series or study, at once or one after the other, has the data set of each file."""
    types = syntax and (("application/dicom", syntax),)
    of_series, of_studies = (
        (web.iter_series, web.retrieve_series),
        (web.iter_study, web.retrieve_study),
    )
    for depth, ways in ((2, of_series), (1, of_studies)):
        for names in {uids(dataset)[:depth] for dataset in stored.values()}:
            expected = [uid for uid, d in stored.items() if uids(d)[:depth] == names]
            for way in ways:
                found = list(way(*names, media_types=types))
                assert sorted(one.SOPInstanceUID for one in found) == sorted(expected)
                for one in found:
                    assert one == stored[one.SOPInstanceUID]
                    own_syntax = stored[one.SOPInstanceUID].file_meta.TransferSyntaxUID
                    assert one.file_meta.TransferSyntaxUID == own_syntax


def test_frames_one_after_the_other(web, stored):
    """Frames that are streamed have the bytes of the file, native and encapsulated."""
    syntaxes = set()
    for dataset in stored.values():
        syntax = dataset.file_meta.TransferSyntaxUID
        if "PixelData" not in dataset or syntax.endswith(".2.2"):  # Big Endian is turned round
            continue
        expected = pixels_of(dataset)
        numbers = [len(expected), 1]
        found = list(web.iter_instance_frames(*uids(dataset), numbers))
        assert found == [expected[number - 1] for number in numbers]
        syntaxes.add(syntax.is_encapsulated)
    assert syntaxes == {True, False}


def test_bulk_data_one_after_the_other(web, stored):
    """Bulk data that is streamed has the bytes of the file, native and encapsulated."""
    syntaxes = set()
    for dataset in stored.values():
        element = web.retrieve_instance_metadata(*uids(dataset)).get("7FE00010")
        syntax = dataset.file_meta.TransferSyntaxUID
        if element is None:
            continue
        expected = pixels_of(dataset) if syntax.is_encapsulated else [dataset.PixelData]
        found = list(web.iter_bulkdata(element["BulkDataURI"]))
        assert found == web.retrieve_bulkdata(element["BulkDataURI"]) == expected
        syntaxes.add(syntax.is_encapsulated)
    assert syntaxes == {True, False}


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small_RLE.dcm", "rtdose.dcm"])
def test_rendered_frames_series_and_instances(web, server_of_module, name):
    """A frame is shown with the window asked for, of an instance or a series, as PNG."""
    dataset = pydicom.dcmread(server_of_module[0] / name)
    frames = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns).astype(float)
    frames = frames * float(dataset.get("RescaleSlope", 1)) + float(
        dataset.get("RescaleIntercept", 0)
    )
    centre, width = float(np.median(frames)), float(np.ptp(frames))
    ask = {
        "media_types": ("image/png",),
        "params": {"window": f"{centre:.3f},{width:.3f},linear-exact"},
    }
    expected = np.clip((frames - centre) / width + 0.5, 0, 1) * 255

    def shown(png):
        return np.asarray(Image.open(io.BytesIO(png)))

    last = len(frames)
    for found, k in (
        (web.retrieve_instance_frames_rendered(*uids(dataset), [last], **ask), last - 1),
        (web.retrieve_instance_rendered(*uids(dataset), **ask), 0),
    ):
        assert np.abs(shown(found) - expected[k]).max() <= 0.6
    of_series = [d for d in web.search_for_instances(*uids(dataset)[:2])]
    if len(of_series) == 1:
        series = web.retrieve_series_rendered(*uids(dataset)[:2], **ask)
        assert np.array_equal(shown(series), shown(found))


def test_a_rendered_colour_frame(web, server_of_module):
    """A frame of an encapsulated colour instance is shown as pydicom decodes it."""
    dataset = pydicom.dcmread(server_of_module[0] / "color3d_jpeg_baseline.dcm")
    png = web.retrieve_instance_frames_rendered(*uids(dataset), [7], media_types=("image/png",))
    expected = pydicom.pixels.pixel_array(dataset, index=6)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), expected)
