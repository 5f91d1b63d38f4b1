"""The viewers in JupyterLab, in a headless Chromium: `make test-browser`.

What they took is printed; the pictures go to the folder that TEST_SCREENSHOTS names, if it does.
"""

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from browsers import browser, keep_picture, page_of  # noqa: F401

from demo.ct import write_sample_ct
from demo.slide import write_sample_slide
from dicomstore import DicomStore, connect
from dicomstore.server.embedded import RedisServer

pytestmark = pytest.mark.browser

PROJECT = Path(__file__).parent.parent
SLICES = 300
START_S = 90
CODE = """
import sys
sys.path.insert(0, {project!r})
from dicom_helpers import DicomStore, connect, look_around, scroll
store = DicomStore(connect(), progress=False)
"""
#: Collects what the viewers say of each picture that they have shown.
LISTEN = """selector => {
  window.seen = [];
  const viewer = document.querySelector(selector);
  viewer.addEventListener("shown", event => window.seen.push(event.detail));
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab with two notebooks, on a store with a CT and a slide; its folder and its URL."""
    folder = tmp_path_factory.mktemp("lab")
    data = folder / "data"
    write_sample_ct(data / "ct", slices=SLICES)
    write_sample_slide(data / "slide.svs", size=20_000_000)
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
        for name, call in (
            ("scroll", "store, modality='CT'"),
            ("look_around", "store, 'slide.svs'"),
        ):
            code = CODE.format(project=str(PROJECT)) + f"{name}({call})"
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


def _picture(page, name):
    keep_picture(page, name)
    keep_picture(page.locator(".dicom-viewer"), f"{name}-viewer")


def _shown(page, number):
    page.wait_for_selector(f".dicom-viewer[data-shown='{number}']", timeout=20_000)


def test_scroll_with_wheel(opened):
    """The wheel goes through all 300 slices, each is shown, and the costs are said."""
    page = opened("scroll")
    _shown(page, SLICES // 2)
    _picture(page, "scroll")
    page.locator(".dicom-viewer canvas").click()
    page.keyboard.press("Home")
    _shown(page, 0)
    page.evaluate(LISTEN, ".dicom-viewer")
    page.locator(".dicom-viewer canvas").hover()
    took = page.evaluate(
        """async count => {
          const canvas = document.querySelector(".dicom-viewer canvas");
          const start = performance.now();
          for (let n = 1; n < count; n += 1) {
            canvas.dispatchEvent(new WheelEvent("wheel", {deltaY: 120, cancelable: true}));
            await new Promise(done => setTimeout(done, 25));
          }
          return performance.now() - start;
        }""",
        SLICES,
    )
    _shown(page, SLICES - 1)
    seen = page.evaluate("window.seen")
    numbers = {one["number"] for one in seen}
    delays = [one["delay"] for one in seen]
    print(
        f"\nscroll: {len(numbers) / took * 1000:.1f} of {SLICES / took * 1000:.1f} slices a second "
        f"shown, delay median {statistics.median(delays):.1f} ms, "
        f"p95 {statistics.quantiles(delays, n=20)[-1]:.1f} ms"
    )
    assert max(numbers) == SLICES - 1
    assert "MB from Redis" in page.locator(".dicom-viewer .costs").text_content()


def test_scroll_with_keys(opened):
    """Keys go where they say, JupyterLab does not take them, and space plays."""
    page = opened("scroll", width=1024, theme="Dark")
    _shown(page, 150)
    page.locator(".dicom-viewer canvas").click()
    for key, number in {
        "ArrowDown": 151, "ArrowUp": 150, "PageDown": 160, "End": 299, "PageUp": 289, "Home": 0,
    }.items():  # fmt: skip
        page.keyboard.press(key)
        _shown(page, number)
    page.get_by_role("button", name="lung").click()
    page.wait_for_function(
        "document.querySelector('.dicom-viewer .state').textContent.includes('-600 / 1500')"
    )
    page.locator(".dicom-viewer canvas").click()
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelector('.dicom-viewer').dataset.shown >= 90")
    page.keyboard.press("Space")
    _picture(page, "scroll-dark-1024")
    assert page.locator(".jp-Cell").count() == 1


def test_scroll_windows_by_dragging(opened):
    """To drag changes the window, and what is drawn."""
    page = opened("scroll")
    _shown(page, 150)
    canvas = page.locator(".dicom-viewer canvas")
    before = canvas.evaluate("canvas => canvas.toDataURL()")
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + 300, box["y"] + 240, steps=5)
    page.mouse.up()
    page.wait_for_function(
        "!document.querySelector('.dicom-viewer .state').textContent.includes('window 40 / 400')"
    )
    assert canvas.evaluate("canvas => canvas.toDataURL()") != before


def _complete(page):
    page.wait_for_selector(".dicom-viewer[data-complete='true']", timeout=20_000)


def test_look_around(opened):
    """A fixed path of pans and zooms: each view is complete, with its tiles in one round trip."""
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
    page.evaluate(LISTEN, ".dicom-viewer")
    # By whole views, none seen before; a key moves by a quarter of one.
    way = [("Right", 3), ("Down", 3), ("Left", 6), ("Up", 6), ("Right", 6)]
    path = [f"Arrow{side}" for side, views in way for _ in range(views)]
    for number, (key, _) in enumerate(itertools.product(path, range(4)), 1):
        page.keyboard.press(key)
        if number % 4 == 0:  # a whole view at once
            page.wait_for_timeout(30)
            _complete(page)
    delays = [one["delay"] for one in page.evaluate("window.seen")]
    print(
        f"\nlook_around: {len(delays)} views of 1,400 × 800, delay median "
        f"{statistics.median(delays):.0f} ms, p95 {statistics.quantiles(delays, n=20)[-1]:.0f} ms"
    )
    assert delays
    _picture(page, "look-around-path")


@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_look_around_in_a_small_window(opened, theme):
    """In a window of 1024 the viewer fits into its cell; the wheel zooms, the keys pan."""
    page = opened("look_around", width=1024, theme=theme)
    _complete(page)
    viewer = page.locator(".dicom-viewer")
    assert viewer.evaluate("one => one.scrollWidth <= one.clientWidth")
    _picture(page, f"look-around-{theme}-whole")
    page.locator(".dicom-viewer canvas").click()
    before = viewer.locator(".state").first.text_content()
    box = page.locator(".dicom-viewer canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    for _ in range(8):
        page.mouse.wheel(0, -120)
        time.sleep(0.05)
    page.keyboard.press("ArrowRight")
    time.sleep(0.2)
    _complete(page)
    assert viewer.locator(".state").first.text_content() != before
    _picture(page, f"look-around-{theme}-near")
