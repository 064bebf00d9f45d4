"""Token files after they are made: merge, split, shard, deduplicate, decontaminate, describe and verify."""
