"""What the two Compose files promise, as far as it can be held without a Docker engine."""

import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
import redis
import yaml
from clusters import port_with_bus
from conftest import BUILD

PROJECT = Path(__file__).parent.parent
ONE = PROJECT / "docker-compose.yml"
CLUSTER = PROJECT / "docs" / "docker-compose.cluster.yml"
PASSWORD = "not-the-default"
CONFIG_FILE = "/usr/local/etc/redis/redis.conf"

# Redis 7.4 gives these to the search module under other names:
# https://redis.io/docs/latest/develop/ai/search-and-query/administration/configuration
NAME_BEFORE_REDIS_8 = {
    "search-timeout": "TIMEOUT",
    "search-on-timeout": "ON_TIMEOUT",
    "search-max-prefix-expansions": "MAXPREFIXEXPANSIONS",
    "search-default-dialect": "DEFAULT_DIALECT",
}


def interpolate(node, environment):
    """Put Compose's variables in: `$$` and `${NAME:-default}`, the two forms in use."""
    if isinstance(node, dict):
        return {key: interpolate(value, environment) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolate(value, environment) for value in node]
    if isinstance(node, str):
        return re.sub(
            r"\$(?:\$|\{(\w+):-([^}]*)\})",
            lambda match: (environment.get(match[1]) or match[2]) if match[1] else "$",
            node,
        )
    return node


def compose(*files, **environment):
    """The files together, both by default, as Compose sees them with these lines in .env."""
    merged = {}
    for file in files or (ONE, CLUSTER):
        text = file.read_text()
        assert not re.search(r"\$(?!\$|\{\w+:-)", text.replace("$$", "")), "a different variable"
        for name, part in interpolate(yaml.safe_load(text), environment).items():
            assert not merged.get(name, {}).keys() & part.keys(), "the files contradict each other"
            merged.setdefault(name, {}).update(part)
    return merged


def config_lines(parsed):
    """Name and value of each line of redis.conf."""
    lines = map(str.strip, parsed["configs"]["redis.conf"]["content"].splitlines())
    return dict(shlex.split(line) for line in lines if line and not line.startswith("#"))


def servers(parsed):
    """The services that run a Redis server."""
    return {
        name: service
        for name, service in parsed["services"].items()
        if str(service.get("command", "")).startswith("redis-server ")
    }


def environment_of(service, **changed):
    """A service's environment for a shell that finds the embedded build's redis-cli."""
    return {"PATH": os.environ["PATH"], **service["environment"], **changed}


@pytest.fixture(autouse=True)
def build_on_path(monkeypatch):
    """The embedded build's programs take the place of the image's."""
    monkeypatch.setenv("PATH", f"{BUILD}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def start(tmp_path):
    """Start the embedded build the way a service of the file starts the image."""
    processes = []

    def start(parsed, name, port):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        lines = parsed["configs"]["redis.conf"]["content"].splitlines()
        config = folder / "redis.conf"
        # The one thing that the embedded build cannot take as it stands.
        config.write_text("\n".join(x for x in lines if not x.strip().startswith("search-")))
        search = [
            word
            for name, value in config_lines(parsed).items()
            if name.startswith("search-")
            for word in (NAME_BEFORE_REDIS_8[name], value)
        ]
        service = parsed["services"][name]
        command = [
            {CONFIG_FILE: str(config), service["environment"]["PORT"]: str(port)}.get(word, word)
            for word in shlex.split(service["command"])
        ]
        assert str(port) in command, "the port of the healthcheck is not the server's"
        command += ["--loadmodule", str(BUILD / "redisearch.so"), *search]
        command += ["--loadmodule", str(BUILD / "rejson.so")]
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        processes.append(process)
        deadline = time.monotonic() + 20
        while b"Ready to accept connections" not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def client(port, password=PASSWORD):
    return redis.Redis(port=port, password=password, decode_responses=True)


def healthcheck(parsed, name, port, **changed):
    """The exit status of a service's healthcheck, run as Docker runs it."""
    kind, command = parsed["services"][name]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    environment = environment_of(parsed["services"][name], PORT=str(port), **changed)
    return subprocess.run(
        ["sh", "-c", command], env=environment, capture_output=True, timeout=30
    ).returncode


# What the file says


def test_every_image_is_pinned_to_one_version():
    """No service follows a moving tag, and all Redis servers are the same Redis 8."""
    images = {name: service["image"] for name, service in compose()["services"].items()}
    for name, image in images.items():
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+", image), f"{name}: {image}"
    others = {image for name, image in images.items() if name != "redisinsight"}
    assert len(others) == 1 and others.pop().startswith("redis:8.")


def test_nothing_is_published_beyond_loopback():
    """Every published port is bound to 127.0.0.1, none is used twice, and no network is shared."""
    services = compose()["services"]
    published = []
    for name, service in services.items():
        for port in service.get("ports", []):
            assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), f"{name}: {port}"
            published.append(port.split(":")[1])
        mode = service.get("network_mode", "service:" + name)
        assert mode.removeprefix("service:") in services, f"{name}: {mode}"
    assert sorted(published) == ["5540", "6379", "7001", "7002", "7003"]


def test_the_password_has_a_default_that_dot_env_overrides():
    """All places take .env's password, and without one the default that .env.example states."""
    stated = dict(
        line.split("=", 1)
        for line in (PROJECT / ".env.example").read_text().splitlines()
        if "=" in line and not line.startswith("#")
    )
    default = stated["REDIS_PASSWORD"]
    for expected, environment in [
        (default, {}),
        (default, {"REDIS_PASSWORD": ""}),
        (PASSWORD, {"REDIS_PASSWORD": PASSWORD}),
    ]:
        parsed = compose(**environment)
        settings = config_lines(parsed)
        found = {settings["requirepass"], settings["masterauth"]}
        for service in parsed["services"].values():
            found.add(
                service["environment"].get("REDISCLI_AUTH")
                or service["environment"]["RI_REDIS_PASSWORD"]
            )
            assert expected not in str(service.get("command")), "ps would show the password"
        assert found == {expected}
    assert default not in yaml.safe_dump(compose(REDIS_PASSWORD=PASSWORD))
    text = ONE.read_text() + CLUSTER.read_text()
    urls = re.findall(r"redis://:(.*)@127\.0\.0\.1:(\d+)", text)
    assert urls == [(default, "6379"), (default, "7001")]


def test_data_lies_in_named_volumes():
    """Each server, and Redis Insight, keeps /data in a volume of its own that the file declares."""
    parsed = compose()
    mounts = [
        mount
        for name, service in parsed["services"].items()
        if name != "cluster-create"
        for mount in service["volumes"]
    ]
    assert all(mount.endswith(":/data") for mount in mounts)
    names = [mount.split(":")[0] for mount in mounts]
    assert sorted(names) == sorted(parsed["volumes"]) and len(names) == len(parsed["services"]) - 1


def test_the_configuration_reaches_every_server():
    """Each server is given the one redis.conf, readable for a user who is not root."""
    for name, service in servers(compose()).items():
        (mount,) = service["configs"]
        assert mount["source"] == "redis.conf", name
        assert mount["target"] == CONFIG_FILE == shlex.split(service["command"])[1], name
        assert mount["mode"] & 0o004, name


def test_a_plain_up_starts_no_cluster():
    """The first file is Redis and Redis Insight; the second adds a cluster and changes neither."""
    assert set(compose(ONE)["services"]) == {"redis", "redisinsight"}
    added = yaml.safe_load(CLUSTER.read_text())["services"]
    assert all(name.startswith("cluster-") for name in added)
    same = ("image", "configs", "healthcheck")
    for name, service in servers(compose()).items():
        for part in same:
            assert service[part] == compose()["services"]["redis"][part], name


def test_cluster_nodes_have_one_address_inside_and_outside():
    """The nodes and the creator share one namespace, whose published ports are the nodes' own."""
    services = compose()["services"]
    creator = services["cluster-create"]
    nodes = [service for name, service in servers(compose()).items() if name.startswith("cluster")]
    ports = [node["environment"]["PORT"] for node in nodes]
    assert len(set(ports)) == 3
    assert creator["environment"]["NODES"].split() == [f"127.0.0.1:{port}" for port in ports]
    assert services["cluster-1"]["ports"] == [f"127.0.0.1:{port}:{port}" for port in ports]
    for name in ("cluster-2", "cluster-3", "cluster-create"):
        assert services[name]["network_mode"] == "service:cluster-1"
    for node in nodes:
        assert "--cluster-announce-ip 127.0.0.1" in node["command"]
        assert "restart" not in node, "restarted alone it would leave the others' namespace"


# What the embedded build makes of it


def test_the_settings_start_the_embedded_build(start):
    """Every line of redis.conf is accepted and in force; the search lines, by their old names."""
    parsed = compose(REDIS_PASSWORD=PASSWORD)
    port = port_with_bus()
    process = start(parsed, "redis", port)
    with client(port) as server:
        for name, value in config_lines(parsed).items():
            if name.startswith("search-"):
                old = NAME_BEFORE_REDIS_8[name]
                assert server.execute_command("FT.CONFIG", "GET", old) == {old: value}
            else:
                assert server.config_get(name) == {name: value}
        assert server.config_get("appendonly") == {"appendonly": "yes"}
        assert server.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert server.json().set("file:a", "$", {})
    assert PASSWORD.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()


def test_what_was_acknowledged_survives_a_kill(start):
    """The append-only file brings a chunk back after `kill -9`, from the volume's folder alone."""
    parsed = compose(REDIS_PASSWORD=PASSWORD)
    port = port_with_bus()
    process = start(parsed, "redis", port)
    with client(port) as server:
        server.set("chunk:file:a.dcm:0123456789ab:0", "bytes")
    process.kill()
    process.wait()
    start(parsed, "redis", port)
    with client(port) as server:
        assert server.get("chunk:file:a.dcm:0123456789ab:0") == "bytes"


def test_the_healthcheck_can_fail(start):
    """It passes with the right password only, and fails when no server answers."""
    parsed = compose(REDIS_PASSWORD=PASSWORD)
    port = port_with_bus()
    for name in servers(parsed):
        assert healthcheck(parsed, name, port) != 0, f"{name}: no server, yet healthy"
    process = start(parsed, "redis", port)
    for name in servers(parsed):
        assert healthcheck(parsed, name, port) == 0, name
        assert healthcheck(parsed, name, port, REDISCLI_AUTH="wrong") != 0, name
        assert healthcheck(parsed, name, port, REDISCLI_AUTH="") != 0, name
    process.kill()
    process.wait()
    assert healthcheck(parsed, "redis", port) != 0


def create_cluster(parsed, ports, patience):
    """Run the creator's own script against nodes on these ports."""
    service = parsed["services"]["cluster-create"]
    environment = environment_of(
        service, NODES=" ".join(f"127.0.0.1:{port}" for port in ports), PATIENCE=str(patience)
    )
    return subprocess.run(
        service["command"], env=environment, capture_output=True, text=True, timeout=60
    )


def test_the_creator_makes_a_cluster_once(start):
    """Its first run makes a cluster a client can use, its second changes nothing and exits 0."""
    parsed = compose(REDIS_PASSWORD=PASSWORD)
    names = [name for name in servers(parsed) if name.startswith("cluster")]
    ports = [port_with_bus() for _ in names]
    nodes = [start(parsed, name, port) for name, port in zip(names, ports, strict=True)]

    first = create_cluster(parsed, ports, patience=30)
    assert first.returncode == 0, first.stdout + first.stderr

    def slots():
        with client(ports[0]) as node:
            return node.execute_command("CLUSTER SLOTS")

    made = slots()
    with redis.RedisCluster(
        host="127.0.0.1", port=ports[0], password=PASSWORD, decode_responses=True
    ) as cluster:
        keys = [f"chunk:file:a.dcm:0123456789ab:{n}" for n in range(50)]
        for key in keys:
            cluster.set(key, key)
        assert [cluster.get(key) for key in keys] == keys
        assert {cluster.get_node_from_key(key).port for key in keys} == set(ports)
        assert {node.host for node in cluster.get_nodes()} == {"127.0.0.1"}

    second = create_cluster(parsed, ports, patience=30)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "cluster_state:ok" in second.stdout and slots() == made

    nodes[2].kill()
    nodes[2].wait()
    third = create_cluster(parsed, ports, patience=1)
    assert third.returncode == 1
    assert f"127.0.0.1:{ports[2]} Could not connect" in third.stderr
    assert PASSWORD not in third.stdout + third.stderr


def test_the_creator_says_what_the_nodes_answer(start):
    """With a wrong password it makes nothing, exits with 1 and shows the node's own words."""
    parsed = compose(REDIS_PASSWORD=PASSWORD)
    port = port_with_bus()
    start(parsed, "cluster-1", port)
    wrong = create_cluster(compose(REDIS_PASSWORD="wrong"), [port], patience=1)
    assert wrong.returncode == 1 and "WRONGPASS" in wrong.stderr
    with client(port) as node:
        assert node.cluster("info")["cluster_slots_assigned"] == "0"
