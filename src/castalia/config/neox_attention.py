"""GPT-NeoX's attention_config: the kind of attention of each layer."""

from typing import Any

from castalia.config.neox_reading import NeoxOptions, NeoxReading, wrong

FULL = ("global", "flash")
"""Kinds that compute full causal attention; only their kernels differ."""
SPARSE = frozenset({"local", "sparse_fixed", "sparse_variable", "bigbird", "bslongformer"})
"""DeepSpeed's patterns of blocks."""
OTHER_BLOCKS = {"gmlp": "gmlp", "amlp": "amlp", "rwkv": "rwkv6", "mamba": "mamba"}
"""Kinds that are layers without attention, and their names in `model.pattern`."""
ATTENTION = "attention"
"""The name there of a layer with attention."""
UNGATED = {"geglu": "gelu", "reglu": "relu", "swiglu": "silu"}
"""Gated activation -> its function alone, where there is one. GPT-NeoX's experts and gMLP have no
gate."""
Items = list[tuple[list[Any], int | None]]


def attention_kinds(o: NeoxOptions, out: NeoxReading) -> list[str]:
    """Our kind of attention of each layer in turn, as the shortest list that repeats to them.

    Full attention in all layers without an attention_config, or with a wrong one, which is a
    problem in `out`.
    """
    config = o["attention_config"]
    if config is None:
        return ["global"]
    try:
        items = attention_items(config)
    except ValueError as error:
        wrong(out, f"attention_config {config!r}: {error}")
        return ["global"]
    # Over a preset the number of layers is not known here; the kinds say all that matters.
    kinds = expanded(items, o["num_layers"])
    if not right_kinds(kinds, out) or not right_number(items, o["num_layers"], out):
        return ["global"]
    # Layers without attention have a place in the list too, by which the others are counted.
    ours = ["global" if kind in (*FULL, *OTHER_BLOCKS) else str(kind) for kind in kinds]
    return shortest(ours)


def block_pattern(o: NeoxOptions) -> list[str]:
    """Our kind of each layer in turn, as the shortest list that repeats to them."""
    kinds = layer_kinds(o) or [ATTENTION]
    return shortest([OTHER_BLOCKS.get(kind, ATTENTION) for kind in kinds])


def layer_kinds(o: NeoxOptions) -> list[str]:
    """GPT-NeoX's names of the kinds of attention of a file; none if they are wrong."""
    try:
        items = attention_items(o["attention_config"] or [])
    except ValueError:
        return []
    return [str(kind) for kind in expanded(items, o["num_layers"])]


def has_attention(o: NeoxOptions) -> bool:
    """Whether a layer has attention, and with it an MLP."""
    kinds = layer_kinds(o)
    return not kinds or not OTHER_BLOCKS.keys() >= set(kinds)


def right_kinds(kinds: list[Any], out: NeoxReading) -> bool:
    """Whether all kinds are known here; else a problem says which is not."""
    names = sorted({str(kind) for kind in kinds})
    unknown = [name for name in names if name not in (*FULL, *SPARSE, *OTHER_BLOCKS)]
    if unknown:
        menu = ", ".join((*FULL, *sorted(SPARSE), *OTHER_BLOCKS))
        wrong(
            out,
            f"unknown attention type {', '.join(unknown)} in attention_config; choose one of"
            f" {menu}",
        )
    return not unknown


def right_number(items: Items, layers: int | None, out: NeoxReading) -> bool:
    """Whether the items are for as many layers as there are; else a problem says so."""
    if layers is None:
        return True
    given = 0
    for kinds, count in items:
        given += len(kinds) * (layers // len(kinds) if count is None else count)
    if given == layers:
        return True
    wrong(
        out,
        f"attention_config is for {given} layers, num_layers is {layers}",
        "model.num_layers",
    )
    return False


def expanded(items: Items, layers: int | None) -> list[Any]:
    """The kinds of the layers in turn; `all` is one turn where the layers are not known."""
    kinds: list[Any] = []
    for types, count in items:
        if count is None:
            count = 1 if layers is None else layers // len(types)
        kinds += types * count
    return kinds


def shortest(kinds: list[str]) -> list[str]:
    """The shortest list that gives `kinds` when it is repeated."""
    for length in range(1, len(kinds) + 1):
        if len(kinds) % length == 0 and kinds[:length] * (len(kinds) // length) == kinds:
            return kinds[:length]
    return kinds


def attention_items(config: list[Any]) -> Items:
    """The items of attention_config: attention types and how often they repeat, None for `all`.

    Raises  ValueError saying which item is wrong and how it would be right.
    """
    if config and all(isinstance(item, str) for item in config):
        return [(config, 1)]
    items: Items = []
    for item in config:
        if not isinstance(item, list) or len(item) != 2:
            raise ValueError(f"expected [[type, ...], count] or [[type, ...], all], got {item!r}")
        types, count = item
        if isinstance(types, str):
            # A text is a sequence of letters, each of which would be taken for a type.
            raise ValueError(f"the types of an item are a list: write {[[types], count]!r}")
        if not isinstance(types, list) or not types:
            raise ValueError(f"expected a list of types, got {types!r} in {item!r}")
        if count != "all" and not str(count).isdigit():
            raise ValueError(f"expected a count or all, got {count!r} in {item!r}")
        items.append((types, None if count == "all" else int(count)))
    return items
