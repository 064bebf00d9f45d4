"""How the command speaks and listens: options shared by verbs, hints, progress, signals."""
