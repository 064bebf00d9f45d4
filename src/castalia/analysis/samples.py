"""Samples of a run by checkpoint, and those of several runs side by side."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from castalia.analysis.html import NONE, folded, section
from castalia.analysis.runs import RunFiles

TITLE = "Samples by checkpoint"
ABOUT = "Prompts and seed are the same at each checkpoint."


def samples_sections(runs: Sequence[RunFiles]) -> str:
    """The models' continuation of each prompt, checkpoint by checkpoint, folded; "" without any."""
    with_samples = [(run, read_samples(run)) for run in runs if read_samples(run)]
    if len(with_samples) > 1:
        return side_by_side(with_samples)
    named = len(runs) > 1
    return "".join(samples_section(run, samples, named) for run, samples in with_samples)


def read_samples(run: RunFiles) -> Sequence[Mapping[str, Any]]:
    """[{"step", "prompt", "text"}] of a run.

    Raises  DataError if samples.json is not JSON.
    """
    return run.json("samples", "samples.json") or []


def samples_section(run: RunFiles, samples: Sequence[Mapping[str, Any]], named: bool) -> str:
    """The samples of one run; `named` where the page is about several."""
    prompts: list[str] = []
    for prompt in dict.fromkeys(sample["prompt"] for sample in samples):
        boxes: list[str] = []
        for sample in samples:
            if sample["prompt"] == prompt:
                boxes.append(
                    f'<div class="sample"><span>step {sample["step"]}</span>'
                    f"{continued(prompt, [sample['text']])}</div>"
                )
        prompts.append(folded(summary(prompt), "".join(boxes)))
    title = f"{TITLE} of {run.name}" if named else TITLE
    return section(title, ABOUT, "".join(prompts))


def side_by_side(runs: Sequence[tuple[RunFiles, Sequence[Mapping[str, Any]]]]) -> str:
    """The samples of several runs: a table a prompt, with a row a step and a column a run."""
    # prompt -> step -> place of the run -> texts
    texts: dict[str, dict[int, dict[int, list[str]]]] = defaultdict(lambda: defaultdict(dict))
    for place, (_, samples) in enumerate(runs):
        for sample in samples:
            row = texts[sample["prompt"]][sample["step"]]
            row.setdefault(place, []).append(sample["text"])
    head = "".join(f"<th>{escape(name)}</th>" for name in ["step", *(run.name for run, _ in runs)])
    prompts: list[str] = []
    for prompt, rows in texts.items():
        lines: list[str] = []
        for step in sorted(rows):
            cells = [f"<th>{step:,}</th>"]
            for place in range(len(runs)):
                text = NONE
                if place in rows[step]:
                    text = continued(prompt, rows[step][place])
                cells.append(f"<td>{text}</td>")
            lines.append(f"<tr>{''.join(cells)}</tr>")
        table = (
            f'<div class="wide" tabindex="0"><table class="samples"><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table></div>"
        )
        prompts.append(folded(summary(prompt), table))
    return section(TITLE, ABOUT, "".join(prompts))


def continued(prompt: str, texts: Sequence[str]) -> str:
    """A prompt and its continuations."""
    return "".join(f"<pre><b>{escape(prompt)}</b>{escape(text)}</pre>" for text in texts)


def summary(prompt: str) -> str:
    """The title of a prompt's part."""
    return f"After “{prompt.strip()}”"
