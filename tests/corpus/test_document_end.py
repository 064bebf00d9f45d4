"""Which token ends a document: the folder's own, a known name, or the one that the user names."""

import json
import pickle
import shutil
from types import SimpleNamespace

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from castalia.core.errors import CheckpointError, ConfigError, DataError
from castalia.corpus import prepare
from castalia.corpus.chat_template import read_chat_template
from castalia.curate.joining import merge
from castalia.data import DataConfig, IndexedDataset, load_tokenizer
from castalia.data.segments import end_of_document
from castalia.data.sidecar import read_record
from castalia.eval import bits
from castalia.recipes import load_config
from castalia.tokenizers.settings import TextEnd, chat_templates, write_chat_templates
from castalia.train.resume import checkpoint_files

WORDS = ["<unk>", "<|endoftext|>", "</s>", "<EOD|LLM-jp>", "<｜end▁of▁sentence｜>", "a", "b"]
ENDS = WORDS[1:5]


@pytest.fixture
def folder(tmp_path):
    """A tokenizer of whole words, with four tokens that may end a text."""
    inner = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens([AddedToken(name, special=True) for name in ENDS])
    (tmp_path / "t").mkdir()
    inner.save(str(tmp_path / "t" / "tokenizer.json"))
    (tmp_path / "c.jsonl").write_text('{"text": "a b"}\n{"text": "b"}\n')
    return tmp_path / "t"


def prepared(folder, name, **options):
    """Ids of the first document, and the record."""
    output = folder.parent / name
    prepare([folder.parent / "c.jsonl"], output, folder, **options)
    return IndexedDataset(output)[0].tolist(), read_record(output)


@pytest.mark.parametrize(
    ("files", "end"),
    [
        ({}, {"id": 1, "token": "<|endoftext|>", "named_by": "known name"}),
        ({"tokenizer_config.json": {"eos_token": "</s>"}}, 2),
        ({"tokenizer_config.json": {"eos_token": {"content": "<EOD|LLM-jp>"}}}, 3),
        ({"tokenizer_config.json": {"eos_token": "<｜end▁of▁sentence｜>"}}, 4),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": "</s>"}}, 2),
        ({"tokenizer_config.json": {"eos_token": None}, "config.json": {"eos_token_id": 3}}, 3),
        ({"generation_config.json": {"eos_token_id": [4, 2]}}, 4),
    ],
)
def test_the_folder_first(folder, files, end):
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    if isinstance(end, int):
        end = {"id": end, "token": WORDS[end], "named_by": list(files)[-1]}
    ids, record = prepared(folder, "o", append_eod=True)
    assert ids == [5, 6, end["id"]]
    assert record["eod"] == end and record["tokenizer"]["eod_id"] == end["id"]
    # Workers get the tokenizer pickled.
    again = pickle.loads(pickle.dumps(load_tokenizer(folder)))
    assert again.eod_id == end["id"]


def test_the_users_token(folder):
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    for name, eod in (("by_name", "<EOD|LLM-jp>"), ("by_id", "3")):
        ids, record = prepared(folder, name, eod=eod)
        assert ids == [5, 6, 3] and record["append_eod"]
        assert record["eod"] == {"id": 3, "token": "<EOD|LLM-jp>", "named_by": "--eod"}
    ids, record = prepared(folder, "none")
    assert ids == [5, 6] and "eod" not in record
    with pytest.raises(
        ConfigError, match=r"--eod: '<eof>' is neither a token of .*tokenizer\.json"
    ):
        prepared(folder, "wrong", eod="<eof>")


def test_a_named_token_that_the_vocabulary_lacks(folder):
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    assert load_tokenizer(folder).end == TextEnd("<end>", "tokenizer_config.json")
    with pytest.raises(ConfigError, match=r"lacks the token '<end>', which tokenizer_config\.json"):
        prepared(folder, "o", append_eod=True)


def test_the_end_is_read_from_the_records(folder, monkeypatch):
    """Not from the tokenizer, whose folder may name another one."""
    prepared(folder, "a", eod="<EOD|LLM-jp>")
    prepared(folder, "b", append_eod=True)
    a, b = (str(folder.parent / name) for name in "ab")
    config = DataConfig(train=[a], tokenizer=str(folder), eod_mask_loss=True)
    assert end_of_document(config, "eod_mask_loss") == 3
    with pytest.raises(DataError, match=r"ends its documents with token 1, .* with 3"):
        end_of_document(DataConfig(train=[a, b], tokenizer=str(folder)), "eod_mask_loss")
    # Held-out text is scored without its end, which stands for no byte.
    monkeypatch.setattr(bits, "sum_of_losses", lambda model, windows: 0.0)
    sizes = {"seq_length": 8, "max_tokens": None, "rows": 1}
    model = SimpleNamespace(config=SimpleNamespace(padded_vocab_size=7))
    scored = bits.source_bits(model, bits.HeldOut(a, [3, 1]), eod_id=1, **sizes)
    assert scored.tokens == 3
    record = merge([a, b], folder.parent / "both")
    assert record["eod"] is None, "one tokenizer, two ends"


def test_a_tokenizer_of_the_hub(folder, monkeypatch):
    """From the cache, by OWNER/NAME[@REVISION]; only the files of a tokenizer are asked for."""
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    cache = folder.parent / "hub"
    home = cache / "models--someone--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "snapshots").mkdir()
    for revision, commit in (("main", "0" * 40), ("step3", "1" * 40)):
        (home / "refs" / revision).write_text(commit)
        shutil.copytree(folder, home / "snapshots" / commit)
    (home / "snapshots" / ("1" * 40) / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    asked = []
    real = hub.snapshot_download

    def download(name, **options):
        asked.append(options["allow_patterns"])
        return real(name, **options)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ends = {}
    for name in ("someone/tiny", "hf://someone/tiny@step3"):
        prepare([folder.parent / "c.jsonl"], folder.parent / name[:2], name, append_eod=True)
        ends[name] = IndexedDataset(folder.parent / name[:2])[0].tolist()
    assert ends == {"someone/tiny": [5, 6, 1], "hf://someone/tiny@step3": [5, 6, 2]}
    assert asked and all("safetensors" not in " ".join(patterns) for patterns in asked)
    with pytest.raises(CheckpointError, match="cannot open someone/else: as a path it does not"):
        load_tokenizer("someone/else")
    del asked[:]
    with pytest.raises(
        DataError, match=r"no such tokenizer file; give the path of a tokenizer\.js"
    ):
        load_tokenizer("folder/tokenizer.json")
    assert not asked, "a mistyped file is no request"


def test_a_checkpoint_keeps_the_end_and_the_chat_template(folder):
    """They stand beside the tokenizer, not in it: a run that starts from a chat model has both."""
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (folder / "chat_template.jinja").write_text("{{ eos_token }}")
    config = load_config(["debug", f"data.tokenizer={folder}"])
    saved = folder.parent / "run" / "checkpoints" / "step-00000003"
    saved.mkdir(parents=True)
    (saved / "COMPLETE").touch()
    for name, text in checkpoint_files(config).items():
        (saved / name).write_text(text)
    assert load_tokenizer(saved).eod_id == load_tokenizer(folder.parent / "run").eod_id == 2
    assert read_chat_template(saved).render([]) == "</s>"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "used"}]
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    templates, _ = chat_templates(folder)
    write_chat_templates(saved, templates)
    assert chat_templates(saved)[0] == {"default": "plain", "tool_use": "used"}
