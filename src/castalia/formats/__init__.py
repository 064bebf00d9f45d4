"""Models as other programs save them, and one way to open any of them: `open_model`."""
