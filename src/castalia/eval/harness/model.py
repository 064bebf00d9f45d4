"""An engine of Castalia as a model of lm-evaluation-harness.

Source  lm-eval 0.4.13, models/huggingface.py: what is scored, cut and stopped is that of the
        harness's `hf` model, so that the numbers are equal.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from castalia.core.errors import ConfigError
from castalia.corpus.chat_template import ChatTemplate, read_chat_template
from castalia.eval.harness.encoding import Ids, Pair, TextEncoder
from castalia.eval.harness.generation import Prompt, continue_all, options_of
from castalia.eval.harness.progress import Meter, Say
from castalia.eval.likelihoods.scoring import Likelihood, Line, score_lines
from castalia.eval.shares import ALONE, Share
from castalia.inference import LanguageModel


class Request(NamedTuple):
    """A prompt and how it is continued, as ids."""

    ids: Ids
    prompt: Prompt


class HarnessModel(TemplateLM):
    """A LanguageModel as the harness calls it.

    batch     rows in a forward pass, and texts that are continued together.
    share     this rank's share of the lines; every rank runs the whole harness, and the answers
              are gathered.
    encoder   the model's tokenizer, if its results are shared with other checkpoints.

    The answer to a request is kept: the same line is computed once in the life of this object.
    Raises  ConfigError if the checkpoint has no tokenizer.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        batch: int = 16,
        share: Share = ALONE,
        encoder: TextEncoder | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.batch = batch
        self.share = share
        self.name = ""
        self.say: Say | None = None
        if encoder is None:
            encoder = TextEncoder(model)
        self.encoder = encoder
        # `TemplateLM.chat_template` and the harness's record of tokenizers ask a tokenizer of
        # transformers, which this is not.
        self.tokenizer = None
        self.answers: dict[Line, Likelihood] = {}
        self.texts: dict[tuple[Any, ...], str] = {}
        self.costs: dict[str, int] = {}
        """Tokens that each task asked for, by its name: what its share of the time follows."""

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads."""
        return self.model.config.max_position_embeddings

    @property
    def max_gen_toks(self) -> int:
        """New tokens of a task that names no limit; the harness's own default."""
        return 256

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return self.encoder.eot_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return self.encoder.prefix_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of one text."""
        if add_special_tokens is False:
            return list(self.encoder.plain([string])[0])
        return list(self.encoder.encode([string])[0])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of a context and its continuation."""
        pair = self.encoder.encode_pairs([(context, continuation)])[0]
        return list(pair.context), list(pair.continuation)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """Log-likelihood of tokenized requests: (texts, context ids, continuation ids)."""
        lines = [self.line(Pair(tuple(ids), tuple(more))) for _, ids, more in requests]
        return [(answer.logprob, answer.greedy) for answer in self.score(lines, len(requests))]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether greedy decoding writes it.

        Raises  ConfigError naming the task whose continuation is longer than the model reads.
        """
        pairs = self.encoder.encode_pairs([request.args for request in requests])
        lines = []
        for pair, request in zip(pairs, requests, strict=True):
            line = self.line(pair, request.task_name)
            self.charge(request, len(line.context) + len(line.continuation))
            lines.append(line)
        return [(answer.logprob, answer.greedy) for answer in self.score(lines, len(requests))]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each whole text in nats, in windows whose targets do not overlap."""
        lines: list[Line] = []
        counts = []
        for ids, request in zip(
            self.encoder.encode([request.args[0] for request in requests]), requests, strict=True
        ):
            windows = get_rolling_token_windows(
                token_list=list(ids),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [Line(*map(tuple, make_disjoint_window(window))) for window in windows]
            self.charge(request, len(ids))
            counts.append(len(own))
            lines += own
        logprobs = iter([answer.logprob for answer in self.score(lines, len(requests))])
        return [float(sum(next(logprobs) for _ in range(count))) for count in counts]

    def line(self, pair: Pair, task: str | None = None) -> Line:
        """A pair as the model reads it: cut on the left where it is too long."""
        if len(pair.continuation) > self.max_length:
            raise ConfigError(
                f"task {task or '?'} scores a continuation of {len(pair.continuation)} tokens, but"
                f" the model reads at most {self.max_length}; choose another task"
            )
        # The last token is predicted, not read.
        room = self.max_length + 1 - len(pair.continuation)
        return Line(pair.context[-room:], pair.continuation)

    def score(self, lines: Sequence[Line], requests: int) -> list[Likelihood]:
        """The answers to the lines of some requests; those not known yet are computed, each once
        over all ranks."""
        new = [line for line in dict.fromkeys(lines) if line not in self.answers]
        meter = Meter(self.report, requests)
        answers = self.share.compute(
            new,
            lambda own: score_lines(
                self.model.engine, own, rows=self.batch, progress=meter.over(len(own))
            ),
            together=lambda line: line.context,
            cost=lambda line: len(line.context) + len(line.continuation),
        )
        self.answers.update(zip(new, answers, strict=True))
        meter.finish()
        return [self.answers[line] for line in lines]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each prompt, before its first stop string.

        Raises  ConfigError naming the task with an option that this model does not have, or which
                asks for more tokens than the model reads.
        """
        ids = self.encoder.encode([request.args[0] for request in requests])
        repeats: dict[Any, int] = {}
        asked: list[Request] = []
        for tokens, request in zip(ids, requests, strict=True):
            asked.append(self.request(tokens or (self.prefix_token_id,), request, repeats))
            self.charge(request, len(asked[-1].ids) + asked[-1].prompt.max_new_tokens)
        keys = [(one.ids, one.prompt) for one in asked]
        new = {key: one for key, one in zip(keys, asked, strict=True) if key not in self.texts}
        meter = Meter(self.report, len(requests))
        made = self.share.compute(
            list(new.values()),
            lambda own: self.generate(own, meter.over(len(own))),
            together=lambda one: one.ids,
            cost=lambda one: len(one.ids) + one.prompt.max_new_tokens,
        )
        self.texts.update(zip(new, made, strict=True))
        meter.finish()
        return [self.texts[key] for key in keys]

    def request(self, ids: Ids, request: Instance, repeats: dict[Any, int]) -> Request:
        """A prompt cut on the left, so that the new tokens find room; with its options.

        `repeats` counts the draws from one prompt, which differ.
        """
        prompt = options_of(request.args[1], self.max_gen_toks, request.task_name)
        room = self.max_length - prompt.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"task {request.task_name} asks for {prompt.max_new_tokens} new tokens, but the"
                f" model reads at most {self.max_length} together with the prompt; set"
                " max_gen_toks in generation_kwargs of the task"
            )
        ids = ids[-room:]
        if prompt.draws:
            earlier = repeats.get((ids, prompt), 0)
            repeats[ids, prompt] = earlier + 1
            prompt = prompt.repeated(earlier)
        return Request(ids, prompt)

    def generate(self, requests: Sequence[Request], done: Callable[[int], None]) -> list[str]:
        """The texts of requests, on this rank; `done` is called with the number that ended."""
        ends = set(self.model.end_ids)
        eos = ""
        if self.eot_token_id is not None:
            ends.add(self.eot_token_id)
            eos = self.encoder.tokenizer.decode([self.eot_token_id])
        prompts = [(one.ids, one.prompt) for one in requests]
        made = continue_all(self.model, prompts, ends, rows=self.batch, done=done)
        texts = []
        for tokens, one in zip(made, requests, strict=True):
            # Decoded by themselves and cut then, as `hf` does: a decoder may write the first token
            # differently at the beginning of a text.
            text = self.encoder.decode(tokens)
            texts.append(postprocess_generated_text(text, [*one.prompt.until, eos], None))
        return texts

    def charge(self, request: Instance, tokens: int) -> None:
        """Add tokens to the costs of a request's task."""
        task = request.task_name or ""
        self.costs[task] = self.costs.get(task, 0) + tokens

    def begin(self, name: str, say: Say | None) -> None:
        """The requests that follow are those of a task or group; `say` hears of the answers."""
        self.name = name
        self.say = say
        self.costs = {}

    def report(self, count: int) -> None:
        """Tell of answered requests."""
        if self.say is not None:
            self.say(self.name, count)

    @property
    def tokenizer_name(self) -> str:
        """What tells tokenizers apart in the harness's keys of requests."""
        return self.encoder.key[:16]

    @property
    def template(self) -> ChatTemplate:
        """The chat template.

        Raises  ConfigError if the checkpoint has none.
        """
        template = read_chat_template(self.encoder.folder)
        if template is None:
            raise ConfigError(
                f"{self.encoder.tokenizer.where} has no chat template beside it (it is a base"
                " model); evaluate without a chat template"
            )
        return template

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the chat template."""
        if chat_template is False:
            return None
        return self.template.text

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; without the system's message where the template rejects it."""
        defaults = {
            "eos_token": self.model.token_name(self.eot_token_id) or "",
            "bos_token": self.model.token_name(self.encoder.bos) or "",
        }
        options: dict[str, Any] = {
            "reply": add_generation_prompt,
            "continue_last": not add_generation_prompt,
            "defaults": defaults,
        }
        try:
            return self.template.render(chat_history, **options)
        except ConfigError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            return self.template.render(rest, **options)
