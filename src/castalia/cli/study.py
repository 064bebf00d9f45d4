"""`castalia study …`: whole studies of how knowledge forms, each one command."""

from castalia.terminal.command import Verbs

app = Verbs(help="Studies of how knowledge forms during training: measurements and a page.")
