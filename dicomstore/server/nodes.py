"""How commands reach one server, and how they reach a cluster that changes meanwhile.

`OneServer` and `Cluster` have the same methods, so that nobody else needs to know which it is.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import redis
from redis.client import Pipeline
from redis.cluster import ClusterNode, PipelineCommand
from redis.exceptions import (
    AskError,
    AuthorizationError,
    ClusterError,
    MaxConnectionsError,
    MovedError,
    RedisClusterException,
    TryAgainError,
)

Result = TypeVar("Result")
Command = Sequence[Any]


def _pipelined(client: redis.Redis, commands: Sequence[Command]) -> list[Any]:
    """Send commands to one server in one round trip; return the replies, errors among them.

    On a connection itself, with redis-py's own retries: a pipeline of redis-py takes a quarter of
    a local round trip more.
    """
    pool = client.connection_pool
    connection = pool.get_connection()

    def exchange() -> list[Any]:
        connection.send_packed_command(connection.pack_commands(commands))
        return [_reply(connection) for _ in commands]

    try:
        return connection.retry.call_with_retry(exchange, lambda _: connection.disconnect())
    finally:
        pool.release(connection)


def _reply(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error


def _transact(pipe: Pipeline, keys: Sequence[str], body: Callable[[Any], Result]) -> Result:
    """Do `body` on one server until none of `keys` is changed meanwhile."""
    with pipe:
        while True:
            with contextlib.suppress(redis.WatchError):
                pipe.watch(*keys)
                result = body(pipe)
                if pipe.explicit_transaction:
                    pipe.execute()
                return result


def _scanned(client: redis.Redis, pattern: str, kind: str) -> Iterator[bytes]:
    return client.scan_iter(pattern, count=10_000, _type=kind)


class OneServer:
    """Commands to one server, which holds all keys."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def close(self) -> None:
        """Close what was opened beside the client: nothing."""

    def replies(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one round trip; return the replies, errors among them."""
        return _pipelined(self._client, commands)

    search = replies

    def transaction(self, keys: Sequence[str], body: Callable[[Any], Result]) -> Result:
        """Do `body` until none of `keys` is changed meanwhile."""
        return _transact(self._client.pipeline(), keys, body)

    def scan(self, pattern: str, kind: str) -> Iterator[bytes]:
        """Yield the keys of a type that match a glob pattern."""
        return _scanned(self._client, pattern, kind)


# --- a cluster ---

#: What a cluster answers, or fails to answer, while it changes.
PASSING = (
    redis.ConnectionError,
    redis.TimeoutError,
    ClusterError,
    AskError,  # and MovedError, its child
    TryAgainError,
    RedisClusterException,
)
LASTING = (redis.AuthenticationError, AuthorizationError, MaxConnectionsError)


def is_passing(reply: Any) -> bool:
    """Whether a reply is an error that goes away when the cluster has changed."""
    return isinstance(reply, PASSING) and not isinstance(reply, LASTING)


class _AskingPipeline(Pipeline):
    """A transaction on the node that a slot is moving to, which refuses what is not announced."""

    def immediate_execute_command(self, *words: Any, **options: Any) -> Any:
        send: Any = super().immediate_execute_command
        send("ASKING")
        return send(*words, **options)

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        send: Any = super().immediate_execute_command
        send("ASKING")  # MULTI keeps it for all that follow
        return super().execute(raise_on_error)


class Cluster:
    """Commands to a cluster while its slots move and its nodes fail, take over and join.

    redis-py follows MOVED and ASK, but one command at a time, not within WATCH, and not to a node
    that it has not heard of; and it gives up long before a replica takes over. So its pipelines
    send, and what is redirected or lost is sent again here.

    Parameters
    ----------
    client : redis-py's cluster client
    patience : float
        For how many seconds a command is tried again.
    """

    def __init__(self, client: Any, patience: float) -> None:
        self._client = client
        self._patience = patience
        self._joining: dict[tuple[str, int], ClusterNode] = {}
        self._searched: ClusterNode | None = None

    def close(self) -> None:
        for node in self._joining.values():
            self._client.get_redis_connection(node).close()

    def replies(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands to the nodes of their keys; return the replies, errors among them."""
        replies: list[Any] = [None] * len(commands)
        waiting = list(range(len(commands)))
        for is_last in self._tries():
            sent = self._sent([commands[place] for place in waiting])
            for place, reply in zip(waiting, sent, strict=True):
                replies[place] = reply
            waiting = [place for place in waiting if is_passing(replies[place])]
            if is_last or not waiting:
                break
            self._adapt([replies[place] for place in waiting])
        return replies

    def _sent(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands once, those that are asked for elsewhere also there."""
        queue = [PipelineCommand(command, {}, place) for place, command in enumerate(commands)]
        try:
            with self._client.pipeline(transaction=False) as pipe:
                replies = pipe.send_cluster_commands(
                    queue, raise_on_error=False, allow_redirections=False
                )
        except PASSING as error:
            return [error] * len(commands)
        asked: dict[tuple[str, int], list[int]] = {}
        for place, reply in enumerate(replies):
            if type(reply) is AskError:
                asked.setdefault((reply.host, reply.port), []).append(place)
        for target, places in asked.items():
            words = [part for place in places for part in (("ASKING",), commands[place])]
            try:
                answers = _pipelined(self._at(target), words)[1::2]
            except PASSING as error:
                answers = [error] * len(places)
            for place, reply in zip(places, answers, strict=True):
                replies[place] = reply
        return list(replies)

    def transaction(self, keys: Sequence[str], body: Callable[[Any], Result]) -> Result:
        # Not redis-py's cluster transactions: after a lost connection they send EXEC again without
        # WATCH.
        asked: BaseException | None = None
        for is_last in self._tries():
            try:
                if isinstance(asked, AskError):
                    at = self._at((asked.host, asked.port))
                    pipe = _AskingPipeline(at.connection_pool, at.response_callbacks, True, None)
                    return _transact(pipe, keys, body)
                node = self._client.get_node_from_key(keys[0])
                return _transact(self._client.get_redis_connection(node).pipeline(), keys, body)
            except PASSING as error:
                if is_last or not is_passing(error):
                    raise
                self._adapt([error])
                asked = error if type(error) is AskError else None
        raise AssertionError("unreachable: the last try returns or raises")

    def search(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands to one node, always the same one while it answers: a cursor lives there."""
        # A cursor died with its node.
        can_repeat = not any(command[0] == "FT.CURSOR" for command in commands)
        for is_last in self._tries():
            try:
                node = self._searched or random.choice(self._client.get_primaries())
                replies = _pipelined(self._client.get_redis_connection(node), commands)
                self._searched = node
            except PASSING as error:
                replies = [error] * len(commands)
            lost = [reply for reply in replies if is_passing(reply)]
            if lost:
                self._searched = None
            if is_last or not lost or not can_repeat:
                return replies
            self._adapt(lost)
        raise AssertionError("unreachable: the last try returns")

    def scan(self, pattern: str, kind: str) -> Iterator[bytes]:
        """Yield the keys of all primaries, each once, and again whatever moved meanwhile."""
        seen: set[bytes] = set()
        patience = self._tries()
        while True:
            try:
                owners = self._owners()
                for node in self._client.get_primaries():
                    for key in _scanned(self._client.get_redis_connection(node), pattern, kind):
                        if key not in seen:
                            seen.add(key)
                            yield key
                    patience = self._tries()
                if self._owners() == owners:
                    return
            except PASSING as error:
                if next(patience) or not is_passing(error):
                    raise

    def _tries(self) -> Iterator[bool]:
        """Yield until patience ends, after longer and longer pauses; True the last time."""
        deadline, pause = time.monotonic() + self._patience, 0.0
        while time.monotonic() < deadline:
            yield False
            time.sleep(pause)
            pause = min(2 * pause or 0.01, 0.5)
        while True:
            yield True

    def _adapt(self, errors: Sequence[BaseException]) -> None:
        """Follow what errors say of the cluster."""
        moved = [error for error in errors if isinstance(error, MovedError)]
        if len(moved) > 1 or any(not isinstance(e, (AskError, TryAgainError)) for e in errors):
            with contextlib.suppress(*PASSING):  # the next try says it, too
                self._client.nodes_manager.initialize()
        for error in moved:
            self._client.nodes_manager.move_slot(error)

    def _owners(self) -> list[str]:
        """Return the node of each slot, freshly asked for."""
        self._client.nodes_manager.initialize()
        slots = self._client.nodes_manager.slots_cache
        return [slots[slot][0].name for slot in sorted(slots)]

    def _at(self, address: tuple[str, int]) -> redis.Redis:
        """Return a client of a node that another one names."""
        node = self._client.get_node(*address)
        if node is None:  # it has joined, and its first slot is on the way
            node = self._joining.setdefault(address, ClusterNode(*address, "primary"))
        client: redis.Redis = self._client.get_redis_connection(node)
        return client
