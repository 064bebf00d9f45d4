"""lm-evaluation-harness on Castalia's own engines: tasks, and their numbers for a checkpoint."""
