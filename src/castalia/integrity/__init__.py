"""Whether the files of a folder are those that were written: every kind of folder, one question."""

from castalia.core.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "CheckedFile": "kinds",
        "CheckedFolder": "checking",
        "FOLDER_KINDS": "registered",
        "FolderKind": "kinds",
        "check_folders": "checking",
    },
)
