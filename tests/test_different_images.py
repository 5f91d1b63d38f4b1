"""A path that holds one image is not given to a different one, unless that is asked for."""

import shutil

import pytest
from samples import PREAMBLE, before_commit, dicom, element

from demo.slide import write_sample_slide
from dicomstore import DicomStore


@pytest.fixture(scope="session")
def slides(tmp_path_factory):
    """Two slides that differ in size, and a copy of the first that differs in its last byte."""
    folder = tmp_path_factory.mktemp("slides")
    small = write_sample_slide(folder / "small", size=2_000_000)
    large = write_sample_slide(folder / "large", size=3_000_000)
    content = bytearray(small.read_bytes())
    content[-1] ^= 1
    (folder / "altered").write_bytes(content)
    return {"small": small, "large": large, "altered": folder / "altered"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def row(report):
    return report.iloc[0]


@pytest.mark.parametrize("other", ["large", "altered"])
def test_a_different_slide_is_skipped(other, store, client, folder, slides):
    """Under a stored path it is skipped with the reason and the ways out; both of them work."""
    shutil.copy(slides["small"], folder / "a.svs")
    assert row(store.load(folder))["status"] == "loaded"
    before = {key: client.dump(key) for key in client.scan_iter()}
    shutil.copy(slides[other], folder / "a.svs")
    skipped = row(store.load(folder))
    assert (skipped["status"], skipped["key"], skipped["chunks"]) == ("skipped", "", 0)
    assert "a.svs is stored already, with a different slide" in skipped["reason"]
    assert "under=" in skipped["reason"] and "replace=True" in skipped["reason"]
    assert row(store.load(folder, repair=True))["status"] == "skipped"
    assert {key: client.dump(key) for key in client.scan_iter()} == before
    assert row(store.load(folder, under="new"))["status"] == "loaded"
    assert store.read("a.svs") == slides["small"].read_bytes()
    assert row(store.load(folder, replace=True))["status"] == "replaced"
    assert store.read("a.svs") == store.read("new/a.svs") == slides[other].read_bytes()
    assert len(store.sweep()) == 0


def test_the_same_slide_may_be_cut_anew(store, client, folder, slides):
    """With a different chunk size the same slide is no different one."""
    shutil.copy(slides["small"], folder / "a.svs")
    for size, status in ((65_000, "loaded"), (30_000, "replaced"), (30_000, "unchanged")):
        cut = DicomStore(client, chunk_size=size, progress=False)
        assert row(cut.load(folder))["status"] == status
        assert store.manifest("a.svs").chunk_size == size
        assert store.read("a.svs") == slides["small"].read_bytes()
    assert len(store.sweep()) == 0


@pytest.mark.parametrize("first", ["dicom", "slide"])
def test_dicom_and_slides_do_not_replace_one_another(first, store, folder, slides):
    """An instance over a slide, and a slide over an instance, is a different kind of image."""
    contents = {"dicom": dicom(), "slide": slides["small"].read_bytes()}
    second = "slide" if first == "dicom" else "dicom"
    (folder / "a").write_bytes(contents[first])
    store.load(folder)
    (folder / "a").write_bytes(contents[second])
    skipped = row(store.load(folder))
    assert skipped["status"] == "skipped" and "a different kind of image" in skipped["reason"]
    assert store.read("a") == contents[first]
    assert row(store.load(folder, replace=True))["status"] == "replaced"
    assert store.read("a") == contents[second]
    assert store.find(**({"vendor": "aperio"} if second == "slide" else {"vendor": None}))[
        "path"
    ].tolist() == ["a"]


def test_a_different_slide_that_comes_first(store, client, folder, slides):
    """A slide that takes the path while a different one is sent is kept."""
    shutil.copy(slides["small"], folder / "a.svs")
    (other := folder.parent / "other").mkdir()
    shutil.copy(slides["altered"], other / "a.svs")
    with before_commit(lambda manifest: DicomStore(client, progress=False).load(other)):
        skipped = row(store.load(folder))
    assert skipped["status"] == "skipped" and "a different slide" in skipped["reason"]
    assert store.read("a.svs") == slides["altered"].read_bytes() and len(store.sweep()) == 0


def test_an_instance_without_uid(store, folder):
    """Where an instance has no SOP Instance UID, or the stored one had none, it is replaced."""
    with_uid = dicom(Rows=1)
    without = PREAMBLE + element(0x00080016, "UI", b"1.2.840.10008.5.1.4.1.1.2\0")
    for content in (with_uid, without, with_uid):
        (folder / "a").write_bytes(content)
        assert row(store.load(folder))["status"] in ("loaded", "replaced")
        assert store.read("a") == content


def test_a_document_that_is_damaged_may_be_replaced(store, client, folder):
    """Who the image was cannot be told from it, and loading again is the way out."""
    (folder / "a").write_bytes(dicom(Rows=1))
    store.load(folder)
    client.execute_command("JSON.SET", "file:a", "$", '{"imageName": "a"}')
    (folder / "a").write_bytes(dicom(Rows=2, SOPInstanceUID="1.9"))
    assert row(store.load(folder))["status"] == "replaced"
    assert store.read("a") == dicom(Rows=2, SOPInstanceUID="1.9")
