"""An OpenAI-compatible server of one run, a folder, or a whole suite of checkpoints."""
