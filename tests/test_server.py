"""What `Server` does with clients: whose connections it uses, copies, closes and pickles."""

import multiprocessing
import os
import pickle
import sys

import pytest
import redis
from clusters import running_cluster, wait_until

from dicomstore.errors import RefusedError, ServerError
from dicomstore.server import embedded
from dicomstore.server.connection import Server, by_name, connect


def ids(client):
    """The ids of the connections that the server sees, but for the one that asks."""
    mine = client.client_id()
    return {int(each["id"]) for each in client.client_list() if int(each["id"]) != mine}


# --- whose connections ---------------------------------------------------------------------------


def test_a_callers_client_is_never_closed(server, client):
    """A server works through its caller's connections and leaves them open at its end."""
    with connect(server.url) as theirs:
        with Server(theirs) as sending:
            assert sending.command("PING") and theirs.ping()
            assert theirs.client_id() == sending.command("CLIENT", "ID")
        before = ids(client)
        assert theirs.ping() and ids(client) == before != set()


@pytest.mark.parametrize(
    "pool", [redis.ConnectionPool, redis.BlockingConnectionPool], ids=lambda pool: pool.__name__
)
def test_a_copied_client_keeps_its_pool_and_is_closed(pool, server, client):
    """A copy has the same kind of pool with the same limit, and ends with the server."""
    wait_until(lambda: ids(client) == set())
    limited = pool.from_url(server.url, decode_responses=True, max_connections=7)
    theirs = redis.Redis.from_pool(limited)
    with theirs:
        with Server(theirs) as sending:
            copied = sending.client.connection_pool
            assert type(copied) is pool and copied.max_connections == 7
            assert sending.command("ECHO", "é") == "é".encode()
            assert len(ids(client)) == 1
        wait_until(lambda: ids(client) == set())
        assert theirs.echo("é") == "é"


def test_an_unknown_kind_of_pool_is_not_copied(server):
    """Where a copy cannot be made, one sentence says which client to bring."""

    class Theirs(redis.ConnectionPool):
        pass

    theirs = redis.Redis(connection_pool=Theirs.from_url(server.url, decode_responses=True))
    with theirs, pytest.raises(ServerError, match=r"from a Theirs: .*connect\(\)"):
        Server(theirs)


def test_the_embedded_server_is_known_from_the_client(server, monkeypatch):
    """Whose server it is depends on the client alone, and asking starts none."""
    before = embedded.shared_port()  # of an earlier test in this process, if any
    with connect(server.url) as theirs:
        assert not Server(theirs).is_embedded and embedded.shared_port() == before
        with connect() as own:
            monkeypatch.setenv("REDIS_URL", server.url)
            assert Server(own).is_embedded and not Server(theirs).is_embedded
            embedded.shared_server().stop()
            assert not Server(own).is_embedded


def test_which_clients_the_wire_can_connect_like(server, tmp_path):
    """What a URL says the wire can do; what needs code of the caller's it cannot."""
    with connect(server.url) as client:
        assert Server(client).wire_client() is not None
    with connect(f"{server.url}?decode_responses=True") as client, Server(client) as copied:
        assert copied.wire_client() is copied.client

    class Own(redis.Connection):
        pass

    provider = redis.UsernamePasswordCredentialProvider("default", server.password)
    for options in (
        {"connection_class": Own, "password": server.password},
        {"credential_provider": provider},
    ):
        pool = redis.ConnectionPool(port=server.port, **options)
        with redis.Redis(connection_pool=pool) as client:
            assert Server(client).command("PING") and Server(client).wire_client() is None


# --- other processes -----------------------------------------------------------------------------


def in_another_process(server):
    """Use a server that came by pickle; return its answer and the process."""
    with server:
        return os.getpid(), server.command("GET", "a"), repr(server)


@pytest.mark.parametrize("how", ["connect", "decoding", "by host"])
def test_a_pickled_server_connects_anew(how, server, client):
    """A server that is pickled works in a process that shares nothing with this one."""
    client.set("a", "x")
    made = {
        "connect": lambda: connect(server.url),
        "decoding": lambda: connect(f"{server.url}?decode_responses=True&max_connections=3"),
        "by host": lambda: redis.Redis("127.0.0.1", server.port, password=server.password),
    }
    with made[how]() as theirs, Server(theirs) as sending:
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            with pickle.loads(pickle.dumps(sending, protocol)) as copy:
                assert copy.command("GET", "a") == b"x"
                pool = copy.client.connection_pool
                assert pool is not sending.client.connection_pool
                assert pool.max_connections == sending.client.connection_pool.max_connections
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            process, value, shown = pool.apply(in_another_process, (sending,))
        assert process != os.getpid() and value == b"x" and server.password not in shown
    assert server.password not in repr(sending)


def test_a_pickled_server_of_a_cluster(tmp_path):
    """A cluster is found again by any of its nodes."""
    with running_cluster(3) as nodes, connect(nodes[0].url) as client:
        client.set("a", "x")
        with pickle.loads(pickle.dumps(Server(client))) as copy:
            assert copy.is_cluster and copy.command("GET", "a") == b"x"
            assert copy.client is not client
        assert client.get("a") == b"x"
        host = {"host": "127.0.0.1", "port": nodes[0].port, "password": nodes[0].password}
        with (
            redis.RedisCluster(**host) as theirs,
            pickle.loads(pickle.dumps(Server(theirs))) as copy,
        ):
            assert copy.command("GET", "a") == b"x"


def test_what_cannot_be_pickled_says_so(server):
    """A client with code of the caller's own is refused by pickle, not opened wrongly elsewhere."""
    pool = redis.ConnectionPool.from_url(server.url, redis_connect_func=lambda it: it.on_connect())
    refused = (TypeError, AttributeError, pickle.PicklingError)
    with redis.Redis.from_pool(pool) as client, pytest.raises(refused):
        pickle.dumps(Server(client))


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_fork_shares_no_connection(server, client):
    """A forked child that uses the server opens its own connections, and so does its parent."""
    client.set("a", "x")
    with connect(server.url) as theirs:
        sending = Server(theirs)
        mine = sending.command("CLIENT", "ID")
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(
                writing, b"%d %s" % (sending.command("CLIENT", "ID"), sending.command("GET", "a"))
            )
            os._exit(0)
        os.waitpid(child, 0)
        other, value = os.read(reading, 100).split()
        os.close(reading), os.close(writing)
        assert int(other) != mine and value == b"x"
        assert sending.command("CLIENT", "ID") == mine and sending.command("GET", "a") == b"x"


# --- commands and replies ------------------------------------------------------------------------


def test_errors_among_replies(server, client):
    """Each command of a round trip has its own reply; an error quotes no argument."""
    sending = Server(client)
    client.set("a", "x")
    replies = sending.replies([("GET", "a"), ("LPUSH", "a", "s3cret"), ("GET", "a")])
    assert replies[0] == replies[2] == b"x" and isinstance(replies[1], RefusedError)
    assert "WRONGTYPE" in replies[1].reply and "s3cret" not in str(replies[1])
    for action in (
        lambda: sending.command("LPUSH", "a", "s3cret"),
        lambda: sending.commands([("GET", "a"), ("LPUSH", "a", "s3cret")]),
        lambda: sending.search_command("FT.SEARCH", "none", "s3cret"),
    ):
        with pytest.raises(RefusedError) as caught:
            action()
        assert "s3cret" not in str(caught.value)
    assert sending.replies([]) == sending.commands([]) == []


def test_a_transaction_is_done_again_when_it_is_disturbed(server, client):
    """A key that somebody else changes meanwhile is read again, and no change is lost."""
    sending, turns = Server(client), []

    def add(pipe):
        number = int(pipe.get("n") or 0)
        if len(turns) < 3:
            client.incr("n")
        turns.append(number)
        pipe.multi()
        pipe.set("n", number + 10)

    sending.transaction(["n"], add)
    assert turns == [0, 1, 2, 3] and client.get("n") == b"13"
    assert sending.transaction(["n"], lambda pipe: pipe.get("n")) == b"13"


def test_the_versions_of_a_server(server, client):
    """Engines are named as the server itself says."""
    sending = Server(client)
    assert {"search", "ReJSON"} <= set(sending.engines()) and sending.hello()["server"] == b"redis"
    assert sending.engine_version("search").count(".") == 2
    assert sending.engine_version("bloom") == "none"


def test_replies_of_names_and_values():
    """A map and a flat list of the same pairs are the same; an uneven list is an error."""
    assert by_name({b"a": 1, "b": [2]}) == by_name([b"a", 1, b"b", [2]]) == {"a": 1, "b": [2]}
    with pytest.raises(ValueError):
        by_name([b"a"])
