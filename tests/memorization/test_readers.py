"""Readers against plain greedy decoding: every engine, every family kind, ties, and the screen."""

import itertools

import numpy as np
import pytest
import torch

from castalia.inference import LanguageModel
from castalia.inference.native_engine import NativeEngine
from castalia.inference.torch_engine import TorchEngine
from castalia.memorization.completion import Wanted, complete, in_parallel
from castalia.memorization.native_reader import NativeReader
from castalia.memorization.reader import NEAR
from castalia.memorization.slots_reader import SlotsReader
from castalia.memorization.torch_reader import TorchReader
from castalia.models import Decoder, build_model_config
from castalia.native.choosing import Chooser
from castalia.native.compiled import library
from castalia.native.weights import packed_weights

PROMPT = 6
WINDOW = 14
SHAPES = {
    # A vocabulary that is screened, with padding, and one norm's output for attention and MLP.
    "screened": {"vocab_size": 5000, "activation": "gelu"},
    "serial": {"family": "llama", "num_kv_heads": 2, "intermediate_size": 48, "vocab_size": 67},
    "post-norm": {"family": "olmo2", "num_kv_heads": 2, "intermediate_size": 48, "vocab_size": 67},
}


def made_model(name: str) -> Decoder:
    """A model of large random weights, whose choices vary from place to place."""
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    config = build_model_config(sizes | {"max_position_embeddings": 64} | SHAPES[name], "test")
    model = Decoder(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    return model.requires_grad_(False)


def native_reader(model: Decoder) -> NativeReader:
    """The reader of the compiled step."""
    if library() is None:
        pytest.skip("no C++ compiler")
    engine = NativeEngine(packed_weights(dict(model.state_dict()), model.config, "fp32", None))
    if engine.compiled is None:
        pytest.skip("the compiled step is not the fastest here")
    return NativeReader(Chooser(engine.compiled, NEAR))


class OnceReader(TorchReader):
    """As for a model whose state cannot be cut back."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        self.rewinds = False


@pytest.mark.parametrize("name", SHAPES)
def test_every_reader_completes_as_greedy_decoding(name):
    model = made_model(name)
    plain = LanguageModel(TorchEngine(model))
    windows = np.random.default_rng(2).integers(0, 67, (20, WINDOW))
    made = plain.generate_ids(windows[:, :PROMPT].tolist(), WINDOW - PROMPT, ignore_eos=True)
    # Rows that agree with it to any place, and rows that are exact.
    for row, known in enumerate([*range(WINDOW - PROMPT + 1)] * 2):
        windows[row, PROMPT : PROMPT + known] = made[row][:known]
    made = plain.generate_ids(windows[:, :PROMPT].tolist(), WINDOW - PROMPT, ignore_eos=True)
    exact = np.all(np.array(made) == windows[:, PROMPT:], axis=1)
    assert 2 <= exact.sum() < 20
    losses = [-float(plain.logprobs(row.tolist())[PROMPT - 1 :].mean()) for row in windows]
    readers = [TorchReader(model), OnceReader(model), SlotsReader(plain.engine)]
    readers.append(native_reader(model))
    for reader, score, loss in itertools.product(readers, (True, False), (True, False)):
        done = complete(reader, windows, Wanted(PROMPT, score, loss))
        assert (done.exact == exact).all(), type(reader)
        known = done.made >= 0
        assert (done.made == made)[known].all() and known.all() == score
        if loss:
            assert done.losses == pytest.approx(losses, rel=1e-4)
    both = in_parallel([native_reader(model), native_reader(model)], windows, Wanted(PROMPT))
    assert (both.made == made).all()


def test_of_equal_logits_the_lowest_id_is_chosen_and_the_tie_is_noted():
    model = made_model("screened")
    windows = np.random.default_rng(3).integers(0, 67, (8, WINDOW))
    first = complete(TorchReader(model), windows, Wanted(PROMPT))
    twin, winner = 4999, int(first.made[0, 0])
    model.unembed.weight[twin] = model.unembed.weight[winner]
    model.unembed.weight[-1] = 50.0  # padding, which nobody chooses
    for reader in (TorchReader(model), native_reader(model)):
        done = complete(reader, windows, Wanted(PROMPT, loss=False))
        assert done.made[0, 0] == winner and done.near[0]
        assert (done.made[~done.near] == first.made[~done.near]).all()


def test_the_screen_chooses_as_all_logits_where_int8_cannot_tell_rows_apart():
    model = made_model("screened")
    # All rows but for a little: far less than a step of their int8 numbers.
    weight = model.unembed.weight
    weight.copy_(weight[:1] + 3e-3 * torch.randn(weight.shape, generator=torch.Generator()))
    weight[7] *= 3  # a row that makes the steps of none but itself larger
    reader = native_reader(model)
    if reader.chooser.screen is None:
        pytest.skip("this processor has no instruction for sums of bytes")
    windows = np.random.default_rng(4).integers(0, 67, (40, WINDOW))
    screened = complete(reader, windows, Wanted(PROMPT, loss=False))
    everywhere = complete(reader, windows, Wanted(PROMPT, loss=True))
    assert (screened.made == everywhere.made).all()
    assert len(np.unique(screened.made)) > 10
