"""The calls of hf-hub-ctranslate2: a CTranslate2 model by its name, texts in, texts out.

    model = GeneratorCT2fromHfHub("michaelfeil/ct2fast-pythia-160m")
    model.generate(text=["How do you call a fast Flan-ingo?"], max_length=64)

Arguments and texts are the same. Beyond the original it works without a GPU, reads vocabulary.json,
works offline from the cache, and takes Castalia's runs and Hugging Face folders. Prompts are read
in one step, where the original forces them through the model token by token.
"""

import json
import os
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Protocol

from castalia.checkpoint.hf import is_hf_folder
from castalia.core.errors import CheckpointError, ConfigError
from castalia.core.extras import require
from castalia.core.files import cache_folder
from castalia.core.hub import hub_folder, is_hub_id
from castalia.core.unicode import require_unicode
from castalia.export.ct2_file import QUANTIZATIONS
from castalia.export.exports import export
from castalia.export.places import default_place, revision
from castalia.formats.export_record import RECORD, check_export, read_record
from castalia.formats.saved_model import TOKENIZER, open_model
from castalia.inference.exported import recorded_ids
from castalia.tokenizers.forms import OtherTokenizer
from castalia.tokenizers.special_ids import SpecialIds, read_special_ids
from castalia.tokenizers.tokenizer import load_tokenizer

MODEL = "model.bin"
DEFAULT_MAX_LENGTH = 512
"""CTranslate2's own."""


class TextTokenizer(Protocol):
    """A tokenizer of transformers, of Castalia, or any other with these two methods."""

    def encode(self, text: str, **options: Any) -> list[int]:
        """Ids of a text."""

    def decode(self, ids: list[int], **options: Any) -> str:
        """Text of ids."""


class OwnTokenizer:
    """The tokenizer.json of a model folder, with the options of transformers that change a text.

    Raises  DataError if the file is not a tokenizer.json.
    """

    def __init__(self, folder: Path) -> None:
        self.inner = load_tokenizer(folder)
        self.vocab_size = self.inner.vocab_size
        self.eod_id = self.inner.eod_id

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text."""
        if isinstance(self.inner, OtherTokenizer):  # such a tokenizer adds none
            return self.inner.encode(text)
        ids: list[int] = self.inner.inner.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids."""
        if isinstance(self.inner, OtherTokenizer):
            return self.inner.decode(ids)
        text: str = self.inner.inner.decode(ids, skip_special_tokens=skip_special_tokens)
        return text


class CT2fromHfHub:
    """A CTranslate2 engine with a tokenizer.

    Takes   model_name_or_path: a CTranslate2 folder, a hub id (OWNER/NAME[@REVISION]), a run of
            Castalia or a Hugging Face folder; the last two are exported once.
            device: auto, cpu or cuda. compute_type: auto, or one of CTranslate2's. A device or
            type that this machine lacks is replaced by the nearest, with a warning.
            tokenizer: None takes the folder's tokenizer.json. hub_kwargs go to
            huggingface_hub.snapshot_download. verify: whether the files of an export are compared
            with the hashes in its record. All other keywords go to the engine
            (inter_threads, intra_threads, …).
    Has     model, the engine; tokenizer; folder.
    Raises  ConfigError if ctranslate2 is not installed or no tokenizer is given or found;
            CheckpointError if the model is missing.
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
        verify: bool = True,
        **kwargs: Any,
    ) -> None:
        ctranslate2 = require("ctranslate2", "ct2", "running a CTranslate2 model")
        place, numbers = available(ctranslate2, device, compute_type)
        self.folder = find_model(os.fspath(model_name_or_path), numbers, dict(hub_kwargs or {}))
        if verify:
            check_export(self.folder)
        if tokenizer is None and not (self.folder / TOKENIZER).is_file():
            raise ConfigError(f"{self.folder} has no {TOKENIZER}; give tokenizer=")
        self.tokenizer: Any = tokenizer
        if tokenizer is None:
            self.tokenizer = OwnTokenizer(self.folder)
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
        self.special = special_ids_of(self.folder, len(self.vocabulary))
        """Ids that begin and end a text; empty where only the engine's own config names them."""

    def tokenize_encode(self, text: Sequence[str], **encode_tok_kwargs: Any) -> list[list[str]]:
        """The tokens of each text, as the engine spells them.

        Raises  ConfigError for a text that is not valid Unicode.
        """
        for number, one in enumerate(text):
            require_unicode(one, f"text {number}")
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
        """The text and its continuation, for one text or each of a list.

        By default greedy, up to 512 tokens with the prompt. The other keywords are those of
        ctranslate2.Generator.generate_batch (max_length, sampling_topk, sampling_temperature,
        beam_size, …), with its defaults. An empty text starts from the end-of-document token.
        Raises  ConfigError for a keyword or a value that the engine does not accept.
        """
        if isinstance(text, str):
            texts = [text]
        else:
            texts = list(text)
        prompts = self.tokenize_encode(texts, **(encode_tok_kwargs or {}))
        results = self.run(
            [prompt or self.start() for prompt in prompts], dict(generate_batch_kwargs)
        )
        continued = self.tokenize_decode(results, **(decode_tok_kwargs or {}))
        # A string for a string, a list for a list, as the original returns them.
        if isinstance(text, str):
            return continued[0]
        return continued

    def tokenize_decode(self, tokens_out: Sequence[Any], **decode_tok_kwargs: Any) -> list[str]:
        """The text of the first hypothesis of each result."""
        return [
            self.decode_tokens(result.sequences[0], **decode_tok_kwargs) for result in tokens_out
        ]

    def start(self) -> list[str]:
        """The tokens that stand for an empty text."""
        tokenizer = self.tokenizer
        known = (self.special.start_id, getattr(tokenizer, "eod_id", None))
        candidates = (*known, getattr(tokenizer, "eos_token_id", None))
        start = next((i for i in candidates if i is not None), None)
        if start is None:
            raise ConfigError(
                "a text is empty, and the tokenizer has no end-of-document token to start from"
            )
        return [self.vocabulary[start]]

    def run(self, prompts: list[list[str]], options: dict[str, Any]) -> list[Any]:
        """Results of the engine in the order of the prompts.

        To return the prompt, the engine would read it token by token; it is therefore asked for the
        continuation alone, and the prompt is put before it here. Prompts of one length go
        together, because the limits count the prompt.
        """
        if not options.pop("include_prompt_in_result", True):
            return self.call(prompts, options)
        most = options.pop("max_length", DEFAULT_MAX_LENGTH)
        least = options.pop("min_length", 0)
        places: dict[int, list[int]] = defaultdict(list)
        for place, prompt in enumerate(prompts):
            places[len(prompt)].append(place)
        done: dict[int, Any] = {}
        for length, group in places.items():
            # The engine counts steps, and the first token of the prompt takes none.
            read = length - 1
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
        """One call of the engine, in which the padding of the vocabulary is never chosen."""
        count = tokens_of(self.tokenizer, len(self.vocabulary))
        suppressed = list(options.get("suppress_sequences") or [])
        suppressed += [[token] for token in self.vocabulary[count:]]
        added = {"suppress_sequences": suppressed or None, "include_prompt_in_result": False}
        if self.special.end_ids:
            # All ends: the engine's config holds only the first. A caller's own end_token wins.
            options = {"end_token": list(self.special.end_ids)} | options
        return called(self.model.generate_batch, prompts, options | added)


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
        """The translation of one text, or of each text of a list.

        The other keywords are those of ctranslate2.Translator.translate_batch, with its defaults.
        Raises  ConfigError for a keyword or a value that the engine does not accept.
        """
        if isinstance(text, str):
            texts = [text]
        else:
            texts = list(text)
        tokens = self.tokenize_encode(texts, **(encode_tok_kwargs or {}))
        results = called(self.model.translate_batch, tokens, translate_batch_kwargs)
        translations = self.tokenize_decode(results, **(decode_tok_kwargs or {}))
        if isinstance(text, str):
            return translations[0]
        return translations

    def tokenize_decode(self, tokens_out: Sequence[Any], **decode_tok_kwargs: Any) -> list[str]:
        """The text of the first hypothesis of each result."""
        return [
            self.decode_tokens(result.hypotheses[0], **decode_tok_kwargs) for result in tokens_out
        ]


def special_ids_of(folder: Path, rows: int) -> SpecialIds:
    """The special ids of the record of an export, or of the files of its model."""
    if (folder / RECORD).is_file():
        return recorded_ids(read_record(folder, check=False), None)
    return read_special_ids(folder, None, rows)


def tokens_of(tokenizer: object, rows: int) -> int:
    """Number of tokens in a vocabulary of `rows` rows.

    The length of a tokenizer counts added tokens, which transformers' vocab_size omits.
    """
    sized = 0
    if isinstance(tokenizer, Sized):
        sized = len(tokenizer)
    return max(sized, getattr(tokenizer, "vocab_size", rows))


class Continued:
    """Sequences of tokens with their prompts, in the form of the engine's results."""

    def __init__(self, sequences: list[list[str]]) -> None:
        self.sequences = sequences


def called(engine: Any, tokens: list[list[str]], options: Mapping[str, Any]) -> list[Any]:
    """The engine's results, awaited if it is asynchronous.

    Raises  ConfigError for a keyword or a value that the engine does not accept.
    """
    try:
        results = engine(tokens, **options)
    except TypeError as error:
        raise ConfigError(
            f"CTranslate2 does not accept these arguments: {str(error).splitlines()[0]}"
        ) from None
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"CTranslate2 rejected the call: {error}") from None
    return [result.result() if hasattr(result, "result") else result for result in results]


def available(ctranslate2: Any, device: str, compute_type: str) -> tuple[str, str]:
    """The device and compute type asked for or, with a warning, the nearest of this machine.

    Raises  ConfigError for an unknown name.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"unknown device {device!r}; choose one of auto, cpu, cuda")
    if compute_type not in ("auto", "default", *QUANTIZATIONS):
        raise ConfigError(
            f"unknown compute_type {compute_type!r}; choose one of auto, default,"
            f" {', '.join(QUANTIZATIONS)}"
        )
    gpus = ctranslate2.get_cuda_device_count()
    place = device
    if device == "auto":
        place = "cpu"
        if gpus:
            place = "cuda"
    if place == "cuda" and not gpus:
        warnings.warn(
            "device='cuda', but CTranslate2 finds no GPU here: the model runs on the CPU",
            stacklevel=3,
        )
        place = "cpu"
    if compute_type == "auto":
        return place, "int8"
    if compute_type == "default":
        return place, compute_type
    if compute_type not in ctranslate2.get_supported_compute_types(place):
        nearest = "float32"
        if compute_type.startswith("int"):
            nearest = "int8"
        warnings.warn(
            f"compute_type={compute_type!r} does not run on this {place}; using {nearest!r}",
            stacklevel=3,
        )
        return place, nearest
    return place, compute_type


def find_model(name: str, numbers: str, hub_kwargs: dict[str, Any]) -> Path:
    """The CTranslate2 folder that `name` means; a run or a Hugging Face folder is exported first.

    Raises  CheckpointError if `name` is not a model.
    """
    if is_hub_id(name):
        folder = hub_folder(name, **hub_kwargs)
    else:
        folder = Path(name)
    if (folder / MODEL).is_file():
        return folder
    source = open_model(folder)
    if numbers == "default":
        numbers = "int8"
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
    """Token texts in the order of their ids, from a folder of any CTranslate2 version.

    Raises  OSError if the vocabulary is missing; ValueError if it is not JSON.
    """
    for name in ("vocabulary.json", "shared_vocabulary.json", "target_vocabulary.json"):
        if (folder / name).is_file():
            tokens: list[str] = json.loads((folder / name).read_text(encoding="utf-8"))
            return tokens
    for name in ("vocabulary.txt", "shared_vocabulary.txt"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8").split("\n")[:-1]
    raise FileNotFoundError(f"{folder} has no vocabulary.json")
