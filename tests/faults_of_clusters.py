"""A cluster whose slots move and whose primaries die, while files are loaded and read."""

from __future__ import annotations

import contextlib
import operator
import random
import time
from collections import Counter

import redis
from cluster_work import StoreWork
from clusters import Slot, is_settled, kill, moving, new_node, plain, running_cluster, wait_until
from faults_shared import unreferenced

from dicomstore import connect
from dicomstore.errors import MissingChunkError, NotStoredError

SLOTS = 12
#: What a primary acknowledged so long (s) before it was killed may not have been replicated.
UNSURE_S = 0.5


def slot_moves(seconds):
    """Slots of a cluster moved to and fro, with the keys of files that are loaded and read."""
    with running_cluster(3) as nodes, connect(nodes[0].url) as client:
        keys = ["file:a", "file:b", *(f"file:own/{n}" for n in range(1, SLOTS - 1))]
        slots = [Slot(nodes, client.keyslot(key)) for key in keys]
        shared = slots[:2]
        begun_at = [slot.owner() for slot in shared]
        with StoreWork(nodes[0].url) as work:
            with moving(nodes, slots, pause=0.005) as moves:
                begun = time.monotonic()
                wait_until(
                    lambda: (
                        work.failures or (time.monotonic() > begun + seconds and len(moves) > SLOTS)
                    ),
                    seconds + 60,
                )
            # While slots come and go, a client that follows none of them has only to wait.
            for slot, first in zip(shared, begun_at, strict=True):
                source = slot.owner()
                target = next(name for name in slot.nodes if name not in (first, source))
                slot.begin(target)
                slot.move_keys(source, target)
                assert _go_on(work, 5), work.failures
                slot.end(target)
                assert _go_on(work, 5), work.failures
        assert work.failures == [] and work.refused == 0, (work.failures, work.refused)
        assert work.reads > 10 and len(work.loaded) > 10
        with work.store(client) as store:
            assert store.verify()["status"].eq("ok").all()
            assert len(store.verify()) == len(work.loaded) + len(work.shared)
            assert len(store.sweep()) == 0
        return (
            f"{len(moves):,} moves of {SLOTS} slots; {len(work.loaded):,} files added, "
            f"{work.replaced:,} replaced and {work.reads:,} rounds of reads, no error; every file "
            "whole, none lost, nothing left over"
        )


def failovers(kills):
    """`kill -9` of a cluster's primary, again and again, with a replica that takes over."""
    with contextlib.ExitStack() as stack:
        nodes = list(stack.enter_context(running_cluster(3, replicas=1)))
        work = stack.enter_context(StoreWork(nodes[-1].url))
        killed, longest = [], 0.0
        for _ in range(kills):
            assert _go_on(work, 10), work.failures  # what a kill has lost is stored again
            refused = work.refused
            assert _go_on(work, 30), work.failures
            assert work.refused == refused, "a file was lost before anything was killed"
            victim = random.choice([node for node in nodes if _role(node) == "master"])
            name = _name(victim)
            killed.append(time.monotonic())
            kill(victim)
            nodes.remove(victim)
            assert _go_on(work, 5), work.failures
            wait_until(lambda: sum(_role(node) == "master" for node in nodes) == 3)
            longest = max(longest, time.monotonic() - killed[-1])
            nodes.append(_with_a_replica_more(stack, nodes, name))
        assert _go_on(work, 5), work.failures
        work.__exit__()
        assert work.failures == [], work.failures
        found = Counter()
        with connect(nodes[0].url) as client, work.store(client) as store:
            for at, number in work.loaded:
                try:
                    assert store.read(f"own/{number}") == work.image("own", number)
                    found["whole"] += 1
                except (NotStoredError, MissingChunkError):
                    assert any(kill - UNSURE_S < at <= kill for kill in killed), number
                    found["lost"] += 1
            for name in work.shared:
                store.put(name, work.image(name, 1), replace=True)
                assert store.read(name) == work.image(name, 1)
            store.sweep()
            assert not unreferenced(client) or found["lost"]
        return (
            f"a replica took over within {longest:.1f} s; {found['whole']:,} acknowledged files "
            f"whole, {found['lost']} of those that were acknowledged less than {UNSURE_S:g} s "
            f"before a kill lost; {work.reads:,} rounds of reads, {work.refused:,} clear errors of "
            "such losses, none else"
        )


def _go_on(work, count):
    """Wait until so many files more are added, read and replaced; return whether nothing failed."""

    def done():
        return len(work.loaded), work.reads, work.replaced

    wanted = [number + count for number in done()]
    wait_until(lambda: work.failures or all(map(operator.gt, done(), wanted)), seconds=60)
    return not work.failures


def _role(node):
    with plain(node) as one:
        return one.info("replication")["role"]


def _name(node):
    with plain(node) as one:
        return one.cluster("myid")


def _with_a_replica_more(stack, nodes, dead):
    """Give the primary that has none a new replica; let the nodes forget the dead one."""
    extra = stack.enter_context(new_node(nodes[0].password))
    with plain(extra) as one:
        one.execute_command("CLUSTER MEET", "127.0.0.1", nodes[0].port)
        wait_until(lambda: set(map(_name, nodes)) <= _known(one))
        alone = next(node for node in nodes if _role(node) == "master" and _replicas(node) == 0)
        wait_until(lambda: one.execute_command("CLUSTER REPLICATE", _name(alone)))
    for node in (*nodes, extra):
        with plain(node) as one, contextlib.suppress(redis.ResponseError):  # it never knew it
            one.execute_command("CLUSTER FORGET", dead)
    for node in (*nodes, extra):
        wait_until(lambda node=node: is_settled(node, len(nodes) + 1))
    return extra


def _known(client):
    return {each["node_id"] for each in client.cluster("nodes").values()}


def _replicas(node):
    with plain(node) as one:
        return one.info("replication")["connected_slaves"]
