"""Corpora by name: their files, sizes and hashes, and which of them are gone.

Source  tools/datasets/corpora.py of GPT-NeoX. Most of its addresses no longer answer: EleutherAI
        shut eaidata.bmk.sh down, the-eye.eu its copies of the Pile. They stay in the table, so that
        the name explains what happened.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from castalia.core.errors import ConfigError
from castalia.core.registry import Registry
from castalia.corpus.downloads import OnBytes, RemoteFile, fetch

GONE_PILE = (
    "the-eye.eu removed its copy of the Pile in 2023; name your own copy of the files as inputs, or"
    " use pile_uncopyrighted"
)
GONE_BMK = "eaidata.bmk.sh is down for good; name your own copy of the file as input"


@dataclass(frozen=True)
class Corpus:
    """A corpus of one or more files."""

    files: tuple[RemoteFile, ...]
    about: str
    documents: int | None = None
    """None if unknown."""
    dead: str | None = None
    """Why its addresses no longer answer, and what to do instead."""


def eye(path: str, about: str, documents: int | None = None) -> Corpus:
    """A component of the Pile that the-eye.eu hosted."""
    url = f"https://the-eye.eu/public/AI/pile_preliminary_components/{path}"
    return Corpus((RemoteFile(url),), about, documents, GONE_PILE)


def bmk(path: str, about: str, documents: int | None = None) -> Corpus:
    """A corpus that EleutherAI's own server hosted."""
    return Corpus((RemoteFile(f"http://eaidata.bmk.sh/data/{path}"),), about, documents, GONE_BMK)


def numbered(pattern: str, count: int, about: str, dead: str | None = None) -> Corpus:
    """A corpus of `count` numbered files."""
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
    "openwebtext2": Corpus((RemoteFile(OWT2),), "pages linked from Reddit", 17_103_000),
    "pile": numbered(PILE, 30, "the Pile", GONE_PILE),
    "pile_subset": numbered(PILE, 1, "its first file", GONE_PILE),
    "pile_uncopyrighted": numbered(
        FREE_PILE, 30, "the Pile without its components of disputed copyright"
    ),
    "enron": bmk("enron_emails.jsonl.zst", "emails of Enron", 517_401),
    "github": bmk("github_small.jsonl.zst", "a sample of GitHub"),
    "arxiv": eye("2020-09-08-arxiv-extracts-nofallback-until-2007-068.tar.gz", "papers of arXiv"),
    "europarl": eye(
        "EuroParliamentProceedings_1996_2011.jsonl.zst", "debates of the European Parliament"
    ),
    "freelaw": eye("FreeLaw_Opinions.jsonl.zst", "opinions of US courts"),
    "nih": eye("NIH_ExPORTER_awarded_grant_text.jsonl.zst", "grants of the NIH"),
    "pubmed": eye("PMC_extracts.tar.gz", "papers of PubMed Central"),
    "books1": eye("books1.tar.gz", "BookCorpus"),
    "books3": eye("books3.tar.gz", "Bibliotik; withdrawn at the request of its authors"),
    "hackernews": eye("hn.tar.gz", "discussions on Hacker News", 373_000),
    "stackexchange": eye("stackexchange_dataset.tar", "questions and answers of Stack Exchange"),
    "ubuntu_irc": eye("ubuntu_irc_until_2020_9_1.jsonl.zst", "chats of Ubuntu's channels"),
    "youtube_subtitles": eye("yt_subs.jsonl.zst", "subtitles of YouTube"),
    "c4": numbered(f"{C4}/en/c4-train.{{:05}}-of-01024.json.gz", 1024, "C4, English"),
    "c4_openwebtext": numbered(
        f"{C4}/realnewslike/c4-train.{{:05}}-of-00512.json.gz", 512, "C4, news"
    ),
}.items():
    CORPORA.register(_name)(_corpus)


def download(
    corpus: Corpus, folder: str | os.PathLike[str], on_bytes: OnBytes | None = None
) -> list[Path]:
    """The files of a corpus in `folder`; missing ones are downloaded, partial ones continued.

    Raises  ConfigError if the addresses are dead; DataError if a file differs from the table or its
            server does not answer; CastaliaError if the disk is full.
    """
    if corpus.dead:
        raise ConfigError(f"{corpus.files[0].url}: {corpus.dead}")
    return [fetch(file, Path(folder) / file.name, on_bytes) for file in corpus.files]


def resolve_inputs(
    inputs: Sequence[str], folder: str | os.PathLike[str], on_bytes: OnBytes | None = None
) -> list[str]:
    """The inputs, with the name of a corpus replaced by its files, downloaded to `folder`/NAME.

    An existing file or folder of that name takes precedence.
    """
    paths: list[str] = []
    for name in inputs:
        if name in CORPORA and not Path(name).exists():
            paths += map(str, download(CORPORA[name], Path(folder) / name, on_bytes))
        else:
            paths.append(name)
    return paths


def table() -> str:
    """All corpora, one a line: name, files, documents, whether the address is dead, description."""
    lines = [f"{'name':<20}{'files':>6}{'documents':>12}  {'address':<8}description"]
    for name in CORPORA:
        corpus = CORPORA[name]
        documents = f"{corpus.documents:,}" if corpus.documents else "-"
        state = "dead" if corpus.dead else "-"
        lines.append(
            f"{name:<20}{len(corpus.files):>6}{documents:>12}  {state:<8}{corpus.about};"
            f" {corpus.files[0].url}"
        )
    return "\n".join(lines)
