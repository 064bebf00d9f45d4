"""`castalia demo`: a small suite, trained, evaluated, exported and reported in one command."""
