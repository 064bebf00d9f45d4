"""GPT-NeoX's `soft_prompt_tuning`.

Source  GPT-NeoX, megatron/model/word_embeddings.py:195-251 and megatron/training.py:904-922.
"""

from castalia.config.neox_reading import NeoxOptions, NeoxReading, OptionRule, note

NAME = "soft_prompt_tuning"
KEYS = {
    "n_tokens": "adapter.tokens",
    "num_tokens": "adapter.tokens",
    "init_string": "adapter.init_string",
    "init_range": "adapter.init_range",
}
"""Keys of the section -> ours; the number of tokens has one name in the documentation and another
in the code."""


def soft_prompt(o: NeoxOptions, out: NeoxReading) -> None:
    """A prompt that trains alone, where the section is enabled."""
    section = o[NAME] or {}
    if not section.get("enabled"):
        return
    o.put(out, "adapter.kind", "soft_prompt", NAME)
    for key, path in KEYS.items():
        if section.get(key) not in (None, ""):
            o.put(out, path, section[key], NAME)
    note(
        out,
        f"{NAME}: the last tokens of a row make room for the prompt, whose places are no targets",
        "adapter.tokens",
    )


ADAPTER_RULES: list[tuple[tuple[str, ...], OptionRule]] = [((NAME,), soft_prompt)]
"""The options that each rule reads."""
