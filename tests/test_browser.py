"""The viewers in JupyterLab, in a headless Chromium: `make test-browser`.

What they took is printed; the pictures go to the folder that TEST_SCREENSHOTS names, if it does.
"""

import base64
import contextlib
import functools
import io
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pydicom
import pytest
from browsers import browser, contrast, keep_picture, page_of  # noqa: F401
from PIL import Image
from tiffslide import TiffSlide

from demo.cine import write_sample_cine
from demo.ct import write_sample_ct
from demo.slide import write_sample_slide
from dicomstore import DicomStore, connect
from dicomstore.server.embedded import RedisServer

pytestmark = pytest.mark.browser

PROJECT = Path(__file__).parent.parent
SLICES, FRAMES = 300, 40
ROW = 256  # of a slice, that is compared while it is scrolled
READABLE = 4.5  # the contrast of text at least, by WCAG 2, 1.4.3
START_S = 90
NOTEBOOKS = {
    "scroll": "scroll(store, modality='CT')",
    "cine": "scroll(store, 'cine.dcm')",
    "look_around": "look_around(store, 'slide.svs')",
}
CODE = """
import sys
sys.path.insert(0, {project!r})
from dicom_helpers import DicomStore, connect, look_around, scroll
store = DicomStore(connect(), progress=False)
"""
#: Collects what a viewer says of each picture that it has shown, and one row of the picture.
LISTEN = """row => {
  window.seen = [];
  const viewer = document.querySelector(".dicom-viewer");
  const canvas = viewer.querySelector("canvas");
  viewer.addEventListener("shown", ({ detail }) => queueMicrotask(() => {
    const { data } = canvas.getContext("2d").getImageData(0, row, canvas.width, 1);
    const grey = Array.from({ length: canvas.width }, (_, x) => data[4 * x]);
    const text = viewer.querySelector(".state").textContent;
    window.seen.push({ ...detail, grey, text, at: performance.now() });
  }));
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab with a notebook for each viewer, and what they show; its folder and its URL."""
    folder = tmp_path_factory.mktemp("lab")
    data = folder / "data"
    write_sample_ct(data / "ct", slices=SLICES)
    write_sample_slide(data / "slide.svs", size=20_000_000)
    write_sample_cine(data / "cine.dcm", frames=FRAMES)
    places = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")
    own = {f"JUPYTER_{place}": str(folder / place) for place in places}
    own |= {"IPYTHONDIR": str(folder), "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0",
        f"--ServerApp.root_dir={folder}", "--LabApp.news_url=None",
    ]  # fmt: skip
    with RedisServer() as server, (folder / "log").open("wb") as log:
        with connect(server.url) as client, DicomStore(client, progress=False) as store:
            assert set(store.load(data)["status"]) == {"loaded"}
        for name, call in NOTEBOOKS.items():
            code = CODE.format(project=str(PROJECT)) + call
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
            notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
            nbformat.write(notebook, folder / f"{name}.ipynb")
        running = subprocess.Popen(
            command,
            env={**os.environ, **own, "REDIS_URL": server.url},
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        try:
            yield folder, _address(folder / "RUNTIME_DIR")
        finally:
            running.terminate()
            running.wait(30)


def _address(runtime):
    """The URL of the server that is starting, with {} for the page, once it listens."""
    for _ in range(START_S * 10):
        for file in runtime.glob("jpserver-*.json"):
            said = json.loads(file.read_text())
            return f"{said['url']}lab/tree/{{}}?reset&token={said['token']}"
        time.sleep(0.1)
    raise TimeoutError(
        f"JupyterLab has not started: {(runtime.parent / 'log').read_text()[-2000:]}"
    )


@pytest.fixture
def opened(lab, browser):  # noqa: F811
    """Opens a notebook, runs it, and returns the page with its viewer."""
    folder, address = lab
    pages = contextlib.ExitStack()

    def open_page(name, *, width=1600, theme="Light"):
        settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True, exist_ok=True)
        news = {"fetchNews": "false", "checkForUpdates": False}
        (settings / "notification.jupyterlab-settings").write_text(json.dumps(news))
        chosen = {"theme": f"JupyterLab {theme}"}
        (settings / "themes.jupyterlab-settings").write_text(json.dumps(chosen))
        page = pages.enter_context(page_of(browser, width=width))
        page.goto(address.format(f"{name}.ipynb"))
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=START_S * 1000)
        page.locator(".jp-Cell .jp-InputArea-prompt").click()
        page.keyboard.press("Control+Enter")
        page.wait_for_selector(".dicom-viewer canvas", timeout=START_S * 1000)
        page.locator(".dicom-viewer").scroll_into_view_if_needed()
        return page

    with pages:
        yield open_page


@pytest.fixture(scope="module")
def ct(lab):
    """What slice k of the CT holds in Hounsfield units, by pydicom from the original file."""
    files = {}
    for path in (lab[0] / "data" / "ct").iterdir():
        header = pydicom.dcmread(path, stop_before_pixels=True)
        files[header.ImagePositionPatient[2]] = path
    in_order = [files[z] for z in sorted(files)]

    @functools.cache
    def values(number):
        dataset = pydicom.dcmread(in_order[number])
        return dataset.pixel_array * dataset.RescaleSlope + dataset.RescaleIntercept

    return values


@pytest.fixture
def slide(lab):
    """The original file of the slide, opened with tiffslide."""
    with warnings.catch_warnings(), TiffSlide(lab[0] / "data" / "slide.svs") as opened_slide:
        warnings.simplefilter("ignore")
        yield opened_slide


def _grey(values, centre, width):
    """The grey levels of values in a window, by PS3.3 C.11.2.1.2."""
    return np.clip(((values - (centre - 0.5)) / (width - 1) + 0.5) * 255, 0, 255)


def _canvas(page):
    """The pixels that a viewer shows, of shape (rows, columns, 3)."""
    url = page.locator(".dicom-viewer canvas").evaluate("canvas => canvas.toDataURL()")
    with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as picture:
        return np.asarray(picture.convert("RGB")).astype(float)


def _assert_shows(page, values, centre, width):
    """The picture is the one of these values, in every pixel, but for rounding."""
    difference = _canvas(page) - _grey(values, centre, width)[..., None]
    assert np.abs(difference).max() <= 1


def _state(page):
    return page.locator(".dicom-viewer .state").first.text_content()


def _keep(page, name):
    keep_picture(page, name)
    keep_picture(page.locator(".dicom-viewer"), f"{name}-viewer")


def _shown(page, number):
    page.wait_for_selector(f".dicom-viewer[data-shown='{number}']", timeout=20_000)


def _says(page, text):
    page.get_by_text(text).wait_for(timeout=20_000)


def _assert_fits_and_can_be_read(page):
    """Nothing is wider than its cell, and text stands out from what lies behind it."""
    for place in (".dicom-viewer", ".jp-OutputArea-output:has(.dicom-viewer)"):
        assert page.locator(place).evaluate("one => one.scrollWidth <= one.clientWidth"), place
    for part in page.locator(".dicom-viewer :is(.state, .error, button)").all():
        assert contrast(part) >= READABLE, part


def test_scroll_with_wheel(opened, ct):
    """The wheel goes through all slices: each shows its number and its own values of the CT."""
    page = opened("scroll")
    _shown(page, SLICES // 2)
    _keep(page, "scroll")
    canvas = page.locator(".dicom-viewer canvas")
    canvas.click()
    page.keyboard.press("Home")
    _shown(page, 0)
    page.evaluate(LISTEN, ROW)
    page.evaluate(
        """async count => {
          const canvas = document.querySelector(".dicom-viewer canvas");
          for (let n = 1; n < count; n += 1) {
            canvas.dispatchEvent(new WheelEvent("wheel", {deltaY: 120, cancelable: true}));
            await new Promise(done => setTimeout(done, 25));
          }
        }""",
        SLICES,
    )
    _shown(page, SLICES - 1)
    canvas.hover()
    for number in reversed(range(SLICES - 20, SLICES - 1)):
        page.mouse.wheel(0, -120)
        _shown(page, number)
    seen = page.evaluate("window.seen")
    numbers = [one["number"] for one in seen]
    last = numbers.index(SLICES - 1)
    delays = [one["delay"] for one in seen[: last + 1]]
    seconds = (seen[last]["at"] - seen[0]["at"]) / 1000
    print(
        f"\nscroll: {len(set(numbers))} of {SLICES} slices shown, {last / seconds:.1f} a second, "
        f"delay median {statistics.median(delays):.1f} ms, "
        f"p95 {statistics.quantiles(delays, n=20)[-1]:.1f} ms"
    )
    assert numbers[: last + 1] == sorted(numbers[: last + 1])
    assert list(dict.fromkeys(numbers[last:])) == list(reversed(range(SLICES - 20, SLICES)))
    for one in seen:
        assert one["text"].startswith(f"slice {one['number'] + 1} of {SLICES} ")
        expected = _grey(ct(one["number"])[ROW], 40, 400)
        assert np.abs(np.array(one["grey"]) - expected).max() <= 1
    _assert_shows(page, ct(SLICES - 20), 40, 400)
    assert "MB from Redis" in page.locator(".dicom-viewer .costs").text_content()


@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_scroll_in_a_small_window(opened, ct, theme):
    """In a window of 1024 all fits and can be read, and keys, slider and buttons do what they say.

    JupyterLab does not take the keys.
    """
    page = opened("scroll", width=1024, theme=theme)
    _shown(page, SLICES // 2)
    _assert_fits_and_can_be_read(page)
    page.locator(".dicom-viewer canvas").click()
    for key, number in {
        "ArrowDown": 151, "ArrowUp": 150, "ArrowRight": 151, "ArrowLeft": 150,
        "PageDown": 160, "End": 299, "PageUp": 289, "Home": 0,
    }.items():  # fmt: skip
        page.keyboard.press(key)
        _shown(page, number)
        assert _state(page).startswith(f"slice {number + 1} of {SLICES} ")
        _assert_shows(page, ct(number), 40, 400)
    slider = page.get_by_role("slider", name="slice")
    slider.click()  # into its middle
    number = int(slider.input_value())
    assert abs(number - SLICES // 2) < SLICES // 10
    _shown(page, number)
    for name, window in {
        "lung": (-600, 1500), "bone": (400, 1800), "brain": (40, 80), "soft tissue": (40, 400),
    }.items():  # fmt: skip
        page.get_by_role("button", name=name).click()
        _says(page, f"window {window[0]} / {window[1]}")
        _assert_shows(page, ct(number), *window)
    _keep(page, f"scroll-{theme}-1024")
    assert page.locator(".jp-Cell").count() == 1


def test_scroll_windows_by_dragging(opened, ct):
    """To drag to the right widens the window, to drag down raises its centre; both are drawn."""
    page = opened("scroll")
    _shown(page, SLICES // 2)
    box = page.locator(".dicom-viewer canvas").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + 300, box["y"] + 240, steps=5)
    page.mouse.up()
    page.mouse.move(box["x"] + 100, box["y"] + 100)  # no longer held
    page.wait_for_function(
        "!document.querySelector('.dicom-viewer .state').textContent.includes('window 40 / 400')"
    )
    centre, width = map(int, re.search(r"window (\d+) / (\d+)", _state(page)).groups())
    assert 60 < centre < 140 and 480 < width < 620
    # What is said is rounded, what is drawn is not.
    difference = _canvas(page) - _grey(ct(SLICES // 2), centre, width)[..., None]
    assert np.abs(difference).max() <= 2


def test_cine(opened, lab):
    """Space plays each frame in its order, begins again after the last, and stops where it is."""
    page = opened("cine")
    frames = pydicom.dcmread(lab[0] / "data" / "cine.dcm").pixel_array
    _shown(page, FRAMES // 2)
    _assert_shows(page, frames[FRAMES // 2], 2048, 4096)
    page.evaluate(LISTEN, ROW)
    page.locator(".dicom-viewer canvas").click()
    page.keyboard.press("Space")
    page.wait_for_function("count => window.seen.length >= count", arg=2 * FRAMES)
    page.keyboard.press("Space")
    page.wait_for_timeout(200)  # for a frame that was asked for before
    seen = page.evaluate("window.seen")
    page.wait_for_timeout(500)
    assert len(page.evaluate("window.seen")) == len(seen)
    numbers = [one["number"] for one in seen]
    seconds = (seen[-1]["at"] - seen[0]["at"]) / 1000
    print(f"\ncine: {(len(numbers) - 1) / seconds:.1f} frames a second of 25")
    assert numbers == [(FRAMES // 2 + 1 + n) % FRAMES for n in range(len(numbers))]
    for one in seen:
        assert one["text"] == f"frame {one['number'] + 1} of {FRAMES} · window 2048 / 4096"
        expected = _grey(frames[one["number"]][ROW].astype(float), 2048, 4096)
        assert np.abs(np.array(one["grey"]) - expected).max() <= 1
    # The button does the same as the key.
    page.get_by_role("button", name="▶").click()
    page.wait_for_function("count => window.seen.length > count", arg=len(seen))
    page.get_by_role("button", name="❚❚").click()
    page.get_by_role("button", name="▶").wait_for()


def _complete(page):
    page.wait_for_selector(".dicom-viewer[data-complete='true']", timeout=20_000)


def _place(page):
    """Level, per cent, and the point of the slide in the middle, as the viewer says them."""
    level, zoom, x, y = re.match(
        r"level (\d) of \d · (\S+) % · (\S+), (\S+) of", _state(page)
    ).groups()
    return int(level), float(zoom), int(x.replace(",", "")), int(y.replace(",", ""))


def _assert_shows_slide(page, slide):
    """The picture, at one pixel to one, is the slide there, but for how colours are smoothed."""
    shown = _canvas(page)
    height, width, _ = shown.shape
    level, zoom, x, y = _place(page)
    assert (level, zoom) == (0, 100)
    corner = (x - width // 2, y - height // 2)
    expected = slide.read_region(corner, 0, (width, height), as_array=True)
    assert np.abs(shown - expected).mean() < 2


def test_look_around(opened, slide):
    """A fixed path of pans: each view is complete, and shows the slide where it says it is."""
    page = opened("look_around", width=1900)
    _complete(page)
    page.evaluate(
        """() => {
          const canvas = document.querySelector(".dicom-viewer canvas");
          Object.assign(canvas.style, {width: "1400px", height: "800px", maxWidth: "none"});
        }"""
    )
    page.wait_for_function("document.querySelector('.dicom-viewer canvas').width === 1400")
    page.locator(".dicom-viewer canvas").click()
    page.keyboard.press("1")
    time.sleep(0.5)
    _complete(page)
    _assert_shows_slide(page, slide)
    # What comes next if the pan goes on is there already: nothing is waited for.
    page.wait_for_selector(".dicom-viewer[data-complete='true'][data-asked='0']")
    page.keyboard.press("ArrowDown")
    page.wait_for_selector(".dicom-viewer[data-complete='true'][data-asked='0']")
    at_once = page.evaluate(
        """async () => {
          const canvas = document.querySelector(".dicom-viewer canvas");
          const down = { key: "ArrowDown", bubbles: true };
          canvas.dispatchEvent(new KeyboardEvent("keydown", down));
          await new Promise(requestAnimationFrame);
          return canvas.parentElement.dataset.complete;
        }"""
    )
    assert at_once == "true"
    _assert_shows_slide(page, slide)
    page.evaluate(LISTEN, ROW)
    delays = []
    # By whole views, none seen before; a key moves by a quarter of one.
    way = [("Right", 3), ("Down", 3), ("Left", 6), ("Up", 6), ("Right", 6)]
    path = [f"Arrow{side}" for side, views in way for _ in range(views)]
    for number, (key, _) in enumerate(itertools.product(path, range(4)), 1):
        page.keyboard.press(key)
        if number % 4 == 0:  # a whole view at once
            page.wait_for_timeout(30)
            _complete(page)
            delays.append(page.evaluate("window.seen.at(-1).delay"))
            if number % 40 == 0:
                _assert_shows_slide(page, slide)
    print(
        f"\nlook_around: {len(delays)} views of 1,400 × 800, delay median "
        f"{statistics.median(delays):.0f} ms, p95 {statistics.quantiles(delays, n=20)[-1]:.0f} ms"
    )
    _assert_shows_slide(page, slide)
    _keep(page, "look-around-path")


@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_look_around_in_a_small_window(opened, slide, theme):
    """In a window of 1024 all fits and can be read, and keys, wheel and buttons do what they say.

    JupyterLab does not take the keys.
    """
    page = opened("look_around", width=1024, theme=theme)
    _complete(page)
    _assert_fits_and_can_be_read(page)
    _keep(page, f"look-around-{theme}-whole")
    whole = _place(page)
    assert whole[2:] == (slide.dimensions[0] // 2, slide.dimensions[1] // 2)
    height, width, _ = _canvas(page).shape

    def press(action, key):
        before = _state(page)
        action(key)
        page.wait_for_function(
            "text => document.querySelector('.dicom-viewer .state').textContent !== text",
            arg=before,
        )
        _complete(page)
        return _place(page)

    def button(name):
        page.locator(".dicom-viewer").get_by_role("button", name=name).click()

    page.locator(".dicom-viewer canvas").click()
    _, zoom, x, y = press(page.keyboard.press, "1")
    assert (zoom, x, y) == (100, *whole[2:])
    _assert_shows_slide(page, slide)
    quarter = {"ArrowRight": (1, 0), "ArrowDown": (0, 1), "ArrowLeft": (-1, 0), "ArrowUp": (0, -1)}
    for key, (right, down) in quarter.items():
        _, zoom, new_x, new_y = press(page.keyboard.press, key)
        assert abs(new_x - x - right * width / 4) <= 1 and abs(new_y - y - down * height / 4) <= 1
        assert zoom == 100
        x, y = new_x, new_y
    _assert_shows_slide(page, slide)
    assert press(page.keyboard.press, "-")[1] == 50
    assert press(page.keyboard.press, "+")[1] == 100
    assert press(page.keyboard.press, "0") == whole
    assert press(button, "full size")[1] == 100
    assert press(button, "+")[1] == 200
    assert press(button, "−")[1] == 100  # noqa: RUF001
    assert press(button, "whole slide") == whole
    # The wheel zooms in on what is under the pointer: the point there stays there.
    box = page.locator(".dicom-viewer canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    near = press(lambda turns: page.mouse.wheel(0, turns), -300)
    assert near[1] == pytest.approx(2 * whole[1], rel=0.01)
    under = [place[2] - width / 4 / (place[1] / 100) for place in (whole, near)]
    assert abs(under[0] - under[1]) <= 0.01 * slide.dimensions[0]
    # What is grabbed follows the pointer.
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4 + 80, box["y"] + box["height"] / 2 + 40, steps=4)
    page.mouse.up()
    _complete(page)
    moved = _place(page)
    assert abs(moved[2] - near[2] + 80 / (near[1] / 100)) < 10
    assert abs(moved[3] - near[3] + 40 / (near[1] / 100)) < 10
    _keep(page, f"look-around-{theme}-near")
    assert page.locator(".jp-Cell").count() == 1
