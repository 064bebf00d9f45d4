"""Studies of how knowledge forms: runs, measurements and a picture, each one command."""
