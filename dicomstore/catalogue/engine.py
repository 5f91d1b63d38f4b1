"""Searches sent and their answers taken: complete ones, or an error."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from dicomstore.catalogue.alias import Alias, explained
from dicomstore.catalogue.answers import Hit
from dicomstore.catalogue.query import Query
from dicomstore.catalogue.schema import Index
from dicomstore.errors import NotIndexedError, RefusedError, SearchError, SearchTimeoutError
from dicomstore.server.connection import Server

Result = TypeVar("Result")

#: A search answers within this time or with an error.
SEARCH_TIMEOUT_MS = 10_000
TIMED_OUT = (
    f"The search engine did not finish within {SEARCH_TIMEOUT_MS} ms. Narrow the query, or give "
    "the server a longer TIMEOUT."
)
#: So many hits come in one answer; more are read through a cursor.
PAGE = 10_000
#: What a server does unless told otherwise: a prefix stands for its first 200 words.
DEFAULT_EXPANSIONS = 200
#: From this engine on (Redis 8) an answer says when a prefix stands for more words than it may.
WARNING_ENGINE = 80_000
#: How often a search starts again when the index is replaced under it.
ATTEMPTS = 5


class Engine:
    """Asks the index that answers.

    Parameters
    ----------
    server : Server
        Where the documents lie.
    alias : Alias
        Knows the index.
    """

    def __init__(self, server: Server, alias: Alias) -> None:
        self._server = server
        self._alias = alias
        self._expansions: float | None = None

    def ask(self, ask: Callable[[Index], Result]) -> tuple[Index, Result]:
        """Return the index that was asked, and what `ask` found in it.

        A search names the index whose fields it knows. If the index has gone meanwhile, or a field
        is unknown that another process may have added, `ask` is called again with the index that
        answers now.
        """
        index = self._alias.index()
        for _ in range(ATTEMPTS):
            try:
                return index, ask(index)
            except (NotIndexedError, RefusedError) as error:
                answering = self._alias.look()
                if answering == index:
                    raise _refused(error) if isinstance(error, RefusedError) else error from error
                index = answering
        raise SearchError("The index was replaced again and again during a search; try again.")

    def hits(self, index: Index, query: Query, loaded: Sequence[str]) -> list[Hit]:
        """Return key and loaded fields of every match."""
        stages = ["RETURN", str(len(loaded)), *loaded, "LIMIT", "0", str(PAGE)]
        reply = self.search(index, "FT.SEARCH", query, *stages)
        if reply[b"total_results"] <= len(reply[b"results"]):
            return hits_of(reply)
        groups = self.groups(index, query, *load_stage(["__key", *loaded]))
        return [(os.fsdecode(group[b"__key"]), group) for group in groups]

    def groups(self, index: Index, query: Query, *stages: str) -> list[dict[bytes, bytes]]:
        """Return all rows of an aggregation. A cursor, since servers may cap an answer without."""
        cursor_options = ["WITHCURSOR", "COUNT", str(PAGE)]
        reply, cursor = self.search(index, "FT.AGGREGATE", query, *stages, *cursor_options)
        rows = [result[b"extra_attributes"] for result in reply[b"results"]]
        while cursor:
            reply, cursor = self._server.search_command("FT.CURSOR", "READ", index.name, cursor)
            _refuse_partial(reply)
            rows += [result[b"extra_attributes"] for result in reply[b"results"]]
        return rows

    def search(self, index: Index, command: str, query: Query, *stages: str) -> Any:
        """Send one search; return its reply, which is complete."""
        options = ["TIMEOUT", str(SEARCH_TIMEOUT_MS), "DIALECT", "2"]
        words = [command, index.name, query.text, *stages, *query.parameters, *options]
        most = self._most_expansions() if query.expands_words else math.inf
        if most == math.inf:
            reply = self._server.search_command(*words)
        else:
            # This engine leaves out words in silence: how many are there?
            info, reply = self._server.search_commands([("FT.INFO", index.name), words])
            for each in (info, reply):
                if isinstance(each, Exception):
                    raise each
            _refuse_unexpanded(query, info, most)
        _refuse_partial(reply[0] if isinstance(reply, list) else reply)
        return reply

    def _most_expansions(self) -> float:
        """Return for how many words a prefix stands at most; infinity if the engine warns."""
        if self._expansions is None:
            if self._server.engines()["search"] >= WARNING_ENGINE:
                self._expansions = math.inf
            else:
                reply = self._server.search_commands([("FT.CONFIG", "GET", "MAXEXPANSIONS")])[0]
                found = {} if isinstance(reply, Exception) else dict(reply)
                self._expansions = int(found.get(b"MAXEXPANSIONS", DEFAULT_EXPANSIONS))
        return self._expansions


def load_stage(fields: Sequence[str]) -> list[str]:
    """Return the stage of an aggregation that loads fields, and members by their JSON paths."""
    names = [name if name.startswith("$") else f"@{name}" for name in fields]
    return ["LOAD", str(len(names)), *names] if names else []


def hits_of(reply: Mapping[bytes, Any]) -> list[Hit]:
    return [
        (os.fsdecode(hit[b"id"]), hit.get(b"extra_attributes", {})) for hit in reply[b"results"]
    ]


def _refused(error: RefusedError) -> Exception:
    """Return what a refused search means."""
    if "timeout" in error.reply.lower():
        return SearchTimeoutError(TIMED_OUT)
    if explained(error) is not error:
        return explained(error)
    return SearchError(f"The search engine refused the query: {error.reply}.")


def _refuse_partial(reply: Mapping[bytes, Any]) -> None:
    """Raise if the engine warns that its answer is not complete."""
    for warning in reply.get(b"warning") or ():
        text = warning.decode(errors="replace")
        if "timeout" in text.lower():
            raise SearchTimeoutError(TIMED_OUT)
        if "prefix expansion" in text.lower():
            raise SearchError(
                "A prefix in this search stands for more words or values than this server takes: "
                "give whole words, or start it with a larger MAXEXPANSIONS."
            )
        raise SearchError(f"The search engine warns that its answer may be incomplete: {text}.")


def _refuse_unexpanded(query: Query, info: Mapping[bytes, Any], expansions: float) -> None:
    """Raise if the engine may have left out words that a prefix stands for."""
    most = int(info[b"num_terms"])
    if query.expands_values:
        most = max(most, int(info[b"num_docs"]))
    if most > expansions:
        raise SearchError(
            f"This server takes a prefix for at most {expansions} words or values, and the index "
            f"has up to {most}: give whole words, or start it with a larger MAXEXPANSIONS."
        )
