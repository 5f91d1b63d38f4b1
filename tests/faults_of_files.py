"""Files made to break those who read them, and queries made to break out."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import signal
import string
import struct
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

import psutil
import pydicom
from faults_shared import (
    store_of,
    workers,
)
from pydicom.uid import DeflatedExplicitVRLittleEndian
from samples import PREAMBLE, dicom, element

from dicomstore import DicomStore, connect
from dicomstore.errors import FrameError
from dicomstore.server.embedded import RedisServer

PYDICOM_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
#: What one hostile file may cost.
SECONDS, MEBIBYTES = 2, 300
ITEM, SEQUENCE = b"\xfe\xff\x00\xe0", 0x00081140


# --- mutated files --------------------------------------------------------------------------------


def nested(depth, *, undefined):
    content = b""
    for _ in range(depth):
        length = 0xFFFFFFFF if undefined else len(content)
        end = b"\xfe\xff\x0d\xe0" + bytes(4) if undefined else b""
        item = ITEM + struct.pack("<I", length) + content + end
        length = 0xFFFFFFFF if undefined else len(item)
        end = b"\xfe\xff\xdd\xe0" + bytes(4) if undefined else b""
        content = element(SEQUENCE, "SQ", item + end, length=length)
    return content


def deflated(start, piece=b"", times=0):
    """A file in deflated syntax (PS3.5 A.5) whose data set is `start` and `times` the `piece`."""
    compress = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    plain = dicom(syntax=DeflatedExplicitVRLittleEndian)
    with io.BytesIO(plain) as file:
        pydicom.filereader.read_preamble(file, True)
        pydicom.filereader._read_file_meta_info(file)
        head = plain[: file.tell()]
    pieces = [compress.compress(start), *(compress.compress(piece) for _ in range(times))]
    return head + b"".join(pieces) + compress.flush()


def heavy_files(bomb):
    """Files that are large or deep in what they say; those in deflated syntax of `bomb` MiB."""
    sop = element(0x00080016, "UI", b"1.2.840.10008.5.1.4.1.1.2\0")
    for undefined in (False, True):
        yield "nested", PREAMBLE + sop + nested(1000, undefined=undefined)
        yield "nested in deflated", deflated(sop + nested(1000, undefined=undefined))
    for vr, value in (("LO", b"ab"), ("SQ", b""), ("DS", b"1\\2 "), ("UN", b"")):
        many = b"".join(
            element((0x0009 + 2 * (n // 50_000) << 16) + 0x10 + n % 50_000, vr, value)
            for n in range(100_000)
        )
        yield "many elements", PREAMBLE + sop + many
        yield "many elements in deflated", deflated(sop + many)
    item = ITEM + bytes(4)
    yield "many items", PREAMBLE + sop + element(SEQUENCE, "SQ", item * 100_000)
    mebibyte = 1 << 20
    for name, start, piece in (
        ("a bomb of zeros", b"", bytes(mebibyte)),
        ("a bomb of text", element(0x00081140, "UT", b"", length=mebibyte << 8), b"x" * mebibyte),
        (
            "a bomb of items",
            element(SEQUENCE, "SQ", b"", length=0xFFFFFFFF),
            item * (mebibyte >> 3),
        ),
        ("a bomb of elements", b"", element(0x00100010, "PN", b"ab") * (mebibyte // 10)),
    ):
        yield name, deflated(sop + start, piece, bomb)


def mutations(count, seed):
    """`count` mutated files, as (kind, bytes): the heavy ones first, once, then random ones."""
    numbers = random.Random(seed)
    yield from heavy_files(1024 if count > 1000 else 32)
    bases = [file.read_bytes() for file in sorted(PYDICOM_FILES.glob("*.dcm"))]
    bases = [base for base in bases if len(base) < 60_000]
    cuts = [(base, at) for base in bases for at in range(100, len(base), 100)]
    while True:
        base = bytearray(numbers.choice(bases))
        kind = numbers.choice(["bit flips", "cut", "length", "header bit flips"])
        if kind == "cut":
            base, at = numbers.choice(cuts)
            yield kind, base[:at]
            continue
        reach = len(base) if kind == "bit flips" else min(len(base), 2500)
        if kind == "length":
            at = numbers.randrange(132, reach - 4)
            base[at : at + 4] = b"\xff\xff\xff\xff"
        else:
            for _ in range(numbers.randrange(1, 20)):
                base[numbers.randrange(reach)] ^= 1 << numbers.randrange(8)
        yield kind, bytes(base)


def processor_time():
    """Seconds that this process and its workers, living and ended, have taken so far."""
    living = 0.0
    for worker in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            living += sum(worker.cpu_times()[:2])
    return time.process_time() + living + sum(os.times()[2:4])


def frame_of(store, name):
    """Fetch and decode a frame: what came of it. Any error but a clear one ends the run."""
    try:
        store.frame(name, 0)
    except FrameError:
        return "without a frame"
    return "with a frame"


def store_mutations(url, folder, count, seed, answer):
    """Load mutated files one by one, in a process of its own, and say what became of them."""
    outcomes, slowest, peak = Counter(), (0.0, ""), (0, "")
    file = Path(folder) / f"mutated{seed}"
    with connect(url) as client:
        store = DicomStore(client, progress=False)
        store.put("a", dicom())  # starts a worker
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number, (kind, image) in zip(range(count), mutations(count, seed), strict=False):
            file.write_bytes(image)
            signal.alarm(60)
            started = processor_time()
            row = store.load(file, replace=True).iloc[0]
            slowest = max(slowest, (processor_time() - started, kind))
            outcomes["without its pixels"] += "too much" in row["reason"]
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
            if grown >> 10 > peak[0]:
                peak = grown >> 10, kind
            if row["status"] == "skipped":
                good = bool(row["reason"])
            else:
                good = not row["reason"].startswith("stored, but")
                good = good and store.read(file.name) == image
                outcomes[frame_of(store, file.name)] += 1
            if not good or slowest[0] > SECONDS or peak[0] > MEBIBYTES:
                answer.send((f"file {number} ({kind}): {row.to_dict()}, {slowest} s, {peak} MiB",))
                return
            outcomes["stored" if row["status"] != "skipped" else "skipped"] += 1
    answer.send((None, outcomes, slowest, peak))


def mutated_files(count):
    """Files with flipped bits, cut short, of endless lengths, of great depth, bombs."""
    with (
        tempfile.TemporaryDirectory() as folder,
        RedisServer() as server,
    ):
        here, there = workers().Pipe()
        seed = random.randrange(10**6)
        arguments = (server.url, folder, count, seed, there)
        worker = workers().Process(target=store_mutations, args=arguments, daemon=True)
        worker.start()
        there.close()
        try:
            problem, *found = here.recv()
        except EOFError:
            raise AssertionError(f"the loader died (seed {seed})") from None
        finally:
            worker.join()
        assert problem is None, f"seed {seed}: {problem}"
    outcomes, slowest, peak = found
    return (
        f"{outcomes['stored']:,} stored verbatim, of which {outcomes['without its pixels']:,} "
        f"without their pixels, {outcomes['skipped']:,} skipped with a reason; a first frame "
        f"decoded of {outcomes['with a frame']:,}, refused in a sentence of "
        f"{outcomes['without a frame']:,}; "
        f"at most {slowest[0]:.2f} s of processor time ({slowest[1]}) and {peak[0]} MiB ({peak[1]})"
    )


# --- hostile queries ------------------------------------------------------------------------------

SYNTAX = [
    "194} | @patientSex:{M", "*", "19*", "$p0", "{194}", "@patientID:{194}", "-194", "a,b",
    "%194%", "w'*'", "=>[KNN 1 @v $v]", "$.x", "(194)", "a|b", "~a", "[1 2]", "[-inf +inf]",
    "a:b;c", "=>{$weight:2}", "ismissing(@patientID)", "@*:{x}", "\\", "\\\\", "\\*", "a\\ b", "|",
    "\n", "\t", "\x01", "\x7f", "\x80", "\xa0", "\u2028", "\ufeff", "\ufffd", "\U0001f9e0",
    "日本", "é" * 5000, "Ünïcødé", "e\u0301", "\u202egnp", "İ", "ß", "x" * 10_000, "\\" * 5000,
    "1.2.840.10008.5.1.4.1.1.2", "nan", "inf", "null", "None", "true", "PARAMS", "DIALECT 1",
]  # fmt: skip


def hostile_values(count):
    """Equality conditions on values made of syntax, of every printable character, of Unicode."""
    pairs = [a + b for a in string.printable for b in string.printable if (a + b).strip()]
    numbers = random.Random(count)
    values = list(dict.fromkeys([*SYNTAX, *numbers.sample(pairs, min(len(pairs), count))]))
    while len(values) < count:
        length = numbers.randrange(1, 12)
        text = "".join(chr(numbers.choice([numbers.randrange(1, 0x250), 0x1F600, 0x4E2D, 92, 42]))
                       for _ in range(length))  # fmt: skip
        if text not in values:
            values.append(text)
    with RedisServer() as server, connect(server.url) as client:
        store = store_of(client)
        store.find()
        for number, value in enumerate(values):
            document = json.dumps({"patientID": value, "imageName": f"{number}"})
            client.execute_command("JSON.SET", f"file:{number}", "$", document)
        for number, value in enumerate(values):
            found = list(store.find(patientID=value, columns=())["path"])
            assert found == [f"{number}"], (value[:50], found[:5])
        assert len(store.find(patientID="not there")) == 0
    return f"{len(values):,} values, each found in its own document and in no other"
