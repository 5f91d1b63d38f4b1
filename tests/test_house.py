"""The house as docs/architecture.md draws it: which room may enter which, and what stands where."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
PACKAGE = PROJECT / "dicomstore"
TOP_LEVEL = {
    "dicom_redis.ipynb", "dicom_helpers.py", "svs_speed_test.py", "dicomstore", "demo", "examples",
    "benchmarks", "tests", "docs", "images", "data", "docker-compose.yml", "requirements.txt",
    "requirements-dev.txt", "Makefile", "pyproject.toml", "README.md", ".ci",
}  # fmt: skip
#: What a repository has beside, and what the set-up makes.
UNSEEN = {".env.example", ".gitignore", "LICENSE"}
FILE_LINES, CLASS_LINES = 500, 250
#: The store has a line for each parameter of each public method; the reader is all that Python asks
#: of a buffered file.
LONGER = {"DicomStore", "ChunkReader"}

#: From the top of the house to its ground. A room may enter those further down, and its own.
FLOORS = [
    {"demo.run_notebook", "dicom_helpers", "svs_speed_test", "demo", "dicomstore.web"},
    {"dicomstore.store"},
    {"dicomstore"},  # and its files without a line of their own: loading, tier and such
    {"dicomstore.catalogue", "dicomstore.blobs", "dicomstore.imaging"},
    {"dicomstore.server"},
    {"dicomstore.keys", "dicomstore.errors"},
]
#: The public names are an entrance from which everybody may come in, and which enters nothing
#: before it is asked.
ENTRANCE = "dicomstore"
WALLS = {
    "dicomstore.imaging": {"redis", "dicomstore.server", "dicomstore.blobs",
                           "dicomstore.catalogue"},
    "dicomstore.blobs": {"pydicom", "dicomstore.imaging", "dicomstore.catalogue"},
    "dicomstore.catalogue": {"dicomstore.blobs"},
    "dicomstore": {"matplotlib", "IPython", "ipywidgets", "jupyter", "nbformat", "nbclient", "demo",
                   "dicom_helpers", "svs_speed_test"},
}  # fmt: skip


def product():
    """The files of the product: the package, what runs in the notebook, and the scripts."""
    folders = [PACKAGE, PROJECT / "demo"]
    found = [path for folder in folders for path in folder.rglob("*.py")]
    return sorted([*found, PROJECT / "dicom_helpers.py", PROJECT / "svs_speed_test.py"])


def module_of(path):
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path, *, at_once=False):
    """Every module that a file imports, also within functions; or only those at its import."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    later = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if at_once and (id(node) in for_types or id(node) in later):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if is_ours(name) else node.module


def is_ours(module):
    """Whether a module is a file or a folder of this project."""
    path = PROJECT / Path(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def is_within(module, room):
    return module == room or module.startswith(f"{room}.")


def floor_of(module):
    """The number of a module's floor; the most exact name counts."""
    names = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    rooms = [room for room in names if is_within(module, room)]
    assert rooms, f"{module} is in no room that this test knows"
    return names[max(rooms, key=len)]


@pytest.mark.parametrize("path", product(), ids=module_of)
def test_imports_run_one_way(path):
    """No room enters one that is above it, and nothing enters web."""
    module = module_of(path)
    for name in imports_of(path):
        assert not is_within(name, "dicomstore.web") or is_within(module, "dicomstore.web"), module
        if is_ours(name) and ENTRANCE not in (name, module):
            assert floor_of(module) <= floor_of(name), f"{module} imports {name}"


@pytest.mark.parametrize("path", product(), ids=module_of)
def test_walls(path):
    """Redis stays out of imaging, DICOM out of blobs, the notebook's libraries out of the store."""
    module = module_of(path)
    for room, outside in WALLS.items():
        if is_within(module, room):
            for name in imports_of(path):
                assert not any(is_within(name, other) for other in outside), f"{module}: {name}"


def test_one_file_names_the_cluster_client():
    """Whoever wants to know what a cluster changes has one folder to read."""
    naming = [path for path in product() if re.search(r"\bRedisCluster\b", path.read_text())]
    assert naming == [PACKAGE / "server" / "connection.py"]


def test_imports_have_no_circles():
    """Each module can be imported first."""
    graph = {
        module_of(path): {name for name in imports_of(path, at_once=True) if is_ours(name)}
        for path in product()
    }
    while leaves := [name for name, needed in graph.items() if not needed & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert graph == {}


def test_the_top_level_is_what_was_asked_for():
    """A stranger who opens the project sees the demonstration, the store, and nothing beside."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    found = {line.split("/")[0].strip('"') for line in listed.stdout.splitlines()}
    assert found <= TOP_LEVEL | UNSEEN


def lines_of(tree, lines):
    """How many of so many lines are not docstrings."""
    for node in ast.walk(tree):
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    return lines


@pytest.mark.parametrize("path", product(), ids=module_of)
def test_files_and_classes_are_short(path):
    """A file is read in one sitting; the docstrings of public methods do not count."""
    tree = ast.parse(path.read_text())
    assert lines_of(tree, path.read_text().count("\n")) <= FILE_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name not in LONGER:
            assert lines_of(node, node.end_lineno - node.lineno + 1) <= CLASS_LINES, node.name


def test_the_store_works_without_the_notebooks_libraries():
    """Another program can use the package where matplotlib and Jupyter are not installed."""
    code = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("matplotlib", "IPython", "ipykernel", "jupyter_client",
                                  "ipywidgets", "nbformat", "nbclient", "nbconvert"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import dicomstore
with dicomstore.DicomStore(dicomstore.connect(), progress=False) as store:
    pass
print(*dicomstore.__all__)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "DicomStore" in done.stdout
