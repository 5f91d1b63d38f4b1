"""What the index holds: its fields, as FT.CREATE takes them and as FT.INFO says them."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydicom import datadict

from dicomstore.errors import NotIndexedError, SearchError
from dicomstore.imaging import header, slide, thumbnail, values
from dicomstore.keys import DOCUMENT_PREFIX

#: The alias of the index that answers. On Redis 7.4 an index name counts as a key for ACLs, hence
#: the prefix of the documents.
INDEX = "file:idx"
#: An index of ours: the hash of its schema, then what makes it differ from one that was dropped.
INDEX_NAME = re.compile(rf"{INDEX}:([0-9a-f]{{12}}):[0-9a-f]{{12}}")

#: The indexed fields and their types; all but names and the instance's UID can be sorted and
#: grouped by without reading the documents.
INDEX_FIELDS = {
    "imageName": "TAG",
    "folders": "TAG",
    "size": "NUMERIC",
    **{name: indexed.type for name, indexed in header.FIELDS.items()},
    **slide.FIELDS,
}
UNSORTED_FIELDS = {"imageName", "folders", "sopInstanceUID", "dimensions"}
DATE_FIELDS = {"studyDate"}
#: Fields whose words can be searched; their TEXT twins in the index have this ending.
WORD_FIELDS = ("protocolName", "studyDescription", "seriesDescription", "bodyPartExamined")
WORDS = "Words"
#: Fields that can be searched for a part of their text in any case. Their second TAG fields have
#: this ending and take 13 bytes each a document; with suffix tries it were 70, and hardly quicker.
PART_FIELDS = tuple(
    name
    for name in (
        "patientName",
        "patientID",
        "accessionNumber",
        "studyID",
        "studyDescription",
        "seriesDescription",
        "protocolName",
    )
    if name in header.FIELDS
)
ANY_CASE = "AnyCase"
THUMBNAIL = "thumbnail"

Schema = Mapping[str, Sequence[str]]


def _schema() -> dict[str, list[str]]:
    schema = {
        name: _field(f"$.{name}", name, kind, name not in UNSORTED_FIELDS)
        for name, kind in INDEX_FIELDS.items()
    }
    for name in WORD_FIELDS:
        schema[name + WORDS] = [f"$.{name}", "AS", name + WORDS, "TEXT"]
    for name in PART_FIELDS:
        schema[name + ANY_CASE] = [f"$.{name}", "AS", name + ANY_CASE, "TAG"]
    vector = ["TYPE", "FLOAT32", "DIM", str(thumbnail.DIMENSIONS), "DISTANCE_METRIC", "L2"]
    schema[THUMBNAIL] = [f"$.{THUMBNAIL}", "AS", THUMBNAIL, "VECTOR", "FLAT", "6", *vector]
    return schema


def _field(path: str, name: str, kind: str, sortable: bool) -> list[str]:
    # Not through redis-py's TagField: it sends a SEPARATOR, which splits values at commas.
    exact, empty = (["CASESENSITIVE"], ["INDEXEMPTY"]) if kind == "TAG" else ([], [])
    sort = ["SORTABLE"] if sortable else []
    return [path, "AS", name, kind, *exact, "INDEXMISSING", *empty, *sort]


#: The fields of every index by name, each as FT.CREATE takes it.
SCHEMA: Schema = _schema()


def header_field(keyword: str) -> list[str]:
    """Return the field over the attribute `keyword` of ``header``, as FT.CREATE takes it.

    Its type follows the VR: numbers are NUMERIC, everything else TAG, dates included, since
    ``header`` has them as text. None is SORTABLE: that would keep only the first of many values.

    Raises
    ------
    ValueError
        If `keyword` is not in the DICOM dictionary (PS3.6), or is a sequence, or bulk data.
    """
    tag = datadict.tag_for_keyword(keyword)
    if tag is None:
        near = difflib.get_close_matches(keyword, datadict.keyword_dict, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"{keyword!r} is not a keyword of the DICOM dictionary.{hint}")
    vrs = datadict.dictionary_VR(tag).split(" or ")
    if "SQ" in vrs:
        raise ValueError(f"{keyword} is a sequence; only plain attributes can be indexed.")
    if not values.BULK_VRS.isdisjoint(vrs):
        raise ValueError(f"{keyword} is bulk data, which is not in the document.")
    kind = "TAG" if values.NUMBER_VRS.isdisjoint(vrs) else "NUMERIC"
    return _field(f"$.header.{keyword}", keyword, kind, sortable=False)


def definition(also: Schema) -> list[str]:
    """Return what FT.CREATE is told of an index that has the fields of `also` too."""
    schema = {**also, **SCHEMA}
    fields = [word for name in sorted(schema) for word in schema[name]]
    # Without stop words: "with contrast" is not "without contrast".
    prefix = ["PREFIX", "1", DOCUMENT_PREFIX]
    return ["ON", "JSON", *prefix, "STOPWORDS", "0", "SCHEMA", *fields]


def digest(also: Schema) -> str:
    """Return the hash of that, as it stands in the index's name."""
    return hashlib.sha256("\0".join(definition(also)).encode()).hexdigest()[:12]


class Index(NamedTuple):
    """An index that FT.INFO has described: its name, and its fields' types by name."""

    name: str
    fields: Mapping[str, str]

    @classmethod
    def of(cls, reply: Any) -> Index:
        """Return the index that a reply to FT.INFO describes.

        Raises
        ------
        SearchError
            If it is not one of ours.
        """
        info = named(reply)
        name = info[b"index_name"].decode()
        if INDEX_NAME.fullmatch(name) is None:
            raise SearchError(
                f"{INDEX} is not the alias of an index of this store, but answers for the index "
                f"{name}: drop that one (FT.DROPINDEX {name}), which keeps all documents."
            )
        attributes = [named(attribute) for attribute in info[b"attributes"]]
        return cls(name, {a[b"attribute"].decode(): a[b"type"].decode() for a in attributes})

    def has_just(self, also: Schema) -> bool:
        """Whether it has the fields of every index and those of `also`, and as defined today."""
        return self.name.split(":")[2] == digest(also)

    @property
    def asked_for(self) -> dict[str, list[str]]:
        """The fields over attributes of ``header``, beside those of every index."""
        return {
            name: header_field(name)
            for name in self.fields
            if name not in SCHEMA and datadict.tag_for_keyword(name) is not None
        }

    @property
    def names(self) -> list[str]:
        """The fields that conditions and columns can name; those of every index come first."""
        return [*INDEX_FIELDS, *(name for name in self.fields if name not in SCHEMA)]

    def field(self, name: str) -> str:
        """Return the indexed field that `name` means: its own name, or its DICOM keyword.

        Raises
        ------
        NotIndexedError
            If there is none.
        """
        if name in INDEX_FIELDS or (name in self.fields and name not in SCHEMA):
            return name
        for own, indexed in header.FIELDS.items():
            if name == indexed.keyword and own in self.fields:
                return own
        if datadict.tag_for_keyword(name) is not None:
            hint = f"store.index_also({name!r}) makes it one."
        elif near := difflib.get_close_matches(name, self.names, n=1):
            hint = f"Did you mean {near[0]}?"
        else:
            hint = f"Indexed are {', '.join(self.names)}."
        raise NotIndexedError(f"{name!r} is not an indexed field. {hint}")


def named(reply: Any) -> dict[bytes, Any]:
    """Return a reply's members by name, also where a connection speaks RESP2."""
    if isinstance(reply, dict):
        return reply
    # An attribute's flags stand in RESP2 behind the pairs, without a name.
    return {reply[at]: reply[at + 1] for at in range(0, len(reply) - 1, 2)}
