"""Three sources mixed under transformers' Trainer as their losses tell: one object is its data,
loss and callback."""

from collections import deque
from itertools import count

import torch
import torch.nn.functional as F
from torch.utils.data import IterableDataset
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from castalia.mixing import Planner, Stats, make_mixer


class Mixed(IterableDataset, TrainerCallback):
    def __init__(self, planner, rows):
        self.planner, self.rows, self.drawn = planner, rows, deque()

    def __iter__(self):
        for plan in (self.planner.plan(step).rows() for step in count(1)):
            self.drawn.append(torch.from_numpy(plan.source))
            for source, index in zip(plan.source, plan.index, strict=True):
                yield {"input_ids": self.rows[source][index], "labels": self.rows[source][index]}

    def loss(self, outputs, labels, num_items_in_batch=None):
        losses = F.cross_entropy(
            outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
        )
        sums = torch.stack([losses.detach().sum(1), torch.full((len(labels),), 32.0)], 1)
        self.sums = torch.zeros(len(self.rows), 2).index_add(0, self.drawn.popleft(), sums).T
        return losses.mean()

    def on_step_end(self, args, state, control, **kwargs):
        self.planner.observe(Stats(state.global_step, *self.sums))


torch.manual_seed(1)
texts = {
    "digits": b"0123456789" * 500,
    "words": b"the cat sat on the mat. " * 200,
    "noise": torch.randint(256, (5000,)),
}
rows = [
    torch.tensor(list(text)).unfold(0, 33, 32) for text in texts.values()
]  # (rows, 32 + 1) ids each
mixer = make_mixer("odm", sources=list(texts), warmup_steps=5, max_share=0.5)
mixed = Mixed(
    Planner(mixer, sizes=[len(one) for one in rows], rows=16, seed=1, lag=1), rows
)  # it reads one step ahead
model = GPTNeoXForCausalLM(
    GPTNeoXConfig(
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
)
arguments = TrainingArguments(
    "trained",
    max_steps=60,
    per_device_train_batch_size=16,
    learning_rate=0.01,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
    logging_strategy="no",
)
Trainer(
    model, arguments, train_dataset=mixed, callbacks=[mixed], compute_loss_func=mixed.loss
).train()
print({name: round(share, 3) for name, share in zip(texts, mixer.weights().tolist(), strict=True)})
