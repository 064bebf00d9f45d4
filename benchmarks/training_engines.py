"""The engines of benchmarks/training.py: each a process that answers a word with one line of JSON.

It imports its library once, and each case that it is sent, a line of JSON, has a process forked
from it. Words to that one: `step` (seconds of one step), `parts` (Castalia: seconds of the parts of
a step), `memory`, `stop`.
"""

import json
import os
import sys
import time
import traceback
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, ClassVar, NoReturn

import torch
from machine import resident_bytes, seconds
from torch import Tensor
from worker import serve

# AdamW as in Pythia (Biderman et al. 2023, arXiv:2304.01373); the values do not affect the speed.
LR = 6e-4
BETAS = (0.9, 0.95)
EPS = 1e-8
DECAY = 0.1


def main(kind: dict[str, Any]) -> None:
    """Import the library of an engine, then answer case after case."""
    engine = ENGINES[kind["engine"]]
    if kind["keeps_memory"]:
        from castalia.core.memory import keep_freed_memory

        # Before the first tensor, which an import may make.
        keep_freed_memory()
    for name in engine.modules:
        import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            answer(kind | json.loads(line))
        _, status = os.waitpid(child, 0)
        if status:
            # The benchmark then sees the end of the answers, and prints the log.
            sys.exit(1)


def answer(case: dict[str, Any]) -> NoReturn:
    """In the process of a case: answer the words until `stop`, and end it."""
    try:
        answer_words(case)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    # Not `sys.exit`: what the parent would do at its end is not this process's to do.
    os._exit(0)


def answer_words(case: dict[str, Any]) -> None:
    """Answer the words of this benchmark with the engine of `case`."""
    words = {
        "ready": lambda engine: [engine.step() for _ in range(case["warmup"])],
        "step": lambda engine: engine.step(),
        "parts": lambda engine: engine.parts(),
        "memory": lambda engine: engine.memory(),
    }
    serve(lambda: ENGINES[case["engine"]](case), words)


OPERATORS = (
    "castalia::causal_attention",
    "castalia::causal_attention_backward",
    "castalia::fused_attention",
    "castalia::fused_attention_backward",
)
"""Names under which the profiler has the attention of Castalia on a CPU."""


TRANSFORMERS = (
    "transformers.models.gpt_neox",
    "transformers.models.llama",
    "castalia.checkpoint.hf",
)
"""What transformers' models are imported from, and what writes their configs."""


class Engine(ABC):
    """Base of both sides: the batch, the clock and the memory."""

    modules: ClassVar[tuple[str, ...]]
    """What its classes come from, imported before memory is read."""
    optimizer: torch.optim.Optimizer

    def __init__(self, case: dict[str, Any]) -> None:
        self.case = case
        self.device = case["device"]
        self.dtype = case["dtype"]
        self.imported = resident_bytes()
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(
            0, case["vocab_size"], (case["rows"], case["seq"] + 1), generator=generator
        )
        self.tokens = rows[:, :-1].to(self.device)
        self.labels = rows[:, 1:].contiguous().to(self.device)

    @abstractmethod
    def loss(self) -> Tensor:
        """Mean loss of the batch."""

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Autocast in bf16, or none in fp32."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bf16")

    def step(self) -> float:
        """Seconds of forward, backward and update."""

        def work() -> None:
            with self.arithmetic():
                loss = self.loss()
            loss.backward()
            del loss
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        return seconds(work, self.device)

    def memory(self) -> dict[str, int]:
        """Bytes: peak resident size, and that after the imports; on a GPU the allocator's peak."""
        if self.device == "cuda":
            return {"peak": torch.cuda.max_memory_allocated(), "imported": 0}
        return {"peak": resident_bytes("VmHWM"), "imported": self.imported}


class Castalia(Engine):
    """The parts of `castalia train`: allocator, Decoder, NextToken, AdamW with decay groups."""

    modules = (
        "castalia.data",
        "castalia.distributed",
        "castalia.losses",
        "castalia.models",
        "castalia.optim.updater",
    )

    def __init__(self, case: dict[str, Any]) -> None:
        from castalia.data import Batch
        from castalia.distributed import initialize
        from castalia.losses import NextToken
        from castalia.models import Decoder
        from castalia.models.families import build_model_config, family_of
        from castalia.models.init import start_weights
        from castalia.optim import AdamWConfig, Rules
        from castalia.optim.updater import Updater
        from castalia.products import use_onednn

        super().__init__(case)
        with torch.device(self.device):
            self.model = Decoder(build_model_config(case["model"], "a benchmark"))
        initialize(self.model, start_weights(self.model.config, 0))
        if case["products"] == "onednn":
            use_onednn(self.model)
        if case["compiled"]:
            for layer in self.model.layers:
                layer.compile()
        config = AdamWConfig(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, clip=None)
        (self.optimizer,) = Updater(
            self.model, Rules(config, family_of(self.model.config).no_decay)
        ).optimizers.values()
        self.next_token = NextToken()
        place = torch.zeros(case["rows"], dtype=torch.int64, device=self.device)
        self.batch = Batch(tokens=self.tokens, labels=self.labels, source=place.int(), index=place)

    def loss(self) -> Tensor:
        """Sum over the targets divided by their number."""
        return self.head(self.model(self.tokens))

    def head(self, hidden_BTC: Tensor) -> Tensor:
        """The loss of the model's output; both gradients of the head are computed here."""
        from castalia.losses import Scored

        scored = Scored(hidden_BTC, self.model, compiled=self.case["compiled"])
        return self.next_token(scored, self.batch).total / self.labels.numel()

    def parts(self, rounds: int = 2) -> dict[str, float]:
        """Seconds of each part of one step, of the fastest of `rounds` steps.

        All are read off the same step, so that they add up to it whatever the machine does: three
        intervals of the clock, and in the two of the blocks the time inside of the operator of
        attention. On a GPU attention stays in the blocks.
        """
        steps = [self.parts_of_step() for _ in range(rounds)]
        return min(steps, key=lambda parts: sum(parts.values()))

    def parts_of_step(self) -> dict[str, float]:
        """The parts of one more step."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as seen:
            began = self.now()
            with self.arithmetic():
                hidden = self.model(self.tokens)
                blocks_done = self.now()
                loss = self.head(hidden)
            head_done = self.now()
            loss.backward()
            del loss, hidden
            backward_done = self.now()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            ended = self.now()
        attention = 0.0
        if self.device == "cpu":
            attention = 1e-6 * sum(
                event.cpu_time_total for event in seen.key_averages() if event.key in OPERATORS
            )
        blocks = (blocks_done - began) + (backward_done - head_done)
        return {
            "head": head_done - blocks_done,
            "attention": attention,
            "rest of the blocks": blocks - attention,
            "optimizer": ended - backward_done,
        }

    def now(self) -> float:
        """The clock, after whatever a GPU still does."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Peer(Engine):
    """Another library's model with fused AdamW over all of its weights."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__(case)
        torch.manual_seed(0)
        self.model = self.build().to(self.device).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
        )

    @abstractmethod
    def build(self) -> Any:
        """The model with fp32 weights."""

    def compiled(self, module: Any) -> Any:
        """The module as a whole, compiled if the case says so."""
        if self.case["compiled"]:
            return torch.compile(module, dynamic=False)
        return module


class Transformers(Peer):
    """transformers' model as users train it: its own loss, compiled as a whole."""

    modules = TRANSFORMERS

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__(case)
        self.forward = self.compiled(self.model)

    def build(self) -> Any:
        """With torch's own attention."""
        return transformers_model(self.case)

    def loss(self) -> Tensor:
        """Its own mean loss, which shifts the labels itself and so has one target per row less."""
        return self.forward(input_ids=self.tokens, labels=self.tokens).loss


class LitGPT(Peer):
    """litgpt's GPT under its chunked cross-entropy, as its `pretrain` has it."""

    modules = ("litgpt.model", "litgpt.utils")

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__(case)
        from litgpt.utils import chunked_cross_entropy

        self.forward = self.compiled(self.model)
        self.cross_entropy = chunked_cross_entropy

    def build(self) -> Any:
        """Its model of the same sizes."""
        from litgpt.config import Config
        from litgpt.model import GPT

        return GPT(Config(**litgpt_values(self.case)))

    def loss(self) -> Tensor:
        """Mean over the targets."""
        return self.cross_entropy(self.forward(self.tokens), self.labels)


class Torchtitan(Peer):
    """torchtitan's chunked loss, in its own code, over transformers' blocks.

    torchtitan has no model of these families. As in its trainer the blocks are compiled, the loss
    of a chunk is compiled apart, and the head runs chunk by chunk.
    """

    modules = (*TRANSFORMERS, "torchtitan.components.loss", "torchtitan.config")

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__(case)
        from torchtitan.components.loss import ChunkedLossWrapper
        from torchtitan.config import CompileConfig

        self.forward = self.compiled(self.model.base_model)
        compiling = CompileConfig(enable=case["compiled"], components=["loss"])
        self.chunked = ChunkedLossWrapper.Config().build(compile_config=compiling)
        self.chunked.set_lm_head(self.model.get_output_embeddings())
        self.count = torch.tensor(float(self.labels.numel()), device=self.device)

    def build(self) -> Any:
        """transformers' model, whose head the loss applies itself."""
        return transformers_model(self.case)

    def loss(self) -> Tensor:
        """Sum over the targets divided by their number."""
        hidden = self.forward(input_ids=self.tokens).last_hidden_state
        # (B, T, C), as the release 0.3.0 cuts them along T.
        loss, _ = self.chunked(hidden, self.labels, self.count)
        return loss


def transformers_model(case: dict[str, Any]) -> Any:
    """transformers' model of the case, random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from castalia.checkpoint.hf import hf_config
    from castalia.models.families import build_model_config

    values = hf_config(build_model_config(case["model"], "a benchmark"), end_ids=(0,))
    values |= {"use_cache": False, "torch_dtype": "float32"}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def litgpt_values(case: dict[str, Any]) -> dict[str, Any]:
    """The case in litgpt's words: Pythia's blocks or LLaMA's."""
    from castalia.models.families import build_model_config

    config: Any = build_model_config(case["model"], "a benchmark")
    llama = config.family == "llama"
    return {
        "block_size": case["seq"],
        "n_layer": config.num_layers,
        "n_embd": config.hidden_size,
        "n_head": config.num_attention_heads,
        "n_query_groups": config.kv_heads,
        "vocab_size": case["vocab_size"],
        "padded_vocab_size": case["padded_vocab_size"],
        "rotary_percentage": 1.0 if llama else 0.25,
        "parallel_residual": not llama,
        "bias": not llama,
        "norm_class_name": "RMSNorm" if llama else "LayerNorm",
        "mlp_class_name": "LLaMAMLP" if llama else "GptNeoxMLP",
        "intermediate_size": config.ffn_size,
    }


ENGINES: dict[str, type[Engine]] = {
    "castalia": Castalia,
    "transformers": Transformers,
    "litgpt": LitGPT,
    "torchtitan": Torchtitan,
}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
