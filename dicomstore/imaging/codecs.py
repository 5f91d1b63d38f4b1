"""Compressed pixels, decoded with imagecodecs: a plug-in of pydicom's decoders (PS3.5 Annex A.4).

RLE Lossless and what is not compressed are left to pydicom itself.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from typing import Any

import imagecodecs
from numpy.typing import NDArray
from pydicom import uid
from pydicom.pixels import get_decoder
from pydicom.pixels.decoders.base import Decoder, DecodeRunner

PLUGIN = "imagecodecs"
#: Retired forms of JPEG (PS3.5 8.2.1) that the same decoder understands, and pydicom knows not.
RETIRED = {
    "1.2.840.10008.1.2.4.53": uid.JPEGExtended12Bit,  # spectral selection
    "1.2.840.10008.1.2.4.55": uid.JPEGExtended12Bit,  # full progression
}
#: libjpeg's names of colour spaces, by samples per pixel. A frame is decoded from a space to the
#: same one: only the header says which it is (PS3.3 C.7.6.3.1.2), where libjpeg would guess.
COLOUR_SPACES = {3: "YCBCR", 4: "CMYK"}

START_OF_IMAGE, JPEG_2000 = b"\xff\xd8", b"\xff\x4f\xff\x51"
END_OF_IMAGE = b"\xff\xd9"  # of JPEG and JPEG-LS, and JPEG 2000's end of codestream
START_OF_SCAN = 0xDA
#: Markers of a frame header: all SOF of JPEG, and JPEG-LS's.
FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}

Decode = Callable[[bytes, int], NDArray[Any]]


def register() -> None:
    """Add the plug-in to pydicom's decoders, once for the process.

    From then on, pydicom's own functions can decode with it as well.
    """
    with _one_at_a_time:
        for syntax in _DECODERS:
            decoder = get_decoder(syntax)
            if PLUGIN not in decoder.available_plugins:
                decoder.add_plugin(PLUGIN, (__name__, decode_frame.__name__))


def decoder_for(syntax: str) -> tuple[Decoder, str]:
    """Return pydicom's decoder of a transfer syntax, and the ``decoding_plugin`` to use with it.

    Named so, the plug-in here comes before all others that may be installed.

    Parameters
    ----------
    syntax : str
        A transfer syntax UID.

    Raises
    ------
    NotImplementedError
        If there is none.
    """
    register()
    syntax = RETIRED.get(syntax, syntax)
    plugin = PLUGIN if is_available(syntax) else ""
    return get_decoder(syntax), "pydicom" if syntax == uid.RLELossless else plugin


def is_available(syntax: str) -> bool:
    """Whether the plug-in decodes this transfer syntax; pydicom asks before it adds it."""
    return syntax in DECODER_DEPENDENCIES


def decode_frame(frame: bytes, runner: DecodeRunner) -> bytes:
    """Return the samples of one frame, pixel by pixel and in this machine's byte order.

    Parameters
    ----------
    frame : bytes
        As it is in the file.
    runner : pydicom.pixels.decoders.base.DecodeRunner
        Has what the header says, and is told what the samples are like.

    Raises
    ------
    RuntimeError
        If it cannot be decoded: imagecodecs' errors are of this class.
    ValueError
        If its shape is not that of the header.
    """
    samples = runner.samples_per_pixel
    # Before a decoder takes memory for what only the frame says.
    claimed = claimed_size(frame)
    if claimed not in (None, (runner.rows, runner.columns)):
        raise ValueError(
            f"The frame says that it has {claimed} rows and columns, its header says "
            f"{(runner.rows, runner.columns)}."
        )
    array = _DECODERS[runner.transfer_syntax](frame, samples)
    expected = (runner.rows, runner.columns, samples)[: 2 if samples == 1 else 3]
    if array.shape != expected:
        raise ValueError(f"The frame has the shape {array.shape}, its header says {expected}.")
    runner.set_option("bits_allocated", 8 * array.itemsize)
    runner.set_option("planar_configuration", 0)
    if runner.photometric_interpretation in ("YBR_ICT", "YBR_RCT"):
        runner.set_option("photometric_interpretation", "RGB")  # JPEG 2000 has undone it
    return array.tobytes()


def claimed_size(frame: bytes) -> tuple[int, int] | None:
    """Return the rows and columns that a compressed frame says it has, None if that is not clear.

    Read from the frame header of JPEG and JPEG-LS (ITU-T T.81 B.2.2) or from the SIZ marker of
    JPEG 2000 (ITU-T T.800 A.5.1).
    """
    if frame[:4] == JPEG_2000:
        right, lower, left, upper = struct.unpack_from(">4L", frame.ljust(24, b"\0"), 8)
        return lower - upper, right - left
    at = 2
    while frame[:2] == START_OF_IMAGE and at + 9 <= len(frame) and frame[at] == 0xFF:
        marker, length = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4], "big")
        if marker == 0xFF:  # padding before a marker
            at += 1
        elif marker in FRAME_HEADERS:
            rows, columns = struct.unpack_from(">2H", frame, at + 5)
            return (rows, columns) if rows else None  # 0: only the end of the image says it
        elif marker == START_OF_SCAN:
            return None
        else:
            at += 2 + length
    return None


def _jpeg(frame: bytes, samples: int) -> NDArray[Any]:
    space = COLOUR_SPACES.get(samples)
    return imagecodecs.jpeg8_decode(frame, colorspace=space, outcolorspace=space)


def _jpeg_ls(frame: bytes, samples: int) -> NDArray[Any]:
    # In a frame that is cut off, the decoder looks for the end for many seconds.
    is_whole = END_OF_IMAGE in frame[-3:]  # a byte may follow, since DICOM pads to even lengths
    return imagecodecs.jpegls_decode(frame if is_whole else frame + END_OF_IMAGE)


def _jpeg_2000(frame: bytes, samples: int) -> NDArray[Any]:
    return imagecodecs.jpeg2k_decode(frame)


_DECODERS: dict[str, Decode] = {
    uid.JPEGBaseline8Bit: _jpeg,
    uid.JPEGExtended12Bit: _jpeg,
    uid.JPEGLossless: _jpeg,
    uid.JPEGLosslessSV1: _jpeg,
    uid.JPEGLSLossless: _jpeg_ls,
    uid.JPEGLSNearLossless: _jpeg_ls,
    uid.JPEG2000Lossless: _jpeg_2000,
    uid.JPEG2000: _jpeg_2000,
    uid.HTJ2KLossless: _jpeg_2000,
    uid.HTJ2KLosslessRPCL: _jpeg_2000,
    uid.HTJ2K: _jpeg_2000,
}
#: pydicom's name for what a plug-in needs, by transfer syntax.
DECODER_DEPENDENCIES = dict.fromkeys(_DECODERS, (PLUGIN,))

_one_at_a_time = threading.Lock()
