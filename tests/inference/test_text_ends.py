"""Which tokens end a text: what the model's own files name, through every engine and export."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from castalia.checkpoint import Store
from castalia.config import dump_yaml
from castalia.export import GeneratorCT2fromHfHub, export
from castalia.export.gguf import vocabulary_values
from castalia.inference import LanguageModel, load
from castalia.inference.engines import ENGINES
from castalia.inference.speculative import speculative_complete
from castalia.runs.config import RunConfig
from castalia.tokenizers.forms import CharTokenizer
from castalia.tokenizers.special_ids import SpecialIds
from castalia.tokenizers.tokenizer import Tokenizer, load_tokenizer
from castalia.train.resume import checkpoint_files

PROMPT = "The naïve café"
END_OF_TEXT = 256
END_OF_TURN = 257
"""<|im_end|>, which this model writes where it learnt a w."""
STOPPED = " o"
Files = dict[str, Any]


@pytest.fixture(scope="module")
def talker(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a model that ends its turns, without a file that says so."""
    folder = tmp_path_factory.mktemp("talker") / "hf"
    list(export(run_folder, to="hf", output=folder))
    tensors = load_file(folder / "model.safetensors")
    tensors["embed_out.weight"][END_OF_TURN] = 2 * tensors["embed_out.weight"][ord("w")]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = load_tokenizer("bytes").inner
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
    for name in (*names, "export.json"):
        (folder / name).unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["eos_token_id"], config["bos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder_with(talker: Path, tmp_path: Path) -> Callable[..., Path]:
    """Callable: a copy of the folder with more in its JSON files."""

    def make(name: str = "model", **files: Files) -> Path:
        folder = tmp_path / name
        shutil.copytree(talker, folder)
        for stem, values in files.items():
            path = folder / f"{stem}.json"
            known = json.loads(path.read_text()) if path.is_file() else {}
            path.write_text(json.dumps(known | values))
        return folder

    return make


def said(model: LanguageModel) -> tuple[str, str]:
    """The text behind PROMPT, and why it ended."""
    (done,) = model.complete([PROMPT], 9)
    return done.text, done.finish_reason


@pytest.mark.parametrize(
    "files",
    [
        {"generation_config": {"eos_token_id": END_OF_TURN}},
        {"generation_config": {"eos_token_id": [END_OF_TEXT, END_OF_TURN]}},
        {"config": {"eos_token_id": [END_OF_TURN]}},
        {"config": {"eos_token_id": END_OF_TURN}, "generation_config": {"eos_token_id": None}},
        {"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}},
        {"special_tokens_map": {"eos_token": "<|im_end|>"}},
        # Each file is asked before the next one.
        {
            "generation_config": {"eos_token_id": END_OF_TURN},
            "config": {"eos_token_id": END_OF_TEXT},
        },
        {
            "config": {"eos_token_id": END_OF_TURN},
            "tokenizer_config": {"eos_token": "<|endoftext|>"},
        },
    ],
    ids=lambda files: "-".join(files),
)
def test_a_folder_names_the_ends(folder_with: Callable[..., Path], files: Files) -> None:
    model = load(folder_with(**files))
    assert END_OF_TURN in model.end_ids
    assert said(model) == (STOPPED, "eod")
    assert "".join(model.stream(PROMPT, 9)) == STOPPED


def test_other_files_are_not_asked(folder_with: Callable[..., Path]) -> None:
    files = {"generation_config": {"eos_token_id": END_OF_TEXT, "bos_token_id": 65}}
    model = load(folder_with(**files, config={"eos_token_id": END_OF_TURN, "bos_token_id": 66}))
    assert model.end_ids == (END_OF_TEXT,) and said(model)[0].startswith(" o<|im_end|>")
    assert model.start_id == 65 and model.generate_ids([], 3) == model.generate_ids([65], 3)
    # Without any name, the known ones are left.
    assert load(folder_with("plain")).end_ids == (END_OF_TEXT,)
    with pytest.warns(UserWarning, match="eos_token_id 999 is outside the vocabulary of 258"):
        assert load(folder_with("far", config={"eos_token_id": 999})).end_ids == (END_OF_TEXT,)


def test_the_ends_go_through_exports_and_back(
    folder_with: Callable[..., Path], tmp_path: Path
) -> None:
    ends = {"eos_token_id": [END_OF_TURN, END_OF_TEXT], "bos_token_id": END_OF_TEXT}
    folder = folder_with(generation_config=ends)
    for to in ("hf", "native", "ct2", "gguf"):
        quantization = {"native": "fp32", "ct2": "float32", "gguf": "F32"}.get(to)
        list(export(folder, to=to, output=tmp_path / to, quantization=quantization))
        record = json.loads((tmp_path / to / "export.json").read_text())
        assert (record["end_ids"], record["start_id"]) == (ends["eos_token_id"], END_OF_TEXT)
        if to == "hf" or ENGINES["llama.cpp" if to == "gguf" else to].is_installed():
            model = load(tmp_path / to)
            assert said(model) == (STOPPED, "eod"), to
            assert (model.end_ids, model.start_id) == (tuple(ends["eos_token_id"]), END_OF_TEXT)
    for name in ("config.json", "generation_config.json"):
        assert ends.items() <= json.loads((tmp_path / "hf" / name).read_text()).items()
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert (settings["eos_token"], settings["bos_token"]) == ("<|im_end|>", "<|endoftext|>")
    described = json.loads((tmp_path / "ct2" / "config.json").read_text())
    assert (described["eos_token"], described["bos_token"]) == ("<|im_end|>", "<|endoftext|>")
    if ENGINES["ct2"].is_installed():
        # The first end alone stands in the engine's own config.
        swapped = {"eos_token_id": [END_OF_TEXT, END_OF_TURN]}
        other = folder_with("other", generation_config=swapped)
        list(export(other, to="ct2", output=tmp_path / "hub", quantization="float32"))
        hub = GeneratorCT2fromHfHub(str(tmp_path / "hub"), compute_type="float32")
        assert hub.generate(PROMPT, max_length=40) == PROMPT + STOPPED
    # An export of an earlier version ends at the token of its tokenizer.
    record = json.loads((tmp_path / "native" / "export.json").read_text())
    for key in ("end_ids", "start_id", "files_bytes", "record_sha256"):
        del record[key]
    (tmp_path / "native" / "export.json").write_text(json.dumps(record))
    assert load(tmp_path / "native").end_ids == (END_OF_TURN,)


def test_a_template_finds_its_own_eos_token_in_an_export(
    folder_with: Callable[..., Path], tmp_path: Path
) -> None:
    """The end that comes first in generation_config.json is not what the template writes."""
    ends = [END_OF_TURN, END_OF_TEXT]
    named = {"eos_token": "<|endoftext|>", "pad_token": "<|im_end|>", "chat_template": "hello"}
    folder = folder_with(generation_config={"eos_token_id": ends}, tokenizer_config=named)
    for to in ("hf", "gguf"):
        list(export(folder, to=to, output=tmp_path / to))
        settings = json.loads((tmp_path / to / "tokenizer_config.json").read_text())
        assert (settings["eos_token"], settings["pad_token"]) == ("<|endoftext|>", "<|im_end|>")
    assert load(tmp_path / "hf").end_ids == tuple(ends)
    data = (tmp_path / "gguf" / "model.gguf").read_bytes()
    key = b"tokenizer.chat_template"
    # A string: its kind, 8, its length, and the text.
    assert key + bytes([8, 0, 0, 0, 5]) + bytes(7) + b"hello" in data


def test_llama_cpp_gets_a_role_for_each_end(talker: Path) -> None:
    tokenizer = load_tokenizer(talker / "tokenizer.json")
    special = SpecialIds((END_OF_TURN, END_OF_TEXT), 65)
    values = vocabulary_values(tokenizer, 384, special)
    roles = {role: values[f"tokenizer.ggml.{role}_token_id"][1] for role in ("bos", "eos", "eot")}
    assert roles == {"bos": 65, "eos": END_OF_TURN, "eot": END_OF_TEXT}
    kinds = values["tokenizer.ggml.token_type"][1][1]
    assert [kinds[i] for i in (64, 65, END_OF_TEXT, END_OF_TURN, 300)] == [1, 3, 3, 3, 5]
    # Tokens that were added are found before the text is split, special or not.
    tokenizer.inner.add_tokens(["   "])
    tokenizer = Tokenizer(tokenizer.inner.to_str())
    values = vocabulary_values(tokenizer, 384, SpecialIds((END_OF_TEXT,), END_OF_TEXT))
    kinds = values["tokenizer.ggml.token_type"][1][1]
    assert [kinds[i] for i in (END_OF_TURN, END_OF_TURN + 1)] == [3, 4]
    # A tokenizer of another library has neither merges nor added tokens.
    values = vocabulary_values(CharTokenizer(), 512, SpecialIds((0,), 0))
    assert values["tokenizer.ggml.merges"][1][1] == []


def test_guesses_do_not_pass_an_end(folder_with: Callable[..., Path]) -> None:
    model = load(folder_with(generation_config={"eos_token_id": [END_OF_TURN, END_OF_TEXT]}))
    unaware = load(folder_with("draft", generation_config={"eos_token_id": 65}))
    for draft in ("lookup", unaware):
        ((done, _),) = speculative_complete(model, [PROMPT], 9, draft=draft)
        assert (done.text, done.finish_reason) == (STOPPED, "eod")


def test_a_run_keeps_the_end_of_its_tokenizer(
    folder_with: Callable[..., Path], run_folder: Path, tmp_path: Path
) -> None:
    folder = folder_with(tokenizer_config={"eos_token": "<|im_end|>", "chat_template": "x"})
    source = load(run_folder)
    config = RunConfig(
        model=source.config.model_copy(update={"vocab_size": 258}),
        data={"seq_length": 64, "tokenizer": str(folder)},
    )
    files = checkpoint_files(config)
    assert files["config.yaml"] == dump_yaml(config)
    weights = load(folder, engine="torch").model.state_dict()
    tensors = {f"model.{name}": value for name, value in weights.items()}
    Store(tmp_path / "run" / "checkpoints").save(1, tensors, {"step": 1}, files, asynchronous=False)
    model = load(tmp_path / "run")
    assert model.end_ids == (END_OF_TURN,) and said(model) == (STOPPED, "eod")
    (done,) = export(tmp_path / "run", to="hf")
    assert json.loads((Path(done.folder) / "config.json").read_text())["eos_token_id"] == 257
