"""Whether a model divides over a layout: what can be told from the config, before any process starts."""

from castalia.distributed.config import ParallelConfig
from castalia.models.config import ModelConfig


def layout_problems(model: ModelConfig, seq_length: int, parallel: ParallelConfig) -> list[str]:
    """One sentence for each number of the model that the degrees of `parallel` do not divide."""
    return tensor_problems(model, seq_length, parallel) + context_problems(seq_length, parallel)


def tensor_problems(model: ModelConfig, seq_length: int, parallel: ParallelConfig) -> list[str]:
    """Heads, MLP width and vocabulary over parallel.tp processes."""
    tp, padding = parallel.tp, model.make_vocab_size_divisible_by
    sizes = {
        "model.num_attention_heads": (model.num_attention_heads, "a head stays whole on one process"),
        "model.intermediate_size": (model.ffn_size, "each process holds an equal part of the MLP"),
        "the padded vocabulary": (
            model.padded_vocab_size,
            f"each process holds an equal part of it; model.make_vocab_size_divisible_by={padding * tp} pads it to fit",
        ),
    }
    return [
        f"{name} {size} does not divide over parallel.tp={tp} processes: {why}"
        for name, (size, why) in sizes.items()
        if size % tp
    ]


def context_problems(seq_length: int, parallel: ParallelConfig) -> list[str]:
    """The tokens of a row over parallel.cp * parallel.tp processes."""
    cp, tp = parallel.cp, parallel.tp
    out = []
    if cp > 1 and seq_length % (2 * cp):
        out.append(
            f"data.seq_length {seq_length} does not divide into 2 * parallel.cp = {2 * cp} chunks: each of the {cp}"
            " processes takes an early and a late one"
        )
    if seq_length % (cp * tp):
        of = f"parallel.cp={cp} times parallel.tp={tp}" if cp > 1 else f"parallel.tp={tp}"
        out.append(
            f"data.seq_length {seq_length} does not divide over {of} processes: between the matrices each process"
            " holds an equal part of the tokens"
        )
    return out
