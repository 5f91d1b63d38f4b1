"""Debian's Chromium for the tests: headless, and it may ask nothing of other machines."""

import contextlib
import os
import re
from urllib.parse import urlsplit

import pytest

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = "/usr/bin/chromium"
# It connects to nothing but this machine, and needs no graphics card.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
#: The colours of an element's text and of what lies behind it.
COLOURS = """one => {
  let behind = one;
  const clear = () => getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)";
  while (behind.parentElement && clear()) behind = behind.parentElement;
  return [getComputedStyle(one).color, getComputedStyle(behind).backgroundColor];
}"""


@pytest.fixture(scope="module")
def browser():
    if not os.path.exists(CHROMIUM):
        pytest.skip("The browser is not installed: apt-get install chromium.")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@contextlib.contextmanager
def page_of(browser, *, width=1600, height=1000):
    """A new page, closed afterwards; fails if it asked anything of another machine."""
    page = browser.new_page(viewport={"width": width, "height": height})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url))
    try:
        yield page
    finally:
        page.close()
    places = [urlsplit(url) for url in asked]
    hosts = {place.hostname for place in places if place.scheme in ("http", "https", "ws", "wss")}
    assert hosts <= {"localhost", "127.0.0.1"}


def keep_picture(place, name):
    """Save what a page or a part of it shows in the folder TEST_SCREENSHOTS, if there is one."""
    if folder := os.environ.get("TEST_SCREENSHOTS"):
        place.screenshot(path=f"{folder}/{name}.png")


def contrast(place):
    """The contrast of an element's text with what lies behind it, 1 to 21, by WCAG 2."""
    lights = []
    for colour in place.evaluate(COLOURS):
        shares = [int(number) / 255 for number in re.findall(r"[\d.]+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
        lights.append(sum(c * w for c, w in zip(linear, (0.2126, 0.7152, 0.0722), strict=True)))
    return (max(lights) + 0.05) / (min(lights) + 0.05)
