"""The speed test, as a person runs it from a shell."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from samples import dicom

import svs_speed_test
from demo.slide import write_sample_slide
from dicomstore import DicomStore
from dicomstore.errors import ServerError

SCRIPT = Path(svs_speed_test.__file__)


@pytest.fixture(scope="session")
def slide(tmp_path_factory):
    return write_sample_slide(tmp_path_factory.mktemp("slides") / "test.svs", size=5_000_000)


@pytest.fixture
def run(server, client, capsys):
    """Run the script's main against the test server; give exit code, output and errors."""

    def run(*arguments):
        code = svs_speed_test.main(["--url", server.url, *map(str, arguments)])
        written = capsys.readouterr()
        return code, written.out, written.err

    return run


def test_the_published_lines_come_out_to_the_letter(run, slide, client):
    """Banner, sizes, key, times, bytes and integrity read as published; nothing is left."""
    code, output, _ = run(slide, "--chunk_size", 30, "--connections", 100)
    assert code == 0
    size = slide.stat().st_size
    published = rf"""
\*\*\* File Retrieval Test - 30 KB Chunks, 100 Client Connections \*\*\*
test\.svs Size: {size / 1024**2:.2f} MB
Files loaded: 1

Key: file:svs_speed_test/test\.svs
Exec time: \d+\.\d\d ms
Bytes Retrieved: {size}
File integrity check:  Pass
(.+\n)+
Total time: \d+\.\d\d ms
"""
    assert re.match(published, output), output
    assert client.dbsize() == 0


def test_every_slide_below_a_folder_is_tested(run, slide, tmp_path):
    """All slides below a folder are loaded, what is no slide is not, and the times add up."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.svs").write_bytes(slide.read_bytes())
    (tmp_path / "b.svs").write_bytes(slide.read_bytes())
    (tmp_path / "notes.txt").write_text("no slide")
    code, output, _ = run(tmp_path, "--json")
    found = json.loads(output)
    assert code == 0
    assert [file["key"] for file in found["files"]] == [
        "file:svs_speed_test/b.svs",
        "file:svs_speed_test/a.svs",
    ]
    assert found["total_ms"] == pytest.approx(sum(file["exec_ms"] for file in found["files"]))
    assert found["files"][0]["level_count"] == 4 and found["files"][0]["passed"] is True


def test_repeated_retrievals_give_their_median(run, slide):
    """--repeat 3 retrieves three times, and the exec time is the middle one."""
    _, output, _ = run(slide, "--repeat", 3, "--json")
    (file,) = json.loads(output)["files"]
    assert len(file["runs_ms"]) == 3
    assert file["exec_ms"] == sorted(file["runs_ms"])[1]


def test_the_retrieved_file_is_kept_where_asked(run, slide, tmp_path):
    """--output retrieves into a file that is the same as the slide."""
    code, output, _ = run(slide, "--output", tmp_path / "new" / "folder")
    assert code == 0 and "Pass" in output
    assert (tmp_path / "new" / "folder" / "test.svs").read_bytes() == slide.read_bytes()


def test_what_was_there_stays(run, slide, client):
    """A slide of the same name that the user has stored is neither replaced nor cut anew."""
    theirs = dicom(pixels=bytes(5000))
    DicomStore(client, chunk_size=1000, progress=False).put("test.svs", theirs)
    before = {key: client.dump(key) for key in client.scan_iter()}
    code, _, _ = run(slide, "--chunk_size", "30")
    assert code == 0
    assert {key: client.dump(key) for key in client.scan_iter()} == before


def test_the_slide_stays_in_redis_where_asked(run, slide, client):
    """--keep leaves the slide in a folder of its own, also when the test runs again without."""
    run(slide, "--keep")
    store = DicomStore(client, progress=False)
    assert store.read("svs_speed_test_kept/test.svs") == slide.read_bytes()
    run(slide)
    assert list(store.find()["path"]) == ["svs_speed_test_kept/test.svs"]


def test_a_test_that_broke_off_is_cleaned_up(run, slide, client):
    """What an earlier test left, a document or chunks alone, is gone after the next one."""
    DicomStore(client, progress=False).load(slide, under="svs_speed_test")
    client.set("chunk:file:svs_speed_test/other.svs:0123456789ab:0", b"left over")
    code, _, _ = run(slide)
    assert code == 0 and client.dbsize() == 0


@pytest.mark.parametrize("linked", [False, True])
def test_output_never_overwrites_the_slide(run, slide, tmp_path, linked):
    """--output into the slide's own folder, also through a link, is refused and changes nothing."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "test.svs").write_bytes(slide.read_bytes())
    target = own
    if linked:
        target = tmp_path / "link"
        target.symlink_to(own)
    code, _, errors = run(own / "test.svs", "--output", target)
    assert code == 2 and "would overwrite" in errors and len(errors.splitlines()) == 1
    assert (own / "test.svs").read_bytes() == slide.read_bytes()


def test_a_failed_transfer_leaves_no_file(run, slide, tmp_path, monkeypatch):
    """A transfer that breaks off leaves neither part of the slide nor a changed older file."""

    async def broken(self, chunks, write, **options):
        write(b"a part")
        raise ServerError("A connection to Redis was lost. Try again.")

    (tmp_path / "test.svs").write_bytes(b"older")
    monkeypatch.setattr(svs_speed_test.ChunkStream, "copy", broken)
    code, _, errors = run(slide, "--output", tmp_path)
    assert code == 1 and "was lost" in errors
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["test.svs"]
    assert (tmp_path / "test.svs").read_bytes() == b"older"


def test_a_changed_byte_fails_the_test(run, slide, client, monkeypatch):
    """'Pass' means compared: a byte that comes back changed makes it Fail, and exit code 1."""
    fetch = svs_speed_test.ChunkStream.fetch

    async def changed(self, chunks, buffer, **options):
        await fetch(self, chunks, buffer, **options)
        buffer[1000] ^= 1

    monkeypatch.setattr(svs_speed_test.ChunkStream, "fetch", changed)
    code, output, _ = run(slide)
    assert code == 1 and "File integrity check:  Fail" in output


def test_a_slide_is_made_where_there_is_none(run, tmp_path, monkeypatch, capsys):
    """Without slides one is made, of the size asked for, and used again the next time."""
    monkeypatch.setattr(svs_speed_test, "SLIDES_FOLDER", tmp_path)
    code, _, errors = run("--sample_size", 2)
    assert code == 0 and "making one of 2 MB" in errors
    code, output, errors = run("--sample_size", 7)
    assert "sample_2MB.svs Size: 2.0" in output and "making" not in errors


def test_a_slide_that_does_not_fit_is_not_made(run, tmp_path, monkeypatch):
    """Too little free memory ends in one sentence that names the option."""
    monkeypatch.setattr(svs_speed_test, "SLIDES_FOLDER", tmp_path)
    code, _, errors = run("--sample_size", 10_000_000)
    assert code == 1 and "--sample_size" in errors and len(errors.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--chunk_size", "0"], "--chunk_size"),
        (["--chunk_size", "1e6"], "16384 KB"),
        (["--connections", "-1"], "--connections"),
        (["--connections", "many"], "--connections"),
        (["--repeat", "0"], "--repeat"),
        (["--speed"], "--speed"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments, words, capsys):
    """A wrong option exits with 2 and names itself."""
    with pytest.raises(SystemExit) as caught:
        svs_speed_test.main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_paths_that_cannot_be_are_refused(run, tmp_path):
    """A path that is missing or is no slide exits with 2 and names itself."""
    code, _, errors = run(tmp_path / "nothing.svs")
    assert code == 2 and "nothing.svs" in errors
    (tmp_path / "plain.svs").write_bytes(b"II*\0 but no more")
    code, _, errors = run(tmp_path / "plain.svs")
    assert code == 2 and "plain.svs" in errors and len(errors.splitlines()) == 1


def test_a_server_that_is_not_there_is_one_sentence(slide, capsys):
    """No traceback, no password: exit code 1 and what to check."""
    code = svs_speed_test.main([str(slide), "--url", "redis://:planted@127.0.0.1:1"])
    errors = capsys.readouterr().err
    assert code == 1 and "Check the URL" in errors
    assert "planted" not in errors and len(errors.splitlines()) == 1


def test_more_connections_than_the_server_allows_end_in_one_sentence(slide, capsys):
    """Asking for 200 connections of a server that allows 50 fails at once and leaves no key."""
    from dicomstore import connect
    from dicomstore.server.embedded import RedisServer

    with RedisServer(config=["maxclients 50"]) as small:
        code = svs_speed_test.main([str(slide), "--url", small.url, "--connections", "200"])
        assert connect(small.url).dbsize() == 0
    errors = capsys.readouterr().err
    assert code == 1 and "clients" in errors
    assert len(errors.splitlines()) == 1


def test_the_grid_draws_every_cell_and_marks_the_best(run, slide, tmp_path, monkeypatch):
    """--grid measures all cells and writes the heat map."""
    monkeypatch.setattr(svs_speed_test, "GRID_FILE", tmp_path / "grid.png")
    monkeypatch.setattr(svs_speed_test, "GRID_CHUNKS_KB", (30, 256))
    monkeypatch.setattr(svs_speed_test, "GRID_CONNECTIONS", (1, 4))
    code, output, _ = run(slide, "--grid")
    assert code == 0
    assert len(re.findall(r"KB chunks, +\d+ connections", output)) == 4
    assert re.search(r"Best: --chunk_size (30|256) --connections (1|4),", output)
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def fetched(client):
    """How many times chunks have been asked for."""
    return client.info("commandstats").get("cmdstat_mget", {}).get("calls", 0)


def test_ctrl_c_leaves_nothing_behind(server, client, slide, tmp_path):
    """An interrupt in the middle of the retrievals: exit code 130, no key, no file, no process."""
    script = subprocess.Popen(
        [sys.executable, SCRIPT, slide, "--url", server.url, "--repeat", "100000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    client.config_resetstat()
    deadline = time.monotonic() + 60
    while fetched(client) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    script.send_signal(signal.SIGINT)
    _, errors = script.communicate(timeout=60)
    assert script.returncode == 130
    assert "Traceback" not in errors and "Stopped" in errors
    assert client.dbsize() == 0


def test_help_explains_with_examples(capsys):
    """--help names every option and shows commands."""
    with pytest.raises(SystemExit):
        svs_speed_test.main(["--help"])
    text = capsys.readouterr().out
    options = "chunk_size connections sample_size repeat json output keep url timeout grid"
    assert all(f"--{option}" in text for option in options.split())
    assert "python svs_speed_test.py --chunk_size 30 --connections 1000" in text
