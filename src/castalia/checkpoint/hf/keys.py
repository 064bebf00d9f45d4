"""The keys of a config.json, each of which must be read: what a reader does not know is an error.

transformers ignores unknown keys. Here they are refused, since such a key is most often an option
that changes what the model computes.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from castalia.core.errors import ConfigError, nearest

HARMLESS_LINES = (
    # Names, versions, and where code is found.
    "_attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation",
    "auto_map custom_pipelines keys_to_ignore_at_inference model_type name_or_path",
    "tokenizer_class torchscript transformers_version unsloth_version",
    # Special ids.
    "bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id",
    # How numbers are stored and summed: pretraining_tp sums the same products in another order.
    "chunk_size_feed_forward dtype gradient_checkpointing pretraining_tp torch_dtype use_bfloat16",
    "use_cache",
    # Start weights, other heads and tasks.
    "classifier_dropout finetuning_task id2label initializer_range is_decoder label2id num_labels",
    "prefix problem_type task_specific_params",
    # Lengths that the decoder does not read.
    "max_sequence_length n_ctx",
    # What a forward pass returns.
    "output_attentions output_hidden_states output_scores return_dict return_dict_in_generate",
    # How text is drawn.
    "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping",
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id",
    "forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size",
    "num_beam_groups num_beams num_return_sequences remove_invalid_values repetition_penalty",
    "suppress_tokens temperature top_k top_p typical_p",
)
HARMLESS = frozenset(key for line in HARMLESS_LINES for key in line.split())
"""Keys that change no logits, whatever the architecture."""


class Keys:
    """A config.json; each key is taken once, and `finish` names those that are left.

    names   our spelling -> this format's, for keys that it spells otherwise than most. Both are
            read.
    """

    def __init__(
        self, values: Mapping[str, Any], where: str, names: Mapping[str, str] | None = None
    ) -> None:
        self.where = where
        self.left = {key: untagged(value) for key, value in values.items()}
        self.known = set(HARMLESS)
        self.names = dict(names or {})

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key; `default` if it is missing or null."""
        spellings = [name for name in (self.names.get(key), key) if name is not None]
        self.known |= set(spellings)
        values = [self.left.pop(name) for name in spellings if name in self.left]
        given = [value for value in values if value is not None]
        if any(value != given[0] for value in given):
            raise ConfigError(
                f"{self.where}: {' and '.join(spellings)} are one option and say {given}"
            )
        return given[0] if given else default

    def take_switch(self, key: str, default: bool) -> Any:
        """The value of a switch, which null turns off as in transformers."""
        return self.take(key, default and key not in self.left)

    def need(self, key: str) -> Any:
        """The value of a key.

        Raises  ConfigError if it is missing.
        """
        value = self.take(key)
        if value is None:
            raise ConfigError(f"{self.where}: {self.names.get(key, key)} is missing")
        return value

    def need_int(self, key: str) -> int:
        """The integer under a key.

        Raises  ConfigError if it is missing or not an integer.
        """
        value = self.need(key)
        # The exact type: to isinstance, true is an integer.
        if type(value) is not int:
            raise self.error(key, value, "expected an integer")
        return value

    def only(self, key: str, *allowed: Any) -> Any:
        """The value of a key, the first of `allowed` if it is missing.

        Raises  ConfigError if it is another value.
        """
        value = self.take(key, allowed[0])
        if value not in allowed:
            menu = " or ".join(map(shown, allowed))
            raise self.error(key, value, f"only {menu} is supported")
        return value

    def error(self, key: str, value: Any, expected: str) -> ConfigError:
        """An error about the value of a key."""
        return ConfigError(f"{self.where}: {self.names.get(key, key)} {shown(value)}: {expected}")

    def ignore(self, keys: Collection[str]) -> None:
        """Leave out keys that change no logits in this format."""
        self.known |= set(keys)
        for key in keys:
            self.left.pop(key, None)

    def finish(self) -> None:
        """Raises  ConfigError naming keys that nothing has read and that ask for something."""
        self.ignore(HARMLESS)
        # Null, false, 0 and empty values switch an option off.
        rest = {key: value for key, value in self.left.items() if value}
        if not rest:
            return
        pairs = ", ".join(f"{key}={shown(value)}" for key, value in sorted(rest.items()))
        raise ConfigError(
            f"{self.where}: Castalia does not implement {pairs}{nearest(min(rest), self.known)};"
            " delete a key from the file only if the model computes the same without it"
        )


def untagged(value: Any) -> Any:
    """A value whose floats that JSON lacks are tagged, {"__float__": "Infinity"}, with the floats
    themselves. Source  transformers 5, configuration_utils.py, _FLOAT_TAG_KEY."""
    if isinstance(value, list | tuple):
        return [untagged(part) for part in value]
    if isinstance(value, Mapping) and value.keys() == {"__float__"}:
        return float(value["__float__"])
    return value


def shown(value: Any) -> str:
    """A value as the file spells it."""
    return json.dumps(value, default=str) if not isinstance(value, str) else value
