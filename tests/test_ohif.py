"""The viewer OHIF on `python -m dicomstore.web`, in a headless Chromium: `make test-browser`.

It is fetched once, from npm, as `make viewer` fetches it. Pictures of what it shows go to the
folder that TEST_SCREENSHOTS names, if it does.
"""

import base64
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from browsers import browser, keep_picture, page_of  # noqa: F401
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import EncapsulatedPDFStorage, ExplicitVRLittleEndian

from demo.ct import write_sample_ct
from demo.wsi import write_sample_wsi
from dicomstore.server.embedded import RedisServer

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore:.*only a single component:UserWarning"),  # MADE UP
]

PROJECT = Path(__file__).parent.parent
SLICES, SIDE = 300, 256
SHOWN_S = 60
#: Frames in the transfer syntaxes of modern archives, by pydicom's names of the files.
STACKS = {
    "JPEG": "examples_ybr_color.dcm",
    "RLE": "emri_small_RLE.dcm",
    "JPEG 2000": "emri_small_jpeg_2k_lossless.dcm",
    "JPEG-LS": "emri_small_jpeg_ls_lossless.dcm",
}
#: Remembers which image each viewport was given last; what is drawn before that is not it.
LISTEN = """
window.given = {};
addEventListener("CORNERSTONE_STACK_NEW_IMAGE", event => {
  window.given[event.detail.viewportId] = event.detail.imageId;
}, true);
"""
#: The frame that the viewport shows, or null as long as it shows none.
SHOWN = """() => {
  const [element] = window.cornerstone?.getEnabledElements() ?? [];
  if (element?.viewport.viewportStatus !== "rendered" || !("default" in window.given)) return null;
  const id = element.viewport.getCurrentImageId();
  return id === window.given.default && cornerstone.cache.getImage(id) ? id : null;
}"""
#: The values of the frame that is shown, as the viewer decoded them.
VALUES = """() => {
  const [element] = cornerstone.getEnabledElements();
  const image = cornerstone.cache.getImage(element.viewport.getCurrentImageId());
  const values = image.getPixelData();
  const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  let text = "";
  for (let n = 0; n < bytes.length; n += 4096) {
    text += String.fromCharCode(...bytes.subarray(n, n + 4096));
  }
  return [values.constructor.name, btoa(text), image.rows, image.columns];
}"""


def own(dataset, number, description):
    """Make a data set an instance of its own study; pydicom's samples share their UIDs."""
    dataset.StudyInstanceUID = f"2.25.14{number}"
    dataset.SeriesInstanceUID = f"2.25.14{number}1"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"2.25.14{number}2"
    dataset.StudyDescription = dataset.PatientName = dataset.PatientID = description
    return dataset


def pdf():
    """One empty page as an Encapsulated PDF (PS3.3 A.45.1)."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = EncapsulatedPDFStorage
    dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = "DOC", 1, 1
    dataset.MIMETypeOfEncapsulatedDocument = "application/pdf"
    dataset.EncapsulatedDocument = (
        b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
        b"2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
        b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]>>endobj\n"
        b"trailer<</Root 1 0 R>>\n%" + b" " * 5000 + b"\n%%EOF\n"  # too long to be sent inline
    )
    return dataset


def segmentation(slices):
    """What is denser than water in a CT, in its lower half (PS3.3 A.51)."""
    mask = np.stack([one.pixel_array > 1124 for one in slices])
    mask[:, : SIDE // 2] = False
    body = highdicom.seg.SegmentDescription(
        1, "Body", codes.SCT.Tissue, codes.SCT.Tissue,
        highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
    )  # fmt: skip
    return highdicom.seg.Segmentation(
        slices, mask, highdicom.seg.SegmentationTypeValues.BINARY, [body], "2.25.1491", 9,
        "2.25.1492", 1, "MADE UP", "MADE UP", "1", "1", series_description="Body",
    )  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory, large_files):
    """A folder with the CT, its segmentation, and an instance of each other kind."""
    folder = tmp_path_factory.mktemp("images")
    write_sample_ct(folder / "ct", slices=SLICES, side=SIDE)
    slices = [pydicom.dcmread(path) for path in sorted((folder / "ct").iterdir())[140:160]]
    segmentation(slices).save_as(folder / "seg.dcm")
    for number, (description, name) in enumerate({**STACKS, "ECG": "waveform_ecg.dcm"}.items()):
        dataset = pydicom.dcmread(pydicom.data.get_testdata_file(name))
        own(dataset, number, description).save_as(folder / f"{description}.dcm")
    write_sample_wsi(folder / "slide", size=5_000_000)
    own(pdf(), 8, "PDF").save_as(folder / "PDF.dcm", enforce_file_format=True)
    return folder


@pytest.fixture(scope="module")
def viewer():
    """The folder of the built viewer, fetched if it is not there yet."""
    page = PROJECT / ".viewer" / "package" / "dist" / "index.html"
    if not page.exists():
        if shutil.which("npm") is None:
            pytest.skip("The viewer comes from npm, which is not installed: apt-get install npm.")
        subprocess.run(["make", "--silent", page.relative_to(PROJECT)], cwd=PROJECT, check=True)
    return page.parent


@pytest.fixture(scope="module")
def address(images, viewer):
    """Where the viewer is, on a server of its own that has loaded the images."""
    command = [sys.executable, "-m", "dicomstore.web", images, "--port=0", "--viewer", viewer]
    with RedisServer() as redis:
        web = subprocess.Popen(
            command,
            cwd=PROJECT,
            env={**os.environ, "REDIS_URL": redis.url},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            said = next(line for line in web.stdout if line.startswith("The viewer is at"))
            yield said.split()[-1]
        finally:
            web.terminate()
            web.communicate(timeout=30)


@pytest.fixture
def page(browser):  # noqa: F811
    with page_of(browser) as opened:
        opened.add_init_script(LISTEN)
        errors = []
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.on("console", lambda said: said.type == "error" and errors.append(said.text))
        yield opened
        assert not errors


def open_study(page, address, uid):
    page.goto(f"{address}viewer?StudyInstanceUIDs={uid}")


def shown(page, before=None):
    """Wait until a frame is shown that is not the one before, and return its address."""
    page.wait_for_function(
        f"before => {{ const id = ({SHOWN})(); return id && id !== before; }}",
        arg=before,
        timeout=SHOWN_S * 1000,
    )
    return page.evaluate(SHOWN)


def values(page):
    kind, text, rows, columns = page.evaluate(VALUES)
    array = np.frombuffer(base64.b64decode(text), kind.removesuffix("Array").lower())
    return array.reshape(rows, columns, -1).squeeze()


def scroll_by_one(page):
    page.locator("[data-cy=viewport-grid] canvas").first.hover()
    page.mouse.wheel(0, 120)


def wait_for_pixels(page, are_meant, most=0):
    """Wait until more than `most` + 500 pixels of the page are meant, by red, green and blue."""
    for _ in range(SHOWN_S):
        if count_pixels(page, are_meant) > most + 500:
            return
        page.wait_for_timeout(1000)
    raise TimeoutError("It is not drawn.")


def count_pixels(page, are_meant):
    picture = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(int)
    return np.count_nonzero(are_meant(*np.moveaxis(picture, -1, 0)))


def is_red(red, green, blue):
    return red > np.maximum(green, blue) + 40


def is_yellow(red, green, blue):
    return np.minimum(red, green) > blue + 100


def is_stained(red, green, blue):
    """Whether it has the colours of haematoxylin and eosin."""
    return (np.minimum(red, blue) > green + 20) & (red > 80)


def test_the_study_list(page, address):
    """It shows each study that is stored, and finds some by a part of the name."""
    page.goto(address)
    for description in (*STACKS, "ECG", "PDF", "Made-up CT"):
        page.get_by_text(description, exact=True).first.wait_for(timeout=SHOWN_S * 1000)
    keep_picture(page, "ohif-studies")
    page.locator("input").first.fill("peg")
    page.get_by_text("RLE", exact=True).first.wait_for(state="hidden")
    for description in STACKS:
        assert page.get_by_text(description, exact=True).first.is_visible() == (
            "PEG" in description
        )


def test_a_filter_that_finds_nothing(page, address):
    """The list is empty while nothing fits, without an error, and full again afterwards."""
    page.goto(address)
    row = page.get_by_text("PDF", exact=True).first
    row.wait_for(timeout=SHOWN_S * 1000)
    with page.expect_response("**/studies?*nobody*", timeout=SHOWN_S * 1000) as response:
        page.locator("input").first.fill("nobody")
    assert response.value.status == 204
    page.get_by_text("No studies available").wait_for(timeout=SHOWN_S * 1000)
    assert not row.is_visible()
    page.locator("input").first.fill("")
    row.wait_for(timeout=SHOWN_S * 1000)


def test_a_ct_is_scrolled(page, address, images):
    """Slice after slice has the values that pydicom reads, rescaled."""
    slices = {}
    for path in (images / "ct").iterdir():
        dataset = pydicom.dcmread(path)
        slices[dataset.SOPInstanceUID] = dataset
    open_study(page, address, dataset.StudyInstanceUID)
    numbers, place = [], None
    for _ in range(15):
        place = shown(page, place)
        dataset = slices[place.split("/instances/")[1].split("/")[0]]
        numbers.append(dataset.InstanceNumber)
        stored = dataset.pixel_array.astype(int)
        assert np.array_equal(values(page), stored + int(dataset.RescaleIntercept))
        scroll_by_one(page)
    keep_picture(page, "ohif-ct")
    assert len(set(numbers)) == 15
    assert max(numbers) - min(numbers) == 14


@pytest.mark.parametrize("kind", STACKS)
def test_frames_of_a_transfer_syntax(page, address, images, kind):
    """The frames of a multi-frame instance follow one another, each equal to pydicom's."""
    dataset = pydicom.dcmread(images / f"{kind}.dcm")
    frames = dataset.pixel_array
    open_study(page, address, dataset.StudyInstanceUID)
    place = None
    for number in range(4):
        place = shown(page, place)
        assert place.endswith(f"/frames/{number + 1}")
        frame = values(page)
        assert np.array_equal(frame[..., :3] if frame.ndim == 3 else frame, frames[number])
        scroll_by_one(page)
    keep_picture(page, f"ohif-{kind}")


def test_a_segmentation_over_its_source(page, address, images):
    """A segmentation that is opened colours the slice of the CT that it was made of."""
    open_study(page, address, pydicom.dcmread(images / "seg.dcm").StudyInstanceUID)
    shown(page)
    before = count_pixels(page, is_red)
    page.locator("[data-cy=study-browser-thumbnail-no-image]").dblclick()
    page.get_by_text("Do you want to open this Segmentation?").wait_for(timeout=SHOWN_S * 1000)
    wait_for_pixels(page, is_red, before)
    keep_picture(page, "ohif-segmentation")


def test_an_ecg(page, address, images):
    """A waveform is drawn, with the names of its leads."""
    open_study(page, address, pydicom.dcmread(images / "ECG.dcm").StudyInstanceUID)
    wait_for_pixels(page, is_yellow)
    keep_picture(page, "ohif-ecg")


def test_a_pdf(page, address, images):
    """A document reaches the browser's reader as it was encapsulated."""
    dataset = pydicom.dcmread(images / "PDF.dcm")
    with page.expect_response("**/bulkdata/**", timeout=SHOWN_S * 1000) as response:
        open_study(page, address, dataset.StudyInstanceUID)
    assert dataset.EncapsulatedDocument in response.value.body()
    wait_for_pixels(page, lambda red, green, blue: np.minimum(red, green) > 250)
    keep_picture(page, "ohif-pdf")


def test_a_slide(page, address, images):
    """The microscopy viewer shows a slide, and fetches tiles as it is zoomed and dragged."""
    levels = [pydicom.dcmread(path) for path in sorted((images / "slide").iterdir())]
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}microscopy?StudyInstanceUIDs={levels[0].StudyInstanceUID}")
    wait_for_pixels(page, is_stained)
    finest = f"/instances/{levels[0].SOPInstanceUID}/frames/"
    assert not any(finest in url for url in asked)
    keep_picture(page, "ohif-slide")
    page.mouse.move(850, 550)
    with page.expect_response(lambda response: finest in response.url, timeout=SHOWN_S * 1000):
        for _ in range(20):
            page.mouse.wheel(0, -120)
            page.wait_for_timeout(300)
            if any(finest in url for url in asked):
                break
    wait_for_pixels(page, is_stained, 50_000)
    keep_picture(page, "ohif-slide-near")
    page.wait_for_timeout(2000)  # until all tiles of this view are there
    before = {url for url in asked if finest in url}
    page.locator("[data-cy=dragPan]").click()  # until then a drag measures
    page.mouse.move(400, 500)
    page.mouse.down()
    with page.expect_response(
        lambda response: finest in response.url and response.url not in before,
        timeout=SHOWN_S * 1000,
    ):
        page.mouse.move(1200, 500, steps=20)
        page.mouse.up()
    keep_picture(page, "ohif-slide-dragged")
