"""What is cold is fetched in the background, before somebody reads it."""

import shutil
import threading

import pytest
from samples import dicom

from dicomstore import DicomStore
from dicomstore.blobs.chunks import Chunks
from dicomstore.errors import NotStoredError


def tier_of(client, **options):
    return DicomStore(client, chunk_size=1000, progress=False, **options)


@pytest.fixture
def archive(tmp_path):
    """Three studies of a patient, two instances each, and one of a different patient."""
    folder = tmp_path / "archive"
    folder.mkdir()
    for study, patient in enumerate("AAAB"):
        for number in range(2):
            image = dicom(
                PatientID=patient, StudyInstanceUID=f"1.2.{study}", StudyDate=f"201{study}0101",
                SeriesInstanceUID=f"1.2.{study}.{number}", SOPInstanceUID=f"1.2.{study}.{number}.1",
                pixels=bytes(5000),
            )  # fmt: skip
            (folder / f"{study}{number}.dcm").write_bytes(image)
    return folder


def hot_files(tier):
    table = tier.verify()
    return set(table["path"][table["status"] == "ok"])


def test_prefetch_brings_what_is_cold(client, archive):
    """What conditions or names ask for is fetched in the background, and nothing else."""
    with tier_of(client, source=archive) as tier:
        tier.load(archive, pixels=False)
        prefetch = tier.prefetch(studyInstanceUID="1.2.1")
        assert prefetch.wait(20) and prefetch.files == 2 and not prefetch.failures
        assert prefetch.fetched == sum((archive / f"1{n}.dcm").stat().st_size for n in (0, 1))
        assert hot_files(tier) == {"10.dcm", "11.dcm"}
        (archive / "30.dcm").unlink()
        prefetch = tier.prefetch(["30.dcm", "31.dcm"])
        assert prefetch.wait(20) and list(prefetch.failures) == ["file:30.dcm"]
        assert hot_files(tier) == {"10.dcm", "11.dcm", "31.dcm"}


@pytest.mark.parametrize("name", ["10.dcm", "file:10.dcm"])
def test_prefetch_of_a_file_whose_document_was_evicted(name, client, archive):
    """A name that only the source knows is loaded from there, whatever else has such a name."""
    (archive / "2").mkdir()
    shutil.copy(archive / "30.dcm", archive / "2" / "10.dcm")
    with tier_of(client, source=archive) as tier:
        tier.load(archive, pixels=False)
        client.delete("file:10.dcm", "file:11.dcm")
        prefetch = tier.prefetch([name, "11.dcm"])
        assert prefetch.wait(20) and prefetch.files == 2 and not prefetch.failures
        assert prefetch.fetched == sum((archive / f"1{n}.dcm").stat().st_size for n in (0, 1))
        assert hot_files(tier) == {"10.dcm", "11.dcm"}
        with pytest.raises(NotStoredError, match=r"12\.dcm"):
            tier.prefetch(["10.dcm", "12.dcm"])


def test_prefetch_of_what_the_source_cannot_give(client, archive):
    """What was evicted since it was named, and is no image at the source, is a failure."""
    with tier_of(client, source=archive) as tier:
        tier.load(archive, pixels=False)
        client.delete("file:10.dcm")
        (archive / "10.dcm").write_bytes(b"no image")
        prefetch = tier.prefetch(["10.dcm", "11.dcm"])
        assert prefetch.wait(20) and "10.dcm" in prefetch.failures["file:10.dcm"]
        assert hot_files(tier) == {"11.dcm"}


def test_prefetch_of_priors(client, archive):
    """A patient's latest studies are fetched, by their dates."""
    with tier_of(client, source=archive) as tier:
        tier.load(archive, pixels=False)
        assert tier.prefetch_priors("A", last=2).wait(20)
        assert hot_files(tier) == {"10.dcm", "11.dcm", "20.dcm", "21.dcm"}


def test_a_read_that_misses_has_its_study_fetched(client, archive):
    """With prefetch="study", the first miss of an instance brings the others of its study."""
    with tier_of(client, source=archive, prefetch="study") as tier:
        tier.load(archive, pixels=False)
        tier.read("20.dcm")
        while "21.dcm" not in hot_files(tier):
            threading.Event().wait(0.01)
        assert hot_files(tier) == {"20.dcm", "21.dcm"}


def test_closing_ends_prefetching(client, archive):
    """`close` stops the background work in the middle; what is cold stays cold."""
    tier = tier_of(client, source=archive, prefetch_mib_per_s=0.001)
    tier.load(archive, pixels=False)
    prefetch = tier.prefetch(patientID=...)
    tier.close()
    assert prefetch.is_done and len(hot_files(tier)) < 8


def test_a_fetch_in_the_background_waits_for_reads(client, archive, monkeypatch):
    """While a read waits for the source, nothing is fetched in the background."""
    with tier_of(client, source=archive) as tier:
        tier.load(archive, pixels=False)
        put_back, order = Chunks.put_back, []

        def slow(self, manifest, chunks):
            name = threading.current_thread().name
            order.append(name)
            if name != "prefetch":
                threading.Event().wait(0.2)
            put_back(self, manifest, chunks)
            order.append(f"{name} done")

        monkeypatch.setattr(Chunks, "put_back", slow)
        reader = threading.Thread(target=lambda: tier.read("00.dcm"), name="reader")
        reader.start()
        while not order:
            threading.Event().wait(0.001)
        prefetch = tier.prefetch(patientID="B")
        reader.join()
        assert order[:2] == ["reader", "reader done"]
        assert prefetch.wait(20) and order.count("prefetch done") == 2


def test_prefetch_needs_to_know_what(client, archive):
    """Without a source, or without names and conditions, prefetch says what it needs."""
    with pytest.raises(ValueError, match="source"):
        tier_of(client).prefetch(modality="CT")
    with tier_of(client, source=archive) as tier, pytest.raises(ValueError, match="names or cond"):
        tier.prefetch()
