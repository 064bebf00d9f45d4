"""The sides of analysis_memorize.py, each in a process of its own.

The argument is a case as JSON: side (ours or reference), model (a step of a run, or its Hugging
Face folder), rows (.npy of windows), prompt, threads, batches (of the reference).
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from worker import serve


class Ours:
    """castalia memorize on windows of rows."""

    def __init__(self, case: dict[str, Any]) -> None:
        import torch

        from castalia.memorization.engines import load_readers

        torch.set_num_threads(case["threads"])
        self.rows = np.load(case["rows"])
        self.prompt = case["prompt"]
        self.readers = load_readers(case["model"], "auto", None, "cpu")
        self.done = self.complete(score=True, loss=True)

    def complete(self, score: bool, loss: bool) -> Any:
        """The completions of all rows."""
        from castalia.memorization.completion import Wanted, in_parallel

        return in_parallel(self.readers.readers, self.rows, Wanted(self.prompt, score, loss))

    def seconds(self, score: bool, loss: bool) -> float:
        """Of a pass over all rows."""
        start = time.perf_counter()
        self.done = self.complete(score, loss)
        return time.perf_counter() - start

    def answers(self) -> dict[str, Any]:
        """Tokens and near ties of a pass with scores."""
        done = self.complete(score=True, loss=False)
        return {"made": done.made.tolist(), "near": done.near.tolist()}


class Reference:
    """transformers' generate with a cache, at its fastest batch size."""

    def __init__(self, case: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(case["threads"])
        self.rows = torch.from_numpy(np.load(case["rows"]))
        self.prompt = case["prompt"]
        self.model = AutoModelForCausalLM.from_pretrained(
            case["model"], dtype=getattr(torch, case["dtype"])
        ).eval()
        # As Pythia's scoring: a token that ends a text is a token like any other.
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.batch = max(case["batches"])
        self.generate(self.rows[: min(case["batches"])])
        taken = {}
        for self.batch in case["batches"]:
            part = self.rows[: max(self.batch, min(len(self.rows), 128))]
            start = time.perf_counter()
            self.generate(part)
            taken[self.batch] = (time.perf_counter() - start) / len(part)
        self.batch = min(taken, key=taken.__getitem__)

    def generate(self, rows: Any) -> Any:
        """The continuations of rows."""
        import torch

        count = rows.shape[1] - self.prompt
        made = []
        with torch.inference_mode():
            for part in rows.split(self.batch):
                prompts = part[:, : self.prompt]
                made.append(
                    self.model.generate(
                        prompts,
                        attention_mask=torch.ones_like(prompts),
                        max_new_tokens=count,
                        min_new_tokens=count,
                        do_sample=False,
                    )[:, self.prompt :]
                )
        return torch.cat(made)

    def seconds(self) -> float:
        """Of a pass over all rows."""
        start = time.perf_counter()
        self.generate(self.rows)
        return time.perf_counter() - start

    def answers(self) -> dict[str, Any]:
        """The tokens of a pass."""
        return {"made": self.generate(self.rows).tolist(), "batch": self.batch}


WORDS: dict[str, Any] = {
    "ours": {
        "ready": lambda side: side.readers.arithmetic,
        "scores": lambda side: side.seconds(True, False),
        "scores and loss": lambda side: side.seconds(True, True),
        "exact": lambda side: side.seconds(False, False),
        "exact and loss": lambda side: side.seconds(False, True),
        "answers": Ours.answers,
    },
    "reference": {
        "ready": lambda side: side.batch,
        "scores": Reference.seconds,
        "answers": Reference.answers,
    },
}


def main() -> None:
    """Serve one side."""
    case = json.loads(sys.argv[1])
    build = Ours if case["side"] == "ours" else Reference
    serve(lambda: build(case), WORDS[case["side"]])


if __name__ == "__main__":
    main()
