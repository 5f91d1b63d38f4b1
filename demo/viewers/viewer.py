"""What both viewers are: a widget whose front end asks, and a picture where no kernel answers."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import anywidget
import imagecodecs
import numpy as np
import traitlets
from numpy.typing import NDArray

from dicomstore.errors import DicomRedisError

FOLDER = Path(__file__).parent

Answer = tuple[dict[str, Any], Sequence[Any]]


def module(name: str) -> str:
    """Return the JavaScript of a viewer: what both share, then its own, in one module."""
    return "".join((FOLDER / file).read_text(encoding="utf-8") for file in ("viewer.js", name))


class Viewer(anywidget.AnyWidget):
    """A widget that answers what its front end asks for, over its own channel.

    Parameters
    ----------
    about : dict
        What the front end has to know before it can ask.
    still : numpy.ndarray
        Stands in the viewer's place where there is no kernel; uint8, of shape (rows, columns) or
        (rows, columns, 3).
    """

    _css = FOLDER / "viewers.css"
    about = traitlets.Dict().tag(sync=True)

    def __init__(self, about: Mapping[str, Any], still: NDArray[np.uint8]) -> None:
        super().__init__(about=dict(about))
        self._still = base64.b64encode(imagecodecs.png_encode(still)).decode()
        self.on_msg(self._reply)

    def answer(self, asked: Mapping[str, Any]) -> Answer:
        """Return the answer to a question of the front end: a message and its binary buffers."""
        raise NotImplementedError

    def _reply(self, _: Viewer, asked: Mapping[str, Any], __: Sequence[Any]) -> None:
        try:
            message, buffers = self.answer(asked)
        except DicomRedisError as error:
            message, buffers = {"error": str(error)}, []
        self.send(message, buffers)

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data, metadata = cast(Any, super()._repr_mimebundle_(**kwargs))
        return {**data, "image/png": self._still}, metadata
