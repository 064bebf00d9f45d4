"""The job: everything that decides the bytes of the outputs, sent to every worker."""

from dataclasses import dataclass, field

from castalia.core.extras import require
from castalia.corpus.documents import WantedFields
from castalia.corpus.forms import Output, TextForm
from castalia.corpus.inputs import InputFile
from castalia.tokenizers.tokenizer import Tokenizer

FORMAT = 4
"""Version of a part's files; parts of another version are encoded again."""


@dataclass(frozen=True)
class PrepareJob:
    """Everything that decides the bytes of a part, and where they go. Pickles to workers."""

    tokenizer: Tokenizer
    files: tuple[InputFile, ...]
    keys: tuple[str, ...]
    folder: str
    """The work folder."""
    output: str
    """The prefix that errors name."""
    eod_id: int | None = None
    """End-of-document id after each document; None appends nothing."""
    keep: tuple[str, ...] = ()
    ftfy: bool = False
    reject: bool = False
    """Whether to continue after a faulty document."""
    fast: bool = True
    documents: bool = True
    """Whether to write the document index."""
    form: TextForm = field(default_factory=TextForm)

    @property
    def outputs(self) -> list[Output]:
        """The token files of the job."""
        return self.form.outputs(self.keys, self.tokenizer)

    @property
    def settings(self) -> str:
        """The settings that go into each part's identity.

        `reject` is left out: a part without a fault is the same either way. `fast` too: all
        encoders give the same ids.
        """
        settings = [
            FORMAT,
            self.tokenizer.sha256,
            self.tokenizer.kind,
            self.eod_id,
            self.keys,
            self.keep,
            self.ftfy,
            self.documents,
            self.form,
        ]
        return repr(settings)

    @property
    def wanted(self) -> WantedFields:
        """The fields to take of each document."""
        mend = None
        if self.ftfy:
            mend = require("ftfy", "ftfy", "--ftfy").fix_text
        return self.form.wanted(self.keys, self.keep, mend)
