"""The notebook's viewers without a browser: what they answer when their front end asks."""

import base64
import warnings

import imagecodecs
import nbformat
import numpy as np
import pytest
from nbconvert import HTMLExporter
from pictures import image
from tiffslide import TiffSlide

from demo.ct import write_sample_ct
from demo.slide import write_sample_slide
from demo.viewers.slide import SlideViewer
from demo.viewers.stack import open_stack
from dicom_helpers import look_around, scroll
from dicomstore.errors import FrameError, MissingChunkError, VolumeError

ROWS, COLUMNS = 4, 6


@pytest.fixture(scope="module")
def slide_file(tmp_path_factory):
    return write_sample_slide(tmp_path_factory.mktemp("slide") / "slide.svs", size=2_000_000)


@pytest.fixture
def slide(store, slide_file):
    store.load(slide_file.parent)
    return look_around(store, "slide.svs")


@pytest.fixture
def series(store, tmp_path):
    write_sample_ct(tmp_path / "ct", slices=5, side=32)
    store.load(tmp_path / "ct")
    return store


def cine(value, frames=6, **attributes):
    """A multi-frame instance whose frame k holds `value` + k."""
    pixels = np.empty((frames, ROWS, COLUMNS), np.uint16)
    pixels[...] = np.arange(value, value + frames).reshape(-1, 1, 1)
    return image(pixels, NumberOfFrames=frames, **attributes)


@pytest.fixture
def cine_store(store, tmp_path):
    (tmp_path / "cine.dcm").write_bytes(cine(100))
    store.load(tmp_path)
    return store


def asked(viewer, what, monkeypatch):
    """What the front end receives when it sends a question over the widget's channel."""
    sent = []
    monkeypatch.setattr(viewer, "send", lambda *answer: sent.append(answer))
    message = {"method": "custom", "content": {"ask": what}}
    viewer.comm.handle_msg({"content": {"data": message}, "buffers": []})
    ((content, buffers),) = sent
    return content, [bytes(buffer) for buffer in buffers]


# --- a stack ---


def test_slices_are_those_of_the_volume(series, monkeypatch):
    """The browser gets the values of the volume, in its order, byte for byte."""
    viewer = scroll(series, modality="CT")
    array = series.volume(modality="CT").array
    content, buffers = asked(viewer, [4, 0, 2], monkeypatch)
    assert content["numbers"] == [4, 0, 2]
    assert buffers == [array[number].tobytes() for number in (4, 0, 2)]
    assert np.dtype(viewer.about["type"]) == array.dtype
    assert (viewer.about["count"], viewer.about["rows"]) == (5, 32)


def test_windows_of_a_ct(series):
    """A CT offers its own window first, and those for lung, bone, brain and soft tissue."""
    windows = scroll(series, modality="CT").about["windows"]
    assert next(iter(windows.values())) == (40, 400)
    assert {"lung", "bone", "brain", "soft tissue"} < set(windows)


def test_a_table_or_names(series):
    """What is scrolled can be a table of find, a list of names, or conditions."""
    table = series.find(modality="CT")
    for viewer in (scroll(series, table), scroll(series, list(table["path"]))):
        assert viewer.about["count"] == 5


def test_frames_of_an_instance(cine_store, monkeypatch):
    """An instance without a place in space is scrolled by its frames, as they are decoded."""
    viewer = scroll(cine_store, "cine.dcm")
    _, buffers = asked(viewer, [5, 1], monkeypatch)
    assert [np.frombuffer(buffer, "<u2")[0] for buffer in buffers] == [105, 101]
    assert buffers[0] == cine_store.frame("cine.dcm", 5).tobytes()


@pytest.mark.parametrize(
    ("attributes", "rate"),
    [
        ({}, 25),
        ({"FrameTime": "40"}, 25),
        ({"FrameTime": "50", "CineRate": 12}, 12),
        ({"CineRate": 12, "RecommendedDisplayFrameRate": 10}, 10),
    ],
)
def test_frames_a_second(store, tmp_path, attributes, rate):
    """A cine is played as fast as it asks to be (PS3.3 C.7.6.5), 25 frames a second by default."""
    (tmp_path / "cine.dcm").write_bytes(cine(100, **attributes))
    store.load(tmp_path)
    assert scroll(store, "cine.dcm").about["rate"] == rate


def test_files_that_form_no_volume_are_named(cine_store, tmp_path):
    """Several instances that do not belong together are not scrolled as if they did."""
    (tmp_path / "other.dcm").write_bytes(cine(300))
    cine_store.load(tmp_path)
    with pytest.raises(VolumeError, match=r"cine\.dcm"):
        scroll(cine_store, ["cine.dcm", "other.dcm"])


@pytest.mark.parametrize("frames", [6, 2])
def test_an_instance_that_is_replaced(cine_store, tmp_path, monkeypatch, frames):
    """Of a version that was replaced while it is scrolled, no frame of the new one is shown."""
    viewer = open_stack(cine_store, "cine.dcm")
    (tmp_path / "cine.dcm").write_bytes(cine(900, frames))
    cine_store.load(tmp_path, replace=True)
    content, buffers = asked(viewer, [1, 4], monkeypatch)
    assert "Open it again" in content["error"]
    assert buffers == []


def test_a_series_that_is_replaced(series, tmp_path, monkeypatch):
    """A series that was opened is shown as it was, whatever happens to it."""
    viewer = scroll(series, modality="CT")
    before = series.volume(modality="CT").array[3].tobytes()
    for path in series.find(modality="CT")["path"]:
        series.delete(path)
    assert asked(viewer, [3], monkeypatch)[1] == [before]


# --- a slide ---


def test_tiles_are_jpeg_files_as_stored(slide, slide_file, monkeypatch):
    """Each tile that the browser gets decodes to the pixels that tiffslide shows there."""
    with warnings.catch_warnings(), TiffSlide(slide_file) as shown:
        warnings.simplefilter("ignore")
        for n, level in enumerate(slide.levels):
            number = len(level.offsets) // 2
            content, (jpeg,) = asked(slide, [[n, number]], monkeypatch)
            assert content["places"] == [(n, number)]
            row, column = divmod(number, level.columns)
            shrink = slide.levels[0].width / level.width
            wide = min(level.tile[0], level.width - column * level.tile[0])
            high = min(level.tile[1], level.height - row * level.tile[1])
            corner = (column * level.tile[0] * shrink, row * level.tile[1] * shrink)
            there = shown.read_region(tuple(map(round, corner)), n, (wide, high), as_array=True)
            assert np.array_equal(imagecodecs.jpeg8_decode(jpeg)[:high, :wide], there)


def test_a_tile_is_not_encoded_again(slide, slide_file):
    """The bytes of a tile stand in the file as they are sent, behind the tables."""
    level = slide.levels[0]
    (jpeg,) = slide.tiles([(0, 5)])
    stored = slide_file.read_bytes()[level.offsets[5] :][: level.lengths[5]]
    assert jpeg == level.head + stored[2:]


def test_one_view_takes_one_round_trip(slide, monkeypatch):
    """All tiles of a view come in one round trip, wherever in the file they lie."""
    last = len(slide.levels[0].offsets)
    content, buffers = asked(slide, [[0, n] for n in range(0, last, 3)], monkeypatch)
    assert content["roundTrips"] <= 1
    assert len(buffers) == len(range(0, last, 3))


def test_a_slide_that_is_replaced(store, slide_file, slide, tmp_path, monkeypatch):
    """Tiles are of the version that was opened, or the answer is to open it again."""
    expected = slide.tiles([(0, 0)])
    fresh = store.open("slide.svs", cache_bytes=0)
    (tmp_path / "slide.svs").write_bytes(slide_file.read_bytes() + b"\0")
    store.load(tmp_path, replace=True)
    places = [[0, n] for n in range(len(slide.levels[0].offsets))]
    content, buffers = asked(slide, places, monkeypatch)
    assert (
        buffers[:1] == expected if "error" not in content else "Open it again" in content["error"]
    )
    with pytest.raises(MissingChunkError, match="Open it again"):
        fresh.read_spans([(0, 10)])


def test_what_is_not_a_slide(series):
    """A file without JPEG tiles is refused in one sentence that names it."""
    name = series.find()["path"][0]
    with pytest.raises(FrameError, match=name):
        SlideViewer(series, name)


# --- where there is no kernel ---


def test_a_picture_stands_in(slide, series):
    """A notebook that is rendered without a kernel shows a still picture of the viewer."""
    for viewer in (slide, scroll(series, modality="CT")):
        data, _ = viewer._repr_mimebundle_()
        png = imagecodecs.png_decode(base64.b64decode(data["image/png"]))
        assert png.std() > 0
        cell = nbformat.v4.new_code_cell("viewer")
        cell.outputs = [nbformat.v4.new_output("display_data", data)]
        html, _ = HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
        assert data["image/png"][:60] in html
