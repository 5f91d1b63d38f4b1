"""Names, values and documents made to do harm: what the user sees, and that nothing happens."""

import contextlib
import json
import os
import zlib

import pytest
from blake3 import blake3
from conftest import PYDICOM_FILES, examples
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from samples import dicom, element, sha256_of

from dicomstore import DicomStore
from dicomstore.errors import (
    AmbiguousNameError,
    DamagedError,
    DicomRedisError,
    MissingChunkError,
    NotStoredError,
)
from dicomstore.keys import document_key, path_of, shown_path

NAMES = [
    b"a b.dcm", b" leading", b"trailing ", b"it's", b'"quoted"', b"{braces}", b"}{", b"{", b"*",
    b"?", b"[a-z]", b"100%", b"%41", b"%2e%2e", b"new\nline", b"\ttab", b"back\\slash", b"\\",
    b"a,b;c", b"$.imageName", b"@imageName:{*}", b"-x", b"~", b"...", b"..x", b"\xff\xfe",
    b"caf\xe9", "café ü 日本 \U0001f9e0".encode(), "e\u0301".encode(), "\u202egnp".encode(),
    b"\x01\x7f", b"file:x", b"chunk:file:x:0123456789ab:0", b"idx", b"(a|b)", b"<script>",
    b"x" * 255, b"NULL", b"\xc2\xa0",
]  # fmt: skip


def json_set(client, key, document):
    client.execute_command("JSON.SET", key, "$", json.dumps(document))


def document_of(client, key):
    return json.loads(client.execute_command("JSON.GET", key))


def stored_as(client, key, image=None):
    """Store an image by hand under any key at all, with a document that is sound in itself."""
    image = dicom() if image is None else image
    chunk = f"chunk:{key}:0123456789ab:0"
    client.set(chunk, image)
    json_set(client, key, {
        "imageName": shown_path(path_of(key).rpartition("/")[2]),
        "size": len(image), "blake3": blake3(image).hexdigest(),
        "version": "0123456789ab", "chunkSize": len(image), "tail": [],
        "crc": [zlib.crc32(image)], "chunks": [chunk],
    })  # fmt: skip


# --- names and values ----------------------------------------------------------------------------


def test_file_names_of_every_kind(store, client, tmp_path):
    """Files and folders of odd names load, are read by path, found by name, restored identical."""
    folder = os.fsencode(tmp_path) + b"/in"
    os.mkdir(folder)
    for number, name in enumerate(NAMES):
        os.mkdir(folder + b"/d" + name[:200])
        for path in (folder + b"/" + name, folder + b"/d" + name[:200] + b"/inner"):
            with open(path, "wb") as file:
                file.write(dicom(Rows=number))
    report = store.load(os.fsdecode(folder))
    assert report["status"].eq("loaded").all() and len(report) == 2 * len(NAMES)
    assert len(store.find()) == len(report)
    for number, raw in enumerate(NAMES):
        name = os.fsdecode(raw)
        assert store.read(name) == dicom(Rows=number)
        assert store.read(f"d{os.fsdecode(raw[:200])}/inner") == dicom(Rows=number)
        found = store.find(imageName=shown_path(name))
        assert list(found["rows"]) == [number]
        assert list(found["key"]) == [document_key(name)]
    assert store.verify()["status"].eq("ok").all()
    restored = store.restore(tmp_path / "out")
    assert restored["status"].eq("restored").all()
    assert restored.to_string() and report.to_string().encode("utf-8")
    assert sha256_of(tmp_path / "out") == sha256_of(tmp_path / "in")


VALUES = [
    "194} | @patientSex:{M", "194", "194|195", "*", "19*", "$p0", "{194}", "@protocolName:{194}",
    "-194", "a, b", "a,b", "'", '"', "%194%", "w'*'", "=>[KNN 1 @v $v]", "$.x", "Ünïcødé", "日本",
    "\U0001f9e0", "(194)", "194 195", "a|b", "~a", "[1 2]", "a:b;c", "a.b", "#", "<", ">", "&", "^",
]  # fmt: skip


def test_values_that_look_like_queries(store):
    """Each value is found exactly, and matches no other; also in lists and in counts."""
    for number, value in enumerate(VALUES):
        store.put(f"{number}", dicom(SpecificCharacterSet="ISO_IR 192", ProtocolName=value,
                                     PatientSex="M", PatientID=value))  # fmt: skip
    for number, value in enumerate(VALUES):
        assert list(store.find(protocolName=value)["path"]) == [f"{number}"], value
        assert list(store.find(patientID=[value, "none"])["path"]) == [f"{number}"], value
        assert store.count_by("protocolName", patientID=value).to_dict() == {value: 1}
    assert store.count_by("protocolName").to_dict() == dict.fromkeys(VALUES, 1)


@settings(
    max_examples=examples(60),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20))
@example("a\\*b")
@example("\\")
@example("a\\ b")
@example("\\\\")
@example(" \t a ")
def test_any_value_is_found(store, client, value):
    """Whatever text a document holds, a search for it finds just this document."""
    json_set(client, "file:wanted", {"patientID": value})
    json_set(client, "file:other", {"patientID": "other", "imageName": value})
    found = list(store.find(patientID=value)["path"])
    assert found == (["other", "wanted"] if value == "other" else ["wanted"])


def test_a_nul_in_a_name_or_value(store):
    """A NUL, at which the search engine would cut a value off, is refused and not searched for."""
    store.put("a", dicom(PatientID="a"))
    with pytest.raises(ValueError, match="NUL"):
        store.find(patientID="a\0b")
    with pytest.raises(ValueError, match="no path"):
        store.put("a\0b", dicom())


@pytest.mark.parametrize("name", ["", "x" * 5000, "../a", "/", "file:", "*", "a\udcff"])
def test_reading_by_a_name_that_is_none(store, name):
    """A name under which nothing is stored is told in one sentence that can be printed."""
    store.put("a", dicom())
    with pytest.raises(NotStoredError, match="is stored") as caught:
        store.read(name)
    str(caught.value).encode("utf-8")


def test_an_ambiguous_name(store):
    """An imageName that several files have is refused by read and delete, with their paths."""
    for number in range(5):
        store.put(f"{number}/IM\udcff", dicom())
    for action in (store.read, store.delete):
        with pytest.raises(AmbiguousNameError, match=r"^5 stored files.*0/IM%FF, 1/IM%FF.*\.\.\."):
            action("IM\udcff")
    assert len(store.find()) == 5


# --- restoring -----------------------------------------------------------------------------------

ESCAPES = [
    "../../x", "..", ".", "", "/", "//", "a/../../x", "a/../x", "a/./x", "./x", "a//x", "x/", "/x",
    "%2e%2e/x", "%2E%2E/x", "..%2fx", "%2Fx", "a%2fb", "%41", "%zz", "100%", "%ff", "{a}", "a%00b",
    "a%0ab", "\0", "a\0b",
]  # fmt: skip


def test_documents_that_lead_out_of_the_folder(store, client, tmp_path):
    """A path that is absolute, leads upwards or is not written our way is refused by its name."""
    out = tmp_path / "a" / "b" / "out"
    absolute = f"{tmp_path}/absolute"
    for path in [*ESCAPES, absolute]:
        stored_as(client, f"file:{path}")
    stored_as(client, "file:good")
    rows = store.restore(out).set_index("key")
    assert len(rows) == len(ESCAPES) + 2
    assert rows["status"].pop("file:good") == "restored"
    refused = rows.drop("file:good")
    assert refused["status"].eq("skipped").all()
    for path, reason in zip(refused["path"], refused["reason"], strict=True):
        assert repr(path) in reason and "refused" in reason
    assert list(sha256_of(tmp_path)) == ["a/b/out/good"]
    assert not list(tmp_path.rglob(".restore-*"))


def test_keys_that_are_no_utf8(store, client, tmp_path):
    """A document whose key somebody wrote with raw bytes is refused, and the others restored."""
    client.execute_command("JSON.SET", b"file:\xff\xfe", "$", '{"size": 1}')
    store.put("good", dicom())
    rows = store.restore(tmp_path).set_index("path")
    assert rows["status"]["good"] == "restored"
    assert len(rows) == 2 and set(rows["status"]) <= {"restored", "skipped", "damaged"}
    assert len(store.verify()) == 2
    assert os.listdir(tmp_path) == ["good"]
    with contextlib.suppress(DicomRedisError):
        store.read("\udcff\udcfe")


def test_an_empty_file_over_a_document_of_none(store, client, tmp_path):
    """A document that somebody wrote for no bytes does not make an empty file a stored one."""
    document = {
        "imageName": "a", "size": 0, "version": "0123456789ab", "chunkSize": 262_080, "tail": [],
        "crc": [], "chunks": [], "blake3": blake3().hexdigest(),
    }  # fmt: skip
    json_set(client, "file:a", document)
    (tmp_path / "a").write_bytes(b"")
    row = store.load(tmp_path).iloc[0]
    assert row["status"] == "skipped" and row["reason"] == "an empty file"


def test_links_below_the_folder_are_not_followed(store, tmp_path):
    """A link where a folder should be is refused, one where the file should be is not touched."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (elsewhere / "target").write_text("theirs")
    (out / "link").symlink_to(elsewhere)
    (out / "loop").symlink_to(out / "loop")
    (out / "file").symlink_to(elsewhere / "target")
    (out / "broken").symlink_to(elsewhere / "new")
    (out / "taken").write_text("a file where a folder should be")
    for path in ("link/x", "link/deep/x", "loop/x", "file", "broken", "taken/x", "good/x"):
        store.put(path, dicom())
    rows = store.restore(out).set_index("path")
    assert rows["status"].to_dict() == {
        **dict.fromkeys(["link/x", "link/deep/x", "loop/x", "file", "broken"], "skipped"),
        "taken/x": "skipped",
        "good/x": "restored",
    }
    for path in ("link/x", "link/deep/x", "loop/x"):
        assert repr(path) in rows["reason"][path] and "link" in rows["reason"][path]
    # With overwrite, the links give way to files; what they point at stays.
    rows = store.restore(out, overwrite=True).set_index("path")
    assert rows["status"]["file"] == rows["status"]["broken"] == "restored"
    assert not (out / "file").is_symlink() and (out / "file").read_bytes() == dicom()
    assert os.listdir(elsewhere) == ["target"]
    assert (elsewhere / "target").read_bytes() == b"theirs"
    assert (out / "link").is_symlink() and (out / "loop").is_symlink()


def test_the_folder_itself_may_be_a_link(store, tmp_path):
    """The user may restore to a folder behind a link; only links below it are not followed."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store.put("a/b", dicom())
    assert store.restore(tmp_path / "link")["status"].tolist() == ["restored"]
    assert (tmp_path / "real" / "a" / "b").read_bytes() == dicom()


def test_nothing_is_overwritten_unless_asked(store, tmp_path):
    """A file that exists is left alone and named; overwrite=True replaces it."""
    store.put("a", dicom())
    (tmp_path / "a").write_text("theirs")
    (row,) = store.restore(tmp_path).to_dict("records")
    assert row["status"] == "skipped" and "overwrite=True" in row["reason"]
    assert (tmp_path / "a").read_text() == "theirs"
    assert store.restore(tmp_path, overwrite=True)["status"].tolist() == ["restored"]
    assert (tmp_path / "a").read_bytes() == dicom()


def test_names_that_the_file_system_refuses(store, tmp_path):
    """A name that is too long, or two that cannot be side by side, cost the one row only."""
    for path in ("x" * 300, "a", "a/b", "/".join(["d" * 200] * 30), "z"):
        store.put(path, dicom())
    rows = store.restore(tmp_path).set_index("path")
    assert rows["status"]["a"] == rows["status"]["z"] == "restored"
    assert rows["status"].value_counts().to_dict() == {"skipped": 3, "restored": 2}
    assert rows["reason"][rows["status"] == "skipped"].ne("").all()
    assert not list(tmp_path.rglob(".restore-*"))


# --- edited documents and damaged chunks ---------------------------------------------------------


@pytest.fixture
def stored(client):
    """A store with one file of several chunks, and its document."""
    store = DicomStore(client, chunk_size=1000, progress=False)
    store.put("a.dcm", dicom(pixels=bytes(range(256)) * 40))
    return store, document_of(client, "file:a.dcm")


def assert_refused(store, out, error, words):
    """Read, verify and restore all refuse `a.dcm` with `words`, and nothing is written."""
    with pytest.raises(error, match=words):
        store.read("a.dcm")
    for report in (store.verify(), store.restore(out)):
        (row,) = report[report["path"] == "a.dcm"].to_dict("records")
        assert row["status"] == "damaged"
        assert words in row["reason"]
    assert not [path for path in out.rglob("*") if path.is_file()]


EDITS = {
    "a foreign key": {"$.chunks[0]": "foreign"},
    "all foreign": {"$.chunks": ["foreign"] * 11},
    "a document as chunk": {"$.chunks[3]": "file:a.dcm"},
    "another version": {"$.version": "ba9876543210"},
    "a version with a path": {"$.version": "../../../../"},
    "a huge size": {"$.size": 2**62},
    "a huge size in chunks of one": {"$.size": 10**18, "$.chunkSize": 1, "$.tail": []},
    "one huge chunk": {"$.chunkSize": 2**62},
    "no chunk size": {"$.chunkSize": 0},
    "a negative size": {"$.size": -1},
    "a size of text": {"$.size": "10000"},
    "a broken size": {"$.size": 1e300},
    "three tails": {"$.tail": [1, 1, 1]},
    "a negative tail": {"$.tail": [-5, 10]},
    "no tail": {"$.tail": None},
    "fewer CRCs": {"$.crc": [1]},
    "no members": {"$": {}},
    "an array": {"$": [1, 2, 3]},
    "a number": {"$": 5},
    "deep": {"$.size": [[[[[[[[[[1]]]]]]]]]]},
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_document(edit, stored, client, tmp_path):
    """A document that does not agree with itself is refused by its key; loading again mends it."""
    store, _ = stored
    client.set("foreign", "secret of another program")
    foreign = client.dump("foreign")
    for path, value in EDITS[edit].items():
        client.execute_command("JSON.SET", "file:a.dcm", path, json.dumps(value))
    assert_refused(store, tmp_path, DamagedError, "file:a.dcm")
    assert store.put("a.dcm", dicom()) == "file:a.dcm"
    assert store.read("a.dcm") == dicom()
    assert client.dump("foreign") == foreign


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_document_can_be_deleted(edit, stored, client):
    """Deleting a file whose document was edited removes no key of others."""
    store, _ = stored
    client.set("foreign", "x")
    for path, value in EDITS[edit].items():
        client.execute_command("JSON.SET", "file:a.dcm", path, json.dumps(value))
    store.delete("a.dcm")
    assert not client.exists("file:a.dcm") and client.get("foreign") == b"x"


def test_edited_checksums(stored, client, tmp_path):
    """With a CRC edited the chunk is named, with the BLAKE3 edited the document is."""
    store, document = stored
    client.execute_command("JSON.SET", "file:a.dcm", "$.crc[5]", "7")
    assert_refused(store, tmp_path, DamagedError, document["chunks"][5])
    json_set(client, "file:a.dcm", {**document, "blake3": "0" * 64})
    for report in (store.verify(), store.restore(tmp_path)):
        assert report["status"].tolist() == ["damaged"]
        assert "file:a.dcm" in report["reason"][0] and "BLAKE3" in report["reason"][0]
    assert os.listdir(tmp_path) == []


#: Members that only frames, volumes or thumbnails are made of.
VIEWS = {
    "frames": [
        5, "x", [], {}, {"count": "a", "span": 3}, {"count": 1, "span": [0, 10**15]},
        {"count": 1, "span": [-100, -5]}, {"count": 10**15, "span": [0, 100]}, {"fault": 5},
        {"count": 3, "start": -5, "bits": -8}, {"count": 3, "start": 0, "bits": 10**15},
        {"count": 3, "start": 10**15, "bits": 80}, {"count": True, "start": 0, "bits": 8},
        {"count": 1, "start": 1.5, "bits": 8}, {"count": 1, "start": 0, "bits": "8"},
    ],
    "header": [5, "x", [1]],
    "transferSyntaxUID": [5, ["1.2"], {}],
    "thumbnail": [5, "x", [], [1, 2], [300] * 64, [0.5] * 64, ["x"] * 64, {"x": 1}],
}  # fmt: skip


@pytest.mark.parametrize("name", ["CT_small.dcm", "SC_rgb_rle_16bit_2frame.dcm"])
@pytest.mark.parametrize("member", VIEWS)
def test_an_edited_view(member, name, store, client):
    """Odd frames, headers or thumbnails in a document are told in one sentence, and fast."""
    store.load(PYDICOM_FILES / name)
    actions = {
        "header": [lambda: store.volume([name])],
        "thumbnail": [lambda: store.similar(name)],
    }.get(member, [lambda: store.frame(name, 0), lambda: store.volume([name])])
    for value in VIEWS[member]:
        client.execute_command("JSON.SET", f"file:{name}", f"$.{member}", json.dumps(value))
        for action in actions:
            with pytest.raises(DamagedError, match=f"{name}.*Delete the file and load it again"):
                action()
    store.read(name)
    store.delete(name)
    store.load(PYDICOM_FILES / name)
    assert store.frame(name, 0).size and store.similar(name).empty


@pytest.mark.filterwarnings("ignore:The number of bytes of pixel data")
@pytest.mark.parametrize("value", [None, "x", -1, 64, 10**12, 1.5, [1, 2], {"x": 1}, True], ids=str)
@pytest.mark.parametrize("keyword", [
    "Rows", "Columns", "BitsAllocated", "BitsStored", "SamplesPerPixel", "PixelRepresentation",
    "PhotometricInterpretation", "PlanarConfiguration", "ImagePositionPatient",
    "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept",
])  # fmt: skip
def test_an_edited_header(keyword, value, store, client):
    """A header that was edited gives an image or an error of ours; it ends no program."""
    store.load(PYDICOM_FILES / "CT_small.dcm")
    path = f"$.header.{keyword}"
    client.execute_command("JSON.SET", "file:CT_small.dcm", path, json.dumps(value))
    for action in (lambda: store.frame("CT_small.dcm", 0), lambda: store.volume(["CT_small.dcm"])):
        with contextlib.suppress(DicomRedisError):
            action()


DAMAGE = {
    "truncated": lambda chunk: chunk[:-1],
    "emptied": lambda chunk: b"",
    "lengthened": lambda chunk: chunk + b"x",
    "one bit flipped": lambda chunk: bytes([chunk[0] ^ 1]) + chunk[1:],
    "turned round": lambda chunk: chunk[::-1],
}


@pytest.mark.parametrize("number", [0, 4, -1])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_chunk(damage, number, stored, client, tmp_path):
    """The damaged chunk is named, nothing is handed out or written, and the way out works."""
    store, document = stored
    image, key = store.read("a.dcm"), document["chunks"][number]
    client.set(key, DAMAGE[damage](client.get(key)))
    assert_refused(store, tmp_path, DamagedError, key)
    buffer = bytearray(len(image))
    with pytest.raises(DamagedError, match="Load the file again with repair=True"):
        store.read("a.dcm", into=buffer)
    (folder := tmp_path / "in").mkdir()
    (folder / "a.dcm").write_bytes(image)
    assert store.load(folder, repair=True)["status"].tolist() == ["repaired"]
    assert store.read("a.dcm") == image and document_of(client, "file:a.dcm") == document


def test_a_chunk_of_another_length_and_the_same_checksum(client, tmp_path):
    """CRC-32 alone would take an emptied chunk for one of four certain bytes; the length tells."""
    same = b"\x9d\x0a\xd9\x6d"
    assert zlib.crc32(same) == zlib.crc32(b"")
    images = [dicom(StudyID=text, pixels=same * 2) for text in ("", "ab")]
    (image,) = [one for one in images if one.index(same) % 4 == 0]
    store = DicomStore(client, chunk_size=4, progress=False)
    store.put("a.dcm", image)
    key = document_of(client, "file:a.dcm")["chunks"][image.index(same) // 4]
    client.set(key, b"")
    assert_refused(store, tmp_path, DamagedError, key)


@pytest.mark.parametrize("numbers", [[0], [-1], [1, 2, 7], range(11)])
def test_missing_chunks(numbers, stored, client, tmp_path):
    """The first missing chunk is named and how many there are; loading again brings them back."""
    store, document = stored
    image, keys = store.read("a.dcm"), [document["chunks"][number] for number in numbers]
    client.delete(*keys)
    assert_refused(store, tmp_path, MissingChunkError, keys[0])
    count = "The chunk" if len(keys) == 1 else f"{len(keys)} chunks"
    with pytest.raises(MissingChunkError, match=f"^{count} .*{keys[0]}.*repair=True"):
        store.read("a.dcm")
    store.put("a.dcm", image)
    assert store.read("a.dcm") == image
    assert {os.fsdecode(key) for key in client.scan_iter("chunk:*")} == {
        *document["chunks"], f"chunk:file:a.dcm:{document['version']}:json"
    }  # fmt: skip


def test_a_chunk_of_another_type(stored, client, tmp_path):
    """A list where a chunk should be counts as a chunk that is gone."""
    store, document = stored
    client.delete(document["chunks"][2])
    client.rpush(document["chunks"][2], "x")
    assert_refused(store, tmp_path, MissingChunkError, document["chunks"][2])


def test_damage_costs_one_row(client, stored, tmp_path):
    """Beside a damaged file, all others are verified and restored."""
    store, document = stored
    store.load(PYDICOM_FILES / "CT_small.dcm")
    client.delete(document["chunks"][0])
    assert store.verify()["status"].tolist() == ["ok", "damaged"]
    assert store.restore(tmp_path)["status"].tolist() == ["restored", "damaged"]
    assert os.listdir(tmp_path) == ["CT_small.dcm"]


# --- hostile files stay in the index -------------------------------------------------------------


def test_hostile_headers_stay_in_the_index(store, client, tmp_path):
    """Whatever a header holds, its document is stored and a search finds it."""
    odd = {
        "date": {"StudyDate": "20040231"},
        "old date": {"StudyDate": "2004.01.19"},
        "nan": {"SliceThickness": "NaN", "PixelSpacing": ["1e999", "2"]},
        "huge": {"SliceThickness": "1e308", "NumberOfFrames": "9" * 30},
        "many": {"PatientID": ["a", "b"], "Modality": ["CT", "MR"], "StudyDate": ["20040119"] * 2},
        "nul": {"PatientID": "a\0b", "ProtocolName": "\0"},
        "long": {"ProtocolName": "x" * 60_000, "PatientID": "y" * 60_000},
        "empty": {"PatientID": "", "Rows": None, "StudyDate": ""},
        "control": {"PatientID": "\x1b[2J\x07", "ProtocolName": "\x0b\x0c"},
    }
    for name, attributes in odd.items():
        (tmp_path / name).write_bytes(dicom(SpecificCharacterSet="ISO_IR 192", **attributes))
    for vr in ("IS", "LO", "SQ", "FD", "AT", "UN"):
        for tag in (0x00080020, 0x00100040, 0x00180010, 0x00280008, 0x00280010):
            name, wrong = f"{vr} {tag:x}", element(tag, vr, b"abcd")
            (tmp_path / name).write_bytes(dicom(ImageType="ORIGINAL") + wrong)
            odd[name] = None
    report = store.load(tmp_path)
    assert report["status"].eq("loaded").all()
    assert not report["reason"].str.contains("no search").any()
    assert sorted(store.find()["path"]) == sorted(odd)
    assert list(store.find(studyDate="20040119")["path"]) == ["old date"]
    assert client.execute_command("FT.INFO", "file:idx")[b"hash_indexing_failures"] == 0
