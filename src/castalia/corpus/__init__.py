"""Text to tokens: readers of every input format, chats, fill-in-the-middle, and `prepare`.

One vocabulary holds in this room, from the user's files to the token files:

input     A file or URL to read (`InputFile`). An archive is one input with many members.
extent    A stretch of one input that can be read on its own (`Extent`): lines, row groups, a text.
document  One text, or one per key, with its place in the input (`Document`).
part      Neighbouring extents encoded together by one worker (`JobPart`), with files of its own.
share     The parts of task I of N, `--shard I/N` (`Share`). *Shards* are files of a cut .bin.
job       Everything that decides the bytes of all parts (`PrepareJob`).
output    One token file of a job (`Output`); a job has one for each key and kind of ids.
form      How documents become ids (`TextForm`): as they are, as chats, or filled in the middle.

The path of `prepare`: `inputs` lists the files, `extents` cuts them, `parts` groups the extents,
`executors` gives the parts to workers, `part_encoding` reads (`documents`), encodes (`encoding`)
and writes each (`part_files`), and `work_folder` appends them, in order, to the outputs.
"""

from castalia.corpus.chats import ChatOptions
from castalia.corpus.fim import FimOptions
from castalia.corpus.options import PrepareOptions
from castalia.corpus.prepare import Prepared, prepare
from castalia.corpus.readers import read_documents

__all__ = ["ChatOptions", "FimOptions", "PrepareOptions", "Prepared", "prepare", "read_documents"]
