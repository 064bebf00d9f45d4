"""Task files of the harness with made-up data, for eval.py: seven kinds of tasks, one of them with
examples.

Sizes follow the real tasks: LAMBADA's passages have 75 words, ARC's questions 20 to 25, a page of
Wikitext 2,000 tokens and more, BLiMP's sentences 8 words.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

SYLLABLES = [
    "ba",
    "ke",
    "lo",
    "mi",
    "nu",
    "ra",
    "se",
    "ti",
    "vo",
    "wa",
    "pe",
    "do",
    "fi",
    "gu",
    "ha",
    "ja",
]
JSON = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}
METRIC = {"aggregation": "mean", "higher_is_better": True}
COMMON = (
    *("the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be"),
    *("by", "on", "not", "he", "his", "but", "at", "are", "this", "have", "from", "or", "had"),
    *("an", "they", "which", "one", "you", "were", "all", "her", "she", "there", "would"),
)


class Words:
    """Sentences of words that a tokenizer cuts like English: common ones, and rarer longer ones."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.rare = ["".join(self.random.choices(SYLLABLES, k=2 + i % 3)) for i in range(3000)]

    def text(self, count: int) -> str:
        """Some words; every other one is common."""
        words = []
        for i in range(count):
            words.append(self.random.choice(self.rare if i % 2 else COMMON))
        return " ".join(words)


def last_word(words: Words) -> dict[str, Any]:
    """As LAMBADA."""
    return {"text": words.text(words.random.randint(60, 90))}


def choices(words: Words) -> dict[str, Any]:
    """As ARC."""
    listed = [words.text(words.random.randint(2, 6)) for _ in range(4)]
    return {"question": words.text(words.random.randint(16, 28)), "choices": listed, "gold": 0}


def page(words: Words) -> dict[str, Any]:
    """As Wikitext."""
    return {"page": "\n".join(words.text(80) for _ in range(words.random.randint(10, 25)))}


def minimal_pair(words: Words) -> dict[str, Any]:
    """As BLiMP."""
    start = words.text(6)
    return {"good": f"{start} {words.text(2)}.", "bad": f"{start} {words.text(2)}."}


def stereotype(words: Words) -> dict[str, Any]:
    """As CrowS-Pairs: two sentences that differ in a word."""
    start = words.text(7)
    end = words.text(6)
    return {"more": f"{start} {words.text(1)} {end}", "less": f"{start} {words.text(1)} {end}"}


def pronoun(words: Words) -> dict[str, Any]:
    """As WinoBias."""
    return {"text": f"{words.text(20)}. The word refers to the", "answer": words.text(1)}


def addition(words: Words) -> dict[str, Any]:
    """As arithmetic."""
    a = words.random.randint(10, 99)
    b = words.random.randint(10, 99)
    return {"context": f"Question: What is {a} plus {b}?\nAnswer:", "completion": f" {a + b}"}


CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
    "fewshot_split": "test",
    "metric_list": [{"metric": "acc", **METRIC}, {"metric": "acc_norm", **METRIC}],
}
KINDS: dict[str, tuple[Callable[[Words], dict[str, Any]], float, dict[str, Any]]] = {
    "lambada": (
        last_word,
        1.0,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc", **METRIC},
            ],
        },
    ),
    "choices": (choices, 0.5, CHOICES),
    "choices_5_shots": (choices, 0.25, CHOICES | {"num_fewshot": 5}),
    "pages": (
        page,
        0.05,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [
                {"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
            ],
        },
    ),
    "minimal_pairs": (
        minimal_pair,
        1.0,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "",
            "doc_to_target": 0,
            "doc_to_choice": "{{[good, bad]}}",
            "metric_list": [{"metric": "acc", **METRIC}],
        },
    ),
    "stereotypes": (
        stereotype,
        0.5,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "",
            "doc_to_target": 0,
            "doc_to_choice": "{{[more, less]}}",
            "process_results": "FUNCTION functions.process_results",
            "metric_list": [
                {"metric": "likelihood_diff", **METRIC},
                {"metric": "pct_stereotype", **METRIC},
            ],
        },
    ),
    "pronouns": (
        pronoun,
        0.25,
        {
            "output_type": "generate_until",
            "doc_to_text": "text",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["\n", ".", ","], "max_gen_toks": 16},
            "metric_list": [{"metric": "exact_match", **METRIC}],
        },
    ),
    "arithmetic": (
        addition,
        1.0,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "context",
            "doc_to_target": "completion",
            "metric_list": [{"metric": "acc", **METRIC}],
        },
    ),
}
"""Kind -> how a document is made, documents for each one asked for, config of the task."""
FUNCTIONS = """
def process_results(doc, results):
    more, less = (float(logprob) for logprob, _ in results)
    return {"likelihood_diff": abs(more - less), "pct_stereotype": float(more > less)}
"""


def write_tasks(folder: Path, documents: int, kinds: list[str]) -> list[str]:
    """Write the tasks into a folder; returns their names.

    `documents` is the number of documents of the largest.
    """
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "functions.py").write_text(FUNCTIONS)
    for number, kind in enumerate(kinds):
        make, share, config = KINDS[kind]
        words = Words(number)
        # More than the examples before a question, which are drawn from the same documents.
        count = max(round(documents * share), 8)
        lines = [json.dumps(make(words)) for _ in range(count)]
        (folder / f"{kind}.jsonl").write_text("\n".join(lines) + "\n")
        data = {"dataset_kwargs": {"data_files": {"test": f"{kind}.jsonl"}}}
        text = yaml.safe_dump({"task": kind, **JSON, **data, **config}, sort_keys=False)
        (folder / f"{kind}.yaml").write_text(text.replace("FUNCTION ", "!function "))
    return kinds
