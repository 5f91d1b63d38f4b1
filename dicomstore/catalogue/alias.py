"""The alias that always names a complete index: made, extended, dropped.

An index with other fields is built beside the one that answers, waited for, and then takes the
alias in one command. One process builds at a time, by a lease that runs out when it is killed; what
it leaves half-built is dropped by the next. A name is never used twice, so that a search that names
the index whose fields it knows is complete, or is told that the index is gone.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from typing import Any

from dicomstore.catalogue.schema import (
    INDEX,
    INDEX_NAME,
    Index,
    Schema,
    definition,
    digest,
    named,
)
from dicomstore.errors import RefusedError, SearchError
from dicomstore.keys import CHUNK_PREFIX
from dicomstore.server.connection import OWN_REDIS, Server

#: Says that an index is being built. Like the lease of a load, but no version is called so.
LEASE = f"{CHUNK_PREFIX}{{{INDEX}}}:builder"
LEASE_MS = 5000
#: Is there from before an index is made until the one that it replaces is dropped: where it is left
#: and no lease is held, a builder was killed.
UNFINISHED = f"{CHUNK_PREFIX}{{{INDEX}}}:unfinished"
POLL_S = 0.02
#: So long does a search wait for a builder in another process, where there is no index yet.
PATIENCE_S = 2.0
NO_COORDINATOR = (
    "On a Redis Cluster, searching needs search engine 8.8.0 or later, and this one is {}. Use a "
    "newer Redis, or Redis Enterprise or Redis Cloud behind their single endpoint."
)


class Alias:
    """Knows the index that answers; has it made where it is missing or out of date."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._index: Index | None = None

    def index(self) -> Index:
        """Return the index that answers, as it was when this was last asked for.

        Raises
        ------
        SearchError
            If there is none and another process is building it, or if a foreign one has its name.
        ServerError
            If there is none and this user may not make it.
        """
        if self._index is None:
            self._index = self._open(PATIENCE_S)
        return self._index

    def look(self) -> Index:
        """Return the index that answers now."""
        self._index = None
        return self.index()

    def ensure(self) -> None:
        """Make the index if there is none, or wait until another process has made it."""
        if self._index is None and self._server.can_search():
            self._index = self._open(None)

    def extend(self, schema: Schema) -> None:
        """Have an index that has the fields of `schema` too, and wait until it is complete."""
        self._index = self._build(schema, None)

    def drop(self) -> None:
        """Drop the index, and what other builders have left of theirs."""
        with self._only_builder(None), _explained("drop the index"):
            self._index = None
            self._answering()  # refuses a foreign one
            self._drop_all_but("")
            self._server.command("DEL", UNFINISHED)

    def _open(self, patience: float | None) -> Index:
        if not self._server.can_search():
            raise SearchError(NO_COORDINATOR.format(self._server.engine_version("search")))
        found = self._answering()
        if found is None:
            return self._build({}, patience)
        if not found.has_just(found.asked_for) or self._server.command("EXISTS", UNFINISHED):
            try:
                return self._build({}, 0)
            except SearchError:
                return found  # another process is building; what answers until then is complete
            except RefusedError as error:
                if not _is_forbidden(error):
                    raise
        return found

    def _build(self, schema: Schema, patience: float | None) -> Index:
        """Return an index with all fields that anybody has asked for, and those of `schema`."""
        while True:
            with self._only_builder(patience) as token, _explained("make or extend the index"):
                found = self._answering()
                wanted = {**(found.asked_for if found else {}), **schema}
                self._drop_all_but(found.name if found else "")
                if found and found.has_just(wanted):
                    self._server.command("DEL", UNFINISHED)
                    return found
                name = f"{INDEX}:{digest(wanted)}:{token}"
                self._server.command("SET", UNFINISHED, name)
                try:
                    self._server.search_command("FT.CREATE", name, *definition(wanted))
                except RefusedError:  # there is nothing that a next builder would have to finish
                    self._server.command("DEL", UNFINISHED)
                    raise
                while self._renew(token):
                    info = self._server.search_command("FT.INFO", name)
                    if not int(named(info)[b"indexing"]):
                        self._server.search_command("FT.ALIASUPDATE", INDEX, name)
                        self._drop_all_but(name)
                        self._server.command("DEL", UNFINISHED)
                        return Index.of(info)
                    time.sleep(POLL_S)

    def _answering(self) -> Index | None:
        """Return the index that answers, None if there is none."""
        try:
            return Index.of(self._server.search_command("FT.INFO", INDEX))
        except RefusedError as error:
            if _is_missing(error):
                return None
            raise explained(error) from error

    def _drop_all_but(self, kept: str) -> None:
        for listed in self._server.search_command("FT._LIST"):
            name = listed.decode(errors="replace")
            if INDEX_NAME.fullmatch(name) and name != kept:
                self._server.search_command("FT.DROPINDEX", name)

    @contextlib.contextmanager
    def _only_builder(self, patience: float | None) -> Iterator[str]:
        """Hold the lease of builders; wait for it for `patience` seconds, for ever if None."""
        token = secrets.token_hex(6)
        begun = time.monotonic()
        while not self._server.command("SET", LEASE, token, "NX", "PX", LEASE_MS):
            if patience is not None and time.monotonic() - begun >= patience:
                raise SearchError(
                    f"The index {INDEX} is being built by another process; try again in a moment."
                )
            time.sleep(POLL_S)
        try:
            yield token
        finally:
            self._change_lease(token, "DEL", LEASE)

    def _renew(self, token: str) -> bool:
        """Prolong the lease; return False if it ran out and somebody else may be building."""
        return self._change_lease(token, "SET", LEASE, token, "PX", LEASE_MS)

    def _change_lease(self, token: str, *command: Any) -> bool:
        def change(pipe: Any) -> bool:
            if pipe.mget(LEASE) != [token.encode()]:
                return False
            pipe.multi()
            pipe.execute_command(*command)
            return True

        return self._server.transaction([LEASE], change)


def _is_missing(error: RefusedError) -> bool:
    """Whether the engine says that there is no such index."""
    return any(words in error.reply.lower() for words in ("no such index", "unknown index"))


def _is_forbidden(error: RefusedError) -> bool:
    return "permission" in error.reply.lower()


def explained(error: RefusedError) -> RefusedError:
    """Return an error of the engine with what to do about it, where that is known."""
    if _is_forbidden(error):
        text = f"This Redis user may not use the index {INDEX}: see the two ACL rules."
    elif "unknown command" in error.reply.lower():
        text = f"This Redis has no search engine. {OWN_REDIS}"
    else:
        return error
    return RefusedError(text, error.reply)


@contextlib.contextmanager
def _explained(action: str) -> Iterator[None]:
    try:
        yield
    except RefusedError as error:
        if _is_forbidden(error):
            raise RefusedError(
                f"This Redis user may not {action}: let the owner do it (the two ACL rules).",
                error.reply,
            ) from error
        if "json" in error.reply.lower():
            raise RefusedError(
                f"This Redis has no JSON engine. {OWN_REDIS}", error.reply
            ) from error
        raise
