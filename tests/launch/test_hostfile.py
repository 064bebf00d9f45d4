"""DeepSpeed's hostfile and filters."""

import pytest

from castalia.core.errors import ConfigError
from castalia.launch.config import LaunchConfig
from castalia.launch.hostfile import choose, read_hostfile
from castalia.launch.plan import hosts_for

HOSTS = {"worker-0": [0, 1, 2, 3], "worker-1": [0, 1]}


@pytest.fixture
def hostfile(tmp_path):
    """Callable: write a hostfile with the given text."""

    def write(text):
        path = tmp_path / "hosts"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_a_hostfile_is_read(hostfile):
    assert (
        read_hostfile(hostfile("# ours\nworker-0 slots=4\n\nworker-1   slots=2 # half\n")) == HOSTS
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "worker-0 slots=4\nworker-1 slot=2\n",
            "line 2: expected `host slots=N`, got 'worker-1 slot=2'",
        ),
        ("worker-0\n", "line 1: expected `host slots=N`, got 'worker-0'"),
        ("worker-0 slots=four\n", "line 1: expected `host slots=N`"),
        ("a;rm slots=1\n", "line 1: expected `host slots=N`"),
        ("a slots=0\n", "line 1: a has slots=0, expected at least 1"),
        ("a slots=1\na slots=2\n", "line 2: a is listed twice; keep one line per host"),
        ("# nothing\n", "lists no hosts; expected lines `host slots=N`"),
        (b"\xff\xfe\x00", "is not a text file; expected lines `host slots=N`"),
    ],
)
def test_a_malformed_line_is_reported_with_file_and_line(hostfile, text, message):
    path = hostfile(text)
    with pytest.raises(ConfigError) as error:
        read_hostfile(path)
    assert str(error.value).startswith(f"hostfile {path}") and message in str(error.value)


def test_a_missing_hostfile(tmp_path):
    with pytest.raises(
        ConfigError, match="cannot be read: No such file or directory; give another with --hostfile"
    ):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ("", "", HOSTS),
        ("worker-1", "", {"worker-1": [0, 1]}),
        ("worker-1:0,1@worker-0:2,0", "", {"worker-0": [0, 2], "worker-1": [0, 1]}),
        ("worker-0:1@worker-0:3", "", {"worker-0": [1, 3]}),
        ("", "worker-0:0,2@worker-1:1", {"worker-0": [1, 3], "worker-1": [0]}),
        ("", "worker-1", {"worker-0": [0, 1, 2, 3]}),
        ("", "worker-1:0,1", {"worker-0": [0, 1, 2, 3]}),
    ],
)
def test_filters(include, exclude, left):
    assert choose(HOSTS, include, exclude) == left


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("worker-0", "worker-1", "are both set; keep one"),
        (
            "worker-2",
            "",
            "include 'worker-2': unknown host 'worker-2'; choose one of worker-0, worker-1; did",
        ),
        ("worker-1:2", "", "worker-1 has slots 0 to 1, not 2"),
        ("worker-1:a", "", "expected host or host:0,2 joined by @, got 'worker-1:a'"),
        ("@", "", "expected host or host:0,2 joined by @, got ''"),
        (
            "",
            "worker-0@worker-1",
            "exclude 'worker-0@worker-1' leaves no host of worker-0, worker-1",
        ),
    ],
)
def test_wrong_filters(include, exclude, message):
    with pytest.raises(ConfigError) as error:
        choose(HOSTS, include, exclude)
    assert message in str(error.value)


def test_the_environment_names_a_hostfile(hostfile):
    path = hostfile("a slots=2\nb slots=2\n")
    assert hosts_for(LaunchConfig(launcher="pdsh"), {"DLTS_HOSTFILE": str(path)}) == {
        "a": [0, 1],
        "b": [0, 1],
    }
    assert hosts_for(
        LaunchConfig(launcher="pdsh", hostfile=str(path), nodes=1, procs_per_node=1), {}
    ) == {"a": [0]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"launcher": "pdsh"},
            "launcher pdsh needs a hostfile with lines `host slots=N`; add --hostfile",
        ),
        ({"include": "a"}, "select hosts of a hostfile, but none is given; add --hostfile"),
        ({"launcher": "mpi", "nodes": 2}, "mpirun needs the names of the 2 hosts"),
        ({"nodes": 3, "file": True}, "has 2 hosts: a, b; lower --nodes or add hosts"),
        (
            {"procs_per_node": 3, "file": True},
            "a has 2, b has 2; lower --procs-per-node or --gpus-per-node",
        ),
    ],
)
def test_impossible_requests_for_hosts(hostfile, options, message):
    if options.pop("file", False):
        options["hostfile"] = str(hostfile("a slots=2\nb slots=2\n"))
    with pytest.raises(ConfigError) as error:
        hosts_for(LaunchConfig(**options), {})
    assert message in str(error.value)
