"""The sides of benchmarks/families.py: each a process that answers a word with one line of JSON.

Words: `ready` (loss and gradient norm of the batch), `fp32` and `bf16` (seconds of forward and
backward), `whole fp32` and `whole bf16` (the same of the batch of all families), `memory`,
`decode N` (seconds of each token after a prompt of N tokens), `stop`.
"""

import itertools
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import resident_bytes, seconds
from safetensors.torch import load_file
from torch import Tensor, nn
from worker import serve

WEIGHTS = "castalia.safetensors"
"""The weights under Castalia's names, beside those of transformers."""
IGNORED = -100
HEAD_SIZE = 64
"""Of RWKV, by default."""


def main(case: dict[str, Any]) -> None:
    """Answer the words of this benchmark with the side of `case`."""
    words: dict[str, Callable[[Any], Any]] = {
        "ready": lambda side: side.facts(),
        "fp32": lambda side: side.step(torch.float32),
        "bf16": lambda side: side.step(torch.bfloat16),
        "whole fp32": lambda side: side.whole(torch.float32),
        "whole bf16": lambda side: side.whole(torch.bfloat16),
        "memory": lambda side: side.memory(),
    }
    for length in case["contexts"]:
        words[f"decode {length}"] = lambda side, n=length: side.decode(n, case["new"])
    serve(lambda: SIDES[case["side"]](case), words)


class Side(ABC):
    """Base of all sides: the batch, the clock and the memory."""

    model: nn.Module

    def __init__(self, case: dict[str, Any]) -> None:
        self.case = case
        self.folder = Path(case["folder"])
        self.imported = resident_bytes()
        self.tokens = self.drawn(case["rows"], case["seq"])

    def drawn(self, rows: int, seq: int) -> Tensor:
        """A batch of random tokens, the same on every side."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self.case["vocab_size"], (rows, seq), generator=generator)

    @abstractmethod
    def loss(self) -> Tensor:
        """Mean loss of the batch, in which each row has T - 1 targets."""

    @abstractmethod
    def stamps(self, prompt: list[int], new: int) -> list[float]:
        """Generate `new` tokens greedily; the time at which each was known."""

    def facts(self) -> dict[str, float]:
        """Loss and norm of all gradients, which show that two sides compute the same."""
        loss = self.loss()
        loss.backward()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt()
        self.model.zero_grad(set_to_none=True)
        return {"loss": loss.item(), "gradient_norm": norm.item()}

    def step(self, dtype: torch.dtype) -> float:
        """Seconds of forward and backward; weights and gradients are fp32, `bf16` is autocast."""

        def work() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = self.loss()
            loss.backward()

        spent = seconds(work)
        self.model.zero_grad(set_to_none=True)
        return spent

    def whole(self, dtype: torch.dtype) -> float:
        """As `step`, with the batch of all families from now on."""
        self.tokens = self.drawn(*self.case["whole"])
        return self.step(dtype)

    def memory(self) -> dict[str, int]:
        """Bytes: peak resident size, and that after the imports."""
        return {"peak": resident_bytes("VmHWM"), "imported": self.imported}

    def decode(self, length: int, new: int) -> list[float]:
        """Seconds from each new token to the next, after a prompt of `length` tokens."""
        generator = torch.Generator().manual_seed(length)
        prompt = torch.randint(0, self.case["vocab_size"], (length,), generator=generator).tolist()
        stamps = self.stamps(prompt, new + 1)
        # The first token comes with the prompt, which is not decoding.
        return [after - before for before, after in itertools.pairwise(stamps)]


class Castalia(Side):
    """The parts of `castalia train` and of `castalia generate`: allocator, Decoder, NextToken,
    engine torch."""

    def __init__(self, case: dict[str, Any]) -> None:
        from castalia.core.memory import keep_freed_memory

        keep_freed_memory()
        from castalia.data import Batch
        from castalia.inference import LanguageModel
        from castalia.losses import NextToken, Scored
        from castalia.models import Decoder
        from castalia.models.families import build_model_config

        assert LanguageModel
        super().__init__(case)
        with torch.device("meta"):
            self.model = Decoder(build_model_config(case["model"], "a benchmark"))
        self.model.load_state_dict(load_file(self.folder / WEIGHTS), assign=True)
        for parameter in self.model.parameters():
            # Loaded tensors take no gradients; biases of routers never do.
            parameter.requires_grad_(parameter.requires_grad)
        self.next_token = NextToken()
        self.scored = partial(Scored.by, self.model, compiled=False)
        self.batch_of = Batch

    def loss(self) -> Tensor:
        """Sum over the targets divided by their number."""
        place = torch.zeros(len(self.tokens), dtype=torch.int64)
        # transformers has no target for the last token of a row.
        labels = torch.cat([self.tokens[:, 1:], torch.full_like(self.tokens[:, :1], IGNORED)], 1)
        batch = self.batch_of(tokens=self.tokens, labels=labels, source=place.int(), index=place)
        total = self.next_token(self.scored(batch), batch).total
        return total / batch.targets

    def stamps(self, prompt: list[int], new: int) -> list[float]:
        """As `LanguageModel.complete`, which joins what this takes token by token."""
        from castalia.inference.continuing import decode_texts
        from castalia.inference.decoding import begin
        from castalia.inference.sampling import Sampling
        from castalia.inference.torch_engine import TorchEngine
        from castalia.tokenizers.special_ids import SpecialIds

        text = begin(
            prompt,
            max_new_tokens=new,
            limit=len(prompt) + new,
            special=SpecialIds(),
            decode=lambda ids: "",
        )
        engine = TorchEngine(self.model)
        times = [time.perf_counter() for _ in decode_texts(engine, [text], Sampling())]
        self.model.train()
        assert len(text.tokens) == new
        return times


class Transformers(Side):
    """transformers' model of the same weights, with its own loss and its `generate`."""

    def __init__(self, case: dict[str, Any]) -> None:
        if case["same_allocator"]:
            from castalia.core.memory import keep_freed_memory

            keep_freed_memory()
        import transformers

        # Its lazy parts too, before the memory after the imports is read.
        assert transformers.AutoModelForCausalLM
        super().__init__(case)
        self.model = self.load().train()

    def load(self) -> Any:
        """The model of the folder."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def loss(self) -> Tensor:
        """Its own mean loss, which shifts the labels itself."""
        return self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss

    @torch.inference_mode()
    def stamps(self, prompt: list[int], new: int) -> list[float]:
        """`generate` with its cache, whose stopping criteria are asked after every token."""
        times = []

        def stamp(ids: Tensor, scores: Any, **options: Any) -> Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        from transformers import StoppingCriteriaList

        self.model.eval()
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([stamp]),
            **options,
        )
        self.model.train()
        return times


class Literal(Side):
    """The recurrence of RWKV 6 or 7 token by token, with the same weights; families_literal.py."""

    def __init__(self, case: dict[str, Any]) -> None:
        from families_literal import LiteralRwkv, renamed

        super().__init__(case)
        version = int(case["model"]["family"].removeprefix("rwkv"))
        weights = renamed(load_file(self.folder / WEIGHTS), version)
        self.model = LiteralRwkv(weights, version, HEAD_SIZE)

    def loss(self) -> Tensor:
        """Mean cross-entropy of the T - 1 targets."""
        logits = self.model(self.tokens)[:, :-1]
        labels = self.tokens[:, 1:].flatten()
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels)

    @torch.inference_mode()
    def stamps(self, prompt: list[int], new: int) -> list[float]:
        """The prompt in one pass, then a token at a time."""
        times = []
        states: list[dict[str, Tensor]] = [{} for _ in range(self.model.layers)]
        ids = torch.tensor([prompt])
        for _ in range(new):
            ids = self.model(ids, states)[:, -1:].argmax(-1)
            ids.item()
            times.append(time.perf_counter())
        return times


class Rwkv4(Transformers):
    """transformers' RWKV 4 with drawn weights: another model of the same width and depth."""

    def load(self) -> Any:
        """A model from its config alone."""
        from transformers import RwkvConfig, RwkvForCausalLM

        model = self.case["model"]
        config = RwkvConfig(
            vocab_size=self.case["vocab_size"],
            context_length=model["max_position_embeddings"],
            hidden_size=model["hidden_size"],
            num_hidden_layers=model["num_layers"],
            # It divides the weights by powers of 2 in inference, for fp16 alone.
            rescale_every=0,
        )
        torch.manual_seed(0)
        return RwkvForCausalLM(config)


SIDES: dict[str, Callable[[dict[str, Any]], Side]] = {
    "castalia": Castalia,
    "transformers": Transformers,
    "literal": Literal,
    "transformers rwkv4": Rwkv4,
}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
