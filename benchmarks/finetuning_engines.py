"""The engines of benchmarks/finetuning.py: each a process that answers a word with a line of JSON.

Words: `step` (seconds, tokens and loss of one step), `memory`, `stop`.
"""

import json
import sys
from typing import Any

import torch
from machine import resident_bytes, seconds
from safetensors.torch import load_file, save_file
from worker import serve

PLACES = {
    "attn.qkv": "attention.query_key_value",
    "attn.out": "attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
"""A layer's linear modules here and in transformers' GPT-NeoX."""


def main(case: dict[str, Any]) -> None:
    """Answer the words of this benchmark with the engine of `case`."""
    words = {
        "ready": lambda engine: "ready",
        "step": lambda engine: engine.step(),
        "memory": lambda engine: {"peak": resident_bytes("VmHWM"), "imported": engine.imported},
    }
    serve(lambda: ENGINES[case["engine"]](case), words)


class Castalia:
    """`castalia train` itself: the Trainer's loader, passes, clipping and update."""

    def __init__(self, case: dict[str, Any]) -> None:
        from castalia.core.memory import keep_freed_memory

        keep_freed_memory()
        import castalia
        from castalia import Trainer

        self.imported = resident_bytes()
        self.trainer = Trainer(castalia.load_config(case["words"]))
        self.batches = self.trainer.training_batches()
        if case["start"] is not None:
            # transformers' side begins with the same matrices.
            parameters = self.trainer.updater.parameters
            matrices = {n: p.detach().clone() for n, p in parameters.items() if "lora_a" in n}
            save_file(matrices, case["start"])

    def step(self) -> dict[str, float]:
        """One step; its tokens are those of the documents, without padding."""
        micro_batches = next(self.batches)
        found: list[Any] = []
        spent = seconds(lambda: found.append(self.trainer.take_step(micro_batches)))
        tokens = sum(int((batch.tokens != 0).sum()) for batch in micro_batches)
        return {"seconds": spent, "tokens": tokens, "loss": found[0].metrics["loss"]}


class Transformers:
    """transformers' model with its own loss, PEFT's LoRA where asked, clipping and fused AdamW."""

    def __init__(self, case: dict[str, Any]) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        self.imported = resident_bytes()
        self.batches = iter(torch.load(case["rows"], weights_only=True))
        self.autocast = case["precision"] == "bf16"
        model = AutoModelForCausalLM.from_pretrained(case["base"], attn_implementation="sdpa")
        model.config.use_cache = False
        if case["start"] is not None:
            targets = [place.split(".")[-1] for place in PLACES.values()]
            config = LoraConfig(
                r=case["rank"], lora_alpha=case["alpha"], target_modules=targets, lora_dropout=0.0
            )
            model = get_peft_model(model, config)
            take_start(model, load_file(case["start"]))
        self.model = model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=case["lr"], betas=(0.9, 0.999), weight_decay=0.0, fused=True
        )

    def step(self) -> dict[str, float]:
        """One step; its tokens are those of the documents, without padding."""
        batch = next(self.batches)
        losses = []

        def work() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                loss = self.model(**batch).loss
            loss.backward()
            losses.append(float(loss))
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        spent = seconds(work)
        tokens = int(batch["attention_mask"].sum())
        return {"seconds": spent, "tokens": tokens, "loss": losses[0]}


def take_start(model: Any, matrices: dict[str, torch.Tensor]) -> None:
    """Give PEFT's A the values that Castalia's have; B is zero on both sides."""
    parameters = dict(model.named_parameters())
    for name, value in matrices.items():
        _, layer, *place, _ = name.split(".")
        theirs = PLACES[".".join(place)]
        key = f"base_model.model.gpt_neox.layers.{layer}.{theirs}.lora_A.default.weight"
        parameters[key].data.copy_(value)


ENGINES: dict[str, Any] = {"castalia": Castalia, "transformers": Transformers}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
