"""A plain PyTorch loop whose three sources are mixed as their losses tell: a model of byte pairs,
in two seconds."""

import torch
import torch.nn.functional as F

from castalia.mixing import Planner, Stats, make_mixer

torch.manual_seed(1)
texts = {
    "digits": b"0123456789" * 500,
    "words": b"the cat sat on the mat. " * 200,
    "noise": torch.randint(256, (5000,)),
}
sources = {
    name: torch.tensor(list(text)).unfold(0, 33, 32) for name, text in texts.items()
}  # (rows, 32 + 1) ids each
model = torch.nn.Embedding(256, 256)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
mixer = make_mixer("odm", sources=list(sources), warmup_steps=10, max_share=0.5)
planner = Planner(mixer, sizes=[len(rows) for rows in sources.values()], rows=16, seed=1)

for step in range(1, 101):
    plan = planner.plan(step).rows()
    batch = torch.stack(
        [sources[mixer.sources[s]][i] for s, i in zip(plan.source, plan.index, strict=True)]
    )
    losses = F.cross_entropy(model(batch[:, :-1]).transpose(1, 2), batch[:, 1:], reduction="none")
    losses.mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    sums = torch.stack(
        [losses.detach().sum(1), torch.full((16,), 32.0)], 1
    )  # summed loss and tokens of each row
    loss_sum, tokens = torch.zeros(3, 2).index_add(0, torch.from_numpy(plan.source), sums).T
    planner.observe(Stats(step, loss_sum, tokens))
print(
    {
        name: round(share, 3)
        for name, share in zip(mixer.sources, mixer.weights().tolist(), strict=True)
    }
)
