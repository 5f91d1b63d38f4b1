"""Describing files in worker processes: on all cores, whatever a file does to one of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import PYDICOM_DATA, PYDICOM_FILES
from samples import before_commit, dicom

from dicomstore import DicomStore
from dicomstore.blobs.versions import Versions
from dicomstore.errors import WorkerError
from dicomstore.imaging import describing, header, thumbnail, values, worker


def described(files, *, pixels):
    """Return what files are, by item, and see that each is answered once."""
    answers = list(describing.describe_all(files.items(), len(files), pixels))
    assert len(answers) == len(files)
    return dict(answers)


def processes():
    """Return the workers of this process that live."""
    living = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if describing.WORKER in child.cmdline():
                living.append(child)
    return living


def busy_jpeg2000():
    """Return 800 bytes that keep the JPEG 2000 decoder busy for more than a minute."""
    return (PYDICOM_FILES / "GDCMJ2K_TextGBR.dcm").read_bytes()[:800]


def greedy_jpeg():
    """Return a file whose decoder asks for more memory than a worker may have."""
    content = bytearray((PYDICOM_FILES / "SC_jpeg_no_color_transform.dcm").read_bytes())
    content[733:737] = b"\xff\xff\xff\xff"
    return bytes(content)


@pytest.mark.parametrize("pixels", [False, True])
def test_the_answers_are_those_of_one_process(pixels):
    """Workers describe every file of the corpus as its modules do in this process."""
    files = {path: path for path in sorted(PYDICOM_DATA.rglob("*")) if path.is_file()}
    answers = dict(describing.describe_all(files.items(), describing.WORTH_WORKERS, pixels))
    assert answers.keys() == files.keys()
    for path, answer in answers.items():
        with path.open("rb") as file, values.quietly():
            expected = describing.by_header(file, path.stat().st_mtime_ns)
            seen = thumbnail.of_file(file, expected.members) if expected.members else None
        assert answer == expected._replace(thumbnail=seen if pixels else None), path


def test_few_headers_are_read_here():
    """Without pixels, no process is started for few DICOM files."""
    describing.end_idle_workers()
    files = {number: dicom(Rows=number) for number in range(1, 100)}
    answers = described(files, pixels=False)
    assert {number: answer.members["rows"] for number, answer in answers.items()} == {
        number: number for number in files
    }
    assert processes() == []


def test_openslide_never_runs_here(tmp_path):
    """What begins like a slide is opened by a worker, however few files are described."""
    describing.end_idle_workers()
    (tmp_path / "a.tif").write_bytes(b"II*\0" + bytes(100))
    answer = described({"a": tmp_path / "a.tif"}, pixels=False)["a"]
    assert answer.members is None and len(processes()) == 1
    script = (
        "import sys, pathlib; from dicomstore.imaging import describing\n"
        "print(list(describing.describe_all([(1, pathlib.Path(sys.argv[1]))], 1, False)))\n"
        "assert 'openslide' not in sys.modules"
    )
    arguments = [sys.executable, "-c", script, tmp_path / "a.tif"]
    subprocess.run(arguments, check=True, timeout=60, cwd=describing.PROJECT)


def test_workers_are_light():
    """A worker imports neither pandas nor redis nor matplotlib."""
    script = (
        "import sys; import dicomstore.imaging.worker\n"
        "assert not {'pandas', 'redis', 'matplotlib', 'openslide'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, cwd=describing.PROJECT)


@pytest.mark.parametrize("hostile", [busy_jpeg2000, greedy_jpeg])
def test_a_hostile_file_costs_only_its_own_pixels(tmp_path, hostile):
    """It is described by its header, and says so; those before and behind it are not touched."""
    good = {f"good {number}": PYDICOM_FILES / "JPEG2000.dcm" for number in range(40)}
    (tmp_path / "hostile").write_bytes(hostile())
    files = dict(list(good.items())[:20]) | {"hostile": tmp_path / "hostile"} | good
    answers = described(files, pixels=True)
    bad = answers.pop("hostile")
    assert bad.given_up and bad.thumbnail is None and bad.members["rows"]
    assert all(one.thumbnail and not one.given_up for one in answers.values())


def test_a_worker_that_earlier_files_have_harmed(monkeypatch):
    """A file at which a used worker ends without a cause of its own is tried in a fresh one."""
    image = (PYDICOM_FILES / "MR_small.dcm").read_bytes()

    def waiting():
        for number in range(100):
            yield number, image

    answers = {}
    for number, answer in describing.describe_all(waiting(), 100, True):
        answers[number] = answer
        if number == 30:
            for worker in processes():
                worker.kill()
    assert sorted(answers) == list(range(100))
    assert all(answer.thumbnail and not answer.given_up for answer in answers.values())


def test_memory_is_limited():
    """A worker does not take what this process would have to give: here, a content too large."""
    content = bytes(worker.MEMORY_LIMIT + 1024**2)
    assert isinstance(described({"a": content}, pixels=True)["a"], OSError)


def test_idle_workers_that_were_killed_are_replaced():
    """The next who needs workers gets living ones."""
    described({"a": PYDICOM_FILES / "MR_small.dcm"}, pixels=True)
    idle = processes()
    for process in idle:
        process.kill()
    psutil.wait_procs(idle, timeout=10)
    assert described({"a": PYDICOM_FILES / "MR_small.dcm"}, pixels=True)["a"].thumbnail


def test_idle_workers_end(monkeypatch):
    """A worker that has had nothing to do for a while ends, and leaves neither zombie nor pipe."""
    describing.end_idle_workers()
    others, before = psutil.Process().children(), psutil.Process().num_fds()
    impatient = describing.WORKER.replace(
        "main()", "import dicomstore.imaging.worker as w; w.IDLE_LIMIT_S = 0.2; main()"
    )
    with monkeypatch.context() as patched:
        patched.setattr(describing, "WORKER", impatient)
        assert described({"a": dicom()}, pixels=True)["a"].members
        deadline = time.monotonic() + 20
        while psutil.Process().children() != others and time.monotonic() < deadline:
            time.sleep(0.05)
        assert psutil.Process().children() == others
        assert psutil.Process().num_fds() == before
        assert described({"a": dicom()}, pixels=True)["a"].members
    describing.end_idle_workers()


def test_idle_workers_can_be_ended():
    """Who has finished can end the workers, more than once; new ones start when needed."""
    described({"a": dicom()}, pixels=True)
    assert processes()
    for _ in range(2):
        describing.end_idle_workers()
        assert processes() == []
    assert described({"a": dicom()}, pixels=True)["a"].members


def test_a_fork_shares_no_workers():
    """A forked process starts workers of its own, and leaves its parent's alone and usable."""
    script = (
        "import os, threading, psutil\n"
        "from dicomstore.imaging import describing as d\n"
        "def work(n): return list(d.describe_all([(i, b'') for i in range(n)], n, True))\n"
        "work(3); parents = psutil.Process().children()\n"
        "busy = threading.Thread(target=work, args=(3000,)); busy.start()\n"
        "children = []\n"
        "for _ in range(5):\n"
        "    if not (child := os.fork()):\n"
        "        work(2); d.end_idle_workers(); d.end_idle_workers()\n"
        "        os._exit(any(p in psutil.Process().children() for p in parents))\n"
        "    children.append(child)\n"
        "assert [os.waitpid(child, 0)[1] for child in children] == [0] * 5\n"
        "busy.join(); assert set(parents) <= set(psutil.Process().children())\n"
    )  # fmt: skip
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=describing.PROJECT)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"sys/fs/cgroup/a/cpu.max": "1000 100000", "proc/self/cgroup": "0::/a/b\n"}, 1),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_the_processors_of_a_container(tmp_path, monkeypatch, files, expected):
    """A quota of control groups counts, of both versions, not the processors of the host."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert describing.cores(tmp_path) == (expected or 6)


def test_a_file_that_cannot_be_read(tmp_path):
    """The answer for a file that is gone is the system's error, and the others come."""
    for pixels in (False, True):
        files = {"gone": tmp_path / "gone", "there": PYDICOM_FILES / "MR_small.dcm"}
        answers = described(files, pixels=pixels)
        assert isinstance(answers["gone"], FileNotFoundError)
        assert answers["there"].members["modality"] == "MR"


def test_relative_paths_are_those_of_this_process(tmp_path, monkeypatch):
    """A worker that was started elsewhere finds the files of a changed working folder."""
    described({"a": PYDICOM_FILES / "MR_small.dcm"}, pixels=True)
    (tmp_path / "odd \udcff\n.dcm").write_bytes((PYDICOM_FILES / "CT_small.dcm").read_bytes())
    monkeypatch.chdir(tmp_path)
    answer = described({"a": Path("odd \udcff\n.dcm")}, pixels=True)["a"]
    assert answer.members["modality"] == "CT" and answer.thumbnail


def test_no_process_can_be_started(monkeypatch, tmp_path):
    """Pixels are then refused in a sentence; headers are read without."""
    for executable in (tmp_path / "missing", "/bin/false"):
        describing.end_idle_workers()
        monkeypatch.setattr(sys, "executable", os.fspath(executable))
        with pytest.raises(WorkerError, match="thumbnails=False"):
            described({"a": dicom()}, pixels=True)
        files = [(number, dicom()) for number in range(10)]
        answers = dict(describing.describe_all(files, describing.WORTH_WORKERS, False))
        assert len(answers) == 10 and all(answer.members for answer in answers.values())


def test_who_stops_asking_leaves_no_busy_worker():
    """Work that nobody waits for any longer ends."""
    files = {number: busy_jpeg2000() for number in range(6)}
    answers = describing.describe_all(files.items(), 6, True)
    next(answers)
    answers.close()
    assert all(process.cpu_percent(0.2) < 50 for process in processes())


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, None])
def test_workers_end_with_their_process(request, ending):
    """Also when it is killed, and without a word on standard error when it just ends."""
    code = (
        "import psutil\nfrom dicomstore.imaging import describing\n"
        "print(list(describing.describe_all([(1, b'')], 1, True)))\n"
        "print(*[child.pid for child in psutil.Process().children()], flush=True)\n"
        "input()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-X", "dev", "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=request.config.rootpath,
    )  # fmt: skip
    with owner:
        owner.stdout.readline()
        children = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
        assert children
        if ending:
            owner.send_signal(ending)
        _, errors = owner.communicate("\n")
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert gone and not alive
    assert ending or not errors, errors


# --- loading with them ---------------------------------------------------------------------------


def test_a_hostile_file_is_loaded_all_the_same(store, tmp_path):
    """Its bytes are stored, the report says what it lacks, and the load goes on."""
    (tmp_path / "a.dcm").write_bytes(greedy_jpeg())
    (tmp_path / "b.dcm").write_bytes((PYDICOM_FILES / "MR_small.dcm").read_bytes())
    rows = store.load(tmp_path).set_index("path")
    assert list(rows["status"]) == ["loaded", "loaded"]
    assert "too much" in rows["reason"]["a.dcm"] and rows["reason"]["b.dcm"] == ""
    assert store.read("a.dcm") == greedy_jpeg()
    assert store.similar("b.dcm", 5).empty


def test_an_interrupted_load_goes_on_where_it_stopped(store, client, tmp_path, monkeypatch):
    """What was stored before is not sent again, nor its header read; the rest is."""
    for number in range(20):
        (tmp_path / f"{number:02}").write_bytes(dicom(Rows=number))
    committed = []

    def interrupt(manifest):
        if len(committed) == 8:
            raise KeyboardInterrupt
        committed.append(manifest)

    # As large as this, each file is committed by itself.
    monkeypatch.setattr("dicomstore.loading.TOGETHER_BYTES", 1)
    with before_commit(interrupt), pytest.raises(KeyboardInterrupt):
        store.load(tmp_path)
    plain = DicomStore(client, progress=False, thumbnails=False)
    client.config_resetstat()
    members, read = header.members, []
    monkeypatch.setattr(header, "members", lambda each: read.append(each) or members(each))
    report = plain.load(tmp_path)
    assert report["status"].value_counts().to_dict() == {"loaded": 12, "unchanged": 8}
    assert len(read) == 12
    assert client.info("commandstats")["cmdstat_json.set"]["calls"] == 12
    assert plain.verify()["status"].eq("ok").all() and len(plain.sweep()) == 0


def test_what_was_stored_without_a_thumbnail_gets_it(client, store, tmp_path, monkeypatch):
    """Loaded again with thumbnails, a file is unchanged and can be compared; once is enough."""
    for name in ("MR_small.dcm", "CT_small.dcm", "rtplan.dcm"):
        (tmp_path / name).write_bytes((PYDICOM_FILES / name).read_bytes())
    without = DicomStore(client, progress=False, thumbnails=False)
    without.load(tmp_path)
    versions = [without.manifest(name).version for name in os.listdir(tmp_path)]
    assert list(store.load(tmp_path)["status"]) == ["unchanged"] * 3
    assert list(store.similar("MR_small.dcm")["path"]) == ["CT_small.dcm"]
    assert [store.manifest(name).version for name in os.listdir(tmp_path)] == versions
    asked = []

    def describe_all(files, *arguments):
        asked.extend(files)
        return describing.describe_all(iter(asked), *arguments)

    monkeypatch.setattr("dicomstore.loading.describe_all", describe_all)
    assert list(store.load(tmp_path)["status"]) == ["unchanged"] * 3
    assert asked == []


def test_a_thumbnail_never_reaches_a_different_version(client, store, tmp_path, monkeypatch):
    """A file that is replaced before its thumbnail is added keeps that of its own."""
    first, second = (PYDICOM_FILES / name for name in ("MR_small.dcm", "CT_small.dcm"))
    (tmp_path / "a").write_bytes(first.read_bytes())
    without = DicomStore(client, progress=False, thumbnails=False)
    without.load(tmp_path)
    set_member = Versions.set_member

    def replaced_meanwhile(self, *arguments):
        without.put("a", second.read_bytes(), replace=True)
        set_member(self, *arguments)

    monkeypatch.setattr(Versions, "set_member", replaced_meanwhile)
    store.load(tmp_path)
    assert client.execute_command("JSON.GET", "file:a", "$.thumbnail") == b"[]"
    assert store.read("a") == second.read_bytes()


def test_progress_in_files_and_bytes(client, tmp_path, capsys):
    """The bar ends at all files and all bytes, skipped and unchanged ones among them."""
    (tmp_path / "a.dcm").write_bytes(dicom(pixels=bytes(3_000_000)))
    (tmp_path / "b.txt").write_bytes(bytes(1024 * 1024))
    for _ in range(2):
        DicomStore(client).load(tmp_path)
        last = capsys.readouterr().out.rstrip().rsplit("\r", 1)[-1]
        assert "100%" in last and "3.86M/3.86M" in last and "2 of 2 files" in last
