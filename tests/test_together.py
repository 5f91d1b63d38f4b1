"""Small files are sent and committed together; what happens to one is not the others' affair."""

import pytest
from samples import before_commit, dicom

from dicomstore import DicomStore
from dicomstore.errors import ServerError


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        (tmp_path / name).write_bytes(dicom(Rows=ord(name)))
    return tmp_path


def assert_stored(store, client, names):
    """Each of these files is whole, and no other key is there."""
    assert sorted(store.verify()["path"]) == sorted(names)
    for name in names:
        assert store.read(name) == dicom(Rows=ord(name))
    assert len(store.sweep()) == 0
    assert len(list(client.scan_iter("chunk:*"))) == 2 * len(names)  # and the data sets as JSON


def test_files_that_lose_their_leases_are_sent_again_one_by_one(store, client, folder):
    """Where all leases are lost, each file tries again for itself; nothing is left over."""
    tried = []

    def lose(manifest):
        tried.append(manifest.key)
        if len(tried) <= 3:
            client.delete(manifest.lease)

    with before_commit(lose):
        assert store.load(folder)["status"].tolist() == ["loaded"] * 3
    assert sorted(tried) == sorted(["file:a", "file:b", "file:c"] * 2)
    assert_stored(store, client, "abc")


def test_a_lost_lease_costs_its_own_file_alone(store, client, folder):
    """The others that were sent with it are committed at once."""
    tried = []

    def lose(manifest):
        tried.append(manifest.key)
        if manifest.key == "file:b" and len(tried) <= 3:
            client.delete(manifest.lease)

    with before_commit(lose):
        assert store.load(folder)["status"].tolist() == ["loaded"] * 3
    assert sorted(tried[:3]) == ["file:a", "file:b", "file:c"] and tried[3:] == ["file:b"]
    assert_stored(store, client, "abc")


def test_a_file_that_cannot_keep_a_lease_is_named(store, client, folder):
    """The load ends with its name; those that were committed before stay."""

    def lose(manifest):
        if manifest.key == "file:b":
            client.delete(manifest.lease)

    with before_commit(lose), pytest.raises(ServerError, match="file:b could not be stored: its"):
        store.load(folder)
    assert_stored(store, client, "ac")


def test_a_foreign_key_costs_its_own_file_alone(store, client, folder):
    """A foreign key that takes a file's place during the load is left alone and named."""

    def take(manifest):
        if manifest.key == "file:b":
            client.hset("file:b", "theirs", "1")

    with before_commit(take):
        rows = store.load(folder).set_index("path")
    assert rows["status"].to_dict() == {"a": "loaded", "b": "skipped", "c": "loaded"}
    assert rows["reason"]["b"] == "The key file:b holds something that is not a document."
    assert client.hgetall("file:b") == {b"theirs": b"1"}
    client.delete("file:b")
    assert_stored(store, client, "ac")


def test_a_different_image_costs_its_own_file_alone(server, client, store, folder):
    """A different image that takes a file's place during the load is not replaced."""
    other = dicom(SOPInstanceUID="1.9")
    second, racing = DicomStore(client, progress=False), []

    def take(manifest):
        if manifest.key == "file:b" and not racing:
            racing.append(second.put("b", other))

    with before_commit(take):
        rows = store.load(folder).set_index("path")
    assert rows["status"].to_dict() == {"a": "loaded", "b": "skipped", "c": "loaded"}
    assert "different SOP Instance UID" in rows["reason"]["b"] and store.read("b") == other
    store.delete("b")
    assert_stored(store, client, "ac")
