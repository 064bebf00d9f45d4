"""Text of any form to token files: inputs, pieces of them, rows, ids, parts on disk, and the files put together."""
