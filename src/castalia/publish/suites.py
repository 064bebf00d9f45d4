"""`upload`: a run to a repository, or a suite to a repository for each of its members."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from castalia.checkpoint.find import complete_steps
from castalia.core.errors import ConfigError
from castalia.export.push import OFFICIAL
from castalia.publish.options import UploadOptions, require_repo
from castalia.publish.uploading import Revision, RunUpload
from castalia.suites.config import SUITE_FILE
from castalia.suites.members import open_suite


def upload(
    path: str | Path,
    repo: str,
    options: UploadOptions | None = None,
    *,
    only: str | Sequence[str] | None = None,
) -> Iterator[Revision]:
    """Upload a run as the repository `repo`, or a suite as `repo`-MEMBER each; every branch is
    yielded when the hub has it.

    Resumable: a branch that is there already, by its hashes, is not exported and not sent again.
    Takes   only: sizes, data variants or members of a suite, as `castalia suite --only`.
    Raises  ConfigError for wrong options, a missing token or extra, before anything is sent;
            CheckpointError; CastaliaError if the hub refuses something or is lost on the way.

    Examples
        >>> import castalia
        >>> from castalia.publish import UploadOptions, upload
        >>> run = castalia.train("debug", steps=4, output="runs/published")
        >>> options = UploadOptions(steps=[4], dry_run=True)
        >>> [branch.revision for branch in upload(run.config.output, "me/published", options)]
        ['step4', 'main']
    """
    uploads = prepare(path, repo, options or UploadOptions(), only)
    return (revision for each in uploads for revision in each.run())


def prepare(
    path: str | Path,
    repo: str,
    options: UploadOptions,
    only: str | Sequence[str] | None = None,
) -> list[RunUpload]:
    """The uploads of a path, each checked.

    Raises  as `upload`.
    """
    if not (Path(path) / SUITE_FILE).is_file():
        if only is not None:
            raise ConfigError(f"--only chooses members of a suite, and {path} is not one")
        return [RunUpload(path, repo, options, {})]
    require_repo(repo)
    # Links to all of them, also to those that an earlier call uploaded.
    folders = trained_members(path, None)
    chosen = trained_members(path, only)
    if not chosen:
        raise ConfigError(f"no member of the suite {path} has a complete checkpoint yet")
    endpoint = (options.endpoint or os.environ.get("HF_ENDPOINT") or OFFICIAL).rstrip("/")
    pages = {name: f"{endpoint}/{repo}-{name}" for name in folders}
    return [
        RunUpload(folder, f"{repo}-{name}", options, others(pages, name))
        for name, folder in chosen.items()
    ]


def trained_members(path: str | Path, only: str | Sequence[str] | None) -> dict[str, Path]:
    """Name and folder of the members that have a complete checkpoint."""
    return {
        member.name: member.folder
        for member in open_suite(str(path), only).members
        if complete_steps(member.folder / "checkpoints")
    }


def others(pages: dict[str, str], name: str) -> dict[str, str]:
    """The pages of the other members."""
    return {other: page for other, page in pages.items() if other != name}
