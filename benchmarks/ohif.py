"""OHIF's time to the first image, in Debian's Chromium."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import socket
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from peers import PROJECT, Client, Peer
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dicomstore import DicomStore
from dicomstore.web.__main__ import server
from dicomstore.web.app import PREFIX, application

VIEWER = PROJECT / ".viewer" / "package" / "dist"
CHROMIUM = Path("/usr/bin/chromium")
TOLD = """performance.getEntriesByType("resource")
    .find(one => one.name.endsWith("/metadata")).duration"""

Times = dict[str, list[float]]


def lacking() -> str | None:
    """Return why OHIF cannot be measured, if it cannot."""
    if not CHROMIUM.exists() or not (VIEWER / "index.html").exists():
        return "OHIF is left out: it needs Chromium (apt-get install chromium), and `make viewer`."
    if importlib.util.find_spec("playwright") is None:
        return "OHIF is left out: Playwright is not installed (requirements-dev.txt)."
    return None


@contextlib.asynccontextmanager
async def viewer(store: DicomStore, peer: Peer) -> AsyncIterator[str]:
    """Serve the viewer's files, and pass what is DICOMweb on to a peer; the same for each."""
    free: list[Client] = []

    async def pass_on(request: Request) -> Response:
        client = free.pop() if free else Client(peer.port)
        query = f"?{request.url.query}" if request.url.query else ""
        body = await client.get(request.url.path + query, request.headers["accept"])
        free.append(client)
        return Response(body, headers={"content-type": client.type})

    app = application(store, viewer=VIEWER)
    app.routes.insert(0, Route(PREFIX + "/{rest:path}", pass_on))
    serving = server(app)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        task = asyncio.create_task(serving.serve(sockets=[listening]))
        yield f"http://localhost:{listening.getsockname()[1]}/viewer"
        serving.should_exit = True
        await task
    for client in free:
        client.close()


async def first_image(
    peers: Sequence[Peer], store: DicomStore, study: str, rounds: int
) -> dict[str, Times]:
    """Return the times from opening a study to its image, and those of its metadata (ms)."""
    from playwright.async_api import async_playwright

    sys.path.append(str(PROJECT / "tests"))
    flags = importlib.import_module("browsers").FLAGS
    scripts = importlib.import_module("test_ohif")
    found: dict[str, Any] = {"image": defaultdict(list), "metadata": defaultdict(list)}
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        for number in range(rounds + 1):  # the first time warms up
            for peer in peers:
                async with viewer(store, peer) as place:
                    page = await chromium.new_page()
                    await page.add_init_script(scripts.LISTEN)
                    await page.goto(f"{place}?StudyInstanceUIDs={study}")
                    await page.wait_for_function(scripts.SHOWN, timeout=60_000)
                    if number:
                        found["image"][peer.name].append(await page.evaluate("performance.now()"))
                        found["metadata"][peer.name].append(await page.evaluate(TOLD))
                    await page.close()
        await chromium.close()
    return found
