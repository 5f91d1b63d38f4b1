"""One Redis server or a cluster, as the rest of the store talks to it.

`connect` gives a client, and `Server` sends commands through it. What a cluster changes, and how an
error of redis-py becomes one of ours, is decided here and nowhere else.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import redis
from redis.backoff import ExponentialBackoff
from redis.cluster import ClusterNode
from redis.exceptions import RedisClusterException
from redis.retry import Retry

from dicomstore.errors import RefusedError, ServerError
from dicomstore.server.nodes import Cluster, Command, OneServer, is_passing

Result = TypeVar("Result")
Client = redis.Redis | redis.RedisCluster

#: redis-py derives what it says of a cluster from nothing else.
REDIS_ERRORS = (redis.RedisError, RedisClusterException)
#: Longer than a search may take, and with few retries: redis-py would by default send a slow
#: command again and again.
SOCKET_TIMEOUT_S = 30.0
#: Read from a socket at a time (bytes); a chunk of the default size in one call.
READ_BYTES = 262_144
KEYS_PER_COMMAND = 1000
#: The first search engine whose answers over a Redis Cluster can be trusted, as HELLO writes it.
COORDINATED_ENGINE = 80_800
#: How long a command to a cluster is tried again. A replica takes over within about 20 s where
#: `cluster-node-timeout` is 15 s, as it is by default.
PATIENCE_S = 30.0
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
    named = "the URL" if url else "REDIS_URL"
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
        if by_name(client.execute_command("HELLO"))["mode"] in (b"cluster", "cluster"):
            client.close()
            return redis.RedisCluster.from_url(url, **options)
    except (TypeError, ValueError):
        # Not `from error`: it may quote a piece of the password.
        raise ServerError(
            f"{named[0].upper()}{named[1:]} cannot be read: write it as "
            "redis://user:password@host:port, rediss://... or unix://..., with / # ? @ : % in the "
            "password as %2F %23 %3F %40 %3A %25."
        ) from None
    except redis.AuthenticationError as error:
        raise ServerError(
            f"Redis refuses the login: user or password is wrong or missing. Check {named}."
        ) from error
    except (*REDIS_ERRORS, OSError) as error:
        raise ServerError(f"Redis cannot be used: {_words(error)}. Check {named}.") from error
    return client


def by_name(reply: Any) -> dict[str, Any]:
    """Return a reply of names and values as a dict, whether it came as a map or as a flat list."""
    pairs = (
        reply.items() if isinstance(reply, Mapping) else zip(reply[::2], reply[1::2], strict=True)
    )
    return {name.decode() if isinstance(name, bytes) else name: value for name, value in pairs}


class Server:
    """Sends commands to one Redis server, or to the right nodes of a cluster.

    Every method raises `RefusedError` where the server answers with an error, and `ServerError`
    where it does not answer; neither quotes a command's arguments. On a cluster, commands follow
    slots that move and primaries that are replaced.

    It can be pickled (the password with it) and connects anew where it is unpickled.

    Parameters
    ----------
    client : redis.Redis or redis.RedisCluster
        Stays the caller's to close. A client that decodes responses is copied without that.
    patience : float
        For how many seconds a command to a cluster is tried again.

    Raises
    ------
    ServerError
        If the client selects a database other than 0.
    """

    def __init__(self, client: Client, *, patience: float = PATIENCE_S) -> None:
        self.client = _binary_client(client)
        self._patience = patience
        self._nodes: OneServer | Cluster
        self._is_own = False
        if isinstance(self.client, redis.RedisCluster):
            self._nodes = Cluster(self.client, patience)
        else:
            self._nodes = OneServer(self.client)
            if isinstance(client, redis.Redis):
                self._is_own = self.client.connection_pool is not client.connection_pool

    def close(self) -> None:
        """Close the connections that are the server's own, not those of the caller's client."""
        self._nodes.close()
        if self._is_own:
            self.client.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (_recipe(self.client), self._patience)

    @property
    def is_cluster(self) -> bool:
        """Whether the keys lie on several nodes."""
        return isinstance(self.client, redis.RedisCluster)

    @property
    def is_embedded(self) -> bool:
        """Whether this is the embedded server of this process."""
        from dicomstore.server.embedded import shared_port

        if isinstance(self.client, redis.RedisCluster):
            return False
        settings = self.client.connection_pool.connection_kwargs
        here = settings.get("host") in ("127.0.0.1", "localhost")
        return here and settings.get("port") == shared_port()

    # --- commands ---

    def command(self, *words: Any) -> Any:
        """Send one command to where its key lies; return the reply."""
        return self.commands([words])[0]

    def commands(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one round trip; return the replies."""
        replies = self.replies(commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def replies(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one round trip; return the replies, errors among them.

        A status is bytes, or True from a cluster, where redis-py reads the replies.
        """
        if not commands:
            return []
        with _translated():
            return _with_our_errors(self._nodes.replies(commands))

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
            queues commands; or queues none. Called again as often as a key was changed meanwhile
            or the connection was lost; in that case, what it queued may have been done.

        Returns
        -------
        Result
            What `body` returned.
        """
        with _translated():
            return self._nodes.transaction(keys, body)

    def scan(self, pattern: str, kind: str) -> Iterator[bytes]:
        """Yield the keys of a type, as TYPE names it, that match a glob pattern."""
        with _translated():
            yield from self._nodes.scan(pattern, kind)

    # --- searching ---

    def search_command(self, *words: Any) -> Any:
        """Send one FT command to a server that answers for all documents; return the reply."""
        (reply,) = self.search_commands([words])
        if isinstance(reply, Exception):
            raise reply
        return reply

    def search_commands(self, commands: Sequence[Command]) -> list[Any]:
        """Send FT commands in one round trip to a server that answers for all; as `replies`."""
        with _translated():
            return _with_our_errors(self._nodes.search(commands))

    def can_search(self) -> bool:
        """Whether searches are answered for all documents."""
        return not self.is_cluster or self.engines().get("search", 0) >= COORDINATED_ENGINE

    # --- the server itself ---

    def hello(self) -> dict[str, Any]:
        """Return what HELLO says of the server."""
        return by_name(self.search_command("HELLO"))

    def engines(self) -> dict[str, int]:
        """Return the versions of the server's engines by name, 21005 for 2.10.5."""
        modules = map(by_name, self.hello()["modules"])
        return {each["name"].decode(): each["ver"] for each in modules}

    def engine_version(self, name: str) -> str:
        """Return the version of an engine, as ``"2.10.5"``, or ``"none"``."""
        number = self.engines().get(name, 0)
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}" if number else "none"

    # --- for the wire, which connects by itself ---

    def wire_client(self) -> redis.Redis | None:
        """Return a client to connect like, if one server holds all keys and the wire can; or None.

        The wire can what a URL says: TCP, TLS, a unix socket, password and user. It cannot do
        Sentinel, a credential provider, OCSP or a connection class of the caller's own.
        """
        return None if isinstance(self.client, redis.RedisCluster) else _if_plain(self.client)


# --- clients -------------------------------------------------------------------------------------

_BYTES = {"decode_responses": False, "protocol": 3}


def _binary_client(client: Client) -> Client:
    """Return a client that hands out bytes and speaks RESP3, as the store needs.

    It has the connections of `client` if that does so itself, else its own.
    """
    if isinstance(client, redis.RedisCluster):
        if not _hands_out_bytes(client.get_connection_kwargs()):
            raise ServerError(
                "This cluster client decodes responses or does not speak RESP3: make it with "
                "connect()."
            )
        return client
    pool = client.connection_pool
    if number := pool.connection_kwargs.get("db"):
        raise ServerError(
            f"Database {number} cannot be used: RediSearch indexes only database 0. Leave the "
            "number out of the URL."
        )
    if _hands_out_bytes(pool.connection_kwargs):
        # The same connections, but replies as they come: client.json() has redis-py parse them.
        return redis.Redis(connection_pool=pool)
    make, *arguments, settings = _recipe(client)
    copied: redis.Redis = make(*arguments, settings | _BYTES)
    return copied


def _hands_out_bytes(settings: Mapping[str, Any]) -> bool:
    return not settings.get("decode_responses") and str(settings.get("protocol") or 3) == "3"


def _recipe(client: Client) -> tuple[Any, ...]:
    """Return a function and its arguments that make a client like `client`; settings come last."""
    if isinstance(client, redis.RedisCluster):
        nodes = [(node.host, node.port) for node in client.get_nodes()]
        settings = _settings(client.get_connection_kwargs())
        settings["redis_connect_func"] = client.user_on_connect_func
        return _cluster_client, nodes, client.nodes_manager.from_url, client.retry, settings
    pool = client.connection_pool
    if type(pool) not in (redis.ConnectionPool, redis.BlockingConnectionPool):
        raise ServerError(
            f"Connections cannot be made from a {type(pool).__name__}: make the client with "
            "connect()."
        )
    limits: dict[str, Any] = {"max_connections": pool.max_connections}
    if isinstance(pool, redis.BlockingConnectionPool):
        limits["timeout"] = pool.timeout
    return _client, type(pool), pool.connection_class, limits, _settings(pool.connection_kwargs)


def _settings(of_a_pool: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a pool's connections are made with, without what each pool adds for itself."""
    added = ("himport_registry", "maint_notifications_pool_", "oss_cluster_maint_", "orig_")
    return {
        name: value
        for name, value in of_a_pool.items()
        # A bare object is redis-py's mark of a default, and a copy of it is not one.
        if not name.startswith(added) and type(value) is not object
    }


def _client(
    pool: type[redis.ConnectionPool], kind: Any, limits: dict[str, Any], settings: dict[str, Any]
) -> redis.Redis:
    return redis.Redis.from_pool(pool(connection_class=kind, **limits, **settings))


def _cluster_client(
    nodes: list[tuple[str, int]], from_url: bool, retry: Retry, settings: dict[str, Any]
) -> redis.RedisCluster:
    if from_url:  # redis-py takes other settings then: a class of connections instead of `ssl`
        host, port = nodes[0]
        settings["url"] = f"redis://[{host}]:{port}" if ":" in host else f"redis://{host}:{port}"
    startup_nodes = [ClusterNode(host, port) for host, port in nodes]
    return redis.RedisCluster(startup_nodes=startup_nodes, retry=retry, **settings)


def _reopened(recipe: tuple[Any, ...], patience: float) -> Server:
    """Return a server that was pickled, with connections of its own."""
    make, *arguments = recipe
    server = Server(make(*arguments), patience=patience)
    server._is_own = True
    return server


def _if_plain(client: redis.Redis) -> redis.Redis | None:
    pool = client.connection_pool
    uncovered = ("credential_provider", "redis_connect_func", "ssl_validate_ocsp_stapled")
    is_plain = (
        type(pool) in (redis.ConnectionPool, redis.BlockingConnectionPool)
        and pool.connection_class
        in (redis.Connection, redis.SSLConnection, redis.UnixDomainSocketConnection)
        and not any(map(pool.connection_kwargs.get, ("ssl_validate_ocsp", *uncovered)))
    )
    return client if is_plain else None


# --- errors --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn an error of redis-py into one of ours."""
    try:
        yield
    except REDIS_ERRORS as error:
        found = our_error(error)
        raise found from (error if _words(error) == str(error) else None)


def _with_our_errors(replies: list[Any]) -> list[Any]:
    return [our_error(reply) if isinstance(reply, Exception) else reply for reply in replies]


def our_error(error: BaseException) -> ServerError:
    """Return our error for one of redis-py."""
    words = _words(error)
    if isinstance(error, redis.ResponseError) and not is_passing(error):
        if "unknown command" in words.lower() and "'JSON." in words.upper():
            return RefusedError(f"This Redis has no JSON engine. {OWN_REDIS}", words)
        return RefusedError(f"Redis refused a command: {words}.", words)
    if isinstance(error, redis.ResponseError):
        return ServerError(
            f"The cluster did not settle in time ({type(error).__name__}: {words}): a slot is "
            "moving, or a failed node has no replica. No file is stored in part; try again later."
        )
    return ServerError(
        f"Redis does not answer: {words}. No file is stored in part; try again when it does."
    )


def _words(error: BaseException) -> str:
    """Return an error's text without the command: its arguments may be a patient's data."""
    text = str(error).rpartition("of pipeline caused error: ")[2]
    if isinstance(error, RedisClusterException):
        text = text.partition("(")[0].rstrip()  # the command follows
    return text.partition(", with args")[0].rstrip(".")
