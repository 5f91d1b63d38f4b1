"""Which files are restored and verified, and where they may be written on any system."""

import os

import pytest
from samples import dicom, sha256_of

from dicomstore import DicomStore, restoring
from dicomstore.errors import NotStoredError
from dicomstore.keys import document_key, parts_below

PATHS = ["a", "cd1/a", "cd1/sub/b", "cd10/a", "cd2/c"]


@pytest.fixture
def filled(store):
    """A store with files in several folders."""
    for number, path in enumerate(PATHS):
        store.put(path, dicom(Rows=number, Modality="MR" if path.startswith("cd1/") else "CT"))
    return store


def written(folder):
    return sorted(sha256_of(folder)) if folder.exists() else []


def test_everything_by_default(filled, tmp_path):
    """Without a choice every file is verified and restored."""
    assert filled.verify()["path"].tolist() == PATHS
    assert filled.restore(tmp_path)["path"].tolist() == written(tmp_path) == PATHS


@pytest.mark.parametrize(
    ("under", "expected"),
    [
        ("cd1", ["cd1/a", "cd1/sub/b"]),
        ("/cd1/", ["cd1/a", "cd1/sub/b"]),
        ("cd1/sub", ["cd1/sub/b"]),
        ("cd", []),
        ("a", []),
    ],
)
def test_one_folder_of_the_store(filled, tmp_path, under, expected):
    """`under` means the files in this folder of the store, not those whose names begin like it."""
    assert filled.verify(under=under)["path"].tolist() == expected
    report = filled.restore(tmp_path, under=under)
    assert report["path"].tolist() == written(tmp_path) == expected
    assert list(report.columns) == ["path", "key", "size", "status", "reason"]


def test_names(filled, tmp_path):
    """Keys, paths, imageNames, single ones and lists choose their own files."""
    for names, expected in (
        (["cd2/c", "file:a"], ["cd2/c", "a"]),
        ("b", ["cd1/sub/b"]),
        ([], []),
    ):
        assert filled.verify(names)["path"].tolist() == expected
        assert filled.restore(tmp_path / "out", names)["path"].tolist() == expected
        assert written(tmp_path / "out") == sorted(expected)
        for path in expected:
            (tmp_path / "out" / path).unlink()
    with pytest.raises(NotStoredError, match="nowhere"):
        filled.restore(tmp_path / "out", ["a", "nowhere"])
    assert written(tmp_path / "out") == []


def test_tables(filled, tmp_path):
    """What a search found, or a row of it, is restored, and nothing else; with `under` of these."""
    table = filled.find(modality="MR")
    assert filled.verify(table)["status"].tolist() == ["ok", "ok"]
    assert filled.restore(tmp_path, table.iloc[[1]])["path"].tolist() == ["cd1/sub/b"]
    assert written(tmp_path) == ["cd1/sub/b"]
    report = filled.restore(tmp_path, filled.find(), under="cd1")
    assert dict(zip(report["path"], report["status"], strict=True)) == {
        "cd1/a": "restored", "cd1/sub/b": "skipped",
    }  # fmt: skip
    assert filled.restore(tmp_path, filled.find(modality="US")).empty
    with pytest.raises(TypeError, match="column 'key'"):
        filled.restore(tmp_path, table[["path"]])


def test_the_report_of_a_load_is_a_table_too(store, tmp_path):
    """What a load stored can be verified by its report; skipped files have no key."""
    (tmp_path / "a").write_bytes(dicom())
    (tmp_path / "b").write_text("no image")
    store.put("other", dicom())
    assert store.verify(store.load(tmp_path))["path"].tolist() == ["a"]


def test_a_name_given_twice_is_restored_once(filled, tmp_path):
    """One file, one row, whatever it is called."""
    assert filled.restore(tmp_path, ["a", "file:a", "a"])["status"].tolist() == ["restored"]


# --- other systems -------------------------------------------------------------------------------

UNSAFE_ON_WINDOWS = [
    "..\\x", "a\\b", "\\x", "C:x", "C:", "C:\\x", "file.dcm:stream", "a/CON", "con", "Con.dcm",
    "nul.tar.gz", "AUX ", "PRN", "COM1", "com9.dcm", "LPT3.x", "COM¹", "CONIN$", "CONOUT$",
    "trailing.", "trailing ", "a./b", "a /b", "a?b", "a*b", "a<b", "a>b", 'a"b', "a|b", "a\tb",
    "a\x01b", "a\nb",
]  # fmt: skip
SAFE = ["a/b", "console", "nullify.dcm", "COM10", "COM", "a.CON", "..a", ".hidden", "a b", "日本",
        "é", "x" * 200, "a.b.c", "-", "~", "a;b", "it's"]  # fmt: skip


@pytest.mark.parametrize("path", UNSAFE_ON_WINDOWS)
def test_names_that_mean_something_else_on_windows(path):
    """Backslashes, drives, streams, devices and endings that Windows drops are refused there."""
    with pytest.raises(PermissionError, match="does not name a file below the folder") as caught:
        parts_below(document_key(path), windows=True)
    assert repr(path) in str(caught.value)
    assert parts_below(document_key(path), windows=False) == path.split("/")


@pytest.mark.parametrize("path", SAFE)
def test_names_that_are_harmless_everywhere(path):
    """What only looks like one of them is written as it is."""
    for windows in (True, False):
        assert parts_below(document_key(path), windows=windows) == path.split("/")


CASES = ["A.dcm", "B/x", "Straße", "a.dcm", "b/X", "c", "strasse"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_names_that_differ_only_by_case(store, tmp_path, monkeypatch, overwrite):
    """Where upper and lower case are the same, the second of two such files is refused by name."""
    for number, path in enumerate(CASES):
        store.put(path, dicom(Rows=number))
    monkeypatch.setattr(restoring, "folds_case", lambda folder: True)
    rows = store.restore(tmp_path, overwrite=overwrite).set_index("path")
    refused = {"a.dcm": "A.dcm", "b/X": "B/x", "strasse": "Straße"}
    assert rows.index[rows["status"] == "skipped"].tolist() == list(refused)
    for path, other in refused.items():
        assert f"the same name as {other}" in rows["reason"][path]
    assert written(tmp_path) == sorted(set(CASES) - set(refused))
    assert (tmp_path / "A.dcm").read_bytes() == dicom(Rows=0)


def test_a_name_is_taken_only_by_what_was_written(store, client, tmp_path, monkeypatch):
    """If the first of two such files is damaged, the second is written."""
    for number, path in enumerate(CASES[::3]):
        store.put(path, dicom(Rows=number))
    client.set(store.manifest("A.dcm").chunk_key(0), b"damage")
    monkeypatch.setattr(restoring, "folds_case", lambda folder: True)
    rows = store.restore(tmp_path).set_index("path")
    assert rows["status"].to_dict() == {
        "A.dcm": "damaged", "a.dcm": "restored", "strasse": "restored",
    }  # fmt: skip
    assert (tmp_path / "a.dcm").read_bytes() == dicom(Rows=1)


def test_names_that_differ_by_case_here(store, tmp_path):
    """On this file system both are written, if it tells upper from lower case, and else one."""
    for number, path in enumerate(CASES):
        store.put(path, dicom(Rows=number))
    rows = store.restore(tmp_path / "out", overwrite=True).set_index("path")
    if restoring.folds_case(tmp_path):
        assert rows["status"]["A.dcm"] == "restored" and rows["status"]["a.dcm"] == "skipped"
    else:
        assert rows["status"].eq("restored").all() and written(tmp_path / "out") == CASES
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".restore")]


def test_sources_refuse_such_names_too(client, tmp_path, monkeypatch):
    """A tier never opens a path in its source that means something else there."""
    monkeypatch.setattr(parts_below, "__kwdefaults__", {"windows": True})
    (tmp_path / "nul").write_bytes(dicom())
    (tmp_path / "plain").write_bytes(dicom())
    tier = DicomStore(client, progress=False, source=tmp_path)
    with pytest.raises(NotStoredError):
        tier.read("nul")
    assert tier.read("plain") == dicom()
