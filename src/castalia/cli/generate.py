"""`castalia generate`."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from castalia.cli.flags import ENGINE, Checkpoint, EngineFlags, grouped, panel

if TYPE_CHECKING:
    from castalia.inference import Completion, LanguageModel

NEW_LINE = "\n"
ESCAPES = {r"\n": NEW_LINE, r"\t": "\t"}

PROMPTS = panel("Prompts")
SAMPLING = panel("Sampling")
OUTPUT = panel("Output")


@dataclass(frozen=True)
class PromptFlags:
    """Options about the texts to continue."""

    prompt: Annotated[
        list[str] | None, PROMPTS(metavar="TEXT", help="Text to continue; may be repeated.")
    ] = None
    file: Annotated[
        str | None,
        PROMPTS(
            metavar="FILE", help='Prompts, one a line, or {"prompt": …} a line in a .jsonl file.'
        ),
    ] = None
    samples: Annotated[
        int,
        PROMPTS(metavar="N", min=0, help="Write N texts from the end-of-document token alone."),
    ] = 0
    prompt_end: Annotated[
        str, PROMPTS(metavar="TEXT", help="End of a prompt that is typed in.")
    ] = r"\n"

    def gather(self) -> list[str] | None:
        """All prompts, else the lines of standard input; None to ask for them on a terminal.

        Raises  ConfigError if there is none.
        """
        from castalia.core.errors import ConfigError
        from castalia.core.unicode import require_unicode
        from castalia.inference.prompts import plain_prompts, read_prompts

        if self.samples:
            return [""] * self.samples
        prompts = list(self.prompt or [])
        for prompt in prompts:  # here, before one of them is shown
            require_unicode(prompt, "--prompt")
        if self.file:
            prompts += read_prompts(self.file)
        if prompts:
            return prompts
        if sys.stdin.isatty():
            return None
        prompts = list(plain_prompts(sys.stdin.read().splitlines()))
        if not prompts:
            raise ConfigError(
                "no prompt; give --prompt TEXT, --file FILE, or lines on standard input"
            )
        return prompts


@dataclass(frozen=True)
class SamplingFlags:
    """Options about the choice of tokens."""

    max_new_tokens: Annotated[
        int, SAMPLING(metavar="N", help="Longest continuation, in tokens.")
    ] = 64
    temperature: Annotated[
        float, SAMPLING(metavar="X", help="0 takes the likeliest token; above 0 draws.")
    ] = 0.0
    top_k: Annotated[
        int, SAMPLING(metavar="N", help="Draw from the N likeliest tokens; 0 is off.")
    ] = 0
    top_p: Annotated[
        float,
        SAMPLING(
            metavar="SHARE",
            help="Draw from the likeliest tokens that together have this probability; 0 is off.",
        ),
    ] = 0.0
    min_p: Annotated[
        float,
        SAMPLING(
            metavar="SHARE",
            help="Draw from tokens at least this many times as likely as the likeliest; 0 is off.",
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        SAMPLING(metavar="X", help="Above 1 avoids the tokens of prompt and text; 1 is off."),
    ] = 1.0
    presence_penalty: Annotated[
        float, SAMPLING(metavar="X", help="Above 0 avoids the tokens of the text.")
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        SAMPLING(metavar="X", help="Above 0 avoids what the text repeats, once for each time."),
    ] = 0.0
    json_schema: Annotated[
        str | None,
        SAMPLING(metavar="FILE", help="Write JSON of the schema in this file."),
    ] = None
    stop: Annotated[
        list[str] | None,
        SAMPLING(metavar="TEXT", help=r"End before this text; \n is a new line. May be repeated."),
    ] = None
    seed: Annotated[
        int | None,
        SAMPLING(
            metavar="N",
            min=-(2**63),
            max=2**63 - 1,
            help="Repeat the same draws; prompt i, counted from 0, uses seed N + i.",
        ),
    ] = None

    def options(self, model: "LanguageModel") -> dict[str, Any]:
        """As `complete` and `stream` take them, without the seed.

        Raises  DataError if the file of the schema cannot be read; ConfigError if it is no schema.
        """
        grammar = None
        if self.json_schema is not None:
            grammar = model.grammars.json(read_schema(self.json_schema))
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "grammar": grammar,
            "stop": [unescaped(text) for text in self.stop or []],
        }


@dataclass(frozen=True)
class RecordFlags:
    """Options about where the texts go."""

    output: Annotated[
        str | None,
        OUTPUT(
            metavar="FILE",
            help="Write GPT-NeoX's records: context, text, length, finished, message,"
            " duration_seconds.",
        ),
    ] = None
    as_json: Annotated[
        bool, OUTPUT("--json", help="JSON lines: prompt, text, tokens, finish_reason, seconds.")
    ] = False


@grouped
def generate(
    checkpoint: Checkpoint,
    *,
    prompts: PromptFlags,
    sampling: SamplingFlags,
    running: EngineFlags,
    device: Annotated[str, ENGINE(help="auto, cpu or cuda.")] = "auto",
    draft: Annotated[
        str | None,
        ENGINE(
            metavar="MODEL",
            help="Guess ahead with a smaller model, or `lookup`; the text stays the same.",
        ),
    ] = None,
    files: RecordFlags,
) -> None:
    """Continue prompts with a checkpoint's model; without --prompt and --file, asks for them.

    Examples:

      castalia generate runs/demo --prompt "def main("

      castalia generate runs/demo/step1000 --file prompts.txt --temperature 0.8

      castalia generate runs/demo --samples 4 --temperature 1 --output samples.jsonl
    """
    from castalia.inference import load

    texts = prompts.gather()
    model = load(checkpoint, engine=running.engine, dtype=running.dtype, device=device)
    options = sampling.options(model)
    if draft == "lookup":
        options["draft"] = draft
    elif draft is not None:
        options["draft"] = load(draft, engine=running.engine, dtype=running.dtype, device=device)
    if texts is None:
        converse(model, options, sampling.seed, unescaped(prompts.prompt_end), files.output)
    elif files.output is not None:
        write_records(model, texts, options, sampling.seed, files.output)
    elif files.as_json:
        print_records(model, texts, options, sampling.seed)
    else:
        print_texts(model, texts, options, sampling.seed)


def read_schema(file: str) -> str:
    """The text of a JSON schema.

    Raises  DataError if the file cannot be read.
    """
    from castalia.core.errors import DataError

    try:
        with open(file, encoding="utf-8") as opened:
            return opened.read()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the JSON schema in {file}: {error}") from None


def unescaped(text: str) -> str:
    r"""The text with `\n` and `\t`, which shells pass as they are, as new lines and tabs."""
    for escape, character in ESCAPES.items():
        text = text.replace(escape, character)
    return text


def seed_of(seed: int | None, number: int) -> int | None:
    """The seed of prompt `number`: its own, so that its text does not depend on the others."""
    from castalia.inference.sampling import wrapped

    if seed is None:
        return None
    # Seeds are int64: the one after the largest is the smallest.
    return wrapped(seed + number)


def print_records(
    model: "LanguageModel", prompts: list[str], options: dict[str, Any], seed: int | None
) -> None:
    """One JSON object a line, a batch at a time."""
    for completion in completions(model, prompts, options, seed):
        print(json.dumps(asdict(completion), ensure_ascii=False), flush=True)


def completions(
    model: "LanguageModel", prompts: list[str], options: dict[str, Any], seed: int | None
) -> Iterator["Completion"]:
    """All texts, a batch at a time; one at a time with a draft."""
    from castalia.inference.language_model import BATCH_ROWS
    from castalia.inference.speculative import speculative_complete

    # Speculative decoding checks the guesses for one text at a time.
    if "draft" in options:
        for number, prompt in enumerate(prompts):
            seed_here = seed_of(seed, number)
            yield speculative_complete(model, [prompt], seed=seed_here, **options)[0][0]
        return
    for start in range(0, len(prompts), BATCH_ROWS):
        batch = prompts[start : start + BATCH_ROWS]
        yield from model.complete(batch, seed=seed_of(seed, start), **options)


def write_records(
    model: "LanguageModel",
    prompts: list[str],
    options: dict[str, Any],
    seed: int | None,
    output: str,
) -> None:
    """Write GPT-NeoX's record of each text, a line each.

    Raises  CastaliaError if the file cannot be written.
    """
    from pathlib import Path

    from castalia.core.files import cannot_write

    try:
        with open(output, "w", encoding="utf-8") as file:
            for completion in completions(model, prompts, options, seed):
                file.write(json.dumps(neox_record(completion), ensure_ascii=False) + "\n")
                file.flush()  # an interrupted job keeps the texts that it has finished
    except OSError as error:
        raise cannot_write(Path(output), error) from error
    print(f"{output}: {len(prompts)} texts", file=sys.stderr)


def neox_record(completion: "Completion") -> dict[str, Any]:
    """The fields of GPT-NeoX's generate.py.

    `finished` means that the model or a stop string ended the text, not its length.
    """
    message = None
    if completion.finish_reason == "context":
        message = "the model's limit ended the text"
    return {
        "context": completion.prompt,
        "text": completion.text,
        "length": len(completion.tokens),
        "finished": completion.finish_reason in ("eod", "stop"),
        "message": message,
        "duration_seconds": completion.seconds,
    }


def print_texts(
    model: "LanguageModel", prompts: list[str], options: dict[str, Any], seed: int | None
) -> None:
    """Print each text as it arrives, after its prompt on a terminal or if there are several."""
    show_prompt = sys.stdout.isatty() or len(prompts) > 1
    for number, prompt in enumerate(prompts):
        if number:
            print()
        speak(model, prompt, options, seed_of(seed, number), show_prompt=show_prompt)


def converse(
    model: "LanguageModel",
    options: dict[str, Any],
    seed: int | None,
    prompt_end: str,
    output: str | None,
) -> None:
    """Ask for prompts and continue them until end of input; `output` gets a record of each."""
    from castalia.core.errors import ConfigError

    key = "Enter" if prompt_end == NEW_LINE else repr(prompt_end)
    print(f"Type a prompt and {key}; Ctrl-D ends.", file=sys.stderr)
    number = 0
    while (prompt := typed(prompt_end)) is not None:
        try:
            completion = speak(model, prompt, options, seed_of(seed, number), show_prompt=False)
        except ConfigError as error:  # a prompt longer than the model's limit: ask for another
            print(f"castalia: {error}", file=sys.stderr)
        else:
            if output is not None:
                with open(output, "a", encoding="utf-8") as file:
                    file.write(json.dumps(neox_record(completion), ensure_ascii=False) + "\n")
        number += 1


def typed(prompt_end: str) -> str | None:
    """The text that is typed in up to `prompt_end`, exclusive; None at the end of input."""
    text = ""
    while prompt_end not in text:
        try:
            text += input("… " if text else "> ") + NEW_LINE
        except EOFError:
            print()
            return None
    return text.split(prompt_end)[0]


def speak(
    model: "LanguageModel",
    prompt: str,
    options: dict[str, Any],
    seed: int | None,
    *,
    show_prompt: bool,
) -> "Completion":
    """Print one continuation token by token; with a draft, whole."""
    if show_prompt:
        sys.stdout.write(prompt)
    if "draft" in options:
        (whole,) = completions(model, [prompt], options, seed)
        print(whole.text, flush=True)
        return whole
    # Not a for loop: the completion is the value that the generator returns at its end.
    stream = model.stream(prompt, seed=seed, **options)
    while True:
        try:
            sys.stdout.write(next(stream))
        except StopIteration as end:
            completion: Completion = end.value
            break
        sys.stdout.flush()
    print(flush=True)
    if completion.finish_reason == "context":
        limit = model.config.max_position_embeddings
        print(f"castalia: the text ended at the model's limit of {limit} tokens", file=sys.stderr)
    return completion
