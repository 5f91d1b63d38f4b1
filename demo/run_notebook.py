"""Run notebooks from top to bottom, cell by cell, as `make demo` and the tests do.

The rendered pages go to data/out/. `--in-place` keeps the outputs in the notebooks themselves: that
is how the committed ones are made.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter
from traitlets.config import Config

PROJECT = Path(__file__).resolve().parent.parent
NOTEBOOK = PROJECT / "dicom_redis.ipynb"
CELL_TIMEOUT_S = 600
#: Cells with this tag hold the answer of a scenario; it is printed again at the end.
RESULT_TAG = "result"
WIDGET = "application/vnd.jupyter.widget-view+json"


def run(notebook: nbformat.NotebookNode, folder: Path, *, quiet: bool = False) -> None:
    """Execute all cells of `notebook`, keeping their outputs, in a kernel of this Python.

    Parameters
    ----------
    notebook : nbformat.NotebookNode
    folder : path
        Where the kernel starts, as Jupyter starts it in the notebook's own folder.
    quiet : bool, optional
        Whether the cells are not told as they begin.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        If a cell fails.
    """
    headings: list[str] = [""]
    code_cells = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    started = time.monotonic()

    def tell(cell: nbformat.NotebookNode, cell_index: int) -> None:
        for before in notebook.cells[:cell_index]:
            if before.cell_type == "markdown" and before.source.startswith("#"):
                headings[0] = before.source.splitlines()[0].lstrip("# ")
        if cell.cell_type == "code" and not quiet:
            number = code_cells.index(cell_index) + 1
            seconds = time.monotonic() - started
            print(f"[{number:2}/{len(code_cells)}] {seconds:5.1f} s  {headings[0]}", flush=True)

    with tempfile.TemporaryDirectory(prefix="kernel-") as sockets:
        client = NotebookClient(
            notebook,
            timeout=CELL_TIMEOUT_S,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            on_cell_start=tell,
            coalesce_streams=True,  # of a progress bar, the last state
            store_widget_state=False,
            # Unix sockets: what passes between this process and the kernel is for no other user to
            # see. Their path is a whole one, since the kernel starts in a folder of its own.
            config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/socket"}}),
        )
        client.execute()
    for cell in notebook.cells:
        # When each cell ran is nobody's business later, and would differ with every run.
        cell.metadata.pop("execution", None)
        # Later no kernel answers a viewer: its still picture is shown.
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop(WIDGET, None)


def results(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the text outputs of the cells tagged as results, each under its heading."""
    found = []
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            heading = cell.source.splitlines()[0].lstrip("# ")
        elif RESULT_TAG in cell.metadata.get("tags", ()):
            text = "\n".join(_texts(cell.outputs))
            found.append(f"{heading}\n{text}")
    return found


def _texts(outputs: list[Any]) -> list[str]:
    texts = []
    for output in outputs:
        if output.output_type == "stream":
            texts.append(output.text.rstrip())
        elif "text/plain" in output.get("data", {}) and "image/png" not in output.data:
            texts.append(output.data["text/plain"].rstrip())
    return texts


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, or 1 if a cell failed or none can be read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "notebooks", type=Path, nargs="*", default=[NOTEBOOK], help="default: the main one"
    )
    parser.add_argument(
        "--in-place", action="store_true", help="also keep the outputs in the notebooks"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=PROJECT / "data" / "out",
        help="folder for the rendered pages (default: data/out)",
    )
    arguments = parser.parse_args(argv)
    for path in arguments.notebooks:
        if len(arguments.notebooks) > 1:
            print(f"\n{path.name}")
        try:
            notebook = nbformat.read(path, as_version=4)
        except (OSError, ValueError, nbformat.ValidationError):
            print(f"{path} is no notebook that can be read.", file=sys.stderr)
            return 1
        try:
            run(notebook, path.resolve().parent)
        except CellExecutionError as error:
            print(f"\n{path.name} failed in this cell:\n{error}", file=sys.stderr)
            return 1
        except DeadKernelError as error:
            print(f"\nThe kernel of {path.name} died: {error}. Out of memory?", file=sys.stderr)
            return 1
        if arguments.in_place:
            nbformat.write(notebook, path)
        page = write_page(notebook, path, arguments.out)
        for result in results(notebook):
            print(f"\n{result}")
        shown = page.relative_to(PROJECT) if page.is_relative_to(PROJECT) else page
        print(f"\n{path.name} ran from top to bottom. The rendered page: {shown}")
    return 0


def write_page(notebook: nbformat.NotebookNode, path: Path, out: Path) -> Path:
    """Write the notebook of the file `path` as a page below `out`, with its pictures in it."""
    out.mkdir(parents=True, exist_ok=True)
    resources = {"metadata": {"path": os.fspath(path.resolve().parent), "name": path.stem}}
    html, _ = HTMLExporter(embed_images=True).from_notebook_node(notebook, resources=resources)
    page = out / f"{path.stem}.html"
    page.write_text(html, encoding="utf-8")
    return page


if __name__ == "__main__":
    sys.exit(main())
