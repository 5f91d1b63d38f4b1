"""The README and docs/: short, and true of the files that they name."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from pydicom.data import get_testdata_file

from dicomstore import DicomStore

PROJECT = Path(__file__).parent.parent
README = PROJECT / "README.md"
PAGES = [README, *sorted((PROJECT / "docs").glob("*.md"))]
SECTIONS = [
    "Summary", "Architecture - High", "Architecture - Low", "Features", "Prerequisites",
    "Installation", "Scenario 1", "Scenario 2", "Scenario 3", "Speed Test",
]  # fmt: skip

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_the_readme_is_short_and_has_the_published_sections():
    """At most 130 lines, with the published README's headings in their order."""
    lines = README.read_text().splitlines()
    assert len(lines) <= 130
    assert [line[3:] for line in lines if line[:3] == "## " and line[3:] in SECTIONS] == SECTIONS


def test_the_readme_runs_as_printed(tmp_path, monkeypatch):
    """The Python lines work in an empty folder, and give a real file back bit for bit."""
    (lines,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.M)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(lines, found)
    original = Path(get_testdata_file("CT_small.dcm")).read_bytes()
    assert found["image"] == original
    assert (tmp_path / "data" / "out" / "restored" / "CT_small.dcm").read_bytes() == original
    assert list(found["report"]["status"]) == ["loaded"]
    assert found["frame"].shape == (128, 128) and found["volume"].array.shape == (1, 128, 128)
    found["store"].close()
    found["store"].client.close()


@each_page
def test_every_make_command_exists(page):
    """What a page tells the reader to make is a target of the Makefile."""
    code = "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", page.read_text(), re.DOTALL | re.M))
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", code))
    targets = set(re.findall(r"^([a-z][\w-]*):", (PROJECT / "Makefile").read_text(), re.M))
    assert named <= targets


@each_page
def test_every_link_leads_somewhere(page):
    """Each relative link and image is a file of the project, each anchor a heading of it."""
    text = page.read_text()
    for link in [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src="([^"]+)"', text)]:
        if re.match(r"\w+://", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_every_file_that_is_named_exists(page):
    """A file or folder in backticks is there, under its whole path from the project's root."""
    code = re.findall(r"(?<!`)`([^`\s]+)`(?!`)", page.read_text())
    files = [
        name for name in code if re.search(r"^[\w./-]+\.(py|ipynb|md|yml|toml|txt|svg)$", name)
    ]
    folders = [name for name in code if re.fullmatch(r"\w[\w/]*/", name)]
    # In the README's sentence about the package, its wings stand without it.
    missing = [
        name
        for name in files + folders
        if not (PROJECT / name).exists() and not (PROJECT / "dicomstore" / name).is_dir()
    ]
    assert not missing


def test_every_module_is_on_the_map():
    """docs/architecture.md says of each file of the package what it does."""
    text = (PROJECT / "docs" / "architecture.md").read_text()
    files = [file for file in (PROJECT / "dicomstore").rglob("*.py") if file.name != "__init__.py"]
    names = [file.relative_to(PROJECT).as_posix() for file in files]
    assert not [name for name in names if f"| `{name}` |" not in text]


@each_page
def test_every_call_and_module_exists(page):
    """Each method of the store, module to run and compose file that a page names is there."""
    text = page.read_text()
    assert set(re.findall(r"\bstore\.(\w+)\(", text)) <= set(dir(DicomStore))
    for module in re.findall(r"\bpython -m ([\w.]+)", text):
        assert importlib.util.find_spec(module), module
    for file in re.findall(r" -f (\S+\.yml)", text):
        assert (PROJECT / file).is_file(), file


def test_the_acl_rules_are_two_lines():
    """docs/security.md has one rule for *app* and one for *owner*, who may do all that app may."""
    page = (PROJECT / "docs" / "security.md").read_text()
    app, owner = (rule.split() for rule in re.findall(r"^ACL SETUSER .*$", page, re.MULTILINE))
    assert app[2] == "app" and owner[2] == "owner"
    assert owner[: len(app)] == ["ACL", "SETUSER", "owner", *app[3:]]
    assert not re.search(r"^ACL SETUSER", README.read_text(), re.MULTILINE)


def test_every_picture_is_shown():
    """Each picture in images/ is on a page or in a notebook: none is left behind."""
    shown = [*PAGES, *(PROJECT / "benchmarks").glob("*.md"), *PROJECT.glob("**/[!.]*.ipynb")]
    text = "".join(page.read_text() for page in shown if ".venv" not in page.parts)
    assert not [
        picture.name for picture in (PROJECT / "images").iterdir() if picture.name not in text
    ]


def test_the_benchmarks_report_what_was_measured():
    """No table holds a figure against a target: only what was measured stands there."""
    for page in (PROJECT / "benchmarks").glob("*.md"):
        assert not re.search(r"\btarget|at most \|", page.read_text()), page.name
