"""Text to tokens: readers of every input format, chats, fill-in-the-middle, and the job that writes token files."""

from castalia.corpus.chats import ChatOptions
from castalia.corpus.fim import FimOptions
from castalia.corpus.options import Options
from castalia.corpus.prepare import Prepared, prepare
from castalia.corpus.readers import read_documents

__all__ = ["ChatOptions", "FimOptions", "Options", "Prepared", "prepare", "read_documents"]
