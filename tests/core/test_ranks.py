"""Each launcher's variables give the rank of a process and rank 0's address."""

import pytest

from castalia.core.errors import ConfigError
from castalia.core.ranks import environment, node_list, rendezvous, world_size

OMPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "120007",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}
JSM = {"JSM_NAMESPACE_RANK": "2", "JSM_NAMESPACE_SIZE": "12", "JSM_NAMESPACE_LOCAL_RANK": "2"}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1, 0)),
        (TORCHRUN, (1, 3, 0)),
        (OMPI, (3, 4, 1)),
        (SLURM, (5, 8, 1)),
        (JSM, (2, 12, 2)),
        (PMI, (1, 2, 0)),
        (PMI | SLURM, (1, 2, 0)),
        (SLURM | OMPI, (3, 4, 1)),
        (OMPI | TORCHRUN, (1, 3, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, (0, 1, 0)),
    ],
)
def test_rank_and_world_size(variables, place):
    assert environment(variables) == place


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "RANK is set but WORLD_SIZE is not"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE is set but PMI_RANK is not"),
        (
            {"PMI_RANK": "0", "PMI_SIZE": "2"},
            "but not the rank on the host; set LOCAL_RANK, RANK and WORLD_SIZE",
        ),
        (
            OMPI | {"OMPI_COMM_WORLD_SIZE": "x"},
            "OMPI_COMM_WORLD_SIZE='x' is not an integer; Open MPI sets this variable",
        ),
        (TORCHRUN | {"RANK": "3"}, "RANK=3 is out of range: WORLD_SIZE=3, so ranks are 0 to 2"),
    ],
)
def test_incomplete_or_inconsistent_variables(variables, message):
    with pytest.raises(ConfigError) as error:
        environment(variables)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("variables", "where"),
    [
        (TORCHRUN, "env://"),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "tcp://127.0.0.1:29500"),
        (OMPI | {"MASTER_ADDR": "a", "MASTER_PORT": "7"}, "tcp://a:7"),
        (SLURM, "tcp://gpu03:20007"),
        (SLURM | {"MASTER_PORT": "7"}, "tcp://gpu03:7"),
        (PMI | SLURM, "tcp://gpu03:20007"),
        (JSM | {"LSB_MCPU_HOSTS": "batch1 1 h36n12 42 h36n13 42"}, "tcp://h36n12:29500"),
    ],
)
def test_address_of_rank_0(variables, where):
    assert rendezvous(variables) == where


def test_an_unknown_host_of_rank_0_is_an_error():
    with pytest.raises(ConfigError, match="does not name the host of rank 0; set MASTER_ADDR"):
        rendezvous(OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})


def test_a_world_size_alone_is_a_plan():
    assert world_size({"WORLD_SIZE": "64"}) == 64
    assert world_size(TORCHRUN) == 3
    assert world_size(OMPI) == 4
    assert world_size({}) == 1
    with pytest.raises(ConfigError, match="WORLD_SIZE='many' is not a positive integer"):
        world_size({"WORLD_SIZE": "many"})


def test_slurm_host_lists():
    assert node_list("gpu[01-03,07],login") == ["gpu01", "gpu02", "gpu03", "gpu07", "login"]
    assert node_list("r[1-2]n[08-10]x") == [
        f"r{r}n{n}x" for r in (1, 2) for n in ("08", "09", "10")
    ]
    assert node_list("a-b.example") == ["a-b.example"]
    with pytest.raises(ConfigError, match="is not a Slurm host list"):
        node_list("gpu[01")
