"""Each launcher's variables give the place of a process, and rank 0's host."""

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
def test_place_of_a_process(variables, place):
    assert environment(variables) == place


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "RANK is set but WORLD_SIZE is not"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE is set but PMI_RANK is not"),
        (
            {"PMI_RANK": "0", "PMI_SIZE": "2"},
            "no rank on the host; set LOCAL_RANK, RANK and WORLD_SIZE",
        ),
        (
            OMPI | {"OMPI_COMM_WORLD_SIZE": "x"},
            "OMPI_COMM_WORLD_SIZE='x' of Open MPI is no whole number",
        ),
        (TORCHRUN | {"RANK": "3"}, "RANK=3 is not among the 3 processes of WORLD_SIZE"),
    ],
)
def test_a_place_that_cannot_be_told(variables, message):
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
def test_where_the_processes_meet(variables, where):
    assert rendezvous(variables) == where


def test_hosts_that_nobody_names_are_an_error():
    with pytest.raises(ConfigError, match="does not say which has rank 0; set MASTER_ADDR"):
        rendezvous(OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})


def test_a_size_alone_plans():
    assert world_size({"WORLD_SIZE": "64"}) == 64
    assert world_size(TORCHRUN) == 3
    assert world_size(OMPI) == 4
    assert world_size({}) == 1
    with pytest.raises(ConfigError, match="WORLD_SIZE='many' is no number of processes"):
        world_size({"WORLD_SIZE": "many"})


def test_host_lists_of_slurm():
    assert node_list("gpu[01-03,07],login") == ["gpu01", "gpu02", "gpu03", "gpu07", "login"]
    assert node_list("r[1-2]n[08-10]x") == [
        f"r{r}n{n}x" for r in (1, 2) for n in ("08", "09", "10")
    ]
    assert node_list("a-b.example") == ["a-b.example"]
    with pytest.raises(ConfigError, match="is no host list of Slurm's"):
        node_list("gpu[01")
