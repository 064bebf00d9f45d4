"""The calls of hf-hub-ctranslate2: a CTranslate2 model by its name, texts in, texts out.

    model = GeneratorCT2fromHfHub("michaelfeil/ct2fast-pythia-160m")
    model.generate(text=["How do you call a fast Flan-ingo?"], max_length=64)

Same arguments, same texts. What differs: it works on a machine without a GPU, reads
vocabulary.json, is offline when cached, takes our runs and Hugging Face folders too, and reads
prompts in one step where the original forces them through the model token by token.
"""

import json
import os
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Protocol

from castalia.checkpoint.hf import is_hf_folder
from castalia.checkpoint.hub import hub_folder, is_hub_id
from castalia.checkpoint.saved_model import TOKENIZER, open_model
from castalia.core.errors import CheckpointError, ConfigError
from castalia.core.extras import require
from castalia.core.files import cache_folder
from castalia.data.tokenizer import load_tokenizer
from castalia.export.ct2_file import QUANTIZATIONS
from castalia.export.exports import default_place, export, revision
from castalia.inference.exported import RECORD

MODEL = "model.bin"
DEFAULT_MAX_LENGTH = 512
"""CTranslate2's own."""


class TextTokenizer(Protocol):
    """What is needed of a tokenizer: one of transformers, of ours, or any with these two."""

    def encode(self, text: str, **options: Any) -> list[int]:
        """Ids of a text."""

    def decode(self, ids: list[int], **options: Any) -> str:
        """Text of ids."""


class OwnTokenizer:
    """The tokenizer.json of a model folder, with the options of transformers that change a text;
    needs no transformers.

    Raises  DataError if it is no tokenizer.json.
    """

    def __init__(self, folder: Path) -> None:
        self.inner = load_tokenizer(folder)
        self.vocab_size, self.eod_id = self.inner.vocab_size, self.inner.eod_id

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self.inner.inner.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids."""
        text: str = self.inner.inner.decode(ids, skip_special_tokens=skip_special_tokens)
        return text


class CT2fromHfHub:
    """A CTranslate2 engine with a tokenizer.

    Takes   model_name_or_path: a CTranslate2 folder, a hub id (OWNER/NAME[@REVISION]), a run of
            ours or a Hugging Face folder; the last two are exported first, once. device: auto, cpu
            or cuda; compute_type: auto, or one of CTranslate2's. What this machine lacks is
            replaced by what it has, with a warning. tokenizer: None takes the folder's
            tokenizer.json. hub_kwargs go to huggingface_hub.snapshot_download, all other keywords
            to the engine (inter_threads, intra_threads, …).
    Has     model, the engine; tokenizer; folder.
    Raises  ConfigError if ctranslate2 is not installed or there is no tokenizer; CheckpointError
            if there is no model.
    """

    engine = ""

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str],
        device: str = "auto",
        device_index: int | list[int] = 0,
        compute_type: str = "auto",
        tokenizer: TextTokenizer | None = None,
        hub_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        ctranslate2 = require("ctranslate2", "ct2", "running a CTranslate2 model")
        place, numbers = what_there_is(ctranslate2, device, compute_type)
        self.folder = find_model(os.fspath(model_name_or_path), numbers, dict(hub_kwargs or {}))
        if tokenizer is None and not (self.folder / TOKENIZER).is_file():
            raise ConfigError(f"{self.folder} has no {TOKENIZER}; give tokenizer=")
        self.tokenizer: Any = OwnTokenizer(self.folder) if tokenizer is None else tokenizer
        try:
            self.model = getattr(ctranslate2, self.engine)(
                str(self.folder),
                device=place,
                device_index=device_index,
                compute_type=numbers,
                **kwargs,
            )
            self.vocabulary = read_vocabulary(self.folder)
        except (RuntimeError, OSError, ValueError) as error:
            raise CheckpointError(f"cannot load {self.folder} in CTranslate2: {error}") from None
        self.ids = {token: i for i, token in enumerate(self.vocabulary)}

    def tokenize_encode(self, text: Sequence[str], **encode_tok_kwargs: Any) -> list[list[str]]:
        """The tokens of each text, as the engine spells them."""
        return [
            [self.vocabulary[i] for i in self.tokenizer.encode(one, **encode_tok_kwargs)]
            for one in text
        ]

    def decode_tokens(self, tokens: Sequence[str], **decode_tok_kwargs: Any) -> str:
        """The text of tokens."""
        return str(
            self.tokenizer.decode([self.ids[token] for token in tokens], **decode_tok_kwargs)
        )


class GeneratorCT2fromHfHub(CT2fromHfHub):
    """Continues texts: GPT-NeoX, Pythia, and every decoder that CTranslate2 runs."""

    engine = "Generator"

    def generate(
        self,
        text: str | list[str],
        encode_tok_kwargs: Mapping[str, Any] | None = None,
        decode_tok_kwargs: Mapping[str, Any] | None = None,
        **generate_batch_kwargs: Any,
    ) -> str | list[str]:
        """The text and its continuation, for one text or each of a list; greedy, up to 512 tokens
        in all.

        The other keywords are those of ctranslate2.Generator.generate_batch (max_length,
        sampling_topk, sampling_temperature, beam_size, …), with its defaults. An empty text starts
        from the end-of-document token.
        Raises  ConfigError on a keyword or a value that the engine does not take.
        """
        texts = [text] if isinstance(text, str) else list(text)
        prompts = self.tokenize_encode(texts, **(encode_tok_kwargs or {}))
        results = self.run(
            [prompt or self.start() for prompt in prompts], dict(generate_batch_kwargs)
        )
        made = self.tokenize_decode(results, **(decode_tok_kwargs or {}))
        return made[0] if isinstance(text, str) else made

    def tokenize_decode(self, tokens_out: Sequence[Any], **decode_tok_kwargs: Any) -> list[str]:
        """The text of the first hypothesis of each result."""
        return [
            self.decode_tokens(result.sequences[0], **decode_tok_kwargs) for result in tokens_out
        ]

    def start(self) -> list[str]:
        """What an empty text becomes."""
        eod_id = getattr(self.tokenizer, "eod_id", None)
        eod_id = getattr(self.tokenizer, "eos_token_id", None) if eod_id is None else eod_id
        if eod_id is None:
            raise ConfigError(
                "a text is empty and the tokenizer has no end-of-document token to start from"
            )
        return [self.vocabulary[eod_id]]

    def run(self, prompts: list[list[str]], options: dict[str, Any]) -> list[Any]:
        """Results of the engine in the order of the prompts.

        With the prompt in the result the engine reads it token by token; without, at once. So it
        is left out there and put back here, and prompts of one length go together: their share of
        max_length is the same.
        """
        if not options.pop("include_prompt_in_result", True):
            return self.call(prompts, options)
        most, least = options.pop("max_length", DEFAULT_MAX_LENGTH), options.pop("min_length", 0)
        places: dict[int, list[int]] = defaultdict(list)
        for place, prompt in enumerate(prompts):
            places[len(prompt)].append(place)
        done: dict[int, Any] = {}
        for length, group in places.items():
            read = (
                length - 1
            )  # the engine counts the steps, and the first token of the prompt takes none
            limits = {"max_length": most - read, "min_length": max(0, least - read)}
            if limits["max_length"] < 1:
                done |= {place: Continued([prompts[place][: most + 1]]) for place in group}
                continue
            results = self.call([prompts[place] for place in group], options | limits)
            for place, result in zip(group, results, strict=True):
                done[place] = Continued(
                    [prompts[place] + sequence for sequence in result.sequences]
                )
        return [done[place] for place in range(len(prompts))]

    def call(self, prompts: list[list[str]], options: dict[str, Any]) -> list[Any]:
        """One call of the engine, which takes the names of the vocabulary's padding for no
        words."""
        padding = [
            [token] for token in self.vocabulary[tokens_of(self.tokenizer, len(self.vocabulary)) :]
        ]
        options = options | {
            "suppress_sequences": [*(options.get("suppress_sequences") or []), *padding] or None
        }
        return called(
            self.model.generate_batch, prompts, options | {"include_prompt_in_result": False}
        )


class TranslatorCT2fromHfHub(CT2fromHfHub):
    """Encoder-decoder models (T5, M2M-100, …): texts in, their translations out."""

    engine = "Translator"

    def generate(
        self,
        text: str | list[str],
        encode_tok_kwargs: Mapping[str, Any] | None = None,
        decode_tok_kwargs: Mapping[str, Any] | None = None,
        **translate_batch_kwargs: Any,
    ) -> str | list[str]:
        """What the model makes of one text, or each of a list.

        The other keywords are those of ctranslate2.Translator.translate_batch, with its defaults.
        Raises  ConfigError on a keyword or a value that the engine does not take.
        """
        texts = [text] if isinstance(text, str) else list(text)
        tokens = self.tokenize_encode(texts, **(encode_tok_kwargs or {}))
        made = self.tokenize_decode(
            called(self.model.translate_batch, tokens, translate_batch_kwargs),
            **(decode_tok_kwargs or {}),
        )
        return made[0] if isinstance(text, str) else made

    def tokenize_decode(self, tokens_out: Sequence[Any], **decode_tok_kwargs: Any) -> list[str]:
        """The text of the first hypothesis of each result."""
        return [
            self.decode_tokens(result.hypotheses[0], **decode_tok_kwargs) for result in tokens_out
        ]


def tokens_of(tokenizer: object, rows: int) -> int:
    """How many of the vocabulary's rows are tokens: added ones count, which transformers'
    vocab_size leaves out."""
    sized = len(tokenizer) if isinstance(tokenizer, Sized) else 0
    return max(sized, getattr(tokenizer, "vocab_size", rows))


class Continued:
    """Sequences of tokens with their prompts, as the engine's own results carry them."""

    def __init__(self, sequences: list[list[str]]) -> None:
        self.sequences = sequences


def called(engine: Any, tokens: list[list[str]], options: Mapping[str, Any]) -> list[Any]:
    """The engine's results, waited for if it answers later.

    Raises  ConfigError on a keyword or a value that the engine does not take.
    """
    try:
        results = engine(tokens, **options)
    except TypeError as error:
        raise ConfigError(
            f"CTranslate2 does not take these arguments: {str(error).splitlines()[0]}"
        ) from None
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"CTranslate2 refused the call: {error}") from None
    return [result.result() if hasattr(result, "result") else result for result in results]


def what_there_is(ctranslate2: Any, device: str, compute_type: str) -> tuple[str, str]:
    """The device and compute type that are asked for or, with a warning, the nearest that this
    machine has.

    Raises  ConfigError on an unknown name.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"no device {device!r}; have: auto, cpu, cuda")
    if compute_type not in ("auto", "default", *QUANTIZATIONS):
        raise ConfigError(
            f"no compute_type {compute_type!r}; have: auto, default, {', '.join(QUANTIZATIONS)}"
        )
    gpus = ctranslate2.get_cuda_device_count()
    place = ("cuda" if gpus else "cpu") if device == "auto" else device
    if place == "cuda" and not gpus:
        warnings.warn(
            "device='cuda', but CTranslate2 finds no GPU here: the model runs on the CPU",
            stacklevel=3,
        )
        place = "cpu"
    if compute_type in ("auto", "default"):
        return place, "int8" if compute_type == "auto" else compute_type
    if compute_type not in ctranslate2.get_supported_compute_types(place):
        nearest = "int8" if compute_type.startswith("int") else "float32"
        warnings.warn(
            f"compute_type={compute_type!r} does not run on this {place}: {nearest!r} takes its place",
            stacklevel=3,
        )
        return place, nearest
    return place, compute_type


def find_model(name: str, numbers: str, hub_kwargs: dict[str, Any]) -> Path:
    """The CTranslate2 folder that `name` means; of a run or a Hugging Face folder it is made first.

    Raises  CheckpointError if there is none.
    """
    folder = hub_folder(name, **hub_kwargs) if is_hub_id(name) else Path(name)
    if (folder / MODEL).is_file():
        return folder
    source = open_model(folder)  # says what is wrong with a path that is no model
    numbers = "int8" if numbers == "default" else numbers
    if is_hf_folder(folder):
        digest = "-".join(value[:12] for value in source.hashes().values())
        place = cache_folder() / f"{folder.resolve().name}-{digest}"[:120] / f"ct2-{numbers}"
    else:
        place = default_place(source.folder, f"ct2-{numbers}") / revision(source.folder)
    if not (place / RECORD).is_file():
        for _ in export(
            folder if is_hf_folder(folder) else source.folder,
            to="ct2",
            quantization=numbers,
            output=place,
        ):
            pass
    return place


def read_vocabulary(folder: Path) -> list[str]:
    """Token texts in the order of their ids, of any CTranslate2 version.

    Raises  OSError if there is none; ValueError if it is no list.
    """
    for name in ("vocabulary.json", "shared_vocabulary.json", "target_vocabulary.json"):
        if (folder / name).is_file():
            found: list[str] = json.loads((folder / name).read_text(encoding="utf-8"))
            return found
    for name in ("vocabulary.txt", "shared_vocabulary.txt"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8").split("\n")[:-1]
    raise FileNotFoundError("there is no vocabulary.json")
