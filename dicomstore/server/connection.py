"""One Redis server or a cluster, as the rest of the store talks to it.

`connect` gives a client, and `Server` sends commands through it. What a cluster changes, and how an
error of redis-py becomes one of ours, is decided here and nowhere else.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisClusterException
from redis.retry import Retry

from dicomstore.errors import RefusedError, ServerError

Result = TypeVar("Result")
Client = redis.Redis | redis.RedisCluster
Command = Sequence[Any]

#: redis-py derives what it says of a cluster from nothing else.
REDIS_ERRORS = (redis.RedisError, RedisClusterException)
#: Longer than a search may take, and with few retries: redis-py would by default send a slow
#: command again and again.
SOCKET_TIMEOUT_S = 30.0
#: Read from a socket at a time (bytes); a chunk of the default size in one call.
READ_BYTES = 262_144
KEYS_PER_COMMAND = 1000
#: The first search engine whose nodes answer for a whole Redis Cluster, that of Redis 8.
COORDINATED_ENGINE = 80_000
OWN_REDIS = (
    "Use Redis 8 or Redis Stack (`docker compose up -d`), or leave REDIS_URL unset for the "
    "embedded server."
)


def connect(url: str | None = None) -> Client:
    """Return a client of the Redis at `url`, else at ``$REDIS_URL``, else of the embedded one.

    Parameters
    ----------
    url : str, optional
        As redis-py reads it: ``redis://user:password@host:port``, ``rediss://`` for TLS (with
        ``?ssl_ca_certs=...``) or ``unix://path?password=...``.

    Returns
    -------
    redis.Redis or redis.RedisCluster
        A new client of the same server at every call; for a node of a Redis Cluster, a client of
        the whole cluster.

    Raises
    ------
    ServerError
        If the URL cannot be read, or the server cannot be reached or refuses the login.
    RedisServerError
        If the embedded server is wanted and cannot start.
    """
    url = url or os.environ.get("REDIS_URL")
    if not url:
        # Imported here: only someone without a Redis of their own needs it.
        from dicomstore.server.embedded import shared_server

        url = shared_server().url
    options: dict[str, Any] = {
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": 5,
        "socket_read_size": READ_BYTES,
        "retry": Retry(ExponentialBackoff(cap=0.5, base=0.05), retries=3),
    }
    try:
        client = redis.Redis.from_url(url, **options)
        client.ping()
        if _is_cluster_node(client):
            client.close()
            return redis.RedisCluster.from_url(url, **options)
    except (TypeError, ValueError):
        # Not `from error`: it may quote a piece of the password.
        raise ServerError(
            "REDIS_URL cannot be read: write it as redis://user:password@host:port, rediss://... "
            "or unix://..., with / # ? @ : % in the password as %2F %23 %3F %40 %3A %25."
        ) from None
    except redis.AuthenticationError as error:
        raise ServerError(
            "Redis refuses the login: user or password is wrong or missing. Check REDIS_URL."
        ) from error
    except (*REDIS_ERRORS, OSError) as error:
        raise ServerError(f"Redis cannot be used: {error}. Check REDIS_URL.") from error
    return client


def _is_cluster_node(client: redis.Redis) -> bool:
    hello = client.execute_command("HELLO")
    members = hello if isinstance(hello, dict) else dict(zip(hello[::2], hello[1::2], strict=True))
    return (members.get(b"mode") or members.get("mode")) in (b"cluster", "cluster")


class Server:
    """Sends commands to one Redis server, or to the right nodes of a cluster.

    Every method raises `RefusedError` where the server answers with an error, and `ServerError`
    where it does not answer; neither quotes a command's arguments.

    Parameters
    ----------
    client : redis.Redis or redis.RedisCluster
        Stays the caller's to close. A client that decodes responses is copied without that.

    Raises
    ------
    ServerError
        If the client selects a database other than 0.
    """

    def __init__(self, client: Client) -> None:
        self.client = _binary_client(client)
        self._execute: Callable[..., Any] = self.client.execute_command

    @property
    def is_cluster(self) -> bool:
        """Whether the keys lie on several nodes."""
        return isinstance(self.client, redis.RedisCluster)

    def command(self, *words: Any) -> Any:
        """Send one command to where its key lies; return the reply."""
        with _translated():
            return self._execute(*words)

    def commands(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one round trip; return the replies."""
        replies = self.replies(commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def replies(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one round trip; return the replies, errors among them."""
        if not commands:
            return []
        with _translated(), self.client.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            replies = pipe.execute(raise_on_error=False)
        return [_error(reply) if isinstance(reply, Exception) else reply for reply in replies]

    def for_keys(self, command: str, keys: Sequence[str]) -> list[Command]:
        """Return the commands that do `command` for many keys.

        The keys of one file lie on all nodes of a cluster: there, one key a command.
        """
        step = 1 if self.is_cluster else KEYS_PER_COMMAND
        return [(command, *keys[at : at + step]) for at in range(0, len(keys), step)]

    def transaction(self, keys: Sequence[str], body: Callable[[Any], Result]) -> Result:
        """Change what lies at `keys`, all of one cluster slot, while nobody else does.

        Parameters
        ----------
        keys : sequence of str
            Watched from before `body` reads until its commands are executed.
        body : callable
            Called with a pipeline of redis-py: reads through it, then calls its ``multi()`` and
            queues commands; or queues none. Called again as often as a key was changed meanwhile.

        Returns
        -------
        Result
            What `body` returned.
        """
        # Not redis-py's cluster transactions: after a lost connection they send EXEC again without
        # WATCH.
        with _translated(), self._node(keys[0]).pipeline() as pipe:
            while True:
                pipe.watch(*keys)
                result = body(pipe)
                try:
                    if pipe.explicit_transaction:
                        pipe.execute()
                    return result
                except redis.WatchError:
                    continue

    def scan(self, pattern: str, kind: str) -> Iterator[bytes]:
        """Yield the keys of a type, as TYPE names it, that match a glob pattern."""
        with _translated():
            yield from self.client.scan_iter(pattern, count=10_000, _type=kind)

    def search_commands(self, commands: Sequence[Command]) -> list[Any]:
        """Send FT commands in one round trip to a server that answers for all; as `replies`."""
        with _translated(), self._searching.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            replies = pipe.execute(raise_on_error=False)
        return [_error(reply) if isinstance(reply, Exception) else reply for reply in replies]

    def search_command(self, *words: Any) -> Any:
        """Send one FT command to a server that answers for all documents; return the reply."""
        with _translated():
            return self._searching.execute_command(*words)

    def can_search(self) -> bool:
        """Whether searches are answered for all documents."""
        return not self.is_cluster or self.engines().get("search", 0) >= COORDINATED_ENGINE

    def wire_client(self) -> redis.Redis | None:
        """Return the client if one server is behind it that the wire can connect to, else None."""
        from dicomstore.blobs.wire import supports

        return self.client if supports(self.client) else None  # type: ignore[return-value]

    def close(self) -> None:
        pass

    def facts(self) -> dict[str, str]:
        """Return the server's version, its engines' versions, and whose it is."""
        engines = self.engines()

        def version(name: str) -> str:
            number = engines.get(name, 0)
            return f"{number // 10000}.{number // 100 % 100}.{number % 100}" if number else "none"

        return {
            "Redis": self.hello()[b"version"].decode(),
            "search engine": version("search"),
            "JSON engine": version("ReJSON"),
            "whose": "yours (REDIS_URL)" if os.environ.get("REDIS_URL") else "embedded",
        }

    def hello(self) -> dict[bytes, Any]:
        """Return what HELLO says of the server."""
        with _translated():
            return dict(self._searching.execute_command("HELLO"))

    def engines(self) -> dict[str, int]:
        """Return the versions of the server's engines by name, 21005 for 2.10.5."""
        return {each[b"name"].decode(): each[b"ver"] for each in self.hello()[b"modules"]}

    def _node(self, key: str) -> redis.Redis:
        """Return a client of the server that holds `key`."""
        if isinstance(self.client, redis.RedisCluster):
            return self.client.get_redis_connection(self.client.get_node_from_key(key))
        return self.client

    @property
    def _searching(self) -> redis.Redis:
        """A client of the server that searches; of a cluster one node, which asks the others."""
        if isinstance(self.client, redis.RedisCluster):
            return self.client.get_redis_connection(self.client.get_default_node())
        return self.client


def _binary_client(client: Client) -> Client:
    """Return `client`, or a copy that hands out bytes and speaks RESP3, as the store needs."""
    if isinstance(client, redis.RedisCluster):
        settings = client.get_connection_kwargs()
        if settings.get("decode_responses") or str(settings.get("protocol") or 3) != "3":
            raise ServerError(
                "This cluster client decodes responses or does not speak RESP3: make it with "
                "connect()."
            )
        return client
    pool = client.connection_pool
    settings = dict(pool.connection_kwargs)
    if settings.get("db"):
        raise ServerError(
            f"Database {settings['db']} cannot be used: RediSearch indexes only database 0. "
            "Leave the number out of REDIS_URL."
        )
    if not settings.get("decode_responses") and str(settings.get("protocol") or 3) == "3":
        # The same connections, but replies as they come: client.json() has redis-py parse them.
        return redis.Redis(connection_pool=pool)
    settings.update(decode_responses=False, protocol=3)
    return redis.Redis(
        connection_pool=redis.ConnectionPool(connection_class=pool.connection_class, **settings)
    )


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn an error of redis-py into one of ours."""
    try:
        yield
    except REDIS_ERRORS as error:
        found = _error(error)
        raise found from (error if _words(error) == str(error) else None)


def _error(error: BaseException) -> ServerError:
    """Return our error for one of redis-py."""
    words = _words(error)
    if isinstance(error, redis.ResponseError):
        if "unknown command" in words.lower() and "'JSON." in words.upper():
            return RefusedError(f"This Redis has no JSON engine. {OWN_REDIS}", words)
        return RefusedError(f"Redis refused a command: {words}.", words)
    return ServerError(
        f"Redis does not answer: {words}. No file is stored in part; try again when it does."
    )


def _words(error: BaseException) -> str:
    """Return an error's text without the command: its arguments may be a patient's data."""
    text = str(error).rpartition("of pipeline caused error: ")[2]
    return text.partition(", with args")[0].rstrip(".")
