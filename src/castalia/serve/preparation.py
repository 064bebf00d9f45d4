"""From a checked request to texts that the scheduler can take.

All of it takes time with the size of the request, so it runs beside the event loop.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from castalia.core.errors import ConfigError
from castalia.inference.language_model import LanguageModel
from castalia.inference.options import Options
from castalia.serve.active_request import ActiveRequest, Inbox
from castalia.serve.answers import AnswerFormat
from castalia.serve.drawing import options_of
from castalia.serve.encoding import prompt_ids
from castalia.serve.loaded_models import LoadedModel
from castalia.serve.requests import SamplingBody
from castalia.serve.scheduler import Job, ServedSearch, ServedText, StreamEvent

MOST_SCORES = 1 << 18
"""Log-probabilities of prompts in one request, each some hundred bytes until they are answered."""


@dataclass(frozen=True)
class Preparation:
    """A request for texts of a model."""

    loaded: LoadedModel
    body: SamplingBody
    prompts: list[str | list[int]]
    max_tokens: int
    answer: AnswerFormat
    score_prompt: bool = False
    echo: bool = False

    def require_capacity(self) -> None:
        """Raises  ConfigError if the request asks for more texts than can wait."""
        texts = len(self.prompts) * self.body.width
        capacity = self.loaded.scheduler.most_waiting
        if texts > capacity:
            raise ConfigError(
                f"the request asks for {texts} texts, but at most {capacity} can wait; split it"
            )

    def prepared(self, loop: asyncio.AbstractEventLoop) -> ActiveRequest:
        """The request with its texts, whose events go to `loop`.

        Raises  ConfigError if the model cannot serve it.
        """
        loaded = self.loaded
        body = self.body
        model = loaded.model
        encoded = [prompt_ids(model, prompt, body, self.echo) for prompt in self.prompts]
        n = body.n or 1
        options = options_of(model, body, self.max_tokens, loaded.scheduler.batcher.slots.count)
        # A search finds its n texts itself; of several drawn ones the best are chosen at the end.
        drawn = n if options.search.num_beams > 1 else body.width
        self.require_few_scores(sum(len(ids) for ids, _ in encoded) * drawn)
        inbox = Inbox()
        texts: list[ServedText] = []
        jobs: list[Job] = []
        for ids, _ in encoded:
            group = []
            for index in range(len(texts), len(texts) + drawn):
                text = served_text(model, ids, self.max_tokens, options, index)
                text.emit = sender(loop, inbox, index)
                text.top = self.answer.top
                # The choice among several goes by their log-probabilities.
                if drawn > n and self.answer.top is None:
                    text.top = 0
                text.score_prompt = self.score_prompt
                group.append(text)
            texts += group
            jobs += [ServedSearch(group, options.search)] if options.search.num_beams > 1 else group
        echoes = [written for _, written in encoded for _ in range(drawn)]
        prompt_tokens = sum(len(text.continuation.ids) for text in texts[::drawn])
        return ActiveRequest(
            loaded, texts, jobs, self.answer, echoes, inbox, prompt_tokens, drawn=drawn, n=n
        )

    def require_few_scores(self, positions: int) -> None:
        """Raises  ConfigError if scores of so many tokens of prompts would fill the memory."""
        if not self.score_prompt:
            return
        top = self.answer.top or 0
        if positions * (top + 1) > MOST_SCORES:
            raise ConfigError(
                f"logprobs: {positions:,} tokens of prompts with {top + 1} log-probabilities each"
                f" are more than {MOST_SCORES:,}; split the request or ask for fewer"
            )


def served_text(
    model: LanguageModel, ids: list[int], max_tokens: int, options: Options, index: int
) -> ServedText:
    """Text `index` of a request, which nobody hears of yet.

    OpenAI's way to score a prompt is max_tokens=0: no token is generated.
    """
    scoring = max_tokens == 0
    continuation = model.continuation(ids, max(1, max_tokens), options.ending, scoring=scoring)
    return ServedText(
        continuation=continuation,
        sampling=options.sampling.after(index),
        emit=lambda event: None,
        vocab_size=model.config.vocab_size,
        continues=not scoring,
    )


def sender(
    loop: asyncio.AbstractEventLoop, inbox: Inbox, index: int
) -> Callable[[StreamEvent], None]:
    """A callback for the scheduler's thread that puts the events of text `index` into `inbox`."""

    def emit(event: StreamEvent) -> None:
        try:
            loop.call_soon_threadsafe(inbox.put_nowait, (index, event))
        except RuntimeError:  # the loop is closed: the server is down and nobody waits
            return

    return emit
