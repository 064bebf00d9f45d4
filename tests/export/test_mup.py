"""A run under μP: what it exports computes the same, in Hugging Face's code and in our engines."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import castalia
from castalia.export import export
from castalia.train.hooks import Save

SIZES = (
    *("model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4"),
    *("data.seq_length=32", "train.batch_size=4", "train.steps=2", "optim.lr=1e-2"),
    *("mup.base_width=16", "mup.attention_mult=1.5", "mup.embedding_mult=3", "mup.output_mult=2"),
)


@pytest.mark.parametrize("tied", ["false", "true"])
def test_exports_of_a_run_have_its_logits(tmp_path, tied):
    run = castalia.load_config(
        ["debug", *SIZES, f"model.tie_word_embeddings={tied}", f"output={tmp_path / 'run'}"]
    )
    trainer = castalia.Trainer(run, hooks=[Save()])
    trainer.fit()
    (done,) = export(tmp_path / "run", to="hf", output=tmp_path / "hf")
    assert any("μP" in note for note in done.notes)
    tokens = torch.arange(24)[None] * 7 % 257
    with torch.no_grad():
        ours = trainer.model.head(trainer.model(tokens))[..., :257]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        theirs = model(tokens).logits[..., :257]
    assert (theirs - ours).abs().max() < 1e-5 * ours.abs().max().clamp(min=1)
    texts = [
        castalia.load(tmp_path / place).generate_ids([tokens[0].tolist()], max_new_tokens=6)
        for place in ("run", "hf")
    ]
    assert texts[0] == texts[1]
