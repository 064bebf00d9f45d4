"""Whether a model divides over a layout: what can be told from the config, before any process starts."""

from castalia.distributed.config import ParallelConfig
from castalia.models.config import ModelConfig


def layout_problems(model: ModelConfig, seq_length: int, parallel: ParallelConfig) -> list[str]:
    """One sentence for each number of the model that the degrees of `parallel` do not divide."""
    return tensor_problems(model, seq_length, parallel)


def tensor_problems(model: ModelConfig, seq_length: int, parallel: ParallelConfig) -> list[str]:
    """Heads, MLP width, vocabulary and sequence over parallel.tp processes."""
    tp, padding = parallel.tp, model.make_vocab_size_divisible_by
    sizes = {
        "model.num_attention_heads": (model.num_attention_heads, "a head stays whole on one process"),
        "model.intermediate_size": (model.ffn_size, "each process holds an equal part of the MLP"),
        "data.seq_length": (seq_length, "between the matrices each process holds an equal part of the tokens"),
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
