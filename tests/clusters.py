"""Redis Clusters of the embedded build for the tests, and what befalls them."""

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time

import redis
from conftest import BUILD

from dicomstore.server.embedded import RedisServer


def port_with_bus():
    """A free TCP port whose cluster bus port, 10,000 above, is free too."""
    while True:
        with socket.socket() as probe, socket.socket() as bus:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                bus.bind(("127.0.0.1", port + 10_000))
                return port


@contextlib.contextmanager
def running_cluster(primaries=3, replicas=0):
    """A cluster that is up: its nodes, each primary followed in the end by its replicas."""
    with contextlib.ExitStack() as stack:
        nodes = []
        for _ in range(primaries * (1 + replicas)):
            nodes.append(stack.enter_context(new_node(nodes[0].password if nodes else None)))
        addresses = [f"127.0.0.1:{node.port}" for node in nodes]
        made = subprocess.run(
            [BUILD / "redis-cli", "--cluster", "create", *addresses,
             "--cluster-replicas", str(replicas), "--cluster-yes"],
            env={**os.environ, "REDISCLI_AUTH": nodes[0].password}, capture_output=True, text=True,
        )  # fmt: skip
        assert made.returncode == 0, made.stdout + made.stderr
        for node in nodes:
            wait_until(lambda node=node: is_settled(node, len(nodes)))
        yield nodes


def new_node(password=None):
    """A node of no cluster yet; it gives up on others after a second."""
    lines = ["cluster-enabled yes", "cluster-node-timeout 1000"]
    node = RedisServer(port=port_with_bus(), config=lines)
    node.password = password or node.password
    node._extra.append(f"masterauth {node.password}")
    return node


def plain(node):
    """A client of one node, which follows no redirection."""
    return redis.Redis.from_url(node.url, decode_responses=True)


def is_settled(node, count):
    """Whether a node sees that many nodes, all well and each replica in step."""
    with plain(node) as one:
        links_up = one.info("replication").get("master_link_status", "up") == "up"
        return (
            links_up
            and one.cluster("info")["cluster_state"] == "ok"
            and len(one.cluster("nodes")) == count
        )


def wait_until(is_so, seconds=30):
    """Wait until `is_so()`; an error of Redis counts as no."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(redis.RedisError):
            if is_so():
                return
        time.sleep(0.05)
    raise AssertionError("what the test waits for does not happen")


class Slot:
    """One slot of a cluster, moved step by step as redis-cli moves it."""

    def __init__(self, nodes, slot):
        self.nodes = {}
        for node in nodes:
            with plain(node) as one:
                self.nodes[one.cluster("myid")] = node
        self.slot = slot

    def owner(self):
        with plain(next(iter(self.nodes.values()))) as one:
            for first, last, (_, port, name, *_), *_ in one.execute_command("CLUSTER SLOTS"):
                if first <= self.slot <= last:
                    assert self.nodes[name].port == port
                    return name
        raise AssertionError(f"nobody has slot {self.slot}")

    def begin(self, target):
        """Let keys that are not at the owner be asked for at the node `target`."""
        source = self.owner()
        self._set(target, "IMPORTING", source)
        self._set(source, "MIGRATING", target)
        return source

    def move_keys(self, source, target, count=10_000):
        node, password = self.nodes[target], self.nodes[target].password
        with plain(self.nodes[source]) as one:
            keys = one.execute_command("CLUSTER GETKEYSINSLOT", self.slot, count)
            if keys:
                one.execute_command(
                    "MIGRATE", "127.0.0.1", node.port, "", 0, 5000, "AUTH", password, "KEYS", *keys
                )

    def end(self, target):
        self._set(target, "NODE", target)
        for name in self.nodes:
            # A primary that lost its last slot may have become a replica, which is told anyway.
            with contextlib.suppress(redis.ResponseError):
                self._set(name, "NODE", target)

    def move(self, target, pause=0.0):
        """Move the slot to a node, with a pause while its keys lie on two nodes."""
        if (source := self.owner()) != target:
            self.begin(target)
            time.sleep(pause)
            self.move_keys(source, target, 1)
            time.sleep(pause)
            self.move_keys(source, target)
            self.end(target)

    def _set(self, where, *words):
        with plain(self.nodes[where]) as one:
            one.execute_command("CLUSTER SETSLOT", self.slot, *words)


@contextlib.contextmanager
def moving(nodes, slots, pause=0.02):
    """Move slots from node to node for as long as the block lasts; give the list of moves."""
    moves, over, failures = [], threading.Event(), []

    def move():
        try:
            while not over.is_set():
                for slot in slots:
                    names = list(slot.nodes)
                    target = names[(names.index(slot.owner()) + 1) % len(names)]
                    slot.move(target, pause)
                    moves.append((slot.slot, target))
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=move)
    thread.start()
    try:
        yield moves
    finally:
        over.set()
        thread.join()
    assert failures == []


def kill(node):
    """Kill a node's server process; its watchdog then cleans up."""
    with plain(node) as one:
        os.kill(one.info("server")["process_id"], signal.SIGKILL)
