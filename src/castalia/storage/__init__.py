"""Object stores behind URLs of fsspec: `s3://bucket/prefix`, and also `file://` and `memory://`."""

from castalia.storage.faults import StorageError
from castalia.storage.objects import ObjectStore, Transfer
from castalia.storage.ranged import RangedFile
from castalia.storage.urls import is_url, problem_of_url

__all__ = ["ObjectStore", "RangedFile", "StorageError", "Transfer", "is_url", "problem_of_url"]
