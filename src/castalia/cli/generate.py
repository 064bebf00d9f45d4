"""`castalia generate`."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from castalia.terminal.flags import ENGINE, Checkpoint, EngineFlags, grouped, panel
from castalia.terminal.sampling_flags import SamplingFlags, SearchFlags, unescaped

if TYPE_CHECKING:
    from castalia.corpus.conversation import Chat
    from castalia.inference import Completion, LanguageModel

NEW_LINE = "\n"

PROMPTS = panel("Prompts")
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
    chat: Annotated[
        bool,
        PROMPTS(
            "--chat", help="Prompts are messages of a user, written by the model's chat template."
        ),
    ] = False
    system: Annotated[
        str | None, PROMPTS(metavar="TEXT", help="With --chat: the first message, of the system.")
    ] = None

    def gather(self) -> list[str] | None:
        """All prompts, else the lines of standard input; None to ask for them on a terminal.

        Raises  ConfigError if there is none.
        """
        from castalia.core.errors import ConfigError
        from castalia.core.unicode import require_unicode
        from castalia.inference.prompts import plain_prompts, read_prompts

        if self.system is not None and not self.chat:
            raise ConfigError("--system is a message of a conversation: add --chat")
        if self.samples and self.chat:
            raise ConfigError("--samples has no prompt, and --chat answers one; give one of them")
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
        bool,
        OUTPUT(
            "--json",
            help="JSON lines: prompt, text, tokens, finish_reason, seconds; score of a beam"
            " search.",
        ),
    ] = False


@grouped
def generate(
    checkpoint: Checkpoint,
    *,
    prompts: PromptFlags,
    sampling: SamplingFlags,
    search: SearchFlags,
    running: EngineFlags,
    device: Annotated[str, ENGINE(help="auto, cpu or cuda.")] = "auto",
    adapter: Annotated[
        str | None,
        ENGINE(
            metavar="PATH",
            help="Adapter to merge into the model: a run that trained it, or a folder of PEFT.",
        ),
    ] = None,
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

      castalia generate runs/sft --chat --prompt "What is a list?"
    """
    from castalia.corpus.conversation import Chat
    from castalia.inference import load

    texts = prompts.gather()
    engine: dict[str, Any] = asdict(running) | {"device": device}
    model = load(checkpoint, **engine, adapter=adapter)
    say_quicker(model)
    options = sampling.options(model) | search.options()
    if draft == "lookup":
        options["draft"] = draft
    elif draft is not None:
        options["draft"] = load(draft, **engine)
    chat = Chat(model, prompts.system) if prompts.chat else None
    if chat is not None and texts is not None:
        texts = chat.prompts(texts)
    if texts is None:
        end = unescaped(prompts.prompt_end)
        converse(model, options, sampling.seed, end, files.output, chat)
    elif files.output is not None:
        write_records(model, texts, options, sampling.seed, files.output)
    elif files.as_json:
        print_records(model, texts, options, sampling.seed)
    else:
        print_texts(model, texts, options, sampling.seed)


def say_quicker(model: "LanguageModel") -> None:
    """Say beside the text if another dtype would be much faster."""
    from castalia.inference.default_engine import quicker

    if sentence := quicker(model, rows=1):
        print(f"castalia: {sentence}", file=sys.stderr)


def seed_of(seed: int | None, number: int) -> int | None:
    """The seed of text `number`: its own, so that it does not depend on the others."""
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
        record = asdict(completion)
        if completion.score is None:
            del record["score"]
        print(json.dumps(record, ensure_ascii=False), flush=True)


def completions(
    model: "LanguageModel", prompts: list[str], options: dict[str, Any], seed: int | None
) -> Iterator["Completion"]:
    """All texts, a batch at a time; one at a time with a draft."""
    from castalia.inference.language_model import BATCH_ROWS
    from castalia.inference.speculative import speculative_complete

    each = options["num_return_sequences"]
    # Speculative decoding checks the guesses for one text at a time.
    if "draft" in options:
        for number, prompt in enumerate(prompts):
            seed_here = seed_of(seed, number * each)
            for completion, _ in speculative_complete(model, [prompt], seed=seed_here, **options):
                yield completion
        return
    for start in range(0, len(prompts), BATCH_ROWS):
        batch = prompts[start : start + BATCH_ROWS]
        yield from model.complete(batch, seed=seed_of(seed, start * each), **options)


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
    count = len(prompts) * options["num_return_sequences"]
    print(f"{output}: {count} texts", file=sys.stderr)


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
    each = options["num_return_sequences"]
    show_prompt = sys.stdout.isatty() or len(prompts) * each > 1
    for number, prompt in enumerate(prompts):
        if number:
            print()
        speak(model, prompt, options, seed_of(seed, number * each), show_prompt=show_prompt)


def converse(
    model: "LanguageModel",
    options: dict[str, Any],
    seed: int | None,
    prompt_end: str,
    output: str | None,
    chat: "Chat | None" = None,
) -> None:
    """Ask for prompts and continue them until end of input; `output` gets a record of each.

    With a `chat` each prompt is the next message of one conversation.
    """
    from castalia.core.errors import ConfigError

    key = "Enter" if prompt_end == NEW_LINE else repr(prompt_end)
    print(f"Type a prompt and {key}; Ctrl-D ends.", file=sys.stderr)
    number = 0
    while (prompt := typed(prompt_end)) is not None:
        try:
            seed_here = seed_of(seed, number * options["num_return_sequences"])
            text = prompt if chat is None else chat.prompt(prompt)
            done = speak(model, text, options, seed_here, show_prompt=False)
            if chat is not None:
                chat.hear(done[0].text)
        except ConfigError as error:  # a prompt longer than the model's limit: ask for another
            print(f"castalia: {error}", file=sys.stderr)
            if chat is not None:
                chat.forget()
        else:
            if output is not None:
                with open(output, "a", encoding="utf-8") as file:
                    for completion in done:
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
) -> list["Completion"]:
    """Print the continuations of a prompt: one token by token; whole with a draft, a beam search,
    or if there are several."""
    lead = prompt if show_prompt else ""
    if "draft" in options or options["num_beams"] != 1 or options["num_return_sequences"] != 1:
        done = list(completions(model, [prompt], options, seed))
        print("\n\n".join(lead + completion.text for completion in done), flush=True)
    else:
        done = [streamed(model, prompt, options, seed, lead)]
    if any(completion.finish_reason == "context" for completion in done):
        limit = model.config.max_position_embeddings
        print(f"castalia: a text ended at the model's limit of {limit} tokens", file=sys.stderr)
    return done


def streamed(
    model: "LanguageModel", prompt: str, options: dict[str, Any], seed: int | None, lead: str
) -> "Completion":
    """Print one continuation token by token, after `lead`."""
    sys.stdout.write(lead)
    # A stream is one text, whatever the options.
    single = {name: value for name, value in options.items() if name != "num_return_sequences"}
    # Not a for loop: the completion is the value that the generator returns at its end.
    stream = model.stream(prompt, seed=seed, **single)
    while True:
        try:
            sys.stdout.write(next(stream))
        except StopIteration as end:
            completion: Completion = end.value
            break
        sys.stdout.flush()
    print(flush=True)
    return completion
