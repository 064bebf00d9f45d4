"""Exports to repositories of the Hugging Face hub, a revision each.

An upload is one commit: readers of the revision see the export before it or all of the new one. The
large files go ahead of the commit, one after the other, and what the hub holds already, by its
hashes, is not sent again; so the same command continues after it was killed.
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from castalia.core.errors import CastaliaError, ConfigError
from castalia.core.extras import require
from castalia.core.hub import HUB_ID
from castalia.core.sealed import record_text, with_own_hash
from castalia.export.record import Exported
from castalia.formats.export_record import HASHES, RECORD, read_record

TOKEN = "HF_TOKEN"
"""The one place where a token is looked for: an environment variable."""
OFFICIAL = "https://huggingface.co"
MAIN = "main"
"""The revision that readers get without naming one."""
WEIGHTS = (
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-?????-of-?????.bin",
    "pytorch_model.bin.index.json",
)
"""Files of a repository that transformers may take for its weights. Those of an earlier upload that
the new one lacks are deleted in its commit: transformers prefers model.safetensors to shards, so an
old one would stay the model."""
UNREACHABLE = (
    "RequestError",
    "TransportError",
    "ConnectionError",
    "TimeoutException",
    "TimeoutError",
)
"""Base classes of errors without an answer, in httpx, httpx2 and requests."""
ATTRIBUTES = ".gitattributes"
"""The file that the hub itself puts into every new repository."""
FRESH = {ATTRIBUTES, "README.md"}
"""The files of a repository that was made on the hub's website, where a license makes a card."""
LARGE = 5_000_000
"""Bytes from which a file is sent ahead of the commit, which has the smaller ones in itself."""


@dataclass(frozen=True)
class Push:
    """Where exports are uploaded to."""

    repo: str
    """OWNER/NAME; created if it does not exist."""
    revision: str | None = None
    """A branch, created if it does not exist. By default main for one export, and step1000 and so
    on for those of several steps."""
    private: bool = False
    """Whether a repository that is created here is private; others are left as they are."""
    endpoint: str | None = None
    """Address of the hub, by default that of HF_ENDPOINT, else huggingface.co."""
    force: bool = False
    """Whether a revision that holds something else is written over."""


@dataclass(frozen=True)
class Pushed:
    """An upload that is done."""

    repo: str
    revision: str
    commit: str
    """The commit of the revision that holds the export."""
    sent: list[str]
    """Files that were uploaded."""
    kept: list[str]
    """Files that were there already, with the same hashes."""
    deleted: list[str]
    """Weights of an earlier upload."""


@dataclass(frozen=True)
class Local:
    """One file of an export on its way."""

    content: Path | bytes
    """The file, or what is sent in its place."""
    sha256: str

    @property
    def size(self) -> int:
        """Bytes."""
        content = self.content
        if isinstance(content, bytes):
            return len(content)
        return content.stat().st_size

    def is_same(self, there: Any) -> bool:
        """Whether a file of the hub has this content, by size and hash."""
        if there.size != self.size:
            return False
        if there.lfs is not None:
            return bool(there.lfs.sha256 == self.sha256)
        content = self.content
        if isinstance(content, bytes):
            data = content
        else:
            data = content.read_bytes()
        return bool(there.blob_id == git_hash(data))


class Hub:
    """A repository of the hub that the token may write to."""

    def __init__(self, push: Push, library: Any, token: str) -> None:
        self.push = push
        self.library = library
        self.token = token
        # Read here and not by the library, which keeps the value that it was imported with.
        address = push.endpoint or os.environ.get("HF_ENDPOINT") or OFFICIAL
        self.endpoint = address.rstrip("/")
        self.api = library.HfApi(endpoint=self.endpoint, token=token, library_name="castalia")

    @classmethod
    def open(cls, push: Push) -> "Hub":
        """The hub, asked once whether it knows the token: before hours of export, not after.

        Raises  ConfigError without a token, huggingface_hub or a right name; CastaliaError if the
                hub cannot be reached or refuses the token.
        """
        named = HUB_ID.fullmatch(push.repo)
        if named is None or named[1] or named["revision"]:
            raise ConfigError(
                f"--push-to-hub {push.repo!r}: expected OWNER/NAME; a revision goes to --revision"
            )
        token = os.environ.get(TOKEN, "").strip()
        if not token:
            raise ConfigError(
                f"uploading to {push.repo} needs a token with write access in the environment:"
                f" set {TOKEN}"
            )
        library = require("huggingface_hub", "hf", "uploading to the Hugging Face hub")
        hub = cls(push, library, token)
        with hub.errors():
            hub.api.whoami()
        return hub

    def require_one_revision(self, exports: int) -> None:
        """Raises  ConfigError if several exports are to share one named revision."""
        if exports > 1 and self.push.revision is not None:
            raise ConfigError(
                f"--revision {self.push.revision} is one revision for {exports} steps; leave it out"
                " and each step gets its own, step1000 and so on"
            )

    def upload(self, done: Exported, step: str | None) -> dict[str, Any]:
        """Make the revision hold the export; returns a `Pushed` as a dict.

        Takes   step: name of the revision of one of several exports; None for a single one.
        Raises  CastaliaError if the hub refuses it or is lost on the way, or the revision holds
                something else.
        """
        revision = self.push.revision or step or MAIN
        return asdict(self.send(contents(Path(done.folder)), revision, done.to, message_of(done)))

    def send(self, local: Mapping[str, Local], revision: str, to: str, message: str) -> Pushed:
        """Make the revision hold the files of an export to the format `to`, in one commit.

        Raises  as `upload` does.
        """
        with self.errors(), self.without_bars(), self.over_http():
            self.api.create_repo(self.push.repo, private=self.push.private or None, exist_ok=True)
            if revision != MAIN:
                self.create_branch(revision)
            there = self.files_there(revision)
            if not self.push.force:
                self.require_own(there, revision, to)
            kept = [name for name in local if is_there(name, local, there)]
            stale = stale_weights(there, local, to)
            changed = {name: file for name, file in local.items() if name not in kept}
            commit = self.commit(changed, stale, revision, message)
            self.require_arrived(local, revision)
        return Pushed(self.push.repo, revision, commit, list(changed), kept, stale)

    def create_branch(self, revision: str) -> None:
        """Create a branch from the first commit of main, where it does not exist.

        From the newest one it would show the weights of main under the name of another step until
        its own commit arrives.
        """
        if revision in self.branches():
            return
        first = self.api.list_repo_commits(self.push.repo, revision=MAIN)[-1].commit_id
        self.api.create_branch(self.push.repo, branch=revision, revision=first, exist_ok=True)

    def branches(self) -> set[str]:
        """The branches of the repository."""
        refs = self.api.list_repo_refs(self.push.repo)
        return {branch.name for branch in refs.branches}

    def commit(
        self, changed: Mapping[str, Local], stale: Sequence[str], revision: str, message: str
    ) -> str:
        """Send the changed files and commit them with the deletions; returns the commit's id."""
        if not changed and not stale:
            return str(self.api.repo_info(self.push.repo, revision=revision).sha)
        add = self.library.CommitOperationAdd
        operations = []
        for name, file in changed.items():
            operation = add(path_in_repo=name, path_or_fileobj=file.content)
            if file.size >= LARGE:
                # One at a time, so that each is safe on the hub before the next one begins.
                self.api.preupload_lfs_files(
                    self.push.repo, [operation], revision=revision, free_memory=False
                )
            operations.append(operation)
        operations += [self.library.CommitOperationDelete(path_in_repo=name) for name in stale]
        info = self.api.create_commit(
            self.push.repo, operations, commit_message=message, revision=revision
        )
        return str(info.oid)

    def files_there(self, revision: str) -> dict[str, Any]:
        """The files of a revision by their paths."""
        tree = self.api.list_repo_tree(self.push.repo, recursive=True, revision=revision)
        return {item.path: item for item in tree if hasattr(item, "blob_id")}

    def require_own(self, there: Mapping[str, Any], revision: str, to: str) -> None:
        """Raises  CastaliaError if the revision holds files, and not an export to `to`."""
        foreign = sorted(set(there) - FRESH)
        if not foreign:
            return
        held = f"files that are no export of Castalia ({', '.join(foreign[:3])})"
        if RECORD in there:
            kind = self.record_there(revision)["to"]
            if kind == to:
                return
            held = f"an export to {kind}"
        raise CastaliaError(
            f"{self.push.repo}@{revision} holds {held}, and the upload to {to} would replace or"
            " delete some of it; name another repository or --revision, or use --force"
        )

    def record_there(self, revision: str) -> dict[str, Any]:
        """The export.json of a revision that has one."""
        with TemporaryDirectory() as folder:
            self.api.hf_hub_download(
                self.push.repo, RECORD, revision=revision, cache_dir=folder, local_dir=folder
            )
            return read_record(Path(folder))

    def require_arrived(self, local: Mapping[str, Local], revision: str) -> None:
        """Raises  CastaliaError if the revision does not hold every file as it is here."""
        there = self.files_there(revision)
        lost = [name for name in local if not is_there(name, local, there)]
        if lost:
            raise CastaliaError(
                f"{self.push.repo}@{revision} holds other content in {', '.join(lost[:5])} than was"
                " sent: another upload came between, or the repository ignores such files; run the"
                " command again"
            )

    @contextmanager
    def over_http(self) -> Iterator[None]:
        """Large files as plain LFS uploads where the endpoint is not the hub itself.

        The library would send them by Xet, a protocol of the hub's own storage that mirrors and
        servers of one's own need not speak.
        """
        constants = self.library.constants
        before = getattr(constants, "HF_HUB_DISABLE_XET", False)
        constants.HF_HUB_DISABLE_XET = before or self.endpoint != OFFICIAL
        try:
            yield
        finally:
            constants.HF_HUB_DISABLE_XET = before

    @contextmanager
    def without_bars(self) -> Iterator[None]:
        """The library's progress bars only on a terminal."""
        utils = self.library.utils
        if sys.stderr.isatty() or utils.are_progress_bars_disabled():
            yield
            return
        utils.disable_progress_bars()
        try:
            yield
        finally:
            utils.enable_progress_bars()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Errors of the library as one sentence each, without the token."""
        try:
            yield
        except CastaliaError:
            raise
        # The library raises its own errors, those of its HTTP client, and plain ones.
        except Exception as error:
            sentence = self.sentence(error).replace(self.token, "***")
            # Not chained: the original holds the request with its headers.
            raise CastaliaError(sentence) from None

    def sentence(self, error: BaseException) -> str:
        """What went wrong and what to do."""
        again = "run the command again: what is there already is not sent again"
        where = f"{self.push.repo} at {self.endpoint}"
        for cause in causes(error):
            status = getattr(getattr(cause, "response", None), "status_code", None)
            if status == 401:
                return f"{self.endpoint} does not know the token in {TOKEN}; make a new one"
            if status == 403:
                return (
                    f"the token in {TOKEN} may not write to {where}; use a token with write access"
                    " to it, or choose another repository"
                )
            if status is not None:
                said = getattr(cause, "server_message", None) or type(cause).__name__
                return f"{where} refused the upload (HTTP {status}: {said}); {again}"
            if "Offline" in type(cause).__name__:
                return f"cannot upload to {where}: HF_HUB_OFFLINE is set; unset it"
            if {base.__name__ for base in type(cause).__mro__} & set(UNREACHABLE):
                kind = type(cause).__name__
                return f"cannot reach {self.endpoint} ({kind}); check the network, then {again}"
        first = (str(error).strip().splitlines() or [""])[0]
        return f"cannot upload to {where}: {type(error).__name__}: {first}; {again}"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it, the innermost last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def contents(folder: Path) -> dict[str, Local]:
    """What is uploaded of an export, by path; its record without the paths of this machine."""
    record = public_record(folder)
    # Hashed when they were written or when the export was found again, both just now.
    files = {name: Local(folder / name, digest) for name, digest in record[HASHES].items()}
    return files | {RECORD: local_record(record)}


def public_record(folder: Path) -> dict[str, Any]:
    """The record of an export without the paths of this machine."""
    record = read_record(folder)
    for key in ("folder", "checkpoint"):
        record[key] = Path(record[key]).name
    return record


def local_record(record: Mapping[str, Any]) -> Local:
    """A record as the file that is sent, with its own hash."""
    return local_bytes(record_text(with_own_hash(record)).encode())


def local_bytes(data: bytes) -> Local:
    """Bytes as a file that is sent."""
    return Local(data, hashlib.sha256(data).hexdigest())


def is_there(name: str, local: Mapping[str, Local], there: Mapping[str, Any]) -> bool:
    """Whether the hub has a file as it is here."""
    return name in there and local[name].is_same(there[name])


def git_hash(data: bytes) -> str:
    """The SHA-1 by which git names a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def stale_weights(there: Mapping[str, Any], local: Mapping[str, Local], to: str) -> list[str]:
    """Weights of an earlier upload that would be read beside those of this one, or before them.

    Takes   to: the format; programs of others than hf are told the name of their file.
    """
    if to != "hf":
        return []
    return [
        name
        for name in there
        if name not in local and any(fnmatchcase(name, pattern) for pattern in WEIGHTS)
    ]


def message_of(done: Exported) -> str:
    """The message of the commit."""
    step = ""
    if done.step is not None:
        step = f", step {done.step}"
    return f"{done.to} {done.numbers} of {Path(done.checkpoint).name}{step}"
