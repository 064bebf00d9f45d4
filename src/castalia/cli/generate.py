"""`castalia generate`."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from castalia.inference import Completion, LanguageModel

ESCAPES = {r"\n": "\n", r"\t": "\t"}


def generate(
    checkpoint: str = typer.Argument(help="A run, RUN/step1000, a checkpoint's folder, or a Hugging Face folder."),
    prompt: list[str] = typer.Option([], help="Text to continue; may be given several times."),
    file: str = typer.Option(None, help='Prompts, one a line, or {"prompt": …} a line in a .jsonl file.'),
    max_new_tokens: int = typer.Option(64, help="Longest continuation, in tokens."),
    temperature: float = typer.Option(0.0, help="0 takes the most likely token each time; above 0 draws."),
    top_k: int = typer.Option(0, help="Draw from this many of the likeliest tokens; 0 is off."),
    top_p: float = typer.Option(0.0, help="Draw from the likeliest tokens that together pass this share; 0 is off."),
    stop: list[str] = typer.Option([], help=r"End before this text; \n means a new line. May be given several times."),
    seed: int = typer.Option(None, help="Repeat the same draws; prompt number i (from 0) uses SEED + i."),
    dtype: str = typer.Option("fp32", help="fp32, bf16 or fp16."),
    device: str = typer.Option("auto", help="auto, cpu or cuda."),
    as_json: bool = typer.Option(False, "--json", help="JSON lines: prompt, text, tokens, finish_reason, seconds."),
) -> None:
    """Continue prompts with a checkpoint's model; without --prompt and --file, asks for them.

    Examples:

      castalia generate runs/demo --prompt "def main("

      castalia generate runs/demo/step1000 --file prompts.txt --temperature 0.8 --top-p 0.95 --seed 1 --json
    """
    from castalia.inference import load

    prompts = gather(prompt, file)
    model = load(checkpoint, dtype=dtype, device=device)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "stop": [unescaped(text) for text in stop],
    }
    if prompts is None:
        converse(model, options, seed)
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


def print_records(model: "LanguageModel", prompts: list[str], options: dict[str, Any], seed: int | None) -> None:
    """One JSON object a line, a batch at a time."""
    from castalia.inference.language_model import BATCH_ROWS

    for start in range(0, len(prompts), BATCH_ROWS):
        batch_seed = None if seed is None else seed + start
        for done in model.complete(prompts[start : start + BATCH_ROWS], seed=batch_seed, **options):
            print(json.dumps(asdict(done), ensure_ascii=False), flush=True)


def print_texts(model: "LanguageModel", prompts: list[str], options: dict[str, Any], seed: int | None) -> None:
    """Each text as it arrives; the prompt stands before it on a terminal, or when there are several."""
    show_prompt = sys.stdout.isatty() or len(prompts) > 1
    for i, prompt in enumerate(prompts):
        if i:
            print()
        speak(model, prompt, options, None if seed is None else seed + i, show_prompt=show_prompt)


def converse(model: "LanguageModel", options: dict[str, Any], seed: int | None) -> None:
    """Ask for a prompt, continue it, and again, until end of input."""
    from castalia.core.errors import ConfigError

    print("Type a prompt and Enter; Ctrl-D ends.", file=sys.stderr)
    number = 0
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        try:
            speak(model, prompt, options, None if seed is None else seed + number, show_prompt=False)
        except ConfigError as error:
            print(f"castalia: {error}", file=sys.stderr)
        number += 1


def speak(
    model: "LanguageModel", prompt: str, options: dict[str, Any], seed: int | None, *, show_prompt: bool
) -> "Completion":
    """Write one continuation to the screen while it is made."""
    stream = model.stream(prompt, seed=seed, **options)
    if show_prompt:
        sys.stdout.write(prompt)
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
