"""The notebook, whole: as committed, and as it runs."""

import json
import statistics
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import JPEG2000, JPEG2000Lossless

import dicom_helpers
from demo import run_notebook
from dicomstore.imaging import rendering

NOTEBOOK = nbformat.read(run_notebook.NOTEBOOK, as_version=4)
CODE_CELLS = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def executed() -> nbformat.NotebookNode:
    notebook = nbformat.read(run_notebook.NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    run_notebook.run(notebook, quiet=True)
    return notebook


def test_it_runs_from_top_to_bottom_with_the_published_answers(executed):
    """Every cell runs, and the scenarios give the figures published for pydicom's files."""
    first, second, third = run_notebook.results(executed)[:3]
    assert "JPGExtended.dcm: 9,844 bytes" in first
    assert "J2K_pixelrep_mismatch.dcm: 138,518 bytes" in second
    for line in ("ANGIO Projected from C    7", "T/S/C RF FAST PILOT       6", "194  "):
        assert line in third


def test_it_cleans_up_after_itself(executed):
    """The last cell sees as many keys as there were before the load."""
    last = [cell for cell in executed.cells if cell.cell_type == "code"][-1]
    assert "0 keys now, 0 before" in last.outputs[0].text


def test_figures_are_drawn(executed):
    """Gallery, the images of scenarios 1 and 2 and the bar chart of 3 are pictures."""
    drawn = [
        output
        for cell in executed.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(drawn) >= 4


def test_committed_outputs_are_of_one_clean_run():
    """Execution counts run from 1 to n, no output is an error, none names a folder of a machine."""
    assert [cell.execution_count for cell in CODE_CELLS] == list(range(1, len(CODE_CELLS) + 1))
    for cell in CODE_CELLS:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert "/site-packages" not in text and str(Path.home()) not in text


def test_cells_are_short():
    """Half of the cells have three lines or fewer, and none has more than fifteen."""
    lengths = [len([line for line in c.source.splitlines() if line.strip()]) for c in CODE_CELLS]
    assert statistics.median(lengths) <= 3
    assert max(lengths) <= 15


def test_a_failing_cell_fails_the_run(monkeypatch, tmp_path, capsys):
    """A cell that raises ends the run with exit code 1 and the cell's error."""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("raise OSError('no disk')")]
    )
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    monkeypatch.setattr("demo.run_notebook.NOTEBOOK", tmp_path / "broken.ipynb")
    assert run_notebook.main(["--out", str(tmp_path)]) == 1
    assert "no disk" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


def test_the_page_stands_alone(monkeypatch, tmp_path, capsys):
    """The rendered page holds its pictures, and the results are printed at the end."""
    cell = nbformat.v4.new_code_cell("print(6 * 7)", metadata={"tags": ["result"]})
    picture = "# Answer\n![a picture](images/architecture-low.svg)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(picture), cell])
    nbformat.write(notebook, tmp_path / "small.ipynb")
    monkeypatch.setattr("demo.run_notebook.NOTEBOOK", tmp_path / "small.ipynb")
    assert run_notebook.main(["--out", str(tmp_path)]) == 0
    assert "Answer\n42" in capsys.readouterr().out
    page = (tmp_path / "small.html").read_text()
    assert 'src="images/' not in page and "data:image/svg+xml" in page


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
