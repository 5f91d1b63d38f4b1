"""Commands to a cluster whose slots move and whose primaries die, with writers and readers at work.

What is held here is the promise of `Server`: every command follows, and nothing is done twice or
half.
"""

import threading
import time

import pytest
from cluster_work import StoreWork, Work
from clusters import Slot, is_settled, kill, moving, new_node, plain, running_cluster, wait_until

from dicomstore.errors import MissingChunkError, NotStoredError, RefusedError, ServerError
from dicomstore.server.connection import Server, connect

SECONDS, MOVES = 2.0, 8


@pytest.fixture(scope="module")
def nodes():
    with running_cluster(3) as running:
        yield running


@pytest.fixture
def server(nodes):
    with connect(nodes[0].url) as client, Server(client, patience=10) as sending:
        client.flushall(target_nodes="primaries")
        yield sending


@pytest.fixture
def half_moved(nodes, server):
    """The slot of ``{a}...`` on its way: ``{a}new`` is at the target; call it to end the move."""
    slot = Slot(nodes, server.client.keyslot("{a}"))
    server.commands([("SET", "{a}old", "1"), ("SET", "{a}new", "1")])
    target = next(name for name in slot.nodes if name != slot.owner())
    source = slot.begin(target)
    with plain(slot.nodes[source]) as one, plain(slot.nodes[target]) as other:
        address = "127.0.0.1", slot.nodes[target].port
        one.execute_command(
            "MIGRATE", *address, "{a}new", 0, 5000, "AUTH", slot.nodes[target].password
        )
        assert one.dbsize() > 0 and other.execute_command("CLUSTER COUNTKEYSINSLOT", slot.slot) == 1
    yield lambda: (slot.move_keys(source, target), slot.end(target))
    slot.move_keys(source, target)
    slot.end(target)


def add_one(key):
    """A transaction that counts: what is done twice or lost shows in the number."""

    def body(pipe):
        number = int(pipe.get(key) or 0)
        pipe.multi()
        pipe.set(key, number + 1)
        return number + 1

    return body


def test_commands_find_keys_of_a_slot_on_its_way(server, half_moved):
    """While the keys of a slot lie on two nodes, each command finds its own, new ones too."""
    replies = server.commands(
        [
            ("GET", "{a}old"), ("GET", "{a}new"), ("MGET", "{a}new"), ("EXISTS", "{a}old"),
            ("SET", "{a}more", "2"), ("PEXPIRE", "{a}new", 100_000), ("GET", "elsewhere"),
            ("JSON.SET", "{a}json", "$", "{}"), ("JSON.GET", "{a}json"), ("UNLINK", "{a}more"),
        ]
    )  # fmt: skip
    assert replies[:4] == [b"1", b"1", [b"1"], 1]
    assert replies[4] in (True, b"OK") and replies[5:] == [1, None, b"OK", b"{}", 1]
    assert server.command("GET", "{a}new") == b"1" and server.command("GET", "{a}none") is None
    half_moved()
    assert server.commands([("GET", "{a}old"), ("GET", "{a}new")]) == [b"1", b"1"]


@pytest.mark.parametrize("key", ["{a}old", "{a}new", "{a}more"])
def test_a_transaction_in_a_slot_on_its_way(key, server, half_moved):
    """A transaction is done once, wherever its key is and even where the slot moves within it."""
    add = add_one(key)
    before = int(server.command("GET", key) or 0)
    assert server.transaction([key], add) == before + 1
    turns = []

    def and_move(pipe):
        turns.append(pipe.get(key))
        if len(turns) == 1:
            half_moved()
        return add(pipe)

    assert server.transaction([key], and_move) == before + 2
    assert int(server.command("GET", key)) == before + 2


def test_keys_on_two_nodes_are_waited_for(nodes, server, half_moved):
    """A transaction over keys that lie on two nodes waits for the slot, or says what it lacks."""
    pair = ["{a}old", "{a}new"]
    with pytest.raises(ServerError, match=r"did not settle in time.*slot is moving.*try again"):
        Server(server.client, patience=0.3).transaction(pair, add_one(pair[0]))
    assert server.command("GET", pair[0]) == b"1"
    mover = threading.Timer(0.3, half_moved)
    mover.start()
    assert server.transaction(pair, add_one(pair[0])) == 2
    mover.join()


def test_a_node_that_joins(nodes, server):
    """A slot on its way to a node that the client has never heard of is followed there."""
    with new_node(nodes[0].password) as extra, plain(nodes[0]) as one:
        one.execute_command("CLUSTER MEET", "127.0.0.1", extra.port)
        slot = Slot([*nodes, extra], server.client.keyslot("{b}"))
        target = next(name for name, node in slot.nodes.items() if node is extra)
        for node in slot.nodes.values():
            wait_until(lambda node=node: is_settled(node, 4))
        server.command("SET", "{b}x", "1")
        source = slot.begin(target)
        slot.move_keys(source, target)
        assert server.command("GET", "{b}x") == b"1"
        assert server.transaction(["{b}x"], add_one("{b}x")) == 2
        slot.end(target)
        assert server.command("GET", "{b}x") == b"2"
        slot.move(source)
        assert server.command("GET", "{b}x") == b"2"
        for node in nodes:
            with plain(node) as each:
                each.execute_command("CLUSTER FORGET", target)


def test_the_scan_misses_nothing_that_moves(nodes, server):
    """Keys whose slot goes to a node already scanned are found, and none twice."""
    keys = [f"{{{number}}}k" for number in range(60)]
    server.commands([("SET", key, "x") for key in keys])
    scan = server.scan("*k", "string")
    found = [next(scan)]
    slots = [Slot(nodes, server.client.keyslot(key)) for key in keys[:6]]
    for slot in slots:
        names = list(slot.nodes)
        slot.move(names[(names.index(slot.owner()) + 1) % 3])
    found += scan
    assert sorted(found) == sorted(key.encode() for key in keys)


def test_writers_and_readers_while_slots_move(nodes, server):
    """No command fails, no transaction is lost or done twice, no reader sees a part."""
    keys = [f"key{number}" for number in range(6)]
    counter = "{key0}count"
    slots = [Slot(nodes, server.client.keyslot(key)) for key in keys]
    counted = 0
    with Work(nodes[0].url, keys) as work, moving(nodes, slots) as moves:
        begun = time.monotonic()
        while time.monotonic() < begun + SECONDS or len(moves) <= len(slots):  # a slow machine
            counted = server.transaction([counter], add_one(counter))
            if work.failures or time.monotonic() > begun + 20 * SECONDS:
                break
    assert work.failures == [] and len(moves) > len(slots)
    assert int(server.command("GET", counter)) == counted > 10
    for key, number in work.written.items():
        assert int(server.command("GET", key)) == number > 0
    assert work.reads > 10


def test_a_replica_takes_over():
    """When a primary is killed, those who write and who only read go on; what was replicated stays.

    Searches go to a node that answers, and a cursor that lived on the dead node is an error.
    """
    with running_cluster(3, replicas=1) as nodes, connect(nodes[1].url) as client:
        server = Server(client)
        victim, key = nodes[0], None
        keys = [f"key{number}" for number in range(200)]
        mine = [key for key in keys if client.get_node_from_key(key).port == victim.port][:4]
        others = [key for key in keys if client.get_node_from_key(key).port != victim.port][:2]
        assert victim.port in {node.port for node in client.get_primaries()} and len(mine) == 4
        searching = [Server(client) for _ in range(8)]
        assert {each.search_command("PING") for each in searching} == {b"PONG"}
        with Work(nodes[1].url, [*mine, *others]) as work:
            wait_until(lambda: all(work.written.values()))
            time.sleep(SECONDS / 2)
            killed = time.monotonic()
            kill(victim)
            before = dict(work.written)
            assert {each.search_command("PING") for each in searching} == {b"PONG"}
            wait_until(
                lambda: (
                    work.failures
                    or all(number > before[key] for key, number in work.written.items())
                )
            )
            assert work.failures == []
            time.sleep(SECONDS / 2)
        assert work.failures == []
        for key, acknowledged in work.acknowledged.items():
            stored = int(server.command("GET", key))
            # What a primary acknowledged in its last moment may not have reached its replica.
            sure = [n for at, n in acknowledged if not killed - 0.5 < at <= killed]
            assert stored >= max(sure)
            parts = server.commands([("GET", f"{{{key}}}:{n}:{stored}") for n in range(3)])
            assert parts == [str(stored).encode()] * 3


def test_a_cluster_without_a_replacement():
    """Where nobody takes over, the error comes after a bounded time and says what is the matter."""
    with running_cluster(3) as nodes, connect(nodes[1].url) as client:
        server = Server(client, patience=2)
        key = next(
            key
            for key in map(str, range(200))
            if client.get_node_from_key(key).port == nodes[0].port
        )
        server.command("SET", key, "x")
        kill(nodes[0])
        for action in (
            lambda: server.command("GET", key),
            lambda: server.transaction([key], add_one(key)),
            lambda: list(server.scan("*", "string")),
        ):
            with pytest.raises(ServerError, match="again") as caught:
                action()
            assert not isinstance(caught.value, RefusedError)
            assert key not in str(caught.value).split()


# --- the store -----------------------------------------------------------------------------------


def test_a_store_while_slots_move(nodes, server):
    """Files are loaded, replaced and read while the slots of all that they consist of move.

    Nothing fails, no reader sees a part, and in the end nothing lies in Redis that no file has.
    """
    with StoreWork(nodes[0].url) as work:
        keys = ["file:a", "file:b", "chunk:file:a:0123456789ab:0", "file:own/9"]
        slots = [Slot(nodes, server.client.keyslot(key)) for key in keys]
        with moving(nodes, slots, pause=0.005) as moves:
            wait_until(lambda: len(moves) > MOVES or work.failures)
    assert work.failures == [] and work.refused == 0 and work.reads and work.loaded
    with work.store(server.client) as store:
        assert store.verify()["status"].eq("ok").all()
        assert len(store.sweep()) == 0
        paths = [*work.shared, *(f"own/{number}" for _, number in work.loaded)]
        for path in paths:
            store.delete(path)
    assert list(server.scan("file:*", "ReJSON-RL")) == list(server.scan("chunk:*", "string")) == []


def test_a_store_while_a_replica_takes_over():
    """When a primary is killed, loads and reads go on, and what was replicated is whole."""
    with running_cluster(3, replicas=1) as nodes, StoreWork(nodes[1].url) as work:
        wait_until(lambda: len(work.loaded) > 5 or work.failures)
        killed = time.monotonic()
        kill(nodes[0])
        count, reads = len(work.loaded), work.reads
        wait_until(
            lambda: (len(work.loaded) > count + 5 and work.reads > reads + 5) or work.failures
        )
        work.__exit__()
        assert work.failures == []
        with connect(nodes[1].url) as client, work.store(client) as store:
            for at, number in work.loaded:
                try:
                    assert store.read(f"own/{number}") == work.image("own", number)
                except (NotStoredError, MissingChunkError):
                    # What a primary acknowledged in its last moment may not have been replicated.
                    assert killed - 0.5 < at <= killed
            for name in work.shared:
                assert store.read(name) in [work.image(name, version) for version in (0, 1)]
