"""The application: which request is whose, who may ask, and what is answered when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import redis
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from dicomstore.errors import (
    DamagedError,
    DicomRedisError,
    MissingChunkError,
    NotIndexedError,
    NotStoredError,
    SearchError,
)
from dicomstore.store import DicomStore
from dicomstore.web.answers import LOCAL_HOSTS
from dicomstore.web.inflating import TooLargeError
from dicomstore.web.searching import TooBroadError
from dicomstore.web.services import Answered, Problem, Services

PREFIX = "/dicom-web"
#: A request is answered within this time, or given up (s).
DEADLINE_S = 600.0
LOG = logging.getLogger("dicomstore.web")

Endpoint = Callable[[Services, Scope], Awaitable[Answered]]


class Guard:
    """Lets in who may ask, and turns what goes wrong into the status that is prescribed.

    Parameters
    ----------
    services : Services
    endpoint : callable
    token : bytes or None
        Without, only this machine is answered.
    origins : collection of str
        The web pages that may read answers.
    """

    def __init__(
        self, services: Services, endpoint: Endpoint, token: bytes | None, origins: Iterable[str]
    ) -> None:
        self._services = services
        self._endpoint = endpoint
        self._token = token
        self._origins = frozenset(origin.encode("latin-1") for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        own: list[tuple[bytes, bytes]] = []
        if self._origins:
            own.append((b"vary", b"Origin"))
            if (origin := headers.get(b"origin")) in self._origins and origin is not None:
                own.append((b"access-control-allow-origin", origin))
                own.append((b"access-control-allow-headers", b"Accept, Authorization"))
        try:
            if scope["method"] == "OPTIONS" and self._origins:
                answered = Answered(204, "", b"")
            else:
                self._let_in(headers)
                if scope["method"] not in ("GET", "HEAD"):
                    raise Problem(405, "This service only reads.", ((b"allow", b"GET, HEAD"),))
                answered = await asyncio.wait_for(self._begun(scope), 60)
        except Exception as error:  # the last resort: every failure has a status
            answered = _answer_to(error)
        await _send(answered, own, receive, send)

    async def _begun(self, scope: Scope) -> Answered:
        """Return an answer whose first piece is there: a status can still be given before."""
        answered = await self._endpoint(self._services, scope)
        if isinstance(answered.body, bytes):
            return answered
        first = await anext(answered.body, b"")
        return answered._replace(body=_resumed(first, answered.body))

    def _let_in(self, headers: dict[bytes, bytes]) -> None:
        if self._token is not None:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._token):
                raise Problem(401, "A token is needed.", ((b"www-authenticate", b"Bearer"),))
            return
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if host.rpartition(":")[0] not in LOCAL_HOSTS and host not in LOCAL_HOSTS:
            raise Problem(403, "This service answers only requests to localhost.")


def _answer_to(error: Exception) -> Answered:
    """Return the answer to a request that failed; only our own words reach it."""
    if isinstance(error, Problem):
        return Answered(error.status, "application/json", _words(str(error)), error.headers)
    if isinstance(error, TooBroadError | TooLargeError):
        return Answered(413, "application/json", _words(str(error)))
    if isinstance(error, NotStoredError):
        return Answered(404, "application/json", _words("There is nothing with these UIDs."))
    if isinstance(error, NotIndexedError):
        return Answered(400, "application/json", _words(str(error)))
    if isinstance(error, redis.RedisError | OSError | SearchError | TimeoutError):
        LOG.warning("%s", type(error).__name__)
        words = (
            str(error)
            if isinstance(error, DicomRedisError)
            else "Redis or the source does not answer."
        )
        return Answered(503, "application/json", _words(words))
    # Not its text: it may quote a value.
    LOG.error("A request failed: %s", type(error).__name__, exc_info=not _is_ours(error))
    words = "The request failed."
    if isinstance(error, MissingChunkError | DamagedError):  # it names a path, maybe a patient's
        words = "What is stored is damaged or gone: load it again with repair=True."
    return Answered(500, "application/json", _words(words))


def _is_ours(error: Exception) -> bool:
    return isinstance(error, DicomRedisError)


def _words(text: str) -> bytes:
    return json.dumps({"error": text}).encode()


async def _send(
    answered: Answered, own: list[tuple[bytes, bytes]], receive: Receive, send: Send
) -> None:
    headers = [*own, *answered.headers]
    if answered.type:
        headers.append((b"content-type", answered.type.encode("latin-1")))
    body = answered.body
    if isinstance(body, bytes):
        if answered.status != 204:
            headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": answered.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        return
    await send({"type": "http.response.start", "status": answered.status, "headers": headers})
    leaving = asyncio.ensure_future(_left(receive))
    try:
        async with asyncio.timeout(DEADLINE_S):
            await _stream(body, send, leaving)
    except TimeoutError:
        LOG.error("An answer broke off: it took too long")
    finally:
        leaving.cancel()


async def _resumed(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


async def _stream(body: AsyncIterator[bytes], send: Send, leaving: asyncio.Future[None]) -> None:
    try:
        async for piece in body:
            # Nothing is cancelled: until Python 3.12 asyncio.wait_for, which redis-py is full of,
            # may lose a cancellation, and the whole file would be read for nobody.
            if leaving.done():
                return
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    except Exception as error:
        # The status is gone: without an end, the client knows that the answer is not whole.
        LOG.error("An answer broke off: %s", type(error).__name__)
        return
    await send({"type": "http.response.body", "body": b""})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def application(
    store: DicomStore,
    *,
    token: str | None = None,
    origins: Iterable[str] = (),
    viewer: Path | None = None,
) -> Router:
    """Return an ASGI application that answers DICOMweb requests from a store.

    Parameters
    ----------
    store : DicomStore
        Stays the caller's to close.
    token : str, optional
        Every request has to carry it; without, only requests to localhost are answered.
    origins : iterable of str, optional
        Web pages of other origins that may read the answers, as ``"https://viewer.example"``.
    viewer : path, optional
        Folder of the viewer OHIF as it is built, served beside DICOMweb.

    Returns
    -------
    starlette.routing.Router
        DICOMweb lies below ``/dicom-web``.
    """
    from dicomstore.web import answers

    services = Services(store)
    secret = token.encode() if token is not None else None
    study = PREFIX + "/studies/{study}"
    series = study + "/series/{series}"
    instance = series + "/instances/{instance}"
    table: list[tuple[str, Endpoint]] = [
        (instance + "/frames/{frames}", answers.frames),
        *((level + "/metadata", answers.metadata) for level in (instance, series, study)),
        *((level + "/rendered", answers.rendered) for level in (instance, series, study)),
        *((level + "/thumbnail", answers.thumbnail) for level in (instance, series, study)),
        (instance + "/frames/{frames}/rendered", answers.rendered),
        (instance + "/frames/{frames}/thumbnail", answers.thumbnail),
        (instance + "/bulkdata/{where:path}", answers.bulkdata),
        *((level + "/instances", answers.search) for level in (series, study, PREFIX)),
        *((level + "/series", answers.search) for level in (study, PREFIX)),
        (PREFIX + "/studies", answers.search),
        *((level, answers.retrieve) for level in (instance, series, study)),
        (PREFIX + "/{other:path}", answers.unknown),
    ]
    routes: list[Any] = [
        Route(path, Guard(services, endpoint, secret, origins)) for path, endpoint in table
    ]
    if viewer is not None:
        routes.append(Route("/app-config.js", _configuration))
        routes.append(Mount("/", _Viewer(viewer)))

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await services.close()

    return Router(routes, lifespan=lifespan)


#: How OHIF finds DICOMweb on its own origin. A tour and a notice would cover the image.
_OHIF = {
    "routerBasename": "/",
    "extensions": [],
    "modes": [],
    "showStudyList": True,
    "maxNumberOfWebWorkers": 2,
    "investigationalUseDialog": {"option": "never"},
    "customizationService": [{"ohif.tours": {"$set": []}}],
    "defaultDataSourceName": "redis",
    "dataSources": [
        {
            "namespace": "@ohif/extension-default.dataSourcesModule.dicomweb",
            "sourceName": "redis",
            "configuration": {
                "friendlyName": "Redis",
                "name": "redis",
                "qidoRoot": PREFIX,
                "wadoRoot": PREFIX,
                "wadoUriRoot": PREFIX,
                "qidoSupportsIncludeField": False,
                "imageRendering": "wadors",
                "thumbnailRendering": "wadors",
                "enableStudyLazyLoad": True,
                "supportsFuzzyMatching": False,
                "supportsWildcard": True,
                "bulkDataURI": {"enabled": True},
            },
        }
    ],
}


async def _configuration(_: Any) -> Response:
    return Response(f"window.config = {json.dumps(_OHIF)};", media_type="text/javascript")


class _Viewer(StaticFiles):
    """The built viewer: its files, and its page for every route that it knows itself."""

    def __init__(self, folder: Path) -> None:
        super().__init__(directory=folder)
        self._page = folder / "index.html"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_page = "." not in scope["path"].rpartition("/")[2]
        if scope["method"] in ("GET", "HEAD") and is_page:
            await FileResponse(self._page)(scope, receive, send)
            return
        try:
            await super().__call__(scope, receive, send)
        except Exception as error:
            status = getattr(error, "status_code", None)
            if status is None:
                raise
            await JSONResponse({"error": "There is no such file."}, status)(scope, receive, send)
