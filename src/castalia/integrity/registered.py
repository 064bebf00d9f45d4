"""The kinds of folders, in the order in which a path is asked for them."""

from castalia.core.registry import Registry
from castalia.integrity.exports import EXPORTS, IMPORTS
from castalia.integrity.indexes import INDEXES, MAPS
from castalia.integrity.kinds import FolderKind
from castalia.integrity.runs import RUNS
from castalia.integrity.steps import STEPS
from castalia.integrity.token_files import TOKEN_FILES

FOLDER_KINDS: Registry[FolderKind] = Registry("kind of folder")
for kind in (STEPS, EXPORTS, IMPORTS, RUNS, TOKEN_FILES, INDEXES, MAPS):
    FOLDER_KINDS.register(kind.name)(kind)
