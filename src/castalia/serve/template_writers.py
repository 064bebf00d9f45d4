"""The processes that write the texts of conversations, beside the event loop."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from castalia.corpus.chat_template import ChatTemplate
from castalia.serve.lanes import LONG
from castalia.serve.template_text import Conversation
from castalia.serve.template_worker import TemplateWorker


class TemplateWriters:
    """One process for short conversations and one for long ones, which may take their time limit.

    They start with the first of each.
    """

    def __init__(self) -> None:
        self.short = TemplateWorker()
        self.long = TemplateWorker()
        # A thread for each: it waits for the process.
        self.short_thread = ThreadPoolExecutor(1, "castalia-templates")
        self.long_thread = ThreadPoolExecutor(1, "castalia-long-templates")

    async def write(self, size: int, template: ChatTemplate, conversation: Conversation) -> str:
        """The text of a conversation, from a request of `size` bytes.

        Raises  ConfigError if the template rejects it, or exceeds a limit.
        """
        worker = self.short
        thread = self.short_thread
        if size >= LONG:
            worker = self.long
            thread = self.long_thread
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(thread, worker.write, template, conversation)

    def close(self) -> None:
        """End the processes; what they write is lost."""
        for thread in (self.short_thread, self.long_thread):
            thread.shutdown(wait=False, cancel_futures=True)
        self.short.close()
        self.long.close()
