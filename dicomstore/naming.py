"""What a name means: a key, a path or an imageName."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dicomstore.blobs.versions import Stored, Versions
from dicomstore.catalogue.index import Catalogue
from dicomstore.errors import AmbiguousNameError, MissingChunkError, NotStoredError
from dicomstore.keys import document_key, likely_key, path_of, shown_path
from dicomstore.server.connection import Server
from dicomstore.tier import Mender, Tier

#: So many documents are read in one round trip.
LOOK_UP = 1000


class Naming:
    """Finds the document that a name means.

    Parameters
    ----------
    server : Server
    versions : Versions
    tier : Tier
        Knows what the source has.
    catalogue : Catalogue
        Finds files by their imageName.
    """

    def __init__(
        self, server: Server, versions: Versions, tier: Tier, catalogue: Catalogue
    ) -> None:
        self._server = server
        self._versions = versions
        self._tier = tier
        self._catalogue = catalogue

    def members(
        self, name: str, names: Sequence[str], mender: Mender | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Return key and members of the document that `name` means: a key, a path or imageName.

        A file whose document is gone comes from `mender`.

        Raises
        ------
        NotStoredError, AmbiguousNameError
            If the name is not that of one stored file.
        """
        for key in _keys(name):
            found = self._versions.members(key, names)
            if found is None and mender is not None and mender.load(key):
                found = self._versions.members(key, names)
                if found is None:
                    raise MissingChunkError(f"{key} is evicted as soon as it is loaded.")
            if found is not None:
                return key, found
        return self._by_image_name(name, names)

    def _by_image_name(self, name: str, names: Sequence[str]) -> tuple[str, dict[str, Any]]:
        """Return key and members of the only document with an imageName."""
        if not self._server.can_search():
            raise NotStoredError(
                f"No file {shown_path(name)!r} is stored under this key or path, and this cluster "
                "cannot be searched for an imageName."
            )
        images = self._catalogue.keys_of(imageName=shown_path(name))
        if len(images) > 1:
            paths = ", ".join(shown_path(path_of(key)) for key in images[:3])
            raise AmbiguousNameError(
                f"{len(images)} stored files are named {shown_path(name)}; say which by its path: "
                f"{paths}{', ...' if len(images) > 3 else '.'}"
            )
        found = self._versions.members(images[0], names) if images else None
        if found is None:
            raise NotStoredError(
                f"No file {shown_path(name)!r} is stored: it is not a key, a path or an imageName."
            )
        return images[0], found

    def stored(
        self, names: Sequence[str], members: Sequence[str]
    ) -> Iterator[list[tuple[str, str, Stored | Exception | None]]]:
        """Yield each name, the key that it likely means, and what is stored there.

        One request looks up a whole list of them.
        """
        for first in range(0, len(names), LOOK_UP):
            group = names[first : first + LOOK_UP]
            keys = list(map(likely_key, group))
            yield list(zip(group, keys, self._versions.stored(keys, members), strict=True))

    def keys(self, names: Sequence[str], mender: Mender | None = None) -> list[str]:
        """Return the keys of the files that names mean, each once; as `members`, for many."""
        found = []
        for group in self.stored(names, ("version",)):
            for name, key, one in group:
                if isinstance(one, Exception):
                    raise one
                found.append(key if one else self.members(name, ("version",), mender)[0])
        return list(dict.fromkeys(found))

    def key_to_fetch(self, name: str) -> str:
        """Return the key of the file that `name` means: one that is stored, or at the source."""
        for key in _keys(name):
            if self._versions.members(key, ("version",)) is not None or self._tier.has(key):
                return key
        return self._by_image_name(name, ("version",))[0]


def _keys(name: str) -> list[str]:
    """Return the keys that a key or a path can mean, the likelier one first."""
    return list(dict.fromkeys((likely_key(name), document_key(name))))
