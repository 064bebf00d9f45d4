"""Corpora by name: where their files are, how large, with which hash; downloads that go on where they stopped.

Source  tools/datasets/corpora.py of GPT-NeoX. Most of its addresses no longer answer: EleutherAI took eaidata.bmk.sh
        down, the-eye.eu its copies of the Pile. They stay in the table so that the name says what happened.
"""

import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castalia.core.errors import ConfigError, DataError
from castalia.core.files import CHUNK_BYTES, cannot_write, claimed, sha256_of
from castalia.core.registry import Registry

GONE_PILE = (
    "the-eye.eu took its copy of the Pile down in 2023; name your own copy of the files as inputs, or take"
    " pile_uncopyrighted"
)
GONE_BMK = "eaidata.bmk.sh is down for good; name your own copy of the file as input"
TRIES = 5
PATIENCE = 30.0
"""Seconds to wait for an answer, and for each next piece."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a corpus. Without a hash the record says which one came; `size` is in bytes, None if not known."""

    url: str
    sha256: str | None = None
    size: int | None = None

    @property
    def name(self) -> str:
        """Its name on disk."""
        return Path(urllib.parse.urlsplit(self.url).path).name


@dataclass(frozen=True)
class Corpus:
    """A corpus of one or more files; `dead` says why its addresses no longer answer."""

    files: tuple[RemoteFile, ...]
    about: str
    documents: int | None = None
    dead: str | None = None


def eye(path: str, about: str, documents: int | None = None) -> Corpus:
    """A corpus that the-eye.eu had under its folder of the Pile's parts."""
    url = f"https://the-eye.eu/public/AI/pile_preliminary_components/{path}"
    return Corpus((RemoteFile(url),), about, documents, GONE_PILE)


def bmk(path: str, about: str, documents: int | None = None) -> Corpus:
    """A corpus that EleutherAI's own server had."""
    return Corpus((RemoteFile(f"http://eaidata.bmk.sh/data/{path}"),), about, documents, GONE_BMK)


def numbered(pattern: str, count: int, about: str, dead: str | None = None) -> Corpus:
    """A corpus of files that differ in a number."""
    return Corpus(tuple(RemoteFile(pattern.format(i)) for i in range(count)), about, dead=dead)


PILE = "https://the-eye.eu/public/AI/pile/train/{:02}.jsonl.zst"
FREE_PILE = (
    "https://huggingface.co/datasets/monology/pile-uncopyrighted/resolve/main/train/{:02}.jsonl.zst"
)
C4 = "https://huggingface.co/datasets/allenai/c4/resolve/main"
OWT2 = (
    "https://huggingface.co/datasets/segyges/OpenWebText2/resolve/main/openwebtext2.jsonl.zst.tar"
)
ENWIK8 = RemoteFile(
    "http://mattmahoney.net/dc/enwik8.zip",
    sha256="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    size=36_445_475,
)
CORPORA: Registry[Corpus] = Registry("corpus")
for _name, _corpus in {
    "enwik8": Corpus((ENWIK8,), "the first 10^8 bytes of the English Wikipedia of 2006", 1),
    "openwebtext2": Corpus((RemoteFile(OWT2),), "pages that Reddit linked to", 17_103_000),
    "pile": numbered(PILE, 30, "the Pile", GONE_PILE),
    "pile_subset": numbered(PILE, 1, "its first file", GONE_PILE),
    "pile_uncopyrighted": numbered(
        FREE_PILE, 30, "the Pile without its parts of disputed copyright"
    ),
    "enron": bmk("enron_emails.jsonl.zst", "mail of Enron", 517_401),
    "github": bmk("github_small.jsonl.zst", "a sample of GitHub"),
    "arxiv": eye("2020-09-08-arxiv-extracts-nofallback-until-2007-068.tar.gz", "arXiv's papers"),
    "europarl": eye(
        "EuroParliamentProceedings_1996_2011.jsonl.zst", "debates of the European Parliament"
    ),
    "freelaw": eye("FreeLaw_Opinions.jsonl.zst", "opinions of American courts"),
    "nih": eye("NIH_ExPORTER_awarded_grant_text.jsonl.zst", "grants of the NIH"),
    "pubmed": eye("PMC_extracts.tar.gz", "papers of PubMed Central"),
    "books1": eye("books1.tar.gz", "BookCorpus"),
    "books3": eye("books3.tar.gz", "Bibliotik; withdrawn at the wish of its authors"),
    "hackernews": eye("hn.tar.gz", "discussions of Hacker News", 373_000),
    "stackexchange": eye("stackexchange_dataset.tar", "questions and answers of Stack Exchange"),
    "ubuntu_irc": eye("ubuntu_irc_until_2020_9_1.jsonl.zst", "chats of Ubuntu's channels"),
    "youtube_subtitles": eye("yt_subs.jsonl.zst", "subtitles of YouTube"),
    "c4": numbered(f"{C4}/en/c4-train.{{:05}}-of-01024.json.gz", 1024, "C4, English"),
    "c4_openwebtext": numbered(
        f"{C4}/realnewslike/c4-train.{{:05}}-of-00512.json.gz", 512, "C4, news"
    ),
}.items():
    CORPORA.register(_name)(_corpus)

OnBytes = Callable[[int], Any]


def download(
    corpus: Corpus, folder: str | os.PathLike[str], on_bytes: OnBytes | None = None
) -> list[Path]:
    """The files of a corpus in `folder`, fetched if they are not there yet; an interrupted file is gone on with.

    Raises  ConfigError if its addresses are dead; DataError if a file is not the one the table knows, or if its server
            does not answer; CastaliaError if the disk is full.
    """
    if corpus.dead:
        raise ConfigError(f"{corpus.files[0].url}: {corpus.dead}")
    return [fetch(file, Path(folder) / file.name, on_bytes) for file in corpus.files]


def fetch(file: RemoteFile, path: Path, on_bytes: OnBytes | None = None) -> Path:
    """One file. It has its name only when whole and right; until then it is NAME.partial, which one process writes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with claimed(path.parent):
            if path.is_file():
                check(file, path)
            else:
                complete(file, path.with_name(path.name + ".partial"), path, on_bytes)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def complete(file: RemoteFile, partial: Path, path: Path, on_bytes: OnBytes | None) -> None:
    """Receive what is missing, check it and give it its name."""
    for attempt in range(1, TRIES + 1):
        try:
            if receive(file, partial, on_bytes):
                break
        except (
            urllib.error.URLError,
            http.client.HTTPException,
            ConnectionError,
            TimeoutError,
        ) as error:
            refuse(file, error, attempt)
            time.sleep(min(2**attempt, 30) * PATIENCE / 30)
    else:
        raise DataError(f"{file.url}: broke off {TRIES} times; run the same command to go on")
    try:
        check(file, partial)
    except DataError:
        partial.unlink()
        raise
    os.replace(partial, path)
    mark_of(partial).unlink(missing_ok=True)


def mark_of(partial: Path) -> Path:
    """Where the server's mark of the version that is being received stands."""
    return partial.with_name(partial.name + ".etag")


def refuse(file: RemoteFile, error: Exception, attempt: int) -> None:
    """Give up on what trying again will not mend.

    Raises  DataError with the reason.
    """
    status = error.code if isinstance(error, urllib.error.HTTPError) else None
    final = status is not None and status < 500 and status not in (408, 429)
    if final or attempt == TRIES:
        reason = f"HTTP {status}" if status else getattr(error, "reason", None) or error
        raise DataError(
            f"{file.url}: cannot be downloaded ({reason}); name your own copy of the file as input"
        ) from None


def receive(file: RemoteFile, partial: Path, on_bytes: OnBytes | None) -> bool:
    """Append what is missing to the partial file; whether it is whole as far as the server tells.

    `If-Range` has the server begin anew if its file is another one now.
    """
    have = partial.stat().st_size if partial.exists() else 0
    mark = (
        mark_of(partial).read_text(encoding="utf-8") if have and mark_of(partial).exists() else ""
    )
    wanted = {"Range": f"bytes={have}-"} | ({"If-Range": mark} if mark else {}) if have else {}
    try:
        answer = urllib.request.urlopen(
            urllib.request.Request(file.url, headers=wanted), timeout=PATIENCE
        )
    except urllib.error.HTTPError as error:
        if (
            error.code == 416 and have
        ):  # nothing is missing, or the partial file is longer than theirs
            if file.size is not None and have != file.size:
                partial.unlink()
                return False
            return True
        raise
    with answer:
        going_on = answer.status == 206
        if going_on and not answer.headers.get("Content-Range", f"bytes {have}-").startswith(
            f"bytes {have}-"
        ):
            partial.unlink()  # other bytes than those asked for: never put behind ours
            return False
        expected, found = answer.headers.get("Content-Length"), answer.headers.get("ETag", "")
        mark_of(partial).write_text("" if found.startswith("W/") else found, encoding="utf-8")
        came = 0
        with open(partial, "ab" if going_on else "wb") as out:
            while piece := answer.read(CHUNK_BYTES):
                out.write(piece)
                came += len(piece)
                if on_bytes:
                    on_bytes(len(piece))
    return expected is None or came == int(expected)


def check(file: RemoteFile, path: Path) -> None:
    """Size and hash are those of the table, where it has any.

    Raises  DataError naming the file.
    """
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        raise DataError(
            f"{path}: {size} bytes, but {file.url} has {file.size}; remove it and run the command again"
        )
    if file.sha256 is not None and (found := sha256_of(path)) != file.sha256:
        raise DataError(
            f"{path}: SHA-256 {found}, but {file.url} has {file.sha256}; remove it and run the command again"
        )


def resolve_inputs(
    inputs: Sequence[str], folder: str | os.PathLike[str], on_bytes: OnBytes | None = None
) -> list[str]:
    """The inputs, where the name of a corpus stands for its files, downloaded to a folder of that name in `folder`.

    A file or folder of the same name goes first.
    """
    found: list[str] = []
    for name in inputs:
        if name in CORPORA and not Path(name).exists():
            found += map(str, download(CORPORA[name], Path(folder) / name, on_bytes))
        else:
            found.append(name)
    return found


def table() -> str:
    """Every corpus in a line: name, files, documents, whether its addresses are known to be dead, what it is."""
    lines = [f"{'name':<20}{'files':>6}{'documents':>12}  {'address':<8}what it is"]
    for name in CORPORA:
        found = CORPORA[name]
        documents = f"{found.documents:,}" if found.documents else "-"
        state = "dead" if found.dead else "-"
        lines.append(
            f"{name:<20}{len(found.files):>6}{documents:>12}  {state:<8}{found.about}; {found.files[0].url}"
        )
    return "\n".join(lines)
