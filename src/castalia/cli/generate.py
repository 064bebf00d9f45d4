"""`castalia generate`."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from castalia.inference import Completion, LanguageModel

NEW_LINE = "\n"
ESCAPES = {r"\n": NEW_LINE, r"\t": "\t"}


def generate(
    checkpoint: str = typer.Argument(
        help="A run, RUN/step1000, a checkpoint's folder, or a Hugging Face folder."
    ),
    prompt: list[str] = typer.Option([], help="Text to continue; may be given several times."),
    file: str = typer.Option(
        None, help='Prompts, one a line, or {"prompt": …} a line in a .jsonl file.'
    ),
    samples: int = typer.Option(
        0, min=0, help="Make this many texts from nothing, the end-of-document token alone."
    ),
    output: str = typer.Option(
        None,
        help="Write GPT-NeoX's records there: context, text, length, finished, message, duration_seconds.",
    ),
    max_new_tokens: int = typer.Option(64, help="Longest continuation, in tokens."),
    temperature: float = typer.Option(
        0.0, help="0 takes the most likely token each time; above 0 draws."
    ),
    top_k: int = typer.Option(0, help="Draw from this many of the likeliest tokens; 0 is off."),
    top_p: float = typer.Option(
        0.0, help="Draw from the likeliest tokens that together pass this share; 0 is off."
    ),
    stop: list[str] = typer.Option(
        [], help=r"End before this text; \n means a new line. May be given several times."
    ),
    seed: int = typer.Option(
        None, help="Repeat the same draws; prompt number i (from 0) uses SEED + i."
    ),
    engine: str = typer.Option("auto", help="auto, native, torch, ct2, llama.cpp or openvino."),
    dtype: str = typer.Option(
        None, help="fp32, bf16, fp16; native also int8, int4 and auto (int8).", show_default="fp32"
    ),
    prompt_end: str = typer.Option(r"\n", help="What ends a prompt that is typed in."),
    draft: str = typer.Option(
        None, help="Guess ahead with a smaller model of the suite, or `lookup`; the same text."
    ),
    device: str = typer.Option("auto", help="auto, cpu or cuda."),
    as_json: bool = typer.Option(
        False, "--json", help="JSON lines: prompt, text, tokens, finish_reason, seconds."
    ),
) -> None:
    """Continue prompts with a checkpoint's model; without --prompt and --file, asks for them.

    Examples:

      castalia generate runs/demo --prompt "def main("

      castalia generate runs/demo/step1000 --file prompts.txt --temperature 0.8 --top-p 0.95 --seed 1 --json

      castalia generate runs/demo --samples 4 --temperature 1 --output samples.jsonl
    """
    from castalia.inference import load

    prompts = [""] * samples if samples else gather(prompt, file)
    model = load(checkpoint, engine=engine, dtype=dtype, device=device)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "stop": [unescaped(text) for text in stop],
    }
    if draft is not None and draft != "lookup":
        options["draft"] = load(draft, engine=engine, dtype=dtype, device=device)
    elif draft is not None:
        options["draft"] = draft
    if prompts is None:
        converse(model, options, seed, unescaped(prompt_end), output)
    elif output is not None:
        write_records(model, prompts, options, seed, output)
    elif as_json:
        print_records(model, prompts, options, seed)
    else:
        print_texts(model, prompts, options, seed)


def gather(prompt: list[str], file: str | None) -> list[str] | None:
    """All prompts; from standard input, one a line, if none is given there; None to ask for them on a terminal.

    Raises  ConfigError if there is none.
    """
    from castalia.core.errors import ConfigError
    from castalia.inference.prompts import plain_prompts, read_prompts

    prompts = [*prompt, *(read_prompts(file) if file else [])]
    if prompts:
        return prompts
    if sys.stdin.isatty():
        return None
    prompts = list(plain_prompts(sys.stdin.read().splitlines()))
    if not prompts:
        raise ConfigError("no prompt; give --prompt TEXT, --file FILE, or lines on standard input")
    return prompts


def unescaped(text: str) -> str:
    """A stop string with new lines and tabs in place of backslash-n and backslash-t, which shells pass as they are."""
    for written, meant in ESCAPES.items():
        text = text.replace(written, meant)
    return text


def print_records(
    model: "LanguageModel", prompts: list[str], options: dict[str, Any], seed: int | None
) -> None:
    """One JSON object a line, a batch at a time."""
    for done in completions(model, prompts, options, seed):
        print(json.dumps(asdict(done), ensure_ascii=False), flush=True)


def completions(
    model: "LanguageModel", prompts: list[str], options: dict[str, Any], seed: int | None
) -> Iterator["Completion"]:
    """All texts, a batch at a time; one at a time with a draft."""
    from castalia.inference.language_model import BATCH_ROWS
    from castalia.inference.speculative import speculative_complete

    size = 1 if "draft" in options else BATCH_ROWS
    for start in range(0, len(prompts), size):
        batch, batch_seed = prompts[start : start + size], None if seed is None else seed + start
        if "draft" in options:
            yield speculative_complete(model, batch, seed=batch_seed, **options)[0][0]
        else:
            yield from model.complete(batch, seed=batch_seed, **options)


def write_records(
    model: "LanguageModel",
    prompts: list[str],
    options: dict[str, Any],
    seed: int | None,
    output: str,
) -> None:
    """GPT-NeoX's record of each text, a line each.

    Raises  CastaliaError if the file cannot be written.
    """
    from pathlib import Path

    from castalia.core.files import cannot_write

    try:
        with open(output, "w", encoding="utf-8") as file:
            for done in completions(model, prompts, options, seed):
                file.write(json.dumps(neox_record(done), ensure_ascii=False) + "\n")
                file.flush()
    except OSError as error:
        raise cannot_write(Path(output), error) from error
    print(f"{output}: {len(prompts)} texts", file=sys.stderr)


def neox_record(done: "Completion") -> dict[str, Any]:
    """The fields of GPT-NeoX's generate.py; `finished` says that the model or a stop string ended the text."""
    return {
        "context": done.prompt,
        "text": done.text,
        "length": len(done.tokens),
        "finished": done.finish_reason in ("eod", "stop"),
        "message": "the model's limit ended the text" if done.finish_reason == "context" else None,
        "duration_seconds": done.seconds,
    }


def print_texts(
    model: "LanguageModel", prompts: list[str], options: dict[str, Any], seed: int | None
) -> None:
    """Each text as it arrives; the prompt stands before it on a terminal, or when there are several."""
    show_prompt = sys.stdout.isatty() or len(prompts) > 1
    for i, prompt in enumerate(prompts):
        if i:
            print()
        speak(model, prompt, options, None if seed is None else seed + i, show_prompt=show_prompt)


def converse(
    model: "LanguageModel",
    options: dict[str, Any],
    seed: int | None,
    prompt_end: str,
    output: str | None,
) -> None:
    """Ask for a prompt, continue it, and again, until end of input; `output` gets a record of each."""
    from castalia.core.errors import ConfigError

    print(
        f"Type a prompt and {'Enter' if prompt_end == NEW_LINE else prompt_end!r}; Ctrl-D ends.",
        file=sys.stderr,
    )
    number = 0
    while (prompt := typed(prompt_end)) is not None:
        try:
            done = speak(
                model, prompt, options, None if seed is None else seed + number, show_prompt=False
            )
        except ConfigError as error:
            print(f"castalia: {error}", file=sys.stderr)
        else:
            if output is not None:
                with open(output, "a", encoding="utf-8") as file:
                    file.write(json.dumps(neox_record(done), ensure_ascii=False) + "\n")
        number += 1


def typed(prompt_end: str) -> str | None:
    """What is typed in up to `prompt_end`, which is left out; None at the end of input."""
    text = ""
    while prompt_end not in text:
        try:
            text += input("> " if not text else "… ") + NEW_LINE
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
    """Write one continuation to the screen while it is made, or with a draft when it is there."""
    if show_prompt:
        sys.stdout.write(prompt)
    if "draft" in options:
        (whole,) = completions(model, [prompt], options, seed)
        print(whole.text, flush=True)
        return whole
    stream = model.stream(prompt, seed=seed, **options)
    while True:
        try:
            sys.stdout.write(next(stream))
        except StopIteration as end:
            done: Completion = end.value
            break
        sys.stdout.flush()
    print(flush=True)
    if done.finish_reason == "context":
        limit = model.config.max_position_embeddings
        print(f"castalia: the text ended at the model's limit of {limit} tokens", file=sys.stderr)
    return done
