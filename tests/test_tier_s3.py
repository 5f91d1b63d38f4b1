"""A tier in front of an S3 server: moto's, which speaks the real protocol over HTTP."""

import logging
import os
import re

import boto3
import botocore.config
import pytest
import s3fs
from moto.server import ThreadedMotoServer
from samples import dicom

from dicomstore import DicomStore
from dicomstore.errors import MissingChunkError
from dicomstore.imaging import describing

KEY, SECRET = "AKIAFORTHETESTS", "a-secret-that-is-nowhere"
IMAGE = dicom(pixels=bytes(range(256)) * 20, Rows=1)
OTHER = dicom(pixels=bytes(range(255, -1, -1)) * 20, Rows=1)


@pytest.fixture(scope="module")
def s3_server():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def archive(s3_server, monkeypatch):
    """An empty bucket, and the settings that lead fsspec to it; as a user would give them."""
    host, port = s3_server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(
        "fsspec.config.conf", {"s3": {"config_kwargs": {"retries": {"max_attempts": 1}}}}
    )
    s3fs.S3FileSystem.clear_instance_cache()
    retries = botocore.config.Config(retries={"max_attempts": 1})
    s3 = boto3.client("s3", config=retries)
    s3.create_bucket(Bucket="archive")
    yield s3
    for listed in s3.list_objects_v2(Bucket="archive").get("Contents", []):
        s3.delete_object(Bucket="archive", Key=listed["Key"])
    s3.delete_bucket(Bucket="archive")


@pytest.fixture
def asked(monkeypatch):
    """The ranges that are asked for, as HTTP says them, and how many bytes came."""
    ranges = []
    call = s3fs.S3FileSystem._call_s3

    async def noted(self, method, *arguments, **options):
        answer = await call(self, method, *arguments, **options)
        if method == "get_object":
            given = {
                name: value
                for one in arguments
                if isinstance(one, dict)
                for name, value in one.items()
            }
            ranges.append(((given | options).get("Range"), answer["ContentLength"]))
        return answer

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", noted)
    return ranges


def tier_of(client, folder, s3, images, **options):
    """Return a tier whose files lie in a folder, and in a bucket as well."""
    for name, image in images.items():
        (folder / name).write_bytes(image)
        s3.put_object(Bucket="archive", Key=f"deep/{name}", Body=image)
    options = {"chunk_size": 1000, "progress": False, "thumbnails": False} | options
    tier = DicomStore(client, source="s3://archive/deep", **options)
    tier.load(folder)
    return tier


def lose(client, tier, name, numbers=None):
    client.delete(*tier.manifest(name).chunk_keys(numbers))


def test_one_lost_chunk_asks_for_one_range(client, tmp_path, archive, asked):
    """Of a large file with one chunk gone, that chunk's bytes are asked for and no others."""
    image = dicom(pixels=os.urandom(20 * 2**20))
    tier = tier_of(client, tmp_path, archive, {"large": image}, chunk_size=262_080)
    lose(client, tier, "large", [40])
    with tier.open("large") as file:
        file.seek(40 * 262_080 + 7)
        assert file.read(100) == image[40 * 262_080 + 7 :][:100]
    start = 40 * 262_080
    assert asked == [(f"bytes={start}-{start + 262_080 - 1}", 262_080)]
    assert tier.read("large") == image and len(asked) == 1


def test_cold_and_evicted_files_come_from_s3(client, tmp_path, archive, asked):
    """Chunks come by ranges, a file whose document is gone comes whole; all bytes are right."""
    tier = tier_of(client, tmp_path, archive, {"a": IMAGE, "b": dicom(Rows=2)})
    lose(client, tier, "a")
    assert tier.read("a") == IMAGE and sum(count for _, count in asked) == len(IMAGE)
    client.delete("file:b")
    assert tier.read("b") == dicom(Rows=2)


def test_a_changed_object_is_loaded_anew(client, tmp_path, archive):
    """If the object has other bytes now, it becomes a new version, never a mixture."""
    tier = tier_of(client, tmp_path, archive, {"a": IMAGE})
    lose(client, tier, "a", [1])
    archive.put_object(Bucket="archive", Key="deep/a", Body=OTHER)
    assert tier.read("a") == OTHER and len(tier.sweep()) == 0


def test_a_shorter_object_is_no_mixture(client, tmp_path, archive):
    """An object that ends before the lost chunk is a new version too."""
    tier = tier_of(client, tmp_path, archive, {"a": IMAGE})
    lose(client, tier, "a", [4])
    archive.put_object(Bucket="archive", Key="deep/a", Body=IMAGE[:900])
    assert tier.read("a") == IMAGE[:900]


def refused(tier, name):
    """Return what is said when a file cannot be read."""
    with pytest.raises(MissingChunkError) as caught:
        tier.read(name)
    text = str(caught.value)
    assert text.count("\n") == 0 and len(text) < 250
    return text


def test_what_cannot_be_fetched_is_said_in_one_sentence(
    client, tmp_path, archive, monkeypatch, caplog
):
    """Object gone, bucket gone, wrong key, server down: one error each, without a secret."""
    caplog.set_level(logging.DEBUG)
    tier = tier_of(client, tmp_path, archive, {"a": IMAGE})
    chunk = tier.manifest("a").chunk_key(1)
    lose(client, tier, "a", [1])
    archive.delete_object(Bucket="archive", Key="deep/a")
    said = [refused(tier, "a")]
    assert re.search(f"{chunk}.*no such file", said[0])
    nowhere = DicomStore(client, source="s3://no-such-bucket/x", progress=False)
    said.append(refused(nowhere, "a"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    s3fs.S3FileSystem.clear_instance_cache()
    down = DicomStore(client, source="s3://archive/deep", progress=False)
    said.append(refused(down, "a"))
    assert chunk in said[2] and "cannot help" in said[2]
    documents = b"".join(
        client.execute_command("JSON.GET", key) for key in client.scan_iter("file:*")
    )
    ours = [one.getMessage() for one in caplog.records if one.name.startswith("dicomstore")]
    shown = " ".join([*said, *ours, repr(tier), repr(tier._tier._source), documents.decode()])
    assert SECRET not in shown and KEY not in shown and "s3://" not in shown


def test_the_objects_are_never_written(client, tmp_path, archive, monkeypatch):
    """Reading, mending, repairing and deleting a file leave the bucket as it is."""

    def refuse(self, method, *_, **__):
        raise AssertionError(f"{method} was asked for")

    tier = tier_of(client, tmp_path, archive, {"a": IMAGE})
    for name in ("_pipe_file", "_put_file", "_rm", "_mkdir", "_cp_file"):
        monkeypatch.setattr(s3fs.S3FileSystem, name, refuse)
    before = archive.list_objects_v2(Bucket="archive")["Contents"]
    lose(client, tier, "a")
    tier.read("a")
    client.delete("file:a")
    tier.read("a")
    tier.load(tmp_path, repair=True)
    tier.delete("a")
    assert archive.list_objects_v2(Bucket="archive")["Contents"] == before


@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/secret", "a//b", "."])
def test_no_name_leads_out_of_the_source(client, tmp_path, archive, asked, path):
    """A document whose path would lead out of the source's folder fetches nothing."""
    archive.put_object(Bucket="archive", Key="secret", Body=IMAGE)
    tier = tier_of(client, tmp_path, archive, {"a": IMAGE})
    document = client.execute_command("JSON.GET", "file:a").decode()
    version = tier.manifest("a").version
    name = path.rpartition("/")[2]
    moved = document.replace(f"chunk:file:a:{version}", f"chunk:file:{path}:{version}")
    moved = moved.replace('"imageName":"a"', f'"imageName":"{name}"')
    client.execute_command("JSON.SET", f"file:{path}", "$", moved)
    with pytest.raises(MissingChunkError, match="refused"):
        tier.read(f"file:{path}")
    assert asked == []


def test_reading_from_s3_starts_no_worker(client, tmp_path, archive, monkeypatch):
    """A whole file that comes from S3 in a read is described without a worker."""
    tier_of(client, tmp_path, archive, {"a": IMAGE})
    client.delete("file:a")

    def refuse(*_):
        raise AssertionError("a worker was asked for")

    monkeypatch.setattr(describing, "_Worker", refuse)
    assert DicomStore(client, source="s3://archive/deep", progress=False).read("a") == IMAGE
