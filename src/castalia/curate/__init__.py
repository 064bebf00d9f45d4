"""Tools for finished token files: merge, split, shard, dedup, contamination, describe, verify."""
