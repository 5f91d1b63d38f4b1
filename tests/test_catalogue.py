"""The alias that always names a complete index, who may do what, and what a search shows."""

import json
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import ResponseError

from dicomstore.catalogue.alias import LEASE, UNFINISHED
from dicomstore.catalogue.index import CARRIED, FIND_COLUMNS, Catalogue
from dicomstore.catalogue.query import containing, not_, words
from dicomstore.errors import NotIndexedError, SearchError, ServerError
from dicomstore.server.connection import Server, connect

#: What searching needs, beside the key patterns.
APP = "+ft.info +ft.search +ft.aggregate +ft.cursor +set +mget +exists +del +watch +multi +exec"
OWNER = f"{APP} +ft.create +ft.dropindex +ft._list +ft.aliasupdate"


def fill(client, count, first=0, **members):
    """Write documents whose `rows` count on."""
    with client.pipeline(transaction=False) as pipe:
        for number in range(first, first + count):
            document = {"imageName": f"{number}", "rows": number, "modality": "CT", **members}
            pipe.execute_command("JSON.SET", f"file:{number:06}", "$", json.dumps(document))
        pipe.execute()


def indexes(client):
    return sorted(name.decode() for name in client.execute_command("FT._LIST"))


def answering(client):
    return client.execute_command("FT.INFO", "file:idx")[b"index_name"].decode()


def calls(client):
    """Return how often each command was called, those of this test and of looking left out."""
    stats = client.info("commandstats")
    return {name.removeprefix("cmdstat_"): stats[name]["calls"] for name in stats}


@pytest.fixture
def catalogue(client):
    return Catalogue(Server(client))


@pytest.fixture
def as_user(server, client):
    """Return the catalogue of a user with these rights."""
    made = []

    def login(name, rights):
        rule = f"ACL SETUSER {name} reset on >x ~file:* ~chunk:* -@all +ping {rights}"
        client.execute_command(*rule.split())
        made.append(connect(f"redis://{name}:x@127.0.0.1:{server.port}"))
        return Catalogue(Server(made[-1]))

    yield login
    for connected in made:
        connected.close()
    client.execute_command("ACL", "DELUSER", "app", "owner")


# --- the index -----------------------------------------------------------------------------------


def test_an_index_behind_the_alias(client, catalogue):
    """The first search makes one index over what is stored; the alias names it."""
    fill(client, 500)
    assert len(catalogue.find()[0]) == 500
    assert indexes(client) == [answering(client)]
    assert not client.exists(LEASE, UNFINISHED)


def test_a_search_asks_once(client, catalogue):
    """After the first one a search is one command, and nothing is asked about the index."""
    fill(client, 10)
    catalogue.ensure()
    before = calls(client)
    catalogue.find(modality="CT", carry=("imageName",))
    catalogue.find(order_by="-rows", limit=3)
    catalogue.count_by("modality")
    catalogue.keys_of(rows=(1, 2))
    catalogue.similar([0] * 64, 3)
    sent = {name: count - before.get(name, 0) for name, count in calls(client).items()}
    assert {name: count for name, count in sent.items() if count} == {
        "FT.SEARCH": 3, "FT.AGGREGATE": 2, "info": 1,
    }  # fmt: skip


def test_an_extended_index_takes_the_place_of_the_old(client, catalogue):
    """The index with more fields keeps those asked for before; the old one is dropped."""
    fill(client, 300, header={"KVP": 7, "SliceThickness": 2.5})
    catalogue.ensure()
    first = answering(client)
    assert catalogue.index_also("KVP")["KVP"] == 300
    second = answering(client)
    assert catalogue.index_also("SliceThickness")["SliceThickness"] == 300
    assert len({first, second, answering(client)}) == 3 and indexes(client) == [answering(client)]
    assert len(catalogue.keys_of(KVP=7, SliceThickness=2.5)) == 300
    unchanged = answering(client)
    catalogue.index_also("KVP")
    assert answering(client) == unchanged


def test_stores_that_are_open_follow(client, catalogue):
    """A store that knows an index that has gone finds all in the next, or says what it lacks."""
    fill(client, 50, header={"KVP": 7})
    other = Catalogue(Server(client))
    assert len(other.keys_of()) == 50
    with pytest.raises(NotIndexedError):
        other.keys_of(KVP=7)
    catalogue.index_also("KVP")
    assert len(other.keys_of(KVP=7)) == len(other.keys_of()) == 50
    catalogue.drop_index()
    assert indexes(client) == []
    assert len(catalogue.keys_of()) == 50  # it is made again, with other fields
    for search in (
        lambda: other.keys_of(KVP=7),
        lambda: other.keys_of(KVP=not_(7)),
        lambda: other.find(columns=["KVP"]),
        lambda: other.count_by("KVP"),
    ):
        with pytest.raises(NotIndexedError, match="index_also"):
            search()
    client.flushall()
    assert other.keys_of() == [] and len(indexes(client)) == 1


def test_searches_during_a_rebuild_are_complete(client, server):
    """While indexes are built, moved and dropped, every answer has all, also through a cursor."""
    fill(client, 12_000, header={"KVP": 7, "SliceThickness": 1, "ImageType": "O"})
    Catalogue(Server(client)).ensure()
    stop, wrong, searches = threading.Event(), [], []

    def search(ask):
        with connect(server.url) as own:
            own_catalogue = Catalogue(Server(own))
            while not stop.is_set():
                found = ask(own_catalogue)
                searches.append(found)
                if found != 12_000:
                    wrong.append(found)

    asked = [
        lambda catalogue: int(catalogue.count_by("modality").sum()),
        lambda catalogue: len(catalogue.keys_of()),  # more than a page
    ]
    threads = [threading.Thread(target=search, args=(ask,)) for ask in asked]
    for thread in threads:
        thread.start()
    builder = Catalogue(Server(client))
    for keyword in ("KVP", "SliceThickness", "ImageType"):
        assert builder.index_also(keyword)[keyword] == 12_000
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and len(searches) > 3


def test_builders_at_once(client, server):
    """Whoever extends the index at the same moment, all fields are there in the end."""
    fill(client, 300, header={"KVP": 1, "ImageType": ["x"], "SliceThickness": 2})
    wanted = ["KVP", "ImageType", "SliceThickness"]
    for _ in range(3):
        for name in indexes(client):
            client.execute_command("FT.DROPINDEX", name)
        start, failures = threading.Barrier(6), []

        def work(number, start=start, failures=failures):
            with connect(server.url) as own:
                try:
                    start.wait()
                    keyword = wanted[number % 3]
                    assert Catalogue(Server(own)).index_also(keyword)[keyword] == 300
                except BaseException as error:
                    failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert len(Catalogue(Server(client)).keys_of(KVP=1, ImageType="x", SliceThickness=2)) == 300
        assert indexes(client) == [answering(client)]


BUILD = """
import sys
from dicomstore.catalogue.index import Catalogue
from dicomstore.server.connection import Server, connect
Catalogue(Server(connect(sys.argv[1]))).index_also("KVP")
"""


def test_a_killed_builder(client, server, catalogue):
    """What a killed builder leaves harms no search, and the next to open the store drops it."""
    fill(client, 30_000, header={"KVP": 1})
    catalogue.ensure()
    complete = answering(client)
    builder = subprocess.Popen([sys.executable, "-c", BUILD, server.url])
    while len(indexes(client)) < 2 and builder.poll() is None:
        time.sleep(0.002)
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    assert len(indexes(client)) == 2 and answering(client) == complete
    assert int(catalogue.count_by("modality")["CT"]) == 30_000
    assert int(Catalogue(Server(client)).count_by("modality")["CT"]) == 30_000
    client.delete(LEASE)  # as when it has run out
    assert int(Catalogue(Server(client)).count_by("modality")["CT"]) == 30_000
    assert indexes(client) == [complete] and not client.exists(LEASE, UNFINISHED)


def test_a_builder_that_lost_its_lease_starts_again(client, server, monkeypatch):
    """A builder whose lease ran out does not move the alias; it begins anew."""
    fill(client, 20_000, header={"KVP": 1})
    done = []

    def build():
        with connect(server.url) as own:
            done.append(Catalogue(Server(own)).index_also("KVP")["KVP"])

    builder = threading.Thread(target=build)
    builder.start()
    while not indexes(client):
        time.sleep(0.002)
    client.set(LEASE, "somebody else", px=1000)
    time.sleep(0.3)  # in which it would have taken the lease back
    assert client.get(LEASE) == b"somebody else"
    with pytest.raises(ResponseError, match="Unknown index"):
        answering(client)
    builder.join()
    assert done == [20_000] and indexes(client) == [answering(client)]


def test_an_index_that_is_named_like_the_alias(client, catalogue):
    """A foreign index of that name is refused with the way to drop it, and never dropped."""
    client.execute_command("FT.CREATE", "file:idx", "SCHEMA", "a", "TEXT")
    for act in (catalogue.find, catalogue.ensure, catalogue.drop_index):
        with pytest.raises(SearchError, match=r"FT\.DROPINDEX file:idx\)"):
            act()
    assert indexes(client) == ["file:idx"]


def test_a_first_index_that_is_being_built(client, catalogue):
    """Where no index answers yet and another process is building it, a search says so."""
    fill(client, 3)
    client.set(LEASE, "somebody else", px=60_000)
    with pytest.raises(SearchError, match="being built by another process") as caught:
        catalogue.find()
    assert not isinstance(caught.value, NotIndexedError)
    client.delete(LEASE)
    assert len(catalogue.find()[0]) == 3


# --- who may do what -----------------------------------------------------------------------------


def test_what_the_owner_needs(client, as_user):
    """The owner's commands are enough for the index's whole life, and each is needed."""

    def live(catalogue):
        fill(client, 20, header={"KVP": 1})
        assert len(catalogue.keys_of()) == 20
        assert catalogue.index_also("KVP")["KVP"] == 20
        assert catalogue.unindexed(["file:000001", "file:none"]) == set()
        catalogue.drop_index()
        assert indexes(client) == []

    live(as_user("owner", OWNER))
    for part in OWNER.split():
        if part in ("+ft.cursor", "+exists"):
            continue  # needed beyond a page; and where a killed builder may have left something
        client.flushall()
        with pytest.raises(ServerError):
            live(as_user("owner", OWNER.replace(part, "")))


def test_what_an_app_may_do(client, as_user, catalogue):
    """An app searches by the alias, and is told to ask the owner for anything else."""
    app = as_user("app", APP)
    with pytest.raises(ServerError, match="let the owner"):
        app.find()
    fill(client, 20, header={"KVP": 1})
    catalogue.ensure()
    before = indexes(client)
    assert len(app.find(studyDescription=None)[0]) == 20 and app.count_by("modality")["CT"] == 20
    for act in (lambda: app.index_also("KVP"), app.drop_index):
        with pytest.raises(ServerError, match="let the owner"):
            act()
    assert indexes(client) == before and not client.exists(LEASE)
    catalogue.index_also("KVP")
    assert len(app.keys_of(KVP=1)) == 20


# --- what is shown -------------------------------------------------------------------------------


def test_columns_are_the_same_whatever_was_found(client, catalogue):
    """By default those of FIND_COLUMNS, with "all" every indexed field, found or not."""
    fill(client, 3)
    wanted = ["path", "key", *FIND_COLUMNS]
    assert list(catalogue.find()[0]) == list(catalogue.find(modality="none")[0]) == wanted
    everything = catalogue.find(columns="all")[0]
    assert list(everything) == list(catalogue.find(modality="none", columns="all")[0])
    assert set(wanted) < set(everything) and everything["rows"].tolist() == [0, 1, 2]
    assert list(catalogue.find(columns=["rows"])[0]) == ["path", "key", "rows"]
    found = catalogue.find()[0]
    found.columns.name = "changed"
    assert catalogue.find()[0].columns.name is None


def test_members_are_carried(client, catalogue):
    """Members of the documents come beside the table, in its order, in their own types."""
    members = {"version": "012345678901", "size": 5, "chunkSize": 7, "tail": [1, 2]}
    fill(client, 3, **members)
    fill(client, 1, first=3)
    wanted = [(f"file:{number:06}", members) for number in range(3)]
    for options in ({}, {"limit": 9}, {"order_by": "rows", "limit": 9}):
        table, carried = catalogue.find(carry=(*members, "nothing"), **options)
        assert carried == [*wanted, ("file:000003", {})]
        assert table["key"].tolist() == [key for key, _ in carried]
    assert catalogue.find()[1] == []


def test_members_are_carried_beyond_a_page(client, catalogue):
    """Where an answer has more than one page, they are carried for its first rows as well."""
    fill(client, 10_001, size=5)
    table, carried = catalogue.find(carry=("size",))
    assert len(table) == 10_001
    assert carried == [(key, {"size": 5}) for key in table["key"][:CARRIED]]


def test_negated_words_are_taken_as_written(client, catalogue):
    """Words find their other forms; negated they leave out only what has the words themselves."""
    for name, text in {"a": "brain", "b": "Brains", "c": "liver", "d": "brain liver"}.items():
        client.execute_command(
            "JSON.SET", f"file:{name}", "$", json.dumps({"studyDescription": text})
        )
    client.execute_command("JSON.SET", "file:e", "$", "{}")

    def found(condition):
        return "".join(key[-1] for key in catalogue.keys_of(studyDescription=condition))

    assert found(words("brain")) == found(words("BRAINS")) == "abd"
    assert found(not_(words("brain"))) == "bce" and found(not_(words("brains"))) == "acde"
    assert found(not_(words("bra*"))) == "ce" and found(not_(words("brain liver"))) == "abce"


LETTERS = st.text("aBcX09 ^,-.*$|{}()'\"\\@:;%~äÖÜ日本éÉ\t/=<>[]&?!_+#", min_size=2, max_size=12)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(LETTERS, LETTERS, st.integers(0, 10), st.integers(2, 12), st.booleans())
def test_parts_in_any_case(client, catalogue, text, foreign, start, length, own):
    """A part of a text is found in any case, whatever characters it has, and nothing else is."""
    client.execute_command("JSON.SET", "file:x", "$", json.dumps({"patientID": text}))
    part = text[start : start + length] if own else foreign
    for written in (part, part.lower(), part.upper()):
        if len(part) > 1 and sum(letter in "äÖÜéÉ" for letter in part) <= 6:
            found = catalogue.keys_of(patientID=containing(written))
            assert found == (["file:x"] if part.lower() in text.lower() else [])


def test_parts_and_other_conditions(client, catalogue):
    """A part can be negated, be one of several and meet other conditions; some are refused."""
    for number, name in enumerate(["Thorax nativ", "Abdomen", "thorax KM"]):
        fill(client, 1, first=number, studyDescription=name)
    fill(client, 1, first=3)

    def found(**conditions):
        return [int(key.removeprefix("file:")) for key in catalogue.keys_of(**conditions)]

    thorax = containing("THORAX")
    assert found(studyDescription=thorax) == [0, 2]
    assert found(studyDescription=thorax, rows=(1, None)) == [2]
    assert found(studyDescription=not_(thorax)) == [1, 3]
    assert found(studyDescription=[containing("km"), "Abdomen"]) == [1, 2]
    for field, text in (
        ("studyDescription", "a"),
        ("studyDescription", ""),
        ("studyDescription", "äöüäöüä"),
        ("modality", "CT"),
        ("rows", "12"),
    ):
        with pytest.raises(ValueError, match=r"parts|letters"):
            catalogue.keys_of(**{field: containing(text)})
