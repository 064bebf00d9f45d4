"""`export`: checkpoints to folders of other formats, each whole or absent, with card and record."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Unpack

from safetensors import SafetensorError

from castalia.checkpoint.hf import write_hf_tokenizer
from castalia.checkpoint.hf.shards import MAX_SHARD_SIZE
from castalia.core.errors import CheckpointError, ConfigError
from castalia.core.files import cannot_write, files_in, write_json
from castalia.core.hub import hub_folder, is_hub_id
from castalia.core.secrets import redacted
from castalia.core.whole_folder import clear_workshops, whole_folder
from castalia.export.activation import expressed, other_activation
from castalia.export.card import write_card
from castalia.export.certificate import (
    Certificate,
    End,
    certify,
    require_close,
    torch_reader,
    write_certificate,
)
from castalia.export.format import EXPORTS, ParallelFormat, ShardedFormat
from castalia.export.formats import padding_id
from castalia.export.options import ExportOptions, ExportSpec, checked_spec
from castalia.export.places import (
    Destination,
    destinations,
    require_replaceable,
)
from castalia.export.push import Hub, Push
from castalia.export.quality import HeldOutText, Quality, held_out, measure
from castalia.export.record import Exported, hashes_of, same_export, write_record
from castalia.formats.remote import is_remote, local_alone
from castalia.formats.saved_model import TOKENIZER, SavedModel, open_model
from castalia.inference.exported import ExportFolder
from castalia.inference.torch_engine import TorchEngine
from castalia.models.model_config import ModelConfig
from castalia.tokenizers.forms import OtherTokenizer, SentencePieceTokenizer
from castalia.tokenizers.settings import (
    TOKEN_MAP,
    chat_templates,
    special_tokens,
    write_chat_templates,
)
from castalia.tokenizers.tokenizer import Tokenizer

PIECES = "tokenizer.model"
"""The file that SentencePiece tokenizers are distributed as."""


@dataclass(frozen=True)
class Conversion:
    """One checkpoint on its way into a folder."""

    place: Destination
    spec: ExportSpec
    trained: SavedModel
    """The checkpoint."""
    source: SavedModel
    """It as the export computes it, for instance with another form of GELU."""
    changes: list[str]
    """What that changes, in sentences."""

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the files of the source; computed once, since they may be large."""
        return self.source.hashes()

    @property
    def name(self) -> str:
        """Name of the folder that is written."""
        return self.place.folder.resolve().name

    def written(self, folder: Path) -> ExportFolder:
        """What is written in `folder`, for an engine."""
        source = self.source
        return ExportFolder(
            folder,
            self.spec.kind.name,
            self.spec.numbers,
            source.config,
            source.tokenizer,
            source.step,
            source.special,
        )


def export(
    checkpoint: str | Path,
    *,
    to: str = "hf",
    output: str | Path | None = None,
    steps: Sequence[int] | Literal["all"] | None = None,
    force: bool = False,
    push: Push | None = None,
    **options: Unpack[ExportOptions],
) -> Iterator[Exported]:
    """Export one checkpoint, or several steps of its run; each is yielded when its folder is whole.

    One checkpoint goes to `output` itself, several to output/step1000 and so on. Without output
    they go to RUN/exports/hf/step1000 or RUN/exports/ct2-int8/step1000. All options are checked
    before the first one is written.
    Options  to: a name in EXPORTS, whose class lists the values of dtype (hf) and quantization
             (the others). steps: steps of the run, or "all". force replaces earlier exports, here
             and on the hub. push:
             a repository of the Hugging Face hub that each export is uploaded to; an export that is
             there already, from the same checkpoint with the same options, is then uploaded as it
             is. options: see `ExportOptions`.
    Raises   ConfigError for wrong options, a model that the format or its engine cannot express,
             an output that exists, or a KL beyond max_kl; CheckpointError; CastaliaError if the
             folder cannot be written, a logit differs by more than max_difference, or the upload
             fails.

    Examples
        >>> import castalia
        >>> run = castalia.train("debug", steps=4, output="runs/exported")
        >>> from castalia.export import export
        >>> (done,) = export(run.config.output, to="hf", dtype="bf16", output="exports/bf16")
        >>> done.certificate["largest_difference"] < 0.1
        True
    """
    spec = checked_spec(to, options)
    hub = None
    if push is not None:
        hub = Hub.open(replace(push, force=push.force or force))
    if is_hub_id(checkpoint):
        checkpoint = hub_folder(str(checkpoint))
    elif is_remote(checkpoint):
        if output is None:
            shown = redacted(str(checkpoint))
            raise ConfigError(f"{shown} is a URL; give --output for its export")
        checkpoint = local_alone(str(checkpoint), steps)
    name = to
    if spec.kind.option != "dtype":
        name = f"{to}-{spec.numbers}"
    places = destinations(checkpoint, output, name, steps)
    if hub is not None:
        hub.require_one_revision(len(places))
    earlier: dict[Path, Exported | None] = {}
    for place in places:
        clear_workshops(place.folder.resolve().parent)
        if hub is not None and not force:
            earlier[place.folder] = same_export(place.checkpoint, place.folder, spec)
        if earlier.get(place.folder) is None:
            require_replaceable(place.folder, force)
    return exported(places, spec, hub, earlier)


def exported(
    places: Sequence[Destination],
    spec: ExportSpec,
    hub: Hub | None,
    earlier: Mapping[Path, Exported | None],
) -> Iterator[Exported]:
    """Write and upload each export; those that are there already are only uploaded."""
    for place in places:
        done = earlier.get(place.folder) or write_export(place, spec)
        if hub is not None:
            # Several exports are folders step1000 and so on, the names of Pythia's revisions.
            step = None
            if len(places) > 1:
                step = place.folder.name
            done = replace(done, pushed=hub.upload(done, step))
        yield done


def write_export(place: Destination, spec: ExportSpec) -> Exported:
    """Write one folder beside its place, then let it take the name."""
    start = time.perf_counter()
    trained = open_model(place.checkpoint)
    source, changes = expressed(trained, spec.kind, spec.activation)
    work = Conversion(place, spec, trained, source, changes)
    require_expressible(work.source, spec)
    text = text_to_measure(work.source, spec)
    try:
        with whole_folder(place.folder.resolve()) as folder:  # resolved: the name of `.`
            return fill(folder, work, text, start)
    except OSError as error:
        raise cannot_write(place.folder, error) from error
    except SafetensorError as error:
        raise CheckpointError(
            f"cannot write {place.folder}: {error}; free space or choose another place"
        ) from error


def fill(folder: Path, work: Conversion, text: HeldOutText | None, start: float) -> Exported:
    """Write all files of an export into `folder`, which is empty: model, certificate, card, record.

    Takes   start: the time.perf_counter() at which the export began.
    Raises  ConfigError or CastaliaError if the export exceeds a bound.
    """
    spec = work.spec
    notes = work.changes + write_files(folder, work.source, spec)
    digests = hashes_of(folder)
    # The export is measured as written: the bounds are checked on the files that users would get.
    quality = examine(work.written(folder), work.trained, spec, text)
    if quality is not None and spec.max_kl is not None and quality.kl > spec.max_kl:
        raise ConfigError(
            f"{work.place.folder} was not written: its {quality.line()}; max_kl is {spec.max_kl:g}"
        )
    certificate = certified(folder, work, digests)
    if certificate is not None:
        require_close(certificate, spec.max_difference, work.place.folder)
    write_card(
        folder,
        work.source,
        name=work.name,
        kind=spec.kind,
        numbers=spec.numbers,
        notes=notes,
        hashes=work.hashes,
        quality=quality,
        certificate=certificate,
    )
    done = Exported(
        folder=str(work.place.folder),
        to=spec.kind.name,
        numbers=spec.numbers,
        checkpoint=str(work.place.checkpoint),
        step=work.source.step,
        bytes=sum(file.stat().st_size for file in files_in(folder)),
        seconds=round(time.perf_counter() - start, 3),
        notes=notes,
        quality=None if quality is None else quality.as_dict(),
        certificate=None if certificate is None else certificate.as_dict(),
    )
    write_record(folder, work.source, done, sizes=spec.sizes(), hashes=work.hashes, digests=digests)
    return done


def require_expressible(source: SavedModel, spec: ExportSpec) -> None:
    """Raises  ConfigError if the format cannot hold the model; no weight has been read yet."""
    if source.prompt is not None:
        raise ConfigError(
            f"{source.folder} is a soft prompt, which cannot become weights of its base; serve it"
            " with Castalia's torch engine, or train adapter.kind=lora for an export"
        )
    if reason := spec.kind.refuses(source.config, spec.numbers):
        hint = other_activation(source, spec.kind, spec.numbers)
        if not hint and "choose" not in reason:
            hint = other_formats(source.config)
        raise ConfigError(reason + hint)
    if source.tokenizer is None and spec.kind.needs_tokenizer:
        raise ConfigError(
            f"{source.folder} has no {TOKENIZER}; a {spec.kind.name} model finds tokens by text"
        )


def other_formats(config: ModelConfig) -> str:
    """What does hold a model that a format refuses: the other formats, or else the run itself."""
    # `peft` holds an adapter alone, never the model.
    kinds = {name: EXPORTS[name] for name in EXPORTS if name != "peft"}
    able = [name for name, kind in kinds.items() if kind.refuses(config, kind.default) is None]
    if able:
        return f"; --to {' or '.join(able)} takes this model"
    return "; no format takes this model, engine=torch generates and serves it from its run"


def text_to_measure(source: SavedModel, spec: ExportSpec) -> HeldOutText | None:
    """The held-out text of an export that an engine of Castalia can run.

    Raises  ConfigError if max_kl is given and there is no text.
    """
    text = None
    if spec.kind.engine() is not None:
        limit = spec.kind.longest(source.config)
        text = held_out(spec.heldout, source.folder, source.tokenizer, limit)
    if spec.max_kl is not None and text is None:
        raise ConfigError(
            f"max_kl needs held-out text, and {source.folder} names none; give heldout"
        )
    return text


def write_files(folder: Path, source: SavedModel, spec: ExportSpec) -> list[str]:
    """Model and tokenizer files of one export; returns the notes for its card."""
    notes = [*source.notes, *spec.kind.notes(source)]
    if issubclass(spec.kind, ShardedFormat):
        size = spec.max_shard_size or MAX_SHARD_SIZE
        spec.kind.write_shards(folder, source, spec.numbers, size)
    elif issubclass(spec.kind, ParallelFormat):
        spec.kind.write_ranks(folder, source, spec.numbers, spec.shape())
    else:
        spec.kind.write(folder, source, spec.numbers)
    tokenizer = source.tokenizer
    if tokenizer is None:
        return [*notes, f"the checkpoint has no {TOKENIZER}, so neither has the export"]
    tokenizer.save(folder / TOKENIZER)
    tokens = named_tokens(source, tokenizer)
    if spec.kind.library == "transformers" and isinstance(tokenizer, OtherTokenizer):
        notes = [*notes, write_own_form(folder, tokenizer, tokens)]
    else:
        limit = source.config.max_position_embeddings
        write_hf_tokenizer(folder, tokens=tokens, max_length=limit)
    templates, _ = chat_templates(source.folder)
    write_chat_templates(folder, templates)
    return notes


def write_own_form(folder: Path, tokenizer: OtherTokenizer, tokens: Mapping[str, str]) -> str:
    """The files beside a tokenizer that the tokenizers library lacks; returns the note about it.

    No tokenizer_config.json, which would promise transformers a tokenizer that it cannot load.
    """
    write_json(folder / TOKEN_MAP, dict(tokens))
    note = (
        f"the tokenizer is of the kind {tokenizer.kind}, and Castalia alone reads its {TOKENIZER}:"
        " AutoTokenizer of transformers cannot load it; give the model token ids"
    )
    if isinstance(tokenizer, SentencePieceTokenizer):
        (folder / PIECES).write_bytes(tokenizer.model)
        note += f" of the sentencepiece library, which reads {PIECES}"
    return note


def named_tokens(source: SavedModel, tokenizer: Tokenizer) -> dict[str, str]:
    """Role and text of the special tokens: those that the model's folder names, else the ends.

    A chat template writes them, so `eos_token` stays what it was even if another end comes first.
    """
    names = tokenizer.tokens()
    special = source.special
    tokens: dict[str, str] = {}
    if special.start_id is not None:
        tokens["bos_token"] = names[special.start_id]
    if special.end_ids:
        # As GPT-NeoX's own tokenizers do, whose unk_token is their end of text.
        tokens |= dict.fromkeys(("eos_token", "unk_token"), names[special.end_ids[0]])
    named = special_tokens(source.folder)
    tokens |= {role: token for role, token in named.items() if token in tokenizer.ids}
    padding = padding_id(source)
    if padding is not None:
        # Last: a folder may name the end of a text, where a reward model reads its score.
        tokens["pad_token"] = names[padding]
    return tokens


def examine(
    written: ExportFolder, trained: SavedModel, spec: ExportSpec, text: HeldOutText | None
) -> Quality | None:
    """The written export against float32, as the checkpoint says that it was trained.

    None without a text or without the engine's package.
    """
    engine = spec.kind.engine()
    if text is None or engine is None or not engine.is_installed():
        return None
    # Against `trained`, not the exported source: another form of GELU is a part of what the export
    # changes. Naming the dtype measures the export's own arithmetic; auto may score in another.
    return measure(
        engine.from_export(written, spec.numbers), TorchEngine.from_checkpoint(trained), text
    )


def certified(folder: Path, work: Conversion, digests: Mapping[str, str]) -> Certificate | None:
    """The certificate of an export, written into its folder; None where none is wanted.

    Takes   digests: SHA-256 of the files that were written.
    """
    if not work.spec.certificate:
        return None
    certificate = certify(
        End(work.trained.folder.name, work.hashes, torch_reader(work.trained)),
        End(work.name, digests, work.spec.kind.reader(work.written(folder))),
        work.source.config,
        work.spec.kind.longest(work.source.config),
    )
    write_certificate(folder, certificate)
    return certificate
