"""README's pictures of the notebook and of its viewers, made again: `make pictures`.

The notebook is shown as it is committed; run `make notebook` before. The two pictures of OHIF are
kept by `TEST_SCREENSHOTS=folder make test-browser`.
"""

import base64
import io

import nbformat
from browsers import browser, page_of  # noqa: F401
from nbconvert import HTMLExporter
from PIL import Image
from test_browser import PROJECT, SLICES, _complete, _shown, ct, lab, opened  # noqa: F401

from demo.run_notebook import NOTEBOOK

IMAGES = PROJECT / "images"
SCENARIOS = (1, 2, 3)


def cells_below(notebook, heading):
    """The numbers of the code cells between a heading and the next one."""
    found = []
    inside = False
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            inside = cell.source.startswith(f"## {heading}")
        elif inside and cell.cell_type == "code":
            found.append(number)
    return found


def test_the_notebooks_scenarios(browser, tmp_path):  # noqa: F811
    """The cells of each scenario, with what they answered."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    page_file = tmp_path / "notebook.html"
    page_file.write_text(HTMLExporter(template_name="lab").from_notebook_node(notebook)[0])
    page = browser.new_page(viewport={"width": 1000, "height": 1000}, device_scale_factor=1.5)
    page.goto(page_file.as_uri())
    for scenario in SCENARIOS:
        cells = cells_below(notebook, f"Scenario {scenario}")
        boxes = [page.locator(".jp-Cell").nth(number).bounding_box() for number in cells]
        top, bottom = boxes[0]["y"], boxes[-1]["y"] + boxes[-1]["height"]
        area = {"x": 0, "y": top, "width": 1000, "height": bottom - top}
        page.screenshot(path=IMAGES / f"scenario_{scenario}.png", clip=area, full_page=True)
    page.close()


def test_the_notebooks_gallery():
    """The figure of ten images."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (number, *_) = cells_below(notebook, "The images")
    figures = [output.data["image/png"] for output in notebook.cells[number].outputs]
    (IMAGES / "gallery.png").write_bytes(base64.b64decode(figures[-1]))


def stepped(viewer, steps, name, *, width, ms):
    """Keep what a viewer shows before the first step and after each as an animated picture."""
    frames = []
    for step in steps:
        step()
        with Image.open(io.BytesIO(viewer.screenshot())) as shot:
            frames.append(shot.convert("RGB").resize((width, shot.height * width // shot.width)))
    size = (width, max(frame.height for frame in frames))
    padded = [Image.new("RGB", size, "white") for _ in frames]
    for whole, frame in zip(padded, frames, strict=True):
        whole.paste(frame)
    first, *others = [one.quantize(128) for one in padded]
    target = IMAGES / f"{name}.gif"
    first.save(target, save_all=True, append_images=others, duration=ms, loop=0)


def test_scroll(opened):  # noqa: F811
    """Four slices, then the windows for lung and bone."""
    page = opened("scroll", width=860)
    page.locator(".dicom-viewer canvas").click()

    def slice_at(number):
        page.get_by_role("slider", name="slice").fill(str(number))
        _shown(page, number)

    def window(name, text):
        page.get_by_role("button", name=name).click()
        page.get_by_text(text).wait_for()

    numbers = (SLICES // 2, SLICES // 3, SLICES // 5, SLICES * 3 // 5)
    steps = [lambda number=number: slice_at(number) for number in numbers]
    steps += [lambda: window("lung", "window -600"), lambda: window("bone", "window 400")]
    stepped(page.locator(".dicom-viewer"), steps, "scroll", width=560, ms=1200)


def test_look_around(opened):  # noqa: F811
    """The whole slide, twice nearer, then to the right."""
    page = opened("look_around", width=1024)

    def press(*keys):
        for key in keys:
            page.keyboard.press(key)
            page.wait_for_timeout(300)
        _complete(page)

    page.locator(".dicom-viewer canvas").click()
    steps = [lambda: press("0"), lambda: press("+", "+"), lambda: press("+", "+"),
             lambda: press("ArrowRight", "ArrowRight")]  # fmt: skip
    stepped(page.locator(".dicom-viewer"), steps, "look_around", width=520, ms=1500)
