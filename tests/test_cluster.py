"""The whole store on a Redis Cluster of three real nodes of the embedded build."""

import os
import threading
from collections import Counter

import pytest
import redis
from clusters import running_cluster
from samples import dicom, sha256_of

from dicomstore import DicomStore, connect
from dicomstore.blobs.manifest import Manifest
from dicomstore.errors import MissingChunkError, NotStoredError, SearchError, ServerError
from dicomstore.keys import document_key

NODES = 3


@pytest.fixture(scope="module")
def nodes():
    """The nodes of a cluster that is up."""
    with running_cluster(NODES) as running:
        yield running


@pytest.fixture(scope="module")
def cluster(nodes):
    """The URL of one node of that cluster."""
    return nodes[0].url


@pytest.fixture
def client(cluster):
    """A client of the empty cluster, as `connect` makes it."""
    connected = connect(cluster)
    connected.flushall(target_nodes="primaries")
    yield connected
    connected.close()


@pytest.fixture
def store(client):
    return DicomStore(client, chunk_size=1000, progress=False)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for number, path in enumerate(["a.dcm", "sub/a.dcm", "{b} %\udcff", "c"]):
        image = dicom(Rows=number + 1, pixels=os.urandom(20_000 * number))
        (tmp_path / "in" / path).write_bytes(image)
    return tmp_path / "in"


def keys_of(client):
    return set(client.scan_iter(count=10_000))


def test_a_cluster_is_recognised(cluster, client):
    """The URL of one node gives a client of the whole cluster; that of a lone server does not."""
    assert isinstance(client, redis.RedisCluster) and len(client.get_primaries()) == NODES
    with pytest.raises(ServerError, match="user or password"):
        connect(cluster.replace("default:", "default:wrong"))


def test_files_come_back_identical(store, client, folder, tmp_path):
    """Load, load again, read, open, restore, verify and delete work as on one server."""
    assert store.load(folder)["status"].eq("loaded").all()
    assert store.load(folder)["status"].eq("unchanged").all()
    for path in ("a.dcm", "sub/a.dcm", "{b} %\udcff"):
        assert store.read(path) == (folder / path).read_bytes()
        with store.open(path) as file:
            assert file.read() == (folder / path).read_bytes()
    assert store.verify()["status"].eq("ok").all()
    assert store.restore(tmp_path / "out")["status"].eq("restored").all()
    assert sha256_of(tmp_path / "out") == sha256_of(folder)
    for path in ("a.dcm", "sub/a.dcm", "{b} %\udcff", "c"):
        store.delete(path)
    assert keys_of(client) == set()


def test_a_large_file_lies_on_all_nodes(client):
    """Its chunks are spread over all shards, and reads take them from all of them."""
    store = DicomStore(client, progress=False)
    image = dicom(pixels=os.urandom(20 * 2**20))
    store.put("large", image)
    nodes = Counter(
        client.get_node_from_key(key).port for key in store.manifest("large").chunk_keys()
    )
    assert len(nodes) == NODES and min(nodes.values()) > 10
    client.config_resetstat(target_nodes="primaries")
    buffer = bytearray(len(image))
    assert store.read("large") == image and store.read("large", into=buffer) == image
    for node in client.get_primaries():
        stats = client.info("commandstats", target_nodes=node)
        assert stats["cmdstat_mget"]["calls"] == 2 * nodes[node.port]
        # Pipelined: far fewer reads from the node's socket than chunks.
        reads = client.info("stats", target_nodes=node)["total_reads_processed"]
        assert reads < nodes[node.port]


def test_document_and_lease_share_a_slot(client):
    """What is watched together lies on one node, whatever braces the path has."""
    for path in ("a", "x{y}z", "{}", "}{", "{user}/a"):
        manifest = Manifest(document_key(path), "0" * 12, 1, 1, ())
        assert client.keyslot(manifest.key) == client.keyslot(manifest.lease)


def test_replacing_and_racing(cluster, store, client):
    """Loaders that race on one name while others read leave one version whole, no chunk over."""
    versions = [dicom(Rows=n, pixels=bytes([n]) * 9000) for n in (1, 2)]
    store.put("a", versions[0])
    failures, seen = [], set()

    def load(turn):
        with connect(cluster) as own:
            writer = DicomStore(own, chunk_size=1000, progress=False)
            try:
                for number in range(20):
                    writer.put("a", versions[(turn + number) % 2])
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=load, args=(turn,)) for turn in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.add(versions.index(store.read("a")))
    for thread in threads:
        thread.join()
    assert failures == [] and seen == {0, 1}
    manifest = store.manifest("a")
    named = {"file:a", *manifest.chunk_keys(), manifest.attachment_key("json")}
    assert keys_of(client) == {key.encode() for key in named}


def test_sweep_over_all_nodes(store, client):
    """Chunks that no document names are found on every node, and only they."""
    image = dicom(pixels=bytes(50_000))
    store.put("a", image)
    for number in range(30):
        client.set(f"chunk:file:a:0123456789ab:{number}", bytes(10))
    report = store.sweep()
    assert report[["chunks", "size"]].to_numpy().tolist() == [[30, 300]]
    assert store.read("a") == image and len(store.sweep()) == 0


def test_damage_is_named(store, client, folder):
    """A chunk that is gone or altered on any node is named, by read and by verify."""
    store.load(folder)
    keys = store.manifest("c").chunk_keys()
    client.setrange(keys[7], 5, b"xyz")
    client.unlink(keys[30])
    with pytest.raises(MissingChunkError, match=keys[30]):
        store.read("c")
    reason = store.verify().set_index("path")["reason"]["c"]
    assert f"{keys[7]} is damaged" in reason and f"{keys[30]} is gone" in reason


def test_a_cache_on_a_cluster(client, folder):
    """Expiry, the way back to permanent, and the source work across nodes."""
    cache = DicomStore(client, chunk_size=1000, progress=False, ttl=100, source=folder)
    cache.load(folder)
    keys = cache.manifest("c").chunk_keys()
    assert {round(client.pttl(key) / 1000) for key in keys} == {100}
    client.unlink(keys[5])
    assert cache.read("c") == (folder / "c").read_bytes() and cache.misses == 1
    DicomStore(client, chunk_size=1000, progress=False).load(folder)
    assert {client.pttl(key) for key in ["file:c", *cache.manifest("c").chunk_keys()]} == {-1}


def test_searches_without_a_coordinator_are_refused(store, client):
    """Where the engine answers for one node alone, a search is refused, with the way out."""
    version = store.server()["search engine"]
    if tuple(map(int, version.split("."))) >= (8, 8):
        pytest.skip("from search engine 8.8 on, a cluster can be searched")
    store.put("sub/a.dcm", dicom())
    for action in (store.find, lambda: store.count_by("modality")):
        with pytest.raises(SearchError, match=rf"search engine 8\.8\.0 or later.*{version}"):
            action()
    with pytest.raises(NotStoredError, match=r"key or path.*imageName"):
        store.read("a.dcm")
    assert not any(name.startswith(b"file:idx") for name in keys_of(client))


def test_a_cluster_client_that_decodes_is_refused(cluster):
    """A cluster client that gives text instead of bytes is refused in a sentence."""
    theirs = redis.RedisCluster.from_url(cluster, decode_responses=True)
    with theirs, pytest.raises(ServerError, match=r"connect\(\)"):
        DicomStore(theirs)


APP = (
    "on >password ~file:* ~chunk:* -@all +ping +json.get +json.set +mget "
    "+set +del +unlink +exists +strlen +pttl +pexpire +persist +scan +watch +unwatch +multi +exec"
)
ON_A_CLUSTER = ("+cluster|slots", "+command")


@pytest.mark.parametrize("left_out", ["", *ON_A_CLUSTER])
def test_the_acl_rule_on_a_cluster(left_out, cluster, client, folder):
    """The app's rule needs two commands more on a cluster, and nothing beside them."""
    more = [part for part in ON_A_CLUSTER if part != left_out]
    client.execute_command(
        "ACL", "SETUSER", "app", "reset", *APP.split(), *more, target_nodes="primaries"
    )
    url = f"redis://app:password@{cluster.rpartition('@')[2]}"
    try:
        if left_out:
            with pytest.raises(ServerError, match=r"Redis cannot be used"):
                connect(url)
            return
        with connect(url) as own:
            store = DicomStore(own, chunk_size=1000, progress=False, ttl=9, source=folder)
            assert store.load(folder)["status"].eq("loaded").all()
            assert store.read("c") == (folder / "c").read_bytes()
            client.set("chunk:file:a:0123456789ab:0", b"x")
            assert store.sweep()["size"].sum() == 1
            store.delete("c")
    finally:
        client.execute_command("ACL", "DELUSER", "app", target_nodes="primaries")
