"""The calls of hf-hub-ctranslate2 on a folder, a run, a Hugging Face folder and a local hub."""

import json
import shutil
from pathlib import Path

import pytest
from tests.fixtures.hub_server import HubServer, Repo

from castalia.core.errors import CheckpointError, ConfigError
from castalia.core.hub import hub_folder, is_hub_id
from castalia.export import GeneratorCT2fromHfHub, TranslatorCT2fromHfHub, export
from castalia.inference import load

ctranslate2 = pytest.importorskip("ctranslate2")
transformers = pytest.importorskip("transformers")
pytest.importorskip("huggingface_hub")

TEXTS = ["The naïve café owner", "def twice(", "A second guest, who came in late"]
NAME = "someone/ct2fast-tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CTranslate2 folder of the tiny run."""
    (done,) = export(
        run_folder,
        to="ct2",
        quantization="float32",
        output=tmp_path_factory.mktemp("ct2") / "float32",
    )
    return Path(done.folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> GeneratorCT2fromHfHub:
    """It, loaded."""
    return GeneratorCT2fromHfHub(folder, device="cpu", compute_type="float32", intra_threads=1)


def as_the_original(folder: Path, texts: list[str], **options: object) -> list[str]:
    """As hf-hub-ctranslate2: all texts in one call, the engine's defaults, the prompt forced."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    engine = ctranslate2.Generator(
        str(folder), device="cpu", compute_type="float32", intra_threads=1
    )
    tokens = [tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) for text in texts]
    results = engine.generate_batch(tokens, **options)
    return [
        tokenizer.decode(tokenizer.convert_tokens_to_ids(result.sequences[0])) for result in results
    ]


@pytest.mark.parametrize(
    "options", [{"max_length": 60}, {"max_length": 25}, {"max_length": 40, "beam_size": 3}, {}]
)
def test_texts_are_those_of_the_original(
    model: GeneratorCT2fromHfHub, folder: Path, options: dict
) -> None:
    options = options or {"max_length": 200, "repetition_penalty": 1.2}
    assert model.generate(text=TEXTS, **options) == as_the_original(folder, TEXTS, **options)


def test_one_text_gives_one_text_and_the_prompt_may_be_left_out(
    model: GeneratorCT2fromHfHub,
) -> None:
    whole = model.generate(TEXTS[0], max_length=50)
    assert isinstance(whole, str) and whole.startswith(TEXTS[0])
    rest = model.generate(
        TEXTS[0], max_length=51 - len(TEXTS[0].encode()), include_prompt_in_result=False
    )
    assert TEXTS[0] + rest == whole
    assert model.generate("", max_length=10)


def test_the_example_of_the_model_card(folder: Path) -> None:
    """As the source has it, for a GPU; without one it warns and speaks on the CPU."""
    context = (
        pytest.warns(UserWarning, match="CPU") if not ctranslate2.get_cuda_device_count() else None
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def make() -> GeneratorCT2fromHfHub:
        return GeneratorCT2fromHfHub(
            model_name_or_path=str(folder),
            device="cuda",
            compute_type="int8_float16",
            tokenizer=tokenizer,
        )

    if context:
        with context:
            model = make()
    else:
        model = make()
    questions = ["How do you call a fast Flan-ingo?", "User: How are you doing? Bot:"]
    outputs = model.generate(text=questions)
    assert [
        out[: len(question)] for out, question in zip(outputs, questions, strict=True)
    ] == questions


def test_tokens_there_and_back(model: GeneratorCT2fromHfHub) -> None:
    tokens = model.tokenize_encode(["naïve 🍵"])
    assert len(tokens[0]) == len("naïve 🍵".encode())
    assert model.decode_tokens(tokens[0]) == "naïve 🍵"
    end = model.vocabulary[256]
    assert (
        model.decode_tokens([end]) == "<|endoftext|>"
        and model.decode_tokens([end], skip_special_tokens=True) == ""
    )


def test_asynchronous_calls_are_waited_for(model: GeneratorCT2fromHfHub) -> None:
    assert model.generate(TEXTS, max_length=40, asynchronous=True) == model.generate(
        TEXTS, max_length=40
    )


def test_a_run_is_exported_on_the_way_once(run_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    text = GeneratorCT2fromHfHub(run, device="cpu").generate(TEXTS[0], max_length=50)
    written = run / "exports" / "ct2-int8" / "step220" / "model.bin"
    before = written.stat().st_mtime_ns
    assert GeneratorCT2fromHfHub(run, device="cpu").generate(TEXTS[0], max_length=50) == text
    assert written.stat().st_mtime_ns == before


def test_a_hugging_face_folder_is_exported_to_the_cache(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (done,) = export(run_folder, to="hf", output=tmp_path / "hf")
    text = GeneratorCT2fromHfHub(done.folder, device="cpu", compute_type="float32").generate(
        TEXTS[0], max_length=50
    )
    assert text == TEXTS[0] + load(run_folder).generate(TEXTS[0], 51 - len(TEXTS[0].encode()))
    assert [path.parent.name for path in tmp_path.glob("cache/castalia/*/*/model.bin")] == [
        "ct2-float32"
    ]


@pytest.fixture
def hub(own_hub: HubServer, folder: Path, tmp_path: Path) -> dict[str, str]:
    """The options that lead to a hub which has one repository."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    own_hub.repos[NAME] = Repo(private=False)
    own_hub.repos[NAME].branches["main"].append((COMMIT, files))
    return {"endpoint": own_hub.address, "cache_dir": str(tmp_path / "hub")}


def test_a_hub_id_is_downloaded_and_then_works_offline(
    hub: dict[str, str], model: GeneratorCT2fromHfHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"device": "cpu", "compute_type": "float32"}
    online = GeneratorCT2fromHfHub(NAME, hub_kwargs=hub, **options)
    assert online.generate(TEXTS, max_length=40) == model.generate(TEXTS, max_length=40)
    nowhere = hub | {"endpoint": "http://127.0.0.1:9"}
    offline = GeneratorCT2fromHfHub(NAME, hub_kwargs=nowhere, **options)
    assert offline.folder == online.folder
    assert nowhere == hub | {"endpoint": "http://127.0.0.1:9"}, "the caller's options were changed"


def test_a_hub_id_without_network_or_cache_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match="cannot open someone/else: as a path it does not exist,"
        " and as a model of the Hugging Face hub it is not",
    ):
        hub_folder("someone/else", endpoint="http://127.0.0.1:9", cache_dir=str(tmp_path))


def test_what_a_hub_id_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert is_hub_id("EleutherAI/pythia-70m") and is_hub_id("EleutherAI/pythia-70m@step3000")
    assert not is_hub_id("runs/demoo") and not is_hub_id("/a/b") and not is_hub_id("pythia-70m")
    assert is_hub_id("hf://rnus/first") and is_hub_id("rnus/first"), "no run is here"
    (tmp_path / "runs" / "first" / "checkpoints").mkdir(parents=True)
    assert is_hub_id("hf://rnus/first") and not is_hub_id("rnus/first")
    assert not is_hub_id("rnus/frist") and not is_hub_id("Runs/other"), "runs holds runs"
    assert is_hub_id("EleutherAI/pythia-70m")


def test_wrong_words_are_one_sentence(
    folder: Path, model: GeneratorCT2fromHfHub, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="unknown device 'gpu'; choose one of auto, cpu, cuda"):
        GeneratorCT2fromHfHub(folder, device="gpu")
    with pytest.raises(ConfigError, match="unknown compute_type 'int4'; choose one of auto"):
        GeneratorCT2fromHfHub(folder, compute_type="int4")
    with pytest.raises(ConfigError, match="does not accept these arguments"):
        model.generate("a", beams=3)
    with pytest.raises(ConfigError, match="text 1 is not valid Unicode: character 2 is U\\+D800"):
        model.generate(["a", "ab\ud800"])
    with pytest.raises(CheckpointError, match="no checkpoint"):
        GeneratorCT2fromHfHub(tmp_path / "none", device="cpu")
    bare = tmp_path / "bare"
    unrecorded = shutil.ignore_patterns("export.json")
    shutil.copytree(folder, bare, ignore=unrecorded)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"bare has no tokenizer\.json; give tokenizer="):
        GeneratorCT2fromHfHub(bare, device="cpu")
    shutil.copytree(folder, tmp_path / "cut", ignore=unrecorded)
    data = (tmp_path / "cut" / "model.bin").read_bytes()
    (tmp_path / "cut" / "model.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"cannot load .*cut in CTranslate2"):
        GeneratorCT2fromHfHub(tmp_path / "cut", device="cpu")


def test_a_translator(tmp_path: Path) -> None:
    """A tiny T5 with random weights: the words are those of the engine itself."""
    torch = pytest.importorskip("torch")
    from castalia.tokenizers.tokenizer import load_tokenizer

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(
        vocab_size=257, decoder_start_token_id=256, eos_token_id=256, **sizes
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    load_tokenizer("bytes").save(tmp_path / "t5" / "tokenizer.json")
    settings = {
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "t5" / "tokenizer_config.json").write_text(json.dumps(settings))
    converter = ctranslate2.converters.TransformersConverter(
        str(tmp_path / "t5"), copy_files=["tokenizer.json"]
    )
    converter.convert(str(tmp_path / "out"))
    model = TranslatorCT2fromHfHub(tmp_path / "out", device="cpu", compute_type="float32")
    made = model.generate(text=TEXTS, max_decoding_length=12)
    tokens = model.tokenize_encode(TEXTS)
    results = model.model.translate_batch(tokens, max_decoding_length=12)
    assert made == [model.decode_tokens(result.hypotheses[0]) for result in results]
    assert model.generate(TEXTS[0], max_decoding_length=12) == made[0]
