"""Compressed pixels: every transfer syntax, whose colours count, and what broken frames raise."""

import io
import struct
import subprocess
import sys

import imagecodecs
import numpy as np
import pytest
from conftest import PYDICOM_FILES
from pictures import drawn, image, needs_oracle
from pydicom import uid

from dicomstore import DicomStore
from dicomstore.imaging import codecs, header, rendering, thumbnail, values

Y, X = np.mgrid[:48, :56]
GREY8 = (X * 2 + Y * 2).astype(np.uint8)
GREY12 = (X * 40 + Y * 38).astype(np.uint16)
GREY16 = (X * 600 + Y * 640).astype(np.uint16)
SIGNED16 = (X * 600 + Y * 640 - 32_000).astype(np.int16)
COLOUR = np.stack([X * 4, Y * 5, 255 - X * 2 - Y * 2], axis=-1).astype(np.uint8)


def jpeg(array, **options):
    return imagecodecs.jpeg8_encode(array, level=98, subsampling="444", **options)


def jpeg_rgb(array):
    return jpeg(array, colorspace="RGB", outcolorspace="RGB")


def jpeg_12(array):
    return imagecodecs.jpeg8_encode(array, level=98, bitspersample=12)


def lossless(predictor):
    def encode(array):
        bits = array.itemsize * 8
        values = array.view(f"u{array.itemsize}")
        return imagecodecs.jpeg8_encode(
            values, lossless=True, predictor=predictor, bitspersample=bits
        )

    return encode


def jpeg_ls(near):
    return lambda array: imagecodecs.jpegls_encode(array.view(f"u{array.itemsize}"), level=near)


def jpeg_2000(reversible):
    level = None if reversible else 60
    return lambda array: imagecodecs.jpeg2k_encode(
        array, level=level, reversible=reversible, codecformat="J2K"
    )


def ht_jpeg_2000(reversible):
    level = None if reversible else 0.001
    return lambda array: imagecodecs.htj2k_encode(array, level=level, reversible=reversible)


#: Transfer syntax, how to encode for it, arrays that it can hold, and the largest error.
KINDS = [
    (uid.JPEGBaseline8Bit, jpeg, [GREY8], 3),
    (uid.JPEGBaseline8Bit, jpeg_rgb, [COLOUR], 3),
    (uid.JPEGExtended12Bit, jpeg, [GREY8], 3),
    (uid.JPEGExtended12Bit, jpeg_12, [GREY12], 3),
    (uid.JPEGLossless, lossless(4), [GREY8, GREY16, SIGNED16], 0),
    (uid.JPEGLosslessSV1, lossless(1), [GREY8, GREY16, SIGNED16], 0),
    (uid.JPEGLSLossless, jpeg_ls(0), [GREY8, GREY16, SIGNED16, COLOUR], 0),
    (uid.JPEGLSNearLossless, jpeg_ls(2), [GREY8, GREY16, COLOUR], 2),
    (uid.JPEG2000Lossless, jpeg_2000(True), [GREY8, GREY16, SIGNED16, COLOUR], 0),
    (uid.JPEG2000, jpeg_2000(False), [GREY8, COLOUR], 3),
    (uid.HTJ2KLossless, ht_jpeg_2000(True), [GREY8, GREY16, SIGNED16, COLOUR], 0),
    (uid.HTJ2KLosslessRPCL, ht_jpeg_2000(True), [GREY8, GREY16, SIGNED16, COLOUR], 0),
    (uid.HTJ2K, ht_jpeg_2000(False), [GREY8, COLOUR], 3),
]
EACH = [
    pytest.param(syntax, encode, array, error, id=f"{syntax.keyword}-{array.dtype}-{array.ndim}")
    for syntax, encode, arrays, error in KINDS
    for array in arrays
]


def compressed(syntax, encode, array, **attributes):
    """Return a DICOM file of one compressed frame."""
    frame = encode(array)
    if array is GREY12:
        attributes["BitsStored"] = 12
    return image(array, syntax=syntax, pixels=[frame], **attributes)


def decoded(content):
    """Return the stored values of a file's first frame."""
    dataset = rendering.read_dataset(content)
    decoder, plugin = codecs.decoder_for(dataset.file_meta.TransferSyntaxUID)
    with values.quietly():
        array, _ = decoder.as_array(dataset, index=0, raw=True, decoding_plugin=plugin)
    return array


@pytest.mark.parametrize(("syntax", "encode", "array", "error"), EACH)
def test_every_transfer_syntax(syntax, encode, array, error):
    """What was encoded comes out, exactly where the syntax is lossless, in type and sign."""
    found = decoded(compressed(syntax, encode, array))
    assert found.dtype == array.dtype and found.shape == array.shape
    assert np.abs(found.astype(int) - array).max() <= error


@pytest.mark.parametrize(
    ("syntax", "encode", "size"),
    [
        (uid.JPEGBaseline8Bit, jpeg, ">2H"),
        (uid.JPEGLosslessSV1, lossless(1), ">2H"),
        (uid.JPEGLSLossless, jpeg_ls(0), ">2H"),
        (uid.JPEG2000Lossless, jpeg_2000(True), ">2L"),
    ],
)
def test_a_frame_that_claims_another_size(syntax, encode, size):
    """Its own header is compared before a decoder takes memory for what only it claims."""
    frame = encode(GREY8)
    assert codecs.claimed_size(frame) == GREY8.shape
    shape = GREY8.shape if size == ">2H" else GREY8.shape[::-1]
    forged = frame.replace(struct.pack(size, *shape), struct.pack(size, 65535, 65535), 1)
    assert codecs.claimed_size(forged) == (65535, 65535)
    with pytest.raises(values.UNREADABLE, match="its header says"):
        decoded(image(GREY8, syntax=syntax, pixels=[forged]))
    for length in range(40):
        codecs.claimed_size(frame[:length])


def test_the_syntaxes_are_those_of_pydicom():
    """Each compressed syntax that pydicom has a decoder for is decoded here, RLE by pydicom."""
    for syntax in (*codecs.DECODER_DEPENDENCIES, uid.RLELossless):
        decoder, plugin = codecs.decoder_for(syntax)
        assert syntax == decoder.UID
        assert plugin == ("pydicom" if syntax == uid.RLELossless else "imagecodecs")
    assert {syntax for syntax, *_ in KINDS} == set(codecs.DECODER_DEPENDENCIES)
    assert codecs.decoder_for(uid.ExplicitVRLittleEndian)[1] == ""
    with pytest.raises(NotImplementedError):
        codecs.decoder_for(uid.MPEG2MPML)


def test_pydicom_decodes_as_well(request):
    """Once the store is imported, pydicom's own functions decode, without any other package."""
    code = f"""
import sys
sys.modules |= dict.fromkeys(("gdcm", "pylibjpeg", "jpeg_ls"))
import dicomstore.store
import pydicom
for name in ("MR_small.dcm", "MR_small_jpeg_ls_lossless.dcm", "JPGExtended.dcm"):
    print(pydicom.dcmread({str(PYDICOM_FILES)!r} + "/" + name).pixel_array.max())
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=request.config.rootpath
    )
    native, jpeg_ls, extended = map(int, run.stdout.split() or [0, 0, 0])
    assert native == jpeg_ls > 0, run.stderr
    assert 255 < extended < 4096


def test_other_plugins_are_not_asked(monkeypatch):
    """A plug-in that pydicom would try first has no say, whatever is installed beside this one."""
    decoder, _ = codecs.decoder_for(uid.JPEGBaseline8Bit)

    def zeros(_frame, runner):
        return bytes(runner.rows * runner.columns)

    monkeypatch.setattr(codecs, "decode_zeros", zeros, raising=False)
    decoder.add_plugin("a zero", (codecs.__name__, "decode_zeros"))
    try:
        picture = rendering.render(
            rendering.read_dataset(compressed(uid.JPEGBaseline8Bit, jpeg, GREY8))
        )
        assert picture.any()
    finally:
        decoder.remove_plugin("a zero")


@pytest.mark.parametrize(("syntax", "encode", "array", "error"), EACH)
def test_broken_frames(syntax, encode, array, error):
    """A frame that is cut off, changed, or of another shape raises what every caller expects."""
    frame = bytearray(encode(array))
    generator = np.random.default_rng(7)
    broken = [b"\0\0", frame[:2], frame[:40], frame[: len(frame) // 3]]
    for _ in range(20):  # not in the head, which could ask for memory: workers are limited in that
        changed = bytearray(frame)
        changed[generator.integers(len(frame) // 3, len(frame))] ^= int(generator.integers(1, 256))
        broken.append(changed)
    for each in broken:
        content = image(array, syntax=syntax, pixels=[bytes(each)])
        try:
            found = decoded(content)
        except values.UNREADABLE:
            continue
        assert found.shape == array.shape


def test_a_cut_off_jpeg_ls_frame_gets_an_end(monkeypatch):
    """Without an end the decoder searches for seconds; with one it refuses the frame at once."""
    given, original = [], imagecodecs.jpegls_decode

    def decode(frame):
        given.append(frame)
        return original(frame)

    monkeypatch.setattr(codecs.imagecodecs, "jpegls_decode", decode)
    frame = imagecodecs.jpegls_encode(GREY8)
    for cut in range(10, len(frame), 50):
        with pytest.raises(values.UNREADABLE):
            decoded(image(GREY8, syntax=uid.JPEGLSLossless, pixels=[frame[:cut]]))
    assert len(given) > 5 and all(each.endswith(b"\xff\xd9") for each in given)
    whole = [image(GREY8, syntax=uid.JPEGLSLossless, pixels=[f]) for f in (frame, frame + b"\0")]
    assert all(np.array_equal(decoded(each), GREY8) for each in whole)


@pytest.mark.parametrize(("syntax", "encode", "array", "error"), EACH)
def test_frames_of_a_different_shape(syntax, encode, array, error):
    """Rows and columns are the header's, also where as many pixels, or a single one, would fit."""
    rows, columns = array.shape[:2]
    for frame, header_rows, header_columns in (
        (array, rows - 1, columns),
        (array, columns, rows),
        (array[:1, :1], rows, columns),
    ):
        pixels = [encode(np.ascontiguousarray(frame))]
        content = image(array, syntax=syntax, pixels=pixels, Rows=header_rows)
        dataset = rendering.read_dataset(content)
        dataset.Columns = header_columns
        with pytest.raises(values.UNREADABLE):
            rendering.render(dataset)


@pytest.mark.parametrize(
    ("syntax", "encode"),
    [(syntax, encode) for syntax, encode, arrays, _ in KINDS if arrays[0] is GREY8],
)
def test_fewer_bits_than_the_header_allocates(syntax, encode):
    """A frame of 8 bits is what it is where the header has 16 bits a pixel."""
    wide = GREY8.astype(np.uint16)
    found = decoded(image(wide, syntax=syntax, pixels=[encode(GREY8)], BitsStored=8))
    assert found.dtype == np.uint16
    assert np.abs(found.astype(int) - GREY8).max() <= 3


def test_the_header_says_which_colours():
    """RGB and YBR are told apart by the header; markers in the JPEG frame do not count."""
    jfif = b"\xff\xe0\0\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"
    adobe = [b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform]) for transform in (0, 1)]
    for photometric, frame in (
        ("RGB", jpeg_rgb(COLOUR)),
        ("YBR_FULL", jpeg(COLOUR)),
        ("YBR_FULL_422", jpeg(COLOUR)),
    ):
        for marker in (b"", jfif, *adobe):
            marked = frame[:2] + marker + without_markers(frame)[2:]
            content = image(
                COLOUR, syntax=uid.JPEGBaseline8Bit, pixels=[marked], photometric=photometric
            )
            picture = rendering.render(rendering.read_dataset(content))
            assert np.abs(picture.astype(int) - COLOUR).mean() < 1, (photometric, marker)


def without_markers(frame):
    """Return a JPEG frame without application segments, of which encoders write some."""
    kept, position = bytearray(frame[:2]), 2
    while frame[position + 1] != 0xDA:  # start of scan
        end = position + 2 + int.from_bytes(frame[position + 2 : position + 4], "big")
        if frame[position + 1] & 0xF0 != 0xE0:
            kept += frame[position:end]
        position = end
    return bytes(kept + frame[position:])


def test_jpeg_2000_whose_sign_is_not_the_headers():
    """Signed values that are encoded as unsigned ones of 13 bits are signed again."""
    found = decoded((PYDICOM_FILES / "J2K_pixelrep_mismatch.dcm").read_bytes())
    assert found.dtype == np.int16
    assert found[0, :3].tolist() == [-2000] * 3  # padding, in the corners of a CT image
    assert found.min() >= -2000 and 1000 < found.max() < 4096


@pytest.mark.parametrize("name", ["YBR_RCT", "YBR_ICT"])
def test_jpeg_2000_undoes_its_own_colours(name):
    """The transform of JPEG 2000 ends with decoding."""
    content = compressed(uid.JPEG2000Lossless, jpeg_2000(True), COLOUR, photometric=name)
    assert (rendering.render(rendering.read_dataset(content)) == COLOUR).all()


DCMTK_WRITES = [
    ["dcmcjpeg", "--encode-lossless"],
    ["dcmcjpeg", "--encode-lossless-sv1"],
    ["dcmcjpeg", "--encode-baseline"],
    ["dcmcjpeg", "--encode-extended"],
    ["dcmcjpeg", "--encode-spectral"],
    ["dcmcjpeg", "--encode-progressive"],
    ["dcmcjpls", "--encode-lossless"],
    ["dcmcjpls", "--encode-nearlossless"],
    ["dcmcjpls", "--encode-lossless", "--interleave-none"],
    ["dcmcjpls", "--encode-lossless", "--interleave-sample"],
]


@needs_oracle
@pytest.mark.parametrize("command", DCMTK_WRITES, ids=" ".join)
@pytest.mark.parametrize("name", ["MR_small.dcm", "SC_rgb_jpeg_dcmd.dcm", "examples_palette.dcm"])
def test_what_dcmtk_encodes(tmp_path, name, command):
    """Frames of a second encoder, the retired processes of JPEG among them, look as DCMTK's."""
    path = tmp_path / "compressed.dcm"
    run = subprocess.run([*command, PYDICOM_FILES / name, path], capture_output=True)
    if run.returncode:
        pytest.skip("DCMTK does not encode this image so")
    dataset = rendering.read_dataset(path.read_bytes())
    with values.quietly():
        picture = rendering.render(dataset)
    windowed = ["+Wi", "1"] if "WindowCenter" in dataset else []
    expected = drawn(path, 0, tmp_path, *windowed)
    assert np.abs(expected.astype(int) - picture).mean() <= 1


def test_in_a_worker(client, tmp_path):
    """Every syntax is decoded within the limits of a worker, and has a thumbnail."""
    for number, (syntax, encode, arrays, _) in enumerate(KINDS):
        content = compressed(syntax, encode, arrays[0], SOPInstanceUID=f"1.2.{number}")
        (tmp_path / f"{number}.dcm").write_bytes(content)
    store = DicomStore(client, progress=False)
    assert set(store.load(tmp_path)["status"]) == {"loaded"}
    for number, (_, _, arrays, _) in enumerate(KINDS):
        assert not store.similar(f"{number}.dcm", k=1).empty, arrays[0].dtype
        content = (tmp_path / f"{number}.dcm").read_bytes()
        file = io.BytesIO(content)
        assert len(thumbnail.of_file(file, header.searchable(file))) == thumbnail.DIMENSIONS
