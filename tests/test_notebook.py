"""The notebooks, whole: as committed, and as they run."""

import json
import re
import statistics
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import JPEG2000, JPEG2000Lossless
from samples import dicom

import dicom_helpers
from demo import archive, run_notebook
from dicomstore import DicomStore, connect
from dicomstore.imaging import rendering
from dicomstore.server.embedded import RedisServer

MAIN = run_notebook.NOTEBOOK
EXAMPLES = sorted((run_notebook.PROJECT / "examples").glob("*.ipynb"))
HOME = "dicom_redis_notebook"


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def run(notebook, folder):
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    run_notebook.run(notebook, folder, quiet=True)
    return notebook


@pytest.fixture
def own_server(monkeypatch):
    """A server for one notebook, which finds it as its user's, by the *owner* of the docs' rule."""
    with RedisServer() as server:
        admin = connect(server.url)
        page = (run_notebook.PROJECT / "docs" / "security.md").read_text()
        admin.execute_command(*re.search("^ACL SETUSER owner .*$", page, re.MULTILINE)[0].split())
        monkeypatch.setenv("REDIS_URL", f"redis://owner:password@127.0.0.1:{server.port}")
        yield admin
        admin.close()


def everything(client):
    """Return the value of every key, whatever its type, and whether it expires."""
    return {key: (client.dump(key), client.ttl(key) < 0) for key in client.scan_iter()}


def foreign_keys(client):
    """Store keys of all types, and files of ours in different folders."""
    client.set("text", "theirs")
    client.set("soon", "gone", ex=100_000)
    client.rpush("list", 1, 2)
    client.sadd("set", 1, 2)
    client.hset("hash", "field", "value")
    client.zadd("sorted", {"one": 1})
    client.xadd("stream", {"field": "value"})
    client.pfadd("counter", "one")
    client.execute_command("JSON.SET", "json", "$", '{"modality": "CT"}')
    for key in (HOME, f"{HOME}/samples", f"file-{HOME}/a", "chunk", "chunks:file:a", "files"):
        client.set(key, "theirs")
    store = DicomStore(client, chunk_size=1000, progress=False)
    for path in ("a.dcm", "ct/a.dcm", f"{HOME}2/a.dcm", f"mine/{HOME}/JPGExtended.dcm"):
        store.put(path, dicom(pixels=bytes(5000), Modality="CT", ProtocolName="194"))
    store.close()


@pytest.mark.slow
def test_the_main_notebook_beside_foreign_keys(own_server):
    """It gives the published answers, changes nothing of others, and clears a broken-off run."""
    foreign_keys(own_server)
    before = everything(own_server)
    broken = read(MAIN)
    load = next(n for n, cell in enumerate(broken.cells) if "store.load(folder" in cell.source)
    broken.cells = broken.cells[: load + 1]
    run(broken, MAIN.parent)
    own_server.set(f"chunk:file:{HOME}/samples/a.dcm:0123456789ab:0", "of a load that was killed")
    assert len(everything(own_server)) > len(before) + 300

    executed = run(read(MAIN), MAIN.parent)

    assert everything(own_server) == before
    first, second, third = run_notebook.results(executed)[:3]
    assert "JPGExtended.dcm: 9,844 bytes" in first
    assert "J2K_pixelrep_mismatch.dcm: 138,518 bytes" in second
    counts = dict(re.findall(r"^(\S.*?) +(\d+)$", third, re.MULTILINE))
    assert counts == {
        "ANGIO Projected from C": "7", "T/S/C RF FAST PILOT": "6", "1.1 Routine Brain": "4",
        "FAST LOCALIZER": "4", "Whole Body Bone": "4", "194": "1", "t1_vibe_fs_tra_bh_dyn": "1",
    }  # fmt: skip
    assert len(pictures(executed)) == 8


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_beside_foreign_keys(path, own_server):
    """Every cell of each example runs, its figures are drawn, and nothing of others is changed."""
    foreign_keys(own_server)
    before = everything(own_server)
    executed = run(read(path), path.parent)
    assert everything(own_server) == before
    assert len(pictures(executed)) == len(pictures(read(path)))


@pytest.mark.parametrize("path", [MAIN, *EXAMPLES], ids=lambda path: path.stem)
def test_committed_outputs_are_of_one_clean_run(path):
    """Counts run from 1 to n; no output is an error, asks a kernel or names a machine's folder."""
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            data = output.get("data", {})
            assert not any("widget" in kind for kind in data)
            text = "".join(
                [output.get("text", ""), *(data.get(f"text/{n}", "") for n in ("plain", "html"))]
            )
            assert not re.search(r"/site-packages|/tmp/|/home/|/root\b|/work\b", text)
            assert str(Path.home()) not in text


@pytest.mark.parametrize("path", [MAIN, *EXAMPLES], ids=lambda path: path.stem)
def test_cells_are_short(path):
    """No cell has more than fifteen lines."""
    assert max(len(re.findall(r"\S.*", cell.source)) for cell in code_cells(read(path))) <= 15


def test_the_main_notebook_is_short():
    """It has at most 40 cells, and half of those with code have three lines or fewer."""
    notebook = read(MAIN)
    assert len(notebook.cells) <= 40
    lengths = [len(re.findall(r"\S.*", cell.source)) for cell in code_cells(notebook)]
    assert statistics.median(lengths) <= 3


def small_notebook(path, *cells):
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)
    return str(path)


def test_what_is_no_notebook_is_named(tmp_path, capsys):
    """A file that is not there, or is no notebook, is named in one sentence."""
    for name, content in (("absent", None), ("text", "none"), ("json", "{}")):
        path = tmp_path / f"{name}.ipynb"
        if content is not None:
            path.write_text(content)
        assert run_notebook.main([str(path), "--out", str(tmp_path)]) == 1
        assert capsys.readouterr().err == f"{path} is no notebook that can be read.\n"


def test_a_failing_cell_fails_the_run(tmp_path, capsys):
    """A cell that raises ends the run with exit code 1; the error names notebook and cause."""
    cell = nbformat.v4.new_code_cell("raise OSError('no disk')")
    broken = small_notebook(tmp_path / "broken.ipynb", cell)
    assert run_notebook.main([broken, "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "no disk" in told and "broken.ipynb" in told
    assert not list(tmp_path.glob("*.html"))


def test_notebooks_run_from_any_folder(tmp_path, monkeypatch, capsys):
    """A relative path is enough, each kernel starts beside its notebook, and no file is left."""
    where = nbformat.v4.new_code_cell(
        "import os; print(os.path.basename(os.getcwd()))", metadata={"tags": ["result"]}
    )
    for folder in ("one", "two"):
        small_notebook(tmp_path / folder / "small.ipynb", where)
    monkeypatch.chdir(tmp_path)
    assert run_notebook.main(["one/small.ipynb", "two/small.ipynb", "--out", "page"]) == 0
    assert re.findall(r"^(one|two)$", capsys.readouterr().out, re.MULTILINE) == ["one", "two"]
    left = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.*")}
    assert left == {"one/small.ipynb", "two/small.ipynb", "page/small.html"}


def test_the_page_stands_alone(tmp_path, capsys):
    """The rendered page holds its pictures, and the results are printed at the end."""
    cell = nbformat.v4.new_code_cell("print(6 * 7)", metadata={"tags": ["result"]})
    drawing = '<svg xmlns="http://www.w3.org/2000/svg"/>'
    (tmp_path / "drawing.svg").write_text(drawing)
    picture = nbformat.v4.new_markdown_cell("# Answer\n![a picture](drawing.svg)")
    small = small_notebook(tmp_path / "small.ipynb", picture, cell)
    assert run_notebook.main([small, "--out", str(tmp_path)]) == 0
    assert "Answer\n42" in capsys.readouterr().out
    page = (tmp_path / "small.html").read_text()
    assert 'src="drawing' not in page and "data:image/svg+xml" in page


def test_timings_are_quartiles_of_the_calls_after_the_first(monkeypatch):
    """A slow first call is told apart and does not move the median."""
    clock = iter([0.0, 9.0, 9.0, 9.001, 9.001, 9.003, 9.003, 9.008])
    monkeypatch.setattr(dicom_helpers.time, "perf_counter", lambda: next(clock))
    result, timing = dicom_helpers.timed(lambda: "done", repeats=3)
    assert result == "done"
    assert (timing.first, round(timing.median, 6)) == (9000.0, 2.0)


def test_hex_dump_shows_offset_bytes_and_text():
    """A row of the dump reads as hexdump -C writes it, and a short last row keeps its column."""
    dump = dicom_helpers.hex_dump(bytes(126) + b"\x00\x01DICM", 112, 64)
    assert dump.splitlines()[1] == f"00000080  {'44 49 43 4d':47}  DICM"


def test_a_document_is_shown_with_its_lists_in_a_line_and_its_texts_as_they_are(client):
    """Lists of plain values take one line each, and what looks like one in a text stays."""
    header = {"ImageType": ["DERIVED", "é [ 1 ]"], "Note": "[ a ]", "Sequence": [{"A": [1, 2]}]}
    document = json.dumps({"tail": [7, 9], "header": {**header, "Last": 1}})
    client.execute_command("JSON.SET", "file:odd", "$", document)
    shown = dicom_helpers.document_text(client, "file:odd", most=3)
    assert '"tail": [7, 9],\n' in shown
    assert '"Note": "[ a ]"' in shown and "é [ 1 ]" in shown
    assert '"A": [1, 2]' in shown
    assert "… 1 more" in shown


def test_captions_tell_lossless_from_lossy():
    """Two transfer syntaxes that differ only in being lossless do not get the same caption."""
    captions = []
    for syntax in (JPEG2000Lossless, JPEG2000):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = syntax
        captions.append(rendering.caption(dataset).splitlines()[1])
    assert captions == ["JPEG 2000 Lossless", "JPEG 2000"]


def test_a_table_shows_all_of_every_cell():
    """Long text is not shortened, numbers have their thousands set apart, also without HTML."""
    frame = pd.DataFrame({"reason": ["x" * 200], "size": [1234567], "missing": [None]})
    for text in (dicom_helpers.Table(frame)._repr_html_(), repr(dicom_helpers.Table(frame))):
        assert "x" * 200 in text and "1,234,567" in text and "size" in text


def test_an_answer_reads_well():
    """Keys are left out, dates have hyphens, and a missing date is blank."""
    dates = pd.Series([20040826, pd.NA], dtype="Int64")
    found = pd.DataFrame({"path": ["a", "b"], "key": ["file:a", "file:b"], "studyDate": dates})
    shown = repr(dicom_helpers.answer(found))
    assert "2004-08-26" in shown and "file:" not in shown and "NA" not in shown


def test_years_without_files_are_in_the_heat_map():
    """The axis of years runs from the first to the last, without a gap."""
    counts = pd.DataFrame({"2001": [3], "2004": [1]}, index=["CT"]).rename_axis(columns="studyDate")
    axes = dicom_helpers.heat_map(counts, "Files").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "2001",
        "2002",
        "2003",
        "2004",
    ]
    assert [text.get_text() for text in axes.texts] == ["3", "1"]


def test_clearing_leaves_its_neighbours(store, client):
    """Files below a folder and what a killed load left there go; names that begin alike stay."""
    for path in ("one/a.dcm", "one/deep/b.dcm", "one2/c.dcm", "zone/one/d.dcm"):
        store.put(path, dicom())
    client.set("chunk:file:one/e.dcm:0123456789ab:0", "of a load that was killed")
    assert dicom_helpers.key_counts(store, "one")["of this notebook"] > 4
    dicom_helpers.clear(store, "one")
    assert dicom_helpers.key_counts(store, "one")["of this notebook"] == 0
    assert list(store.find().path) == ["one2/c.dcm", "zone/one/d.dcm"]
    assert (store.verify().status == "ok").all()


def test_the_worklist_is_as_the_literature_has_it():
    """The last three of ten priors hold the one that is opened in 91% of cases."""
    day = list(archive.worklist(patients=3000, studies=10))[:3000]
    recent = [opening.files[0].split("/")[1] >= "s07" for opening in day]
    assert np.mean(recent) == pytest.approx(0.91, abs=0.02)


def test_a_tier_reads_from_the_slow_disk(client, tmp_path):
    """What is cold comes from the slow disk whole, and what was prefetched is there already."""
    folder = archive.write_archive(tmp_path / "files", patients=1, studies=4)
    tier = DicomStore(client, source=f"slow-disk://1{folder}", progress=False)
    tier.load(folder, pixels=False)
    recent, old = "p000/s03/0.dcm", "p000/s00/0.dcm"
    assert tier.prefetch_priors("P000", last=3).wait(60)
    assert tier.read(recent) == (folder / recent).read_bytes()
    assert tier.read(old) == (folder / old).read_bytes()
    assert (tier.hits, tier.misses) == (1, 1)
    tier.close()
