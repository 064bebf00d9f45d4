"""Starting the ranks of a run with torchrun, Slurm, MPI, pdsh or ssh. Needs no torch."""

from castalia.launch.config import LaunchConfig

__all__ = ["LaunchConfig"]
