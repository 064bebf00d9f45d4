"""What this machine is and how fast it computes, measured once; read by whatever chooses."""

from castalia.machine.table import Machine, this_machine

__all__ = ["Machine", "this_machine"]
