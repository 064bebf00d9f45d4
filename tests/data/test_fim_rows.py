"""Documents that are cut in three while a run reads them."""

import itertools
import re

import numpy as np
import pytest

from castalia.core.errors import ConfigError
from castalia.data import DataConfig, IndexedDatasetWriter, StepLoader, build_rows

PRE, MID, SUF, END = 1, 2, 3, 0
SEQ = 64


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """Prefix of 200 documents of letters, each with an end."""
    path = tmp_path_factory.mktemp("letters") / "text"
    draw = np.random.default_rng(0)
    with IndexedDatasetWriter(path, np.uint16) as writer:
        for _ in range(200):
            writer.add([*draw.integers(97, 123, draw.integers(5, 60)).tolist(), END])
    return str(path)


def rows_of(prefix, **options):
    options = {"fim_tokens": [str(PRE), str(MID), str(SUF)], "tokenizer": "bytes"} | options
    config = DataConfig(seq_length=SEQ, train=[prefix], **options)
    sizes = {"batch_size": 4, "steps": 12, "eval_every": None, "eval_batches": 1}
    return build_rows(config, seed=7, **sizes)


def restored(served, plain):
    """Where each document of a row was changed, that it is the same text but for the end of its
    suffix; the kinds of changes."""
    kinds = []
    begin = 0
    for stop in [*(np.flatnonzero(plain == END) + 1).tolist(), len(plain)]:
        before = bytes(plain[begin:stop].tolist())
        now = bytes(served[begin:stop].tolist())
        begin = stop
        psm = re.fullmatch(b"\x01([^\x03]*)\x03([^\x02]*)\x02([^\x00]*)(\x00?)", now)
        if now == before:
            kinds.append("same")
        elif now.startswith(b"\x01\x03"):
            spm = re.fullmatch(b"\x01\x03([^\x02]*)\x02([^\x00]*)(\x00?)", now)
            # Prefix and middle follow each other, then comes the suffix without three tokens.
            assert before.startswith(spm[2] + spm[1])
            assert len(before) - len(spm[2] + spm[1]) == 3 + len(spm[3])
            kinds.append("spm")
        else:
            assert before.startswith(psm[1] + psm[3] + psm[2])
            kinds.append("psm")
    return kinds


def test_rows_keep_their_length_and_their_documents(prefix):
    plain = rows_of(prefix).train
    turned = rows_of(prefix, fim_rate=0.6)
    kinds = []
    for place in range(40):
        kinds += restored(turned.train[place][0], plain[place][0])
        assert turned.train.documents_of(place) == plain.documents_of(place)
    # Documents of fewer than four tokens, or whose suffix is too short to pay, stay as they are.
    assert 0.25 < 1 - kinds.count("same") / len(kinds) < 0.6
    assert kinds.count("psm") > 15 and kinds.count("spm") > 15
    whole = rows_of(prefix, fim_rate=1).train
    pairs = [(whole[place][0], plain[place][0]) for place in range(9)]
    kinds = [kind for served, before in pairs for kind in restored(served, before)]
    assert kinds.count("same") < len(kinds) / 2
    assert turned.fingerprint["order"]["fim"] == [0.6, 0.5, PRE, MID, SUF]
    assert "fim" not in rows_of(prefix).fingerprint["order"]


@pytest.mark.parametrize("mask", [None, "documents", "eod"])
def test_batches_hold_the_rows_on_any_ranks_and_workers(prefix, mask):
    options = {} if mask is None else {"document_mask": mask}
    rows = rows_of(prefix, fim_rate=0.5, **options)
    steps = []
    for choice in ({}, {"workers": 1}, {"dp_rank": 0, "dp_world": 2, "micro_batch_size": 1}):
        if mask is not None and "workers" in choice:
            continue
        loader = iter(StepLoader(rows.train, batch_size=4, mask=rows.mask, **choice))
        steps.append([batch for step in itertools.islice(loader, 3) for batch in step])
        loader.close()
    for batch in itertools.chain(*steps):
        for place, tokens in zip(batch.index.tolist(), batch.tokens.tolist(), strict=True):
            assert tokens == rows.train[place][0][:-1].tolist()
    # The next pass over the same document cuts it elsewhere.
    again = rows_of(prefix, fim_rate=0.5, **options).train
    assert (again[3][0] == rows.train[3][0]).all()


def test_what_does_not_go_together(prefix, tmp_path):
    for options, message in (
        ({"fim_tokens": None}, "bytes.* has no tokens for fill-in-the-middle.*data.fim_tokens"),
        ({"fim_tokens": ["<a>", "2", "3"]}, "data.fim_tokens: '<a>' is neither a token"),
        ({"tokenizer": None}, "needs data.tokenizer"),
    ):
        with pytest.raises(ConfigError, match=message):
            rows_of(prefix, fim_rate=0.5, **options)
    with pytest.raises(ValueError, match="labels of tokens, conversations and pairs"):
        DataConfig(train=[prefix], labels=[prefix], fim_rate=0.5)
