"""`python -m castalia`: the same as the command `castalia`."""

from castalia.cli import main

main()
