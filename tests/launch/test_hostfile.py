"""DeepSpeed's hostfile and filters."""

import pytest

from castalia.core.errors import ConfigError
from castalia.launch import plan
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
    ("text", "hosts"),
    [
        ("worker-0 slots=4 max_slots=8\nworker-1 max-slots=2\n", HOSTS),
        ("worker-0 slots = 4\nworker-1\tslots=2", HOSTS),
        ("\ufeffworker-0 slots=4\r\nworker-1 slots=2\r\n", HOSTS),
        # PBS: one line a slot, in any order.
        ("worker-0\nworker-1\n" + "worker-0\n" * 3 + "worker-1\n", HOSTS),
        ("worker-0:4\nworker-1:2\n", HOSTS),
        ("alice@worker-0 slots=2\n", {"alice@worker-0": [0, 1]}),
        ("fd00::1 slots=2\n[fd00::2] slots=1\n", {"fd00::1": [0, 1], "fd00::2": [0]}),
        ("bob@[fd00::1] slots=1\n", {"bob@fd00::1": [0]}),
    ],
)
def test_hostfiles_of_other_launchers(hostfile, text, hosts):
    assert read_hostfile(hostfile(text)) == hosts


def test_bare_names_do_not_bound_the_ranks(hostfile):
    path = str(hostfile("a\nb\n"))
    assert hosts_for(LaunchConfig(hostfile=path), {}) == {"a": [0], "b": [0]}
    two = LaunchConfig(hostfile=path, procs_per_node=2)
    assert hosts_for(two, {}) == {"a": [0, 1], "b": [0, 1]}
    with pytest.raises(ConfigError, match="a has 2, b has 1; lower --procs-per-node"):
        hosts_for(LaunchConfig(hostfile=str(hostfile("a\na\nb\n")), procs_per_node=3), {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "worker-0 slots=4\nworker-1 slot=2\n",
            "line 2: expected `host slots=N`, got 'worker-1 slot=2'",
        ),
        ("worker-0 4\n", "line 1: expected `host slots=N`, got 'worker-0 4'"),
        ("worker-0: slots=4\n", "line 1: expected `host slots=N`"),
        ("worker-0 slots=1 gpus=2\n", "line 1: expected `host slots=N`"),
        ("fd00::zz slots=1\n", "line 1: expected `host slots=N`"),
        ("a\na slots=1\n", "line 2: a is listed twice; keep one line per host"),
        ("a slots=1\na\n", "line 2: a is listed twice; keep one line per host"),
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
    ("include", "left"),
    [
        ("alice@a:1", {"alice@a": [1]}),
        ("a:1@fd00::1", {"alice@a": [1], "fd00::1": [0, 1]}),
        ("b@alice@a", {"alice@a": [0, 1], "b": [0, 1]}),
        ("fd00::1:1", {"fd00::1": [1]}),
        ("[fd00::1]:0", {"fd00::1": [0]}),
    ],
)
def test_filters_of_hosts_with_users_and_addresses(include, left):
    assert choose({"alice@a": [0, 1], "fd00::1": [0, 1], "b": [0, 1]}, include) == left


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


def test_a_filter_without_a_hostfile_selects_gpus_of_this_machine(monkeypatch):
    def hosts(**options):
        return hosts_for(LaunchConfig(**options), {})

    monkeypatch.setattr(plan, "local_gpus", lambda: 0)
    assert hosts(include="localhost:0") == {"localhost": [0]}
    assert hosts(include="localhost:4,5", launcher="mpi") == {"localhost": [4, 5]}
    monkeypatch.setattr(plan, "local_gpus", lambda: 4)
    assert hosts(include="localhost") == {"localhost": [0, 1, 2, 3]}
    assert hosts(exclude="localhost:0") == {"localhost": [1, 2, 3]}
    assert hosts(include="localhost:1,2,3", gpus_per_node=2) == {"localhost": [1, 2]}
    with pytest.raises(ConfigError, match="localhost has slots 0 to 3, not 4, 5"):
        hosts(include="localhost:4,5")


def test_gpus_that_this_machine_lacks(monkeypatch):
    import torch

    monkeypatch.setattr(plan, "local_gpus", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"this machine has no GPU; .* --procs-per-node 2"):
        hosts_for(LaunchConfig(gpus_per_node=2), {})
    assert len(hosts_for(LaunchConfig(gpus_per_node=2, launcher="slurm"), {})["(0)"]) == 2
    # A kind of GPU that the driver's files do not list.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert hosts_for(LaunchConfig(gpus_per_node=2), {}) == {"localhost": [0, 1]}
    with pytest.raises(ConfigError, match="gpus_per_node=3, but this machine has 2 GPUs"):
        hosts_for(LaunchConfig(gpus_per_node=3), {})


def test_visible_gpus():
    assert plan.visible_gpus({}) is None
    assert plan.visible_gpus({"CUDA_VISIBLE_DEVICES": "2, 3"}) == ["2", "3"]
    assert plan.visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []


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
