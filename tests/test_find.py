"""Searching: conditions, words, any attribute, counts, and answers that are never a part."""

import datetime
import io
import json

import numpy as np
import pandas as pd
import pytest
from conftest import PYDICOM_DATA, PYDICOM_FILES, examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import datadict
from samples import PREAMBLE, dicom, element

from dicomstore import DicomStore, connect, not_, words
from dicomstore.catalogue.query import containing
from dicomstore.catalogue.schema import WORD_FIELDS
from dicomstore.errors import NotIndexedError, SearchError, SearchTimeoutError
from dicomstore.imaging import header
from dicomstore.server.embedded import RedisServer

#: What a server does that was started without the options of ours.
PLAIN = "TIMEOUT 10000 ON_TIMEOUT FAIL"


def set_document(client, name, **members):
    client.execute_command("JSON.SET", f"file:{name}", "$", json.dumps({"header": {}, **members}))


@pytest.fixture
def paths(store):
    """Return the names that a search finds, in its order, as one string."""

    def find(*query, **conditions):
        return "".join(store.find(*query, **conditions)["path"])

    return find


# --- conditions ----------------------------------------------------------------------------------


def test_dates(store, client, paths):
    """A date is a day in any notation, or all of a month or a year, also as the end of a range."""
    days = {
        "a": 20181231,
        "b": 20190101,
        "c": 20190531,
        "d": 20190601,
        "e": 20191231,
        "f": 20200229,
    }
    for name, day in days.items():
        set_document(client, name, studyDate=day)
    set_document(client, "g")
    assert paths(studyDate="2019") == paths(studyDate=2019) == "bcde"
    assert paths(studyDate="2019-05") == paths(studyDate="201905") == "c"
    assert paths(studyDate="2020-02") == "f"
    assert paths(studyDate=("2019-05", "2019")) == "cde"
    assert paths(studyDate=("2019", None)) == "bcdef" and paths(studyDate=(None, "2018")) == "a"
    for day in (20190531, "20190531", "2019-05-31", datetime.date(2019, 5, 31)):
        assert paths(studyDate=day) == "c"
    assert paths(studyDate=pd.Timestamp("2019-05-31")) == "c"
    assert paths(studyDate=["2018", ("2019-12", "2020")]) == "aef"
    assert paths(studyDate=not_("2019")) == "afg"
    for wrong in ("2019-13", "2019-02-29", "19", "January", True, 5.5, ("2020", "2019")):
        with pytest.raises(ValueError, match="studyDate"):
            store.find(studyDate=wrong)


def test_presence_and_negation(store, client, paths):
    """None is absent, ... present; not_ turns anything round, the files without the field too."""
    for name, members in {
        "a": {"modality": "CT", "rows": 1}, "b": {"modality": "MR", "rows": 2},
        "c": {"rows": 3}, "d": {"modality": "", "patientSex": "F"},
    }.items():  # fmt: skip
        set_document(client, name, **members)
    assert paths(modality=None) == "c" and paths(modality=...) == "abd"
    assert paths(modality="") == "d"
    assert paths(modality=not_("CT")) == "bcd" and paths(modality=not_(["CT", "MR"])) == "cd"
    assert paths(modality=not_(None)) == "abd" and paths(rows=not_(...)) == "d"
    assert paths(modality=["CT", None]) == "ac" and paths(modality=[not_("CT"), "CT"]) == "abcd"
    assert paths(rows=not_((2, None))) == "ad" and paths(rows=not_([1, 3])) == "bd"
    assert paths(modality=not_("CT"), rows=...) == "bc"
    assert paths(not_("x") and "@rows:[2 3]", modality=None) == "c"


def test_numbers(store, client, paths):
    """Ranges have open sides; NaN, a reversed range, text and truth values are refused."""
    for number in range(1, 6):
        set_document(client, number, rows=number)
    assert paths(rows=(2, 4)) == "234" and paths(rows=(None, 2)) == "12"
    assert paths(rows=(None, None)) == "12345" and paths(rows=(float("-inf"), 1.5)) == "1"
    for wrong in (float("nan"), (float("nan"), 3), (1, float("nan")), (4, 2), "1", True, [1, "2"]):
        with pytest.raises(ValueError, match="rows"):
            store.find(rows=wrong)


def test_dicom_keywords_name_fields_as_well(store, client, paths):
    """A field answers to its DICOM keyword, so also the one that `columns=` hides."""
    set_document(client, "a", columns=512, modality="CT")
    set_document(client, "b", columns=256, modality="CT")
    assert paths(Columns=512) == "a" and paths(Modality="CT", Columns=(None, 300)) == "b"
    assert list(store.find(columns=["Columns"])) == ["path", "key", "Columns"]


def test_names_that_are_no_fields(store):
    """Unknown names are told everywhere, with the nearest field or the way to index it."""
    store.put("a", dicom(KVP=100))
    for search in (
        lambda name: store.find(**{name: 1}),
        lambda name: store.find(order_by=name),
        lambda name: store.find(order_by=f"-{name}", limit=1),
        lambda name: store.find(columns=[name]),
        lambda name: store.count_by(name),
        lambda name: store.count_by("modality", name),
        lambda name: store.count_by("modality", **{name: 1}),
        lambda name: store.similar(np.eye(9), columns=[name]),
    ):
        with pytest.raises(NotIndexedError, match="Did you mean modality"):
            search("modalty")
        with pytest.raises(NotIndexedError, match=r"index_also\('KVP'\)"):
            search("KVP")
        with pytest.raises(NotIndexedError, match="Indexed are imageName"):
            search("zzzz")


# --- words ---------------------------------------------------------------------------------------

TEXTS = {
    "a": "CT Brain with contrast",
    "b": "Brains, contrasted",
    "c": "C-spine (2.5mm) t1_vibe",
    "d": "Schädel ÜBERSICHT",
    "e": "brain without contrast",
    "f": "日本語 検査",
}


@pytest.mark.parametrize("field", WORD_FIELDS)
def test_words(store, client, paths, field):
    """All words in any order and case, other forms of them, prefixes; 'with' is a word too."""
    for name, text in TEXTS.items():
        set_document(client, name, **{field: text})
    for text, found in {
        "brain": "abe", "BRAINS": "abe", "contrast brain": "abe", "with contrast": "a",
        "without": "e", "contr*": "abe", "contrast bra*": "abe", "C-spine": "c", "2.5mm": "c",
        "c-spi*": "c", "t1*": "c", "t1": "", "t1_vibe": "c", "schädel": "d", "SCHÄDEL": "d",
        "sch*": "d", "übersicht": "d", "Übersicht": "d", "日本語": "f",
        "日*": "f", "liver": "", "li*": "",
    }.items():  # fmt: skip
        assert paths(**{field: words(text)}) == found, text
    assert paths(**{field: not_(words("brain"))}) == "bcdf"  # as written: b has only Brains
    assert paths(**{field: not_(words("bra*"))}) == "cdf"
    assert paths(**{field: not_(words("übersicht"))}) == "abcef"
    assert paths(**{field: [words("contrasted"), words("2.5mm")]}) == "abce"
    assert paths(**{field: [words("spine"), "brain without contrast"]}) == "ce"


@pytest.mark.parametrize("text", ["", "  ", "-", "*", "b*", "(*)", "über*", "SCHÄ*"])
def test_words_that_are_none(store, text):
    """No word at all, and prefixes of which the engine would miss some in silence, are refused."""
    with pytest.raises(ValueError, match=r"word|letters"):
        store.find(studyDescription=words(text))


def test_words_of_a_field_without(store):
    """Words in a field that has none are refused with those that have."""
    with pytest.raises(ValueError, match=r"patientID has no words.*studyDescription"):
        store.find(patientID=words("a"))


@settings(max_examples=examples(150), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_no_value_becomes_syntax(store, client, text):
    """Whatever text is searched for, as value, words or prefix, nothing foreign is found."""
    if not client.exists("file:x"):
        set_document(client, "x", protocolName="secret")
    for value in (text, words(text), words(text + "*"), words(f"{text}) | @modality:{{*}} | (a")):
        try:
            found = store.find(protocolName=value)
        except ValueError:
            continue
        assert found.empty or text.strip("*").casefold() in "secret"


@settings(max_examples=examples(150), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(st.characters(max_codepoint=0x17F, exclude_characters="\n\r\x0b\x0c\\"), min_size=1))
def test_every_text_is_found_by_its_words(store, client, text):
    """Cut into words here as there, a description is found by all the words it has."""
    text = "".join(letter for letter in text if letter.isprintable() or letter == "\t")
    set_document(client, "x", studyDescription=text or "x")
    try:
        found = store.find(studyDescription=words(text))
    except ValueError as error:
        assert "has no word in it" in str(error) or "letters" in str(error)
    else:
        assert list(found["path"]) == ["x"]


def test_prefixes_are_complete_or_refused(tmp_path, monkeypatch):
    """Where a server expands a prefix to 200 words, the search is refused.

    The engine of Redis 8 warns of that, and is believed; older ones say nothing, and the words are
    counted.
    """
    monkeypatch.setattr("dicomstore.server.embedded.SEARCH_OPTIONS", PLAIN)
    with RedisServer() as plain, connect(plain.url) as client:
        store = DicomStore(client, progress=False)
        warns = int(store.server()["search engine"].split(".")[0]) >= 8
        sentence = "stands for more" if warns else "at most 200"
        set_document(client, 0, studyDescription="brain")
        assert len(store.find(studyDescription=words("bra*"))) == 1
        for number in range(1, 300):
            set_document(client, number, studyDescription=f"brain{number}", patientID=f"p{number}")
        for search in (
            lambda: store.find(studyDescription=words("bra*")),
            lambda: store.find("@patientID:{p*}"),
            lambda: store.find(patientID=containing("p2")),
            lambda: store.count_by("modality", query="@studyDescriptionWords:bra*"),
        ):
            with pytest.raises(SearchError, match=f"{sentence}.*MAXEXPANSIONS"):
                search()
        assert len(store.find("*")) == 300
        assert len(store.find(studyDescription=words("brain7"))) == 1


def test_prefixes_of_many_words(store, client):
    """The embedded server finds every word behind a prefix, not the first 200."""
    with client.pipeline(transaction=False) as pipe:
        for number in range(300):
            pipe.execute_command(
                "JSON.SET", f"file:{number}", "$", f'{{"studyDescription": "brain{number}"}}'
            )
        pipe.execute()
    assert len(store.find(studyDescription=words("bra*"))) == 300


# --- order, limit, columns -----------------------------------------------------------------------


def test_order_and_limit(store):
    """With a limit the server sorts, without one this module; both give the same order."""
    store.load(PYDICOM_DATA)
    store.index_also("KVP", "ImageType", "PixelSpacing")
    everything = store.find(columns="all")
    assert list(store.find(limit=7)["path"]) == list(everything["path"][:7])
    for field in (*everything.columns[2:], "KVP"):
        for order_by in (field, f"-{field}"):
            whole = store.find(order_by=order_by, columns=[field])
            assert len(whole) == len(everything)
            pd.testing.assert_frame_equal(
                store.find(order_by=order_by, columns=[field], limit=20), whole.head(20)
            )
            values = list(whole[field].dropna())
            assert whole[field][len(values) :].isna().all()
            if field not in ("ImageType", "PixelSpacing"):  # these have several
                assert values == sorted(values, reverse=order_by[0] == "-")
    assert len(store.find(limit=10**6)) == len(everything)
    for limit in (0, -1, 1.5, "3"):
        with pytest.raises(ValueError, match="limit"):
            store.find(limit=limit)


def test_columns(store):
    """Chosen columns come as chosen, also when empty; an absent value is pandas' own."""
    store.put("a", dicom(Rows=5, Modality="CT", PatientID="x"))
    store.put("b", dicom(Rows=6))
    assert list(store.find(columns=["rows", "studyDate"])) == ["path", "key", "rows", "studyDate"]
    assert list(store.find(columns=())) == ["path", "key"]
    shown = store.find(modality="CT")
    assert shown["rows"].dtype == "Int64" and shown["modality"].dtype == "str"
    both = store.find(columns=["modality", "rows"])
    assert both["modality"].isna().tolist() == [False, True] and both["rows"].tolist() == [5, 6]


def test_texts_that_look_like_arrays(store):
    """A text in brackets is shown and counted as it is."""
    for number, text in enumerate(['["a"]', "[1]", "[", "[]"]):
        store.put(f"{number}", dicom(ProtocolName=text))
        assert store.find(protocolName=text)["protocolName"].tolist() == [text]
        assert store.count_by("protocolName")[text] == 1


# --- any attribute -------------------------------------------------------------------------------


def test_any_attribute(store, paths):
    """index_also covers what is stored and what comes, waits for it, and counts the files."""
    for number in range(1, 4):
        store.put(f"{number}", dicom(KVP=100 + number, ImageType=["ORIGINAL", f"T{number}"]))
    store.put("4", dicom(AcquisitionDate="20190131", PixelSpacing=[0.5, 0.75], KVP=""))
    counts = store.index_also("KVP", "ImageType", "AcquisitionDate", "PixelSpacing", "Modality")
    assert counts.to_dict() == {
        "KVP": 3, "ImageType": 3, "AcquisitionDate": 1, "PixelSpacing": 1, "Modality": 0,
    }  # fmt: skip
    store.put("5", dicom(KVP=102.5))
    assert paths(KVP=(102, None)) == "235" and paths(KVP=102.5) == "5" and paths(KVP=None) == "4"
    assert paths(ImageType="ORIGINAL") == "123" and paths(ImageType="T2") == "2"
    assert paths(ImageType=not_("T2"), KVP=...) == "135"
    assert paths(PixelSpacing=0.75) == paths(PixelSpacing=0.5) == "4"
    assert paths(AcquisitionDate="20190131") == "4"
    shown = store.find(columns=["KVP", "ImageType", "PixelSpacing"])
    assert shown["KVP"].dropna().tolist() == [101, 102, 103, 102.5]
    assert shown["ImageType"][1] == "ORIGINAL\\T2" and shown["PixelSpacing"][3] == "0.5\\0.75"
    assert store.index_also("KVP")["KVP"] == 4
    assert store.index_also().empty
    assert "KVP" in store.find(columns="all")


def test_attributes_that_cannot_be_indexed(store, client):
    """Unknown keywords, sequences and bulk are refused in a sentence, and nothing is added."""
    store.find()
    before = client.execute_command("FT.INFO", "file:idx")[b"attributes"]
    for keyword, sentence in [
        ("SliceThicknes", "Did you mean SliceThickness"),
        ("qqqqqqqq", "not a keyword"),
        ("RequestAttributesSequence", "sequence"),
        ("PixelData", "bulk"),
        ("RedPaletteColorLookupTableData", "bulk"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            store.index_also("KVP", keyword)
    assert client.execute_command("FT.INFO", "file:idx")[b"attributes"] == before


def test_an_attribute_that_another_process_added(store, client):
    """A store that was open before learns of it when it is asked for."""
    other = DicomStore(client, progress=False)
    store.put("a", dicom(KVP=100))
    with pytest.raises(NotIndexedError):
        store.find(KVP=100)
    other.index_also("KVP")
    assert len(store.find(KVP=100)) == 1 and store.count_by("KVP").to_dict() == {100: 1}


def test_every_attribute_of_the_corpus(store, client):
    """All attributes of pydicom's files can be indexed, and no document drops out."""
    report = store.load(PYDICOM_FILES)
    stored = report[report["status"] == "loaded"]["key"].tolist()
    expected = {}
    for key in stored:
        for keyword in json.loads(client.execute_command("JSON.GET", key, "$.header"))[0]:
            tag = datadict.tag_for_keyword(keyword)
            if tag is not None and datadict.dictionary_VR(tag) != "SQ":
                expected[keyword] = expected.get(keyword, 0) + 1
    assert len(expected) > 200
    names = sorted(expected)
    assert store.index_also(*names).to_dict() == expected
    assert sorted(store.find(columns=())["key"]) == sorted(stored)
    assert int(client.execute_command("FT.INFO", "file:idx")[b"hash_indexing_failures"]) == 0


ODD_TEXTS = [
    "",
    "a",
    "a\\b",
    "é\\日本",
    "1A",
    "x" * 200,
    " lead",
    "[1]",
    '["a"]',
    "NaN",
    "\x1b$B\x00",
]
ODD_NUMBERS = [
    "",
    "1",
    "1.5\\2",
    "NaN",
    "inf",
    "-inf",
    "1e308",
    "1e999",
    "9" * 30,
    "1A",
    "0x10",
    "-0",
]
ODD_DATES = ["20190131", "2004.01.19", "20040231", "2019", "20190131\\20190201", "", "tomorrow"]
ODD = {
    "StudyDate": ODD_DATES, "AcquisitionDate": ODD_DATES, "Modality": ODD_TEXTS,
    "ProtocolName": ODD_TEXTS, "StudyDescription": ODD_TEXTS, "KVP": ODD_NUMBERS,
    "SliceThickness": ODD_NUMBERS, "ImageType": ODD_TEXTS, "PixelSpacing": ODD_NUMBERS,
    "InstanceNumber": ODD_NUMBERS, "NumberOfFrames": ODD_NUMBERS, "PatientName": ODD_TEXTS,
}  # fmt: skip
CHARACTER_SETS = ["ISO_IR 100", "ISO 2022 IR 87", "ISO_IR 127", "ISO_IR 192", "nonsense", ""]


@st.composite
def odd_headers(draw):
    """Return a DICOM file whose elements hold odd values, in VRs right and wrong."""
    chosen = draw(st.dictionaries(st.sampled_from(sorted(ODD)), st.integers(0, 100), max_size=8))
    elements = {0x00080005: ("CS", draw(st.sampled_from(CHARACTER_SETS)))}
    for keyword, number in chosen.items():
        tag = datadict.tag_for_keyword(keyword)
        vr = draw(st.sampled_from([datadict.dictionary_VR(tag)] * 4 + ["LO", "DS", "US", "UN"]))
        elements[tag] = vr, ODD[keyword][number % len(ODD[keyword])]
    content = PREAMBLE + element(0x00080016, "UI", b"1.2.840.10008.5.1.4.1.1.2\0")
    for tag, (vr, text) in sorted(elements.items()):
        value = text.encode("utf-8")
        content += element(tag, vr, value + b" " * (len(value) % 2))
    return content


@settings(max_examples=examples(120), deadline=None, suppress_health_check=list(HealthCheck))
@given(odd_headers())
def test_odd_headers_stay_in_the_index(store, client, content):
    """Whatever a header holds, its document is found by every field that could be read."""
    if not client.exists("file:x"):
        store.index_also(*ODD)
    store.put("x", content, replace=True)
    assert list(store.find()["path"]) == ["x"]
    members = header.searchable(io.BytesIO(content))
    read = {name: members[name] for name in members if name in header.FIELDS}
    own = {field.keyword for field in header.FIELDS.values()}
    added = set(ODD) - own
    read |= {name: members["header"][name] for name in added if name in members["header"]}
    for name, value in read.items():
        assert list(store.find(**{name: ...})["path"]) == ["x"]
        for one in value if isinstance(value, list) else [value]:
            assert list(store.find(**{name: one})["path"]) == ["x"], (name, one)
    for name in added - set(read):
        assert list(store.find(**{name: None})["path"]) == ["x"], name


# --- counting ------------------------------------------------------------------------------------


@pytest.fixture
def counted(store, client):
    for name, members in {
        "a": {"modality": "CT", "studyDate": 20190131, "header": {"ImageType": ["O", "P", "P"]}},
        "b": {"modality": "CT", "studyDate": 20190201, "header": {"ImageType": ["O", "X"]}},
        "c": {"modality": "MR", "studyDate": 20200101, "header": {"ImageType": "O"}},
        "d": {"modality": "MR", "header": {"ImageType": ["a,b", 'c"]']}},
        "e": {"studyDate": 20200102, "rows": 5},
    }.items():
        set_document(client, name, **members)
    store.index_also("ImageType")
    return store


def test_counts(counted):
    """Largest first, with conditions; files without the field only if asked for."""
    assert counted.count_by("modality").to_dict() == {"CT": 2, "MR": 2}
    missing = counted.count_by("modality", missing=True)
    assert missing[missing.index.isna()].tolist() == [1] and missing.sum() == 5
    assert counted.count_by("modality", studyDate="2019").to_dict() == {"CT": 2}
    assert counted.count_by("modality", query="@modality:{MR}").to_dict() == {"MR": 2}
    rows = counted.count_by("rows", missing=True)
    assert rows[5] == 1 and rows[rows.index.isna()].tolist() == [4]
    assert counted.count_by("manufacturer").empty
    assert counted.count_by("manufacturer", missing=True).tolist() == [5]


def test_counts_of_several_values(counted):
    """Each value of an attribute counts, once a file, whatever characters it has."""
    found = counted.count_by("ImageType")
    assert found.to_dict() == {"O": 3, "P": 1, "X": 1, "a,b": 1, 'c"]': 1}
    assert found.index[0] == "O"
    for value, count in found.items():
        assert len(counted.find(ImageType=value)) == count


def test_counts_by_year_and_month(counted):
    """Dates are counted by year or month, in order of time."""
    years = counted.count_by("studyDate", by="year")
    assert list(years.items()) == [(2019, 2), (2020, 2)]
    assert list(counted.count_by("studyDate", by="month").items()) == [
        ("2019-01", 1), ("2019-02", 1), ("2020-01", 2),
    ]  # fmt: skip
    for name, by in (("studyDate", "week"), ("modality", "year")):
        with pytest.raises(ValueError, match="year"):
            counted.count_by(name, by=by)


def test_cross_tables(counted):
    """Two fields make a table: rows of the first, columns of the second, zero where none is."""
    table = counted.count_by("modality", "studyDate", by="year")
    assert table.to_dict("index") == {"CT": {2019: 2, 2020: 0}, "MR": {2019: 0, 2020: 1}}
    assert (table.index.name, table.columns.name) == ("modality", "studyDate")
    everything = counted.count_by("modality", "studyDate", by="year", missing=True)
    assert everything.to_numpy().sum() == 5 and everything.shape == (3, 3)
    pairs = counted.count_by("modality", "ImageType")
    assert pairs.loc["CT"].to_dict() == {"O": 2, "P": 1, "X": 1, "a,b": 0, 'c"]': 0}
    assert counted.count_by("modality", "manufacturer").empty


def test_counts_on_real_files(store):
    """The counts of every field add up to the files that have it, and each to what find finds."""
    store.load(PYDICOM_FILES)
    found = store.find(columns="all")
    for field in found.columns[2:]:
        counts = store.count_by(field)
        assert counts.to_dict() == found[field].value_counts().to_dict()
        assert store.count_by(field, missing=True).sum() == len(found)


# --- four different answers ----------------------------------------------------------------------


def test_nothing_found(store):
    """Nothing found is an empty table."""
    store.put("a", dicom(Modality="CT"))
    assert store.find(modality="MR").empty and store.count_by("patientID").empty


def test_field_not_indexed(store):
    """A field that is not indexed is an error of its own, which is a ValueError."""
    store.find()
    with pytest.raises(NotIndexedError) as caught:
        store.find(SliceThickness=1)
    assert isinstance(caught.value, ValueError) and not isinstance(caught.value, SearchError)


def test_engine_timed_out(monkeypatch):
    """A search that the engine breaks off is an error under either policy, never a part."""
    monkeypatch.setattr("dicomstore.server.embedded.SEARCH_OPTIONS", "TIMEOUT 1")
    with RedisServer() as server, connect(server.url) as client:
        store = DicomStore(client, progress=False)
        store.find()
        with client.pipeline(transaction=False) as pipe:
            for number in range(30_000):
                members = {"imageName": f"{number}", "rows": number}
                pipe.execute_command("JSON.SET", f"file:{number}", "$", json.dumps(members))
            pipe.execute()
        for policy in ("FAIL", "RETURN"):
            client.execute_command("FT.CONFIG", "SET", "ON_TIMEOUT", policy)
            monkeypatch.setattr("dicomstore.catalogue.engine.SEARCH_TIMEOUT_MS", 1)
            for search in (
                lambda: store.find(),
                lambda: store.find(order_by="rows", limit=10),
                lambda: store.find(rows=(1, None)),
                lambda: store.count_by("imageName"),
                lambda: store.count_by("imageName", "rows"),
            ):
                with pytest.raises(SearchTimeoutError, match="did not finish"):
                    search()
            monkeypatch.setattr("dicomstore.catalogue.engine.SEARCH_TIMEOUT_MS", 10_000)
            assert len(store.find(columns=())) == 30_000
