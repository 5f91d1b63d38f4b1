"""Texts in the character sets of DICOM (PS3.5 6.1), decoded in any thread as pydicom does."""

import warnings

from conftest import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydicom.charset import CODES_TO_ENCODINGS, decode_bytes, python_encoding
from pydicom.valuerep import TEXT_VR_DELIMS

from dicomstore.imaging import values

CHARSETS = sorted(set(python_encoding.values()))
#: What extends the default repertoire, and bytes that are sound in some of the sets.
PIECES = st.sampled_from([*CODES_TO_ENCODINGS, b"\x1b", b"\x1b$Z", b"\r\n", b"^", b"=", b"ab"])
RAW = st.lists(PIECES | st.binary(max_size=6), max_size=8).map(b"".join)


@given(raw=RAW, charsets=st.lists(st.sampled_from(CHARSETS), min_size=1, max_size=3).map(tuple))
@example(raw="山田".encode("iso2022_jp"), charsets=("iso8859", "iso2022_jp"))
@example(raw=b"\x1b$)C\xb1\xe8\r\n\x1b$)C\xc8\xf1", charsets=("iso8859", "euc_kr"))
@example(raw=b"\xff", charsets=("ascii",))
@settings(max_examples=examples(5000))
def test_any_text_is_what_pydicom_makes_of_it(raw, charsets):
    """Code extensions, their ends at a line's end, and what is wrong, without a warning."""
    with values.quietly():
        expected = decode_bytes(raw, charsets, TEXT_VR_DELIMS).rstrip("\0 ")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = values.from_bytes("LT", "LT", raw, True, charsets)
    plain = expected.replace("\0", "").strip().encode("utf-8", "replace").decode()
    assert found.plain == (plain or None) and found.readable


def test_a_character_set_that_gives_no_text():
    """A name of Python's own codecs is no character set: the default one takes its place."""
    assert values.from_bytes("LO", "LO", b"ab", True, ("hex",)).plain == "ab"
    assert values.from_bytes("LO", "LO", b"ab\x1b(Bc", True, ("hex",)).plain == "abc"
