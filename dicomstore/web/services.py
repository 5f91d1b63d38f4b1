"""What the endpoints share: how they answer or refuse, and what they work with."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from dicomstore.store import DicomStore
from dicomstore.web.fetching import REMEMBERED, Fetching
from dicomstore.web.searching import Searching

#: So many images are decoded at a time, and so many may wait for that.
DECODING, WAITING = 2, 32


class Problem(Exception):
    """Why a request is not answered: the status, and a sentence for the client."""

    def __init__(
        self, status: int, words: str, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        super().__init__(words)
        self.status = status
        self.headers = tuple(headers)


class Answered(NamedTuple):
    """A response; its body is whole or comes piece by piece."""

    status: int
    type: str
    body: bytes | AsyncIterator[bytes]
    headers: Sequence[tuple[bytes, bytes]] = ()


class Services:
    """What the endpoints work with, all of one event loop.

    Parameters
    ----------
    store : DicomStore
    """

    def __init__(self, store: DicomStore) -> None:
        self.store = store
        self.fetching = Fetching(store)
        self.searching = Searching(self.fetching)
        self._pool = ThreadPoolExecutor(DECODING, "dicomweb")
        self._waiting = 0
        self._keys: dict[tuple[str, ...], str] = {}

    def known(self, uids: tuple[str, ...]) -> str | None:
        """Return the key of an instance that was looked for lately, while it is still stored."""
        return self._keys.get(uids)

    def remember(self, uids: tuple[str, ...], key: str) -> None:
        self._keys[uids] = key
        if len(self._keys) > REMEMBERED:
            self._keys.pop(next(iter(self._keys)))

    def forget(self, uids: tuple[str, ...]) -> None:
        self._keys.pop(uids, None)

    async def compute(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `work` returns, which takes the processor or waits for Redis itself."""
        if self._waiting >= WAITING:
            raise Problem(503, "Too many images are being made.", ((b"retry-after", b"1"),))
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, functools.partial(work, *arguments))
        finally:
            self._waiting -= 1

    async def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        await self.fetching.close()
