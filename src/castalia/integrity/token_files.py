"""Token files: PREFIX.json speaks for the files of its prefix."""

from collections.abc import Iterator
from pathlib import Path

from castalia.curate.verify import verify
from castalia.integrity.kinds import CheckedFile, FolderKind


def prefixes(path: Path) -> list[Path]:
    """The prefixes of token files in a folder, or the one that a path names."""
    if path.is_dir():
        return [file.with_suffix("") for file in sorted(path.glob("*.idx"))]
    base = path
    if path.suffix in (".bin", ".idx", ".json"):
        base = path.with_suffix("")
    return [base] if Path(f"{base}.idx").is_file() else []


def check(path: Path) -> Iterator[CheckedFile]:
    """The checks of `castalia data verify` on each prefix."""
    for prefix in prefixes(path):
        for done in verify(prefix):
            size = Path(done.file).stat().st_size if Path(done.file).is_file() else 0
            by = ""
            if done.about == "hash":
                by = f"SHA-256 in {prefix.name}.json"
            yield CheckedFile(done.file, done.wrong, by or done.about, size)


TOKEN_FILES = FolderKind("token files", lambda path: bool(prefixes(path)), check, whole=False)
