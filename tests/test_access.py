"""Whom the store lets in and how: URLs, TLS, ACL users, servers that lack something."""

import logging
import os
import re
import socket
import subprocess
import threading
import traceback
from pathlib import Path

import pytest
import redis
from conftest import PYDICOM_FILES
from samples import before_commit, dicom, element
from test_web import get, serving

from dicomstore import DicomStore, connect, not_, words
from dicomstore.blobs.chunks import Chunks
from dicomstore.blobs.versions import Versions
from dicomstore.errors import DicomRedisError, ServerError
from dicomstore.server.connection import Server
from dicomstore.server.embedded import RedisServer, _free_port

PASSWORD = "s3cret-p/w#ord"
QUOTED = "s3cret-p%2Fw%23ord"


def works(url):
    """Store, find and read one file through `url`."""
    with connect(url) as client:
        store, image = DicomStore(client, progress=False), dicom(Modality="CT")
        store.put("a/works.dcm", image)
        found = list(store.find(modality="CT", imageName="works.dcm")["path"])
        assert found == ["a/works.dcm"] and store.read("works.dcm") == image
        store.delete("works.dcm")
    return True


# --- ways in -------------------------------------------------------------------------------------


def test_redis_url_names_the_server(server, monkeypatch):
    """`connect()` goes to the server of REDIS_URL; each call gives another client of it."""
    monkeypatch.setenv("REDIS_URL", server.url)
    with connect() as one, connect() as two:
        assert one is not two
        assert one.info("server")["run_id"] == two.info("server")["run_id"]
        assert one.info("server")["tcp_port"] == server.port


def test_a_password_with_special_characters(server, client):
    """A password and a user, percent-encoded in the URL, are understood."""
    client.execute_command("ACL", "SETUSER", "someone", "on", f">{PASSWORD}", "~*", "+@all")
    try:
        assert works(f"redis://someone:{QUOTED}@127.0.0.1:{server.port}")
        assert works(f"redis://someone:{QUOTED}@localhost:{server.port}/0")
    finally:
        client.acl_deluser("someone")


@pytest.fixture(scope="module")
def many_doors(tmp_path_factory):
    """A server with a unix socket and a TLS port beside the plain one, and its CA's certificate."""
    folder = tmp_path_factory.mktemp("doors")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    # From Python 3.13 on, TLS takes only an authority whose certificate says what it is for.
    signs = ["-addext", "keyUsage = critical, keyCertSign"]
    openssl("req", "-x509", *key, *signs, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=us")
    openssl("req", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=redis")
    (folder / "names").write_text(
        "subjectAltName = IP:127.0.0.1, DNS:localhost\nauthorityKeyIdentifier = keyid\n"
    )
    openssl(
        "x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key",
        "-CAcreateserial", "-out", "server.crt", "-extfile", "names",
    )  # fmt: skip
    doors = [
        f"unixsocket {folder}/socket",
        "unixsocketperm 700",
        f"tls-port {_free_port()}",
        f"tls-cert-file {folder}/server.crt",
        f"tls-key-file {folder}/server.key",
        f"tls-ca-cert-file {folder}/ca.crt",
        "tls-auth-clients no",
    ]
    with RedisServer(config=doors) as running:
        running.folder_of_doors = folder
        running.tls_port = int(doors[2].split()[1])
        yield running


def test_a_unix_socket(many_doors):
    """A unix socket with a password in the URL works."""
    path = many_doors.folder_of_doors / "socket"
    assert works(f"unix://{path}?password={many_doors.password}")


def test_tls_with_a_private_authority(many_doors):
    """TLS works where the CA is named, by address and by host name."""
    authority = f"ssl_ca_certs={many_doors.folder_of_doors}/ca.crt"
    for host in ("127.0.0.1", "localhost"):
        address = f"{host}:{many_doors.tls_port}"
        assert works(f"rediss://default:{many_doors.password}@{address}?{authority}")


def test_tls_with_an_unknown_authority(many_doors):
    """Without that CA, the certificate is refused, in one sentence without the password."""
    url = f"rediss://default:{many_doors.password}@127.0.0.1:{many_doors.tls_port}"
    for address in (url, f"{url}?ssl_ca_certs=/nowhere/ca.crt"):
        with pytest.raises(ServerError, match=r"Check the URL\.$") as caught:
            connect(address)
        assert_no_secret(caught.value, many_doors.password)


# --- what is refused, and how --------------------------------------------------------------------


def assert_no_secret(error, *secrets):
    """What a user may see of an error, its whole chain included, holds none of the secrets."""
    shown = "".join(traceback.format_exception(error)) + repr(error)
    # A traceback quotes the lines of this file too; no secret is spelled out there.
    assert not [secret for secret in secrets if secret in shown]
    assert "\n" not in str(error)


def test_a_wrong_password(server):
    """A wrong user or password is told as such and not repeated."""
    wrong = "wr0ng" + server.password[:8]
    for user in ("default", "nobody", ""):
        with pytest.raises(ServerError, match="wrong or missing") as caught:
            connect(f"redis://{user}:{wrong}@127.0.0.1:{server.port}")
        assert_no_secret(caught.value, wrong)
    with pytest.raises(ServerError, match="wrong or missing"):
        connect(f"redis://127.0.0.1:{server.port}")


def test_a_server_that_is_not_there(tmp_path):
    """A closed port, a host that does not exist and a missing socket are one sentence each."""
    secret = "s3cret" + "-password"
    for url in (
        f"redis://:{secret}@127.0.0.1:{_free_port()}",
        f"unix://{tmp_path}/none?password={secret}",
    ):
        with pytest.raises(ServerError, match=r"^Redis cannot be used: .*the URL\.$") as caught:
            connect(url)
        assert_no_secret(caught.value, secret)


@pytest.mark.parametrize(
    "tail", ["pa/ss@host:1", "pa]ss[@host", "pass@host:port", "pass@host?unknown=option"]
)
def test_a_url_that_cannot_be_read(tail):
    """A URL with an unescaped password or an unknown option says how to write one."""
    secret = "s3cr" + "et"
    with pytest.raises(ServerError, match="The URL cannot be read: write it as") as caught:
        connect(f"redis://user:{secret}{tail}")
    assert_no_secret(caught.value, secret)


def test_whose_url_it_is(server, monkeypatch):
    """An error names REDIS_URL where the URL came from there, and else speaks of the URL."""
    closed = f"redis://127.0.0.1:{_free_port()}"
    for url, refused in ((closed, "cannot be used"), ("http://x", "cannot be read"),
                         (f"redis://127.0.0.1:{server.port}", "wrong or missing")):  # fmt: skip
        with pytest.raises(ServerError, match=refused) as caught:
            connect(url)
        assert "REDIS_URL" not in str(caught.value) and "the url" in str(caught.value).lower()
        monkeypatch.setenv("REDIS_URL", url)
        with pytest.raises(ServerError, match=refused) as caught:
            connect()
        assert "REDIS_URL" in str(caught.value)
        monkeypatch.delenv("REDIS_URL")


def test_another_scheme_than_redis():
    """Something that is no Redis URL at all is refused the same way."""
    with pytest.raises(ServerError, match="The URL cannot be read"):
        connect("http://127.0.0.1")


def test_a_server_that_speaks_no_redis():
    """Another program behind the port is an error, not a hang."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]

        def answer():
            for _ in range(8):
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(ServerError, match="Redis cannot be used"):
            connect(f"redis://127.0.0.1:{port}")
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_another_database_number(server):
    """A database number other than 0 is refused: the index would answer from database 0."""
    with (
        connect(f"{server.url}/1") as client,
        pytest.raises(ServerError, match=r"Database 1 cannot be used.*database 0"),
    ):
        DicomStore(client)


class Lacking(RedisServer):
    """The embedded server without some of its modules."""

    def __init__(self, *missing):
        super().__init__()
        self.missing = missing

    def _configuration(self):
        lines = super()._configuration().splitlines(keepends=True)
        return b"".join(line for line in lines if not any(name in line for name in self.missing))


@pytest.mark.parametrize(
    ("missing", "engine"),
    [
        ([b"redisearch", b"rejson"], "no search engine"),
        ([b"redisearch"], "no search engine"),
        ([b"rejson"], "no JSON engine"),
    ],
)
def test_a_server_without_an_engine(missing, engine, tmp_path):
    """A server without search or JSON says which, and what to use instead."""
    (tmp_path / "a.dcm").write_bytes(dicom())
    with Lacking(*missing) as plain, connect(plain.url) as client:
        store = DicomStore(client, progress=False)
        for action in (
            lambda: store.load(tmp_path),
            lambda: store.put("a", dicom()),
            store.find,
            lambda: store.count_by("modality"),
        ):
            with pytest.raises(ServerError, match=f"{engine}.*docker compose up -d"):
                action()
        if b"rejson" in missing:
            with pytest.raises(ServerError, match=r"no JSON engine.*docker compose up -d"):
                store.read("a.dcm")
        assert not set(client.scan_iter())


@pytest.mark.parametrize(
    "options",
    [
        {"decode_responses": True},
        {"protocol": 2},
        {"decode_responses": True, "protocol": 2},
        {"protocol": 3, "legacy_responses": False},
    ],
    ids=str,
)
def test_clients_of_other_settings(server, client, options):
    """A client that decodes responses or speaks another protocol is copied, and stays as it was."""
    with redis.Redis.from_url(server.url, **options) as theirs:
        store = DicomStore(theirs, progress=False)
        image = dicom(Modality="CT", pixels=bytes(range(256)))
        store.put("a.dcm", image)
        assert store.read("a.dcm") == image
        assert list(store.find(modality="CT")["path"]) == ["a.dcm"]
        assert store.count_by("modality").to_dict() == {"CT": 1}
        assert store.verify()["status"].eq("ok").all()
        assert theirs.get("nothing") is None
        theirs.set("foreign", "x")
        assert theirs.get("foreign") == ("x" if options.get("decode_responses") else b"x")


# --- the two ACL rules ---------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "security.md"
APP, OWNER = re.findall(r"^ACL SETUSER .*$", PAGE.read_text(), re.MULTILINE)
SEVERAL = (PYDICOM_FILES / "SC_rgb_rle_16bit_2frame.dcm").read_bytes()
OWNER_ALSO = OWNER.split()[len(APP.split()) :]


def set_user(client, rule, *more):
    client.execute_command(*rule.split(), *more)


def whole_run(client, folder, out):
    """Do everything that the rules are for; raise if anything fails or differs."""
    store, lost = DicomStore(client, chunk_size=1000, progress=False), []

    def lose(manifest):
        if not lost:  # the lease of the first load, as when another process sweeps too early
            lost.append(client.unlink(manifest.lease))

    with before_commit(lose):
        assert list(store.load(folder)["status"]) == ["loaded", "loaded"]
    assert list(store.load(folder)["status"]) == ["unchanged", "unchanged"]
    store.put("a.dcm", dicom(Modality="MR"))
    assert list(store.find(modality="MR")["path"]) == ["a.dcm"]
    assert store.count_by("imageName").to_dict() == {"a.dcm": 1, "b.dcm": 1}
    uids = {"StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.3"}
    store.put("served.dcm", dicom(**uids, Rows=2, Columns=2, pixels=bytes(4)))
    with serving(store) as address:
        assert get(address, "/studies?PatientID=*nobody*")[0] == 204
        for path in ("/studies", "/studies/1.2/metadata", "/studies/1.2", "/studies/1.2/series"):
            assert get(address, path)[0] == 200
    store.delete("served.dcm")
    assert store.read("b.dcm") == (folder / "b.dcm").read_bytes()
    assert store.verify()["status"].tolist() == ["ok", "ok"]
    assert store.restore(out)["status"].tolist() == ["restored", "restored"]
    store.delete("a.dcm")
    client.set("chunk:file:b.dcm:0123456789ab:0", b"of a killed loader")
    assert store.sweep()["size"].sum() == len(b"of a killed loader")
    cache = DicomStore(client, chunk_size=1000, progress=False, ttl=60, renew=True, source=folder)
    cache.put("b.dcm", (folder / "b.dcm").read_bytes(), replace=True)
    assert list(cache.load(folder)["status"]) == ["loaded", "unchanged"]
    client.unlink(cache.manifest("a.dcm").chunk_key(0))
    assert cache.read("a.dcm") == (folder / "a.dcm").read_bytes()
    assert list(cache.load(folder)["status"]) == ["unchanged", "unchanged"]
    assert list(store.load(folder)["status"]) == ["unchanged", "unchanged"]
    replaced, server = store.manifest("a.dcm"), Server(client)
    store.put("a.dcm", dicom(Modality="MR"))
    Versions(server, Chunks(server)).set_member(replaced, "thumbnail", [0])
    (several := folder.parent / "several.dcm").write_bytes(SEVERAL)
    store.load(several)
    assert store.frame("several.dcm", 1).shape == (100, 100, 3)  # reads where its frames lie
    assert list(store.load(several, repair=True)["status"]) == ["unchanged"]
    for name in ("a.dcm", "b.dcm", "several.dcm"):
        store.delete(name)


def owners_run(client, folder):
    """Do what the owner does beside: add to the index, and what else the notebook shows."""
    store = DicomStore(client, progress=False)
    store.load(folder)
    assert store.index_also("SliceThickness")["SliceThickness"] == 0
    assert list(store.find(studyDescription=not_(words("brains")))["path"]) == ["a.dcm", "b.dcm"]
    assert store.find(studyDescription=words("brain*")).empty
    key = store.manifest("a.dcm").chunk_key(0)
    assert client.memory_usage(key) > len(client.get(key)) > 0
    client.setbit(key, 1, client.getbit(key, 1))
    assert client.dbsize() > 0 and client.info("memory")["used_memory"] > 0


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.dcm").write_bytes(dicom(Modality="CT"))
    (tmp_path / "in" / "b.dcm").write_bytes(dicom(pixels=bytes(5000)))
    return tmp_path / "in"


@pytest.fixture
def as_user(server, client, monkeypatch):
    """Return a client of the user that a rule makes, with further ACL words if given."""
    monkeypatch.setattr("dicomstore.catalogue.engine.PAGE", 1)  # so that a cursor is used
    made = []

    def login(rule, *more):
        name = rule.split()[2]
        set_user(client, rule, *more)
        made.append(connect(f"redis://{name}:password@127.0.0.1:{server.port}"))
        return made[-1]

    yield login
    for connected in made:
        connected.close()
    for name in ("app", "owner"):
        client.acl_deluser(name)


def run_as(login, client, rule, folder, out, *more):
    """Do the whole run on an empty server, as the user of `rule`."""
    client.flushall()
    if rule is APP:
        DicomStore(client).find()  # the owner has made the index
    connected = login(rule, *more)
    whole_run(connected, folder, out)
    if rule is OWNER:
        owners_run(connected, folder)


@pytest.mark.parametrize("rule", [APP, OWNER], ids=["app", "owner"])
def test_the_rule_is_enough(rule, client, as_user, folder, tmp_path):
    """The app, and the owner on an empty server, can do all that their rule is for."""
    run_as(as_user, client, rule, folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("rule", "part"),
    [
        pytest.param(rule, part, id=f"{rule.split()[2]} without {part}")
        for rule, parts in [(APP, APP.split()[5:]), (OWNER, OWNER_ALSO)]
        for part in parts
        if part != "-@all"
    ],
)
def test_the_rule_is_no_wider_than_needed(rule, part, client, as_user, folder, tmp_path):
    """Without any one of its commands or key patterns, something fails."""
    smaller = " ".join(word for word in rule.split() if word != part)
    client.flushall()
    if rule is APP:
        DicomStore(client).find()
    with pytest.raises((redis.RedisError, DicomRedisError, AssertionError)):
        connected = as_user(smaller)
        whole_run(connected, folder, tmp_path / "out")
        if rule is OWNER:
            owners_run(connected, folder)


@pytest.mark.parametrize("rule", [APP, OWNER], ids=["app", "owner"])
def test_what_the_rules_forbid(rule, client, as_user):
    """Neither user can empty or configure the server, run scripts, list or touch foreign keys."""
    client.set("foreign:x", "theirs")
    theirs = as_user(rule)
    for command in (
        "FLUSHALL", "FLUSHDB", "CONFIG GET *", "CONFIG SET maxmemory 1", "EVAL x 0", "KEYS *",
        "SET foreign:x y", "GET foreign:x", "DEL foreign:x", "UNLINK foreign:x", "MGET foreign:x",
        "EXISTS foreign:x", "WATCH foreign:x", "JSON.GET foreign:x", "JSON.SET foreign:x $ 1",
        "ACL LIST", "ACL WHOAMI", "SHUTDOWN", "MONITOR", "CLIENT LIST",
        "FT.DROPINDEX foreign:idx DD", "FT.CONFIG SET TIMEOUT 1", "MODULE LIST",
        "FT.CREATE foreign:idx SCHEMA a TEXT", "FT.SEARCH foreign:idx *", "RENAME file:a foreign:x",
        *(["FT._LIST", "FT.DROPINDEX file:idx"] if rule is APP else []),
    ):  # fmt: skip
        with pytest.raises(redis.exceptions.NoPermissionError):
            theirs.execute_command(*command.split())
    assert client.get("foreign:x") == b"theirs"


def test_an_app_without_index_is_told_whom_to_ask(client, as_user):
    """Where the index is missing, the app user learns that the owner has to make it."""
    store = DicomStore(as_user(APP), progress=False)
    with pytest.raises(ServerError, match=r"may not make or extend the index: let the owner"):
        store.find()


def test_a_user_without_search(client, as_user):
    """A user who may not search is told where the two rules are."""
    store = DicomStore(as_user(APP, "-ft.info"), progress=False)
    with pytest.raises(ServerError, match=r"may not use the index file:idx.*two ACL rules"):
        store.put("a", dicom())


# --- nothing told to outsiders -------------------------------------------------------------------


def test_no_log_line_holds_a_secret(server, client, tmp_path, caplog, capfd):
    """Loading sound and broken files, and failing, logs and prints no value and no password."""
    caplog.set_level(logging.DEBUG)
    secret = "Confidential^Person"
    broken = dicom(PatientName=secret, PatientID=secret * 40, Rows=1, PatientBirthDate=secret)
    meta_end = broken.index(b"\x08\x00\x16\x00")
    odd = [
        element(0x00080005, "CS", b"Confidential^Person "),
        element(0x00100010, "PN", secret.encode() + b"\xff\xfe"),
        element(0x00100020, "DS", secret.encode() + b" "),
        element(0x00280010, "US", secret.encode()),
        element(0x00081140, "SQ", secret.encode()),
        element(0x00100030, "XX", secret.encode()),
    ]
    (tmp_path / "broken.dcm").write_bytes(broken)
    for number, piece in enumerate(odd):
        whole = broken[:meta_end] + piece + broken[meta_end:]
        (tmp_path / f"odd{number}.dcm").write_bytes(whole)
    store = DicomStore(client, progress=True)
    report = store.load(tmp_path)
    assert report["status"].eq("loaded").all()
    client.set(store.manifest("odd1.dcm").chunk_key(0), b"x")
    failures = []
    for action in (
        lambda: store.read("odd1.dcm"),
        lambda: connect(f"redis://default:wrong{server.password}@127.0.0.1:{server.port}"),
        lambda: store.put("broken.dcm", dicom(SOPInstanceUID="1.9", PatientName=secret)),
    ):
        with pytest.raises(DicomRedisError) as caught:
            action()
        failures += traceback.format_exception(caught.value)
    shown = caplog.text + "".join(capfd.readouterr()) + "".join(failures)
    shown += repr(store) + repr(server) + report.to_string() + store.verify().to_string()
    assert "Loading" in shown
    assert "Confidential" not in shown and server.password not in shown


def test_representations_hold_no_secret(server, client):
    """The repr of a store, a server or a document shows neither password nor values."""
    store = DicomStore(client, progress=False)
    store.put("a", (PYDICOM_FILES / "CT_small.dcm").read_bytes())
    shown = repr(store) + repr(server) + repr(store.manifest("a")) + str(client)
    assert server.password not in shown and "CompressedSamples" not in shown
    assert os.fspath(PYDICOM_FILES) not in shown


def test_no_fault_tells_a_secret(server, client, tmp_path, caplog, capfd):
    """Damage, races, full memory, a lost server: no message, log line or repr quotes a value."""
    caplog.set_level(logging.DEBUG)
    secret = "Confidential"
    image = dicom(PatientName=secret, PatientID=secret, StudyDescription=secret, Rows=1)
    other = dicom(PatientName=secret, PatientID=secret, Rows=2)
    (folder := tmp_path / "in").mkdir()
    (folder / "a").write_bytes(image)
    shown = []

    def told(action):
        with pytest.raises(DicomRedisError) as caught:
            action()
        shown.extend(traceback.format_exception(caught.value))

    store = DicomStore(client, chunk_size=100, progress=True, ttl=60, renew=True, source=folder)
    shown.append(store.load(folder).to_string())
    key = store.manifest("a").chunk_key(1)
    client.set(key, b"x")
    told(lambda: DicomStore(client).read("a"))
    shown.append(store.verify().to_string() + store.restore(tmp_path / "out").to_string())
    client.unlink(key)
    (folder / "a").write_bytes(dicom(SOPInstanceUID="1.9", PatientName=secret))
    told(lambda: store.read("a"))
    client.execute_command("JSON.SET", "file:a", "$.blake3", f'"{secret}"')
    told(lambda: store.read("a"))
    for rights in ("-@all +ping", "+@all -json.set", "+@all -exec", "+@all -set"):
        user = ["ACL", "SETUSER", "limited", "reset", "on", f">{secret}", "~*", *rights.split()]
        client.execute_command(*user)
        with connect(f"redis://limited:{secret}@127.0.0.1:{server.port}") as connected:
            limited = DicomStore(connected)
            shown.append(repr(limited))
            told(lambda limited=limited: limited.put("b", image))
            told(lambda limited=limited: limited.load(folder, replace=True))
    client.acl_deluser("limited")
    with RedisServer(config=["maxmemory 1mb"]) as full, connect(full.url) as starved:
        told(lambda: DicomStore(starved).put("a", other))
    told(lambda: DicomStore(starved).put("a", other))
    told(lambda: DicomStore(starved).read("a"))
    shown += [repr(full), repr(store), caplog.text, *capfd.readouterr()]
    text = "\n".join(shown)
    assert len(text) > 2000
    # "Command #" is how redis-py begins to quote a command with its arguments.
    for planted in (secret, server.password, full.password, "Command #"):
        assert planted not in text
