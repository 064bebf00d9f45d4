"""Chat templates in a process of their own, with a limit of time and one of memory.

A template is a program that came with a model, over values that came with a request. Python cannot
stop a thread that multiplies a string, and runs nothing else meanwhile.
"""

import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from typing import BinaryIO

from castalia.core.errors import ConfigError
from castalia.corpus.chat_template import ChatTemplate
from castalia.serve.template_text import Conversation

SECONDS = 10
"""Time of one conversation."""
MEMORY = 64 << 20
"""Bytes of one conversation, besides MEMORY_FACTOR times its own."""
MEMORY_FACTOR = 6
MOST_CHARACTERS = 16 << 20
"""Of the text that a template writes: more than the bytes of the largest request."""
LENGTH = struct.Struct("<Q")
WRITTEN = b"t"
REFUSED = b"r"
BIN = "from castalia.serve.template_worker import answer_all; answer_all()"


class TemplateWorker:
    """A process that writes the text of one conversation at a time; it starts when it is needed.

    Safe to use from several threads, which wait for one another.
    """

    def __init__(self, seconds: int = SECONDS, memory: int = MEMORY) -> None:
        self.seconds = seconds
        self.memory = memory
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def write(self, template: ChatTemplate, conversation: Conversation) -> str:
        """The text of a conversation.

        Raises  ConfigError if the template rejects it, or exceeds a limit.
        """
        job = pickle.dumps((template, conversation, self.seconds, self.memory))
        with self.lock:
            return self.ask(job)

    def ask(self, job: bytes) -> str:
        """The answer to a job.

        Raises  ConfigError if the process was ended by a limit.
        """
        process = self.started()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(LENGTH.pack(len(job)))
            process.stdin.write(job)
            process.stdin.flush()
            kind = process.stdout.read(1)
            (length,) = LENGTH.unpack(process.stdout.read(LENGTH.size))
            text = process.stdout.read(length).decode("utf-8", "surrogatepass")
        except (OSError, struct.error):
            ended = process.wait()
            self.process = None
            reason = f"ended its process with status {ended}"
            if ended == -signal.SIGALRM:
                reason = f"took longer than {self.seconds} s"
            raise ConfigError(f"the chat template {reason}; shorten the conversation") from None
        if kind == REFUSED:
            raise ConfigError(text)
        return text

    def started(self) -> subprocess.Popen[bytes]:
        """The process, running."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", BIN],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                # A Ctrl-C at the terminal is the server's, which finishes what runs.
                start_new_session=True,
            )
        return self.process

    def close(self) -> None:
        """End the process."""
        process = self.process
        if process is not None:
            process.kill()
            process.wait()


def answer_all() -> None:
    """The process: answer jobs until the server is gone."""
    source = sys.stdin.buffer
    # A library that prints must not speak in our place.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with suppress(BrokenPipeError):
        while head := source.read(LENGTH.size):
            answer(source.read(*LENGTH.unpack(head)), answers)


def answer(job: bytes, answers: BinaryIO) -> None:
    """Answer one job within its limits."""
    template, conversation, seconds, memory = pickle.loads(job)
    _, highest = resource.getrlimit(resource.RLIMIT_AS)
    # Without a handler: the signal ends the process even in the midst of a function of C.
    signal.setitimer(signal.ITIMER_REAL, seconds)
    allowed = address_space() + memory + MEMORY_FACTOR * len(job)
    if highest != resource.RLIM_INFINITY:
        allowed = min(allowed, highest)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, highest))
    kind = WRITTEN
    try:
        text = conversation.text(template)
        if len(text) > MOST_CHARACTERS:
            raise ConfigError(
                f"the chat template wrote {len(text):,} characters; shorten the conversation"
            )
        data = text.encode("utf-8", "surrogatepass")
    except (ConfigError, MemoryError) as error:
        kind = REFUSED
        text = str(error)[:500]
        if isinstance(error, MemoryError) or text.endswith(": MemoryError"):
            text = "the chat template takes too much memory; shorten the conversation"
        data = text.encode("utf-8", "replace")
    resource.setrlimit(resource.RLIMIT_AS, (highest, highest))
    signal.setitimer(signal.ITIMER_REAL, 0)
    answers.write(kind + LENGTH.pack(len(data)))
    answers.write(data)
    answers.flush()


def address_space() -> int:
    """Bytes of this process's addresses; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0
