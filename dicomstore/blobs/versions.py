"""How a stored file is replaced so that no reader ever meets half of it.

A load holds a lease, sends the chunks of a new version, and then lets the document name them, in
one transaction. Readers see the old version or the new one. Of a loader that is killed, only chunks
remain that no document names; `sweep` removes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from dicomstore.blobs.chunks import Chunks
from dicomstore.blobs.manifest import (
    STORAGE_MEMBERS,
    Document,
    Manifest,
    parse_document,
    plan_tail,
)
from dicomstore.blobs.wire import crc32
from dicomstore.errors import DamagedError, DicomRedisError, RefusedError, ServerError
from dicomstore.keys import DOCUMENT_PREFIX, shown_path
from dicomstore.server.connection import Server
from dicomstore.server.nodes import Command

#: How long a lease lasts unless it is renewed (ms).
LEASE_MS = 5000
#: How often a load starts again when its lease has run out.
ATTEMPTS = 20
Result = TypeVar("Result")
#: Sends the chunks of a manifest, or appends the commands that do to those of other files; returns
#: the members of the document that is to name them.
Send = Callable[[Manifest, list[Command]], Mapping[str, Any]]
#: Given what is stored and the members of the document that replaces it; raises if it may not.
MayReplace = Callable[["Stored", Mapping[str, Any]], None]


class Stored(NamedTuple):
    """What lies at a document's key at one moment.

    Attributes
    ----------
    document : Document or None
        None if its members do not agree.
    members : mapping
        The members that were asked for.
    """

    document: Document | None
    members: Mapping[str, Any]


@dataclass
class Write:
    """A file that is to be stored.

    Parameters
    ----------
    key : str
        Of its document.
    size, chunk_size : int
        In bytes.
    send : callable
        Called again with a fresh manifest if the lease was lost.
    may_replace : callable
        Called with what the version would replace, and with its own members; raises where it may
        not.

    Attributes
    ----------
    manifest : Manifest
        Of the version that is sent.
    outcome : str, Exception or None
        ``"loaded"``, ``"replaced"``, ``"unchanged"`` if somebody else has just stored the same
        bytes, or why it is not stored; None if that is still open.
    """

    key: str
    size: int
    chunk_size: int
    send: Send
    may_replace: MayReplace
    manifest: Manifest = field(init=False)
    members: Mapping[str, Any] = field(init=False)
    outcome: str | Exception | None = field(init=False, default=None)

    def begin(self) -> None:
        """Plan a new version."""
        tail = plan_tail(self.size, self.chunk_size)
        version = secrets.token_hex(6)
        self.manifest = Manifest(self.key, version, self.size, self.chunk_size, tail)


class Versions:
    """Reads documents, and commits, deletes and sweeps versions.

    Parameters
    ----------
    server : Server
    chunks : Chunks
    """

    def __init__(self, server: Server, chunks: Chunks) -> None:
        self._server = server
        self._chunks = chunks
        self._leases = Leases(server)

    # --- documents ---

    def members(self, key: str, names: Sequence[str]) -> dict[str, Any] | None:
        """Return members of a document by name, or None if there is no document at `key`."""
        (reply,) = self._server.replies([_get(key, names)])
        return _parsed(key, names, reply)

    def stored(self, keys: Sequence[str], names: Sequence[str]) -> list[Stored | Exception | None]:
        """Return what is stored at each key, in one round trip; a foreign value as an error."""
        replies = self._server.replies([_get(key, names) for key in keys])
        found: list[Stored | Exception | None] = []
        for key, reply in zip(keys, replies, strict=True):
            try:
                found.append(_stored(key, _parsed(key, names, reply)))
            except DamagedError as error:
                found.append(error)
        return found

    def is_current(self, manifest: Manifest) -> bool:
        """Whether the document names this version."""
        members = self.members(manifest.key, ("version",))
        return members is not None and members.get("version") == manifest.version

    def keys(self) -> list[str]:
        """Return the keys of all documents, sorted; also of those that no search finds."""
        found = self._server.scan(f"{DOCUMENT_PREFIX}*", "ReJSON-RL")
        return sorted({os.fsdecode(key) for key in found})

    # --- writing ---

    def write(self, writes: Sequence[Write]) -> None:
        """Store new versions of files, each with its `outcome` in the end.

        Several small files take hardly more round trips than one.

        Raises
        ------
        ServerError
            If the server refuses, or the connection is too slow to keep a lease.
        """
        if writes:
            self._try(writes)
        for write in writes:  # those that lost their lease, by themselves: it is over sooner
            for _ in range(ATTEMPTS - 1):
                if write.outcome is None:
                    self._try([write])
            if write.outcome is None:
                raise ServerError(
                    f"{shown_path(write.key)} could not be stored: its lease of {LEASE_MS} ms ran "
                    f"out {ATTEMPTS} times. The connection to Redis is too slow, or stalls."
                )

    def _try(self, writes: Sequence[Write]) -> None:
        """Send and commit new versions; the outcome of one that loses its lease stays open."""
        for write in writes:
            write.begin()
        try:
            with self._leases.held([write.manifest.lease for write in writes]):
                self._send(writes)
                self.commit([write for write in writes if write.outcome is None])
        except BaseException as error:
            # What cannot be taken back now, `sweep` finds once the leases have run out.
            with contextlib.suppress(ServerError):
                for write in writes:
                    self._take_back(write.manifest)
            if type(error) in (ServerError, RefusedError):
                raise _unstored(writes, error) from error.__cause__
            raise
        for write in writes:
            is_stored = write.outcome in ("loaded", "replaced")
            # A commit may have succeeded although its reply was lost.
            if not is_stored and self._take_back(write.manifest) == "committed":
                write.outcome = "loaded"

    def _send(self, writes: Sequence[Write]) -> None:
        """Send the chunks of versions."""
        together: list[Command] = []
        for write in writes:
            try:
                write.members = write.send(write.manifest, together)
            except ServerError:
                raise
            except (OSError, DicomRedisError) as error:
                write.outcome = error
        self._server.commands(together)

    def commit(self, writes: Sequence[Write]) -> None:
        """Let documents name the chunks sent; a lost lease leaves the outcome open."""
        groups = [[write] for write in writes] if self._server.is_cluster else [writes]
        for group in groups:
            if group:
                self._commit(group)

    def _commit(self, writes: Sequence[Write]) -> None:
        texts = [json.dumps(write.members, ensure_ascii=False, allow_nan=False) for write in writes]
        names = (*STORAGE_MEMBERS, "sopInstanceUID", "vendor")

        def commit(pipe: Any) -> list[Stored | None]:
            """Queue what may be committed; return what it replaces."""
            leases = [write.manifest.lease for write in writes]
            have_leases = pipe.execute_command("EXISTS", *leases) == len(leases)
            are_new = not pipe.execute_command("EXISTS", *(write.key for write in writes))
            replaced: list[Stored | None] = []
            for write in writes:
                write.outcome, stored = None, None
                if have_leases or pipe.execute_command("EXISTS", write.manifest.lease):
                    if not are_new:
                        reply = pipe.execute_command(*_get(write.key, names))
                        stored = _stored(write.key, _parsed(write.key, names, reply))
                    write.outcome = self._outcome(write, stored)
                replaced.append(stored)
            pipe.multi()
            for write, text in zip(writes, texts, strict=True):
                if write.outcome in ("loaded", "replaced"):
                    pipe.execute_command("JSON.SET", write.key, "$", text)
                    pipe.execute_command("DEL", write.manifest.lease)
            return replaced

        watched = [key for write in writes for key in (write.key, write.manifest.lease)]
        try:
            replaced = self._transaction(watched, commit)
        except DamagedError as error:  # a foreign key has taken a document's place
            if len(writes) == 1:
                writes[0].outcome = error
                return
            for write in writes:
                self._commit([write])
            return
        for write, stored in zip(writes, replaced, strict=True):
            if stored is not None and stored.document is not None:
                if write.outcome == "replaced":
                    self._chunks.unlink(stored.document.manifest)
                elif write.outcome == "unchanged":
                    self._chunks.keep(stored.document.manifest)

    def _outcome(self, write: Write, stored: Stored | None) -> str | Exception:
        """Return what becomes of a version, given what is stored in its place."""
        if stored is None:
            return "loaded"
        if self._is_whole(stored, write):
            return "unchanged"  # somebody else was first, with the same bytes
        try:
            write.may_replace(stored, write.members)
        except DicomRedisError as error:
            return error
        return "replaced"

    def _is_whole(self, stored: Stored, write: Write) -> bool:
        """Whether what is stored has the bytes of `write`, cut alike, and lacks no key."""
        document = stored.document
        if document is None or document.blake3 != write.members["blake3"]:
            return False
        manifest, new = document.manifest, write.manifest
        return (
            (manifest.size, manifest.chunk_size) == (new.size, new.chunk_size)
            and document.crc == write.members["crc"]
            and self._chunks.missing([manifest]) == [0]
            and not self._chunks.attachment_faults(document)
        )

    def _take_back(self, manifest: Manifest) -> str:
        """Remove what was sent unless it is committed; return ``"committed"`` or ``"removed"``."""
        # Without the lease no commit still under way can succeed: it watches that key.
        self._server.command("UNLINK", manifest.lease)
        with contextlib.suppress(DamagedError):  # a foreign key that has taken the place
            if self.is_current(manifest):
                return "committed"
        self._chunks.unlink(manifest)
        return "removed"

    def set_member(self, manifest: Manifest, name: str, value: Any) -> None:
        """Set a member of a version's document, unless it is replaced meanwhile."""

        def change(pipe: Any) -> None:
            if _version(pipe, manifest.key) == manifest.version:
                pipe.multi()
                pipe.execute_command("JSON.SET", manifest.key, f"$.{name}", json.dumps(value))

        self._transaction([manifest.key], change)

    def attach_again(self, manifest: Manifest, name: str, text: bytes) -> None:
        """Store a string that a document names beside the chunks again; it may differ a little."""
        self._server.commands(self._chunks.attach(manifest, {name: text}))
        self.set_member(manifest, f"attachments.{name}", crc32(text))
        if not self.is_current(manifest):  # replaced meanwhile: nothing else would remove it
            self._chunks.unlink(manifest)

    def put_back(self, manifest: Manifest, chunks: Mapping[int, bytes]) -> bool:
        """Store lost chunks of a version again; return whether it is still the stored one."""
        self._chunks.put_back(manifest, chunks)
        if self.is_current(manifest):
            return True
        self._chunks.unlink(manifest)  # replaced meanwhile: nothing else would remove them
        return False

    def delete(self, key: str) -> None:
        """Delete a file: its document first, so that no reader meets half of it."""
        names = STORAGE_MEMBERS

        def remove(pipe: Any) -> Stored | None:
            found = _stored(key, _parsed(key, names, pipe.execute_command(*_get(key, names))))
            pipe.multi()
            pipe.delete(key)
            return found

        stored = self._transaction([key], remove)
        if stored is not None and stored.document is not None:
            self._chunks.unlink(stored.document.manifest)

    def _transaction(self, keys: Sequence[str], body: Callable[[Any], Result]) -> Result:
        try:
            return self._server.transaction(keys, body)
        except RefusedError as error:
            if is_foreign(error):
                raise _foreign(keys[0]) from error
            raise


class Leases:
    """Keeps the leases of loads in progress alive.

    A lease runs out ``LEASE_MS`` after its holder is gone; a load that finds it gone starts again.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._held: set[str] = set()
        self._lock = threading.Lock()
        self._renewer: threading.Thread | None = None
        self._process = os.getpid()

    def __reduce__(self) -> tuple[type[Leases], tuple[Server]]:
        return Leases, (self._server,)

    @contextlib.contextmanager
    def held(self, keys: Sequence[str]) -> Iterator[None]:
        """Hold leases during a ``with`` block; the commit finds out if one was lost."""
        if self._process != os.getpid():  # a fork: neither the thread nor the lock's owner is here
            self.__init__(self._server)  # type: ignore[misc]
        self._server.commands([("SET", key, b"", "PX", LEASE_MS) for key in keys])
        with self._lock:
            self._held.update(keys)
            if self._renewer is None:
                self._renewer = threading.Thread(target=self._renew, name="leases", daemon=True)
                self._renewer.start()
        try:
            yield
        finally:
            with self._lock:
                self._held.difference_update(keys)

    def _renew(self) -> None:
        """Renew what is held, until for a whole period nothing is."""
        while True:
            time.sleep(LEASE_MS / 3000)
            with self._lock:
                held = list(self._held)
                if not held:
                    self._renewer = None
                    return
            for key in held:
                # If it cannot be renewed, the commit notices. XX: never make it anew.
                with contextlib.suppress(ServerError):
                    self._server.command("SET", key, b"", "PX", LEASE_MS, "XX")


def _get(key: str, names: Sequence[str]) -> list[Any]:
    return ["JSON.GET", os.fsencode(key), *(f"$.{name}" for name in names)]


def _parsed(key: str, names: Sequence[str], reply: Any) -> dict[str, Any] | None:
    """Return the members in the reply to `_get`, or None if there is no document."""
    if isinstance(reply, Exception):
        if is_foreign(reply):
            raise _foreign(key) from reply
        raise reply
    if reply is None:
        return None
    found = json.loads(reply)
    if len(names) == 1:  # for a single path, Redis gives only the values
        found = {f"$.{names[0]}": found}
    return {name: values[0] for name in names if (values := found[f"$.{name}"])}


def is_foreign(error: Exception) -> bool:
    """Whether Redis says that a key is not a JSON document."""
    return isinstance(error, RefusedError) and "wrong" in error.reply.lower()


def _foreign(key: str) -> DamagedError:
    return DamagedError(f"The key {shown_path(key)} holds something that is not a document.")


def _stored(key: str, members: dict[str, Any] | None) -> Stored | None:
    if members is None:
        return None
    with contextlib.suppress(DamagedError):
        return Stored(parse_document(key, members), members)
    return Stored(None, members)


def _version(pipe: Any, key: str) -> Any:
    members = _parsed(key, ("version",), pipe.execute_command(*_get(key, ("version",))))
    return members and members.get("version")


def _unstored(writes: Sequence[Write], error: BaseException) -> ServerError:
    others = f" and {len(writes) - 1} files after it" if len(writes) > 1 else ""
    return ServerError(f"{shown_path(writes[0].key)}{others} could not be stored. {error}")
