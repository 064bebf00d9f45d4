"""Starting the processes of a run: torchrun, Slurm, MPI, pdsh and ssh. Needs no torch."""

from castalia.launch.launching import LaunchConfig

__all__ = ["LaunchConfig"]
