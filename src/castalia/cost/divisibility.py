"""Whether a model divides over a layout: what can be told from the config, before any process starts."""

from castalia.distributed.config import ParallelConfig
from castalia.models.config import ModelConfig
from castalia.models.families import family_of


def layout_problems(model: ModelConfig, seq_length: int, parallel: ParallelConfig) -> list[str]:
    """One sentence for each size of the model that the degrees of `parallel` do not divide."""
    family = family_of(model)
    problems = family.divides(model, parallel) + vocabulary_problems(model, parallel.tp)
    if parallel.cp > 1 and not family.splits_rows:
        problems.append(
            f"model.family {family.name} reads each row from its beginning, so parallel.cp={parallel.cp}"
            " ranks cannot share one; set parallel.cp=1"
        )
    return problems + context_problems(seq_length, parallel)


def vocabulary_problems(model: ModelConfig, tp: int) -> list[str]:
    """The padded vocabulary over parallel.tp ranks."""
    size = model.padded_vocab_size
    if size % tp == 0:
        return []
    return [
        f"the padded vocabulary {size} is not divisible by parallel.tp={tp}: each rank holds an equal part"
        f" of it; model.make_vocab_size_divisible_by={model.make_vocab_size_divisible_by * tp} pads it to fit"
    ]


def context_problems(seq_length: int, parallel: ParallelConfig) -> list[str]:
    """The tokens of a row over parallel.cp * parallel.tp ranks."""
    cp = parallel.cp
    tp = parallel.tp
    problems = []
    if cp > 1 and seq_length % (2 * cp):
        problems.append(
            f"data.seq_length {seq_length} is not divisible by 2 * parallel.cp = {2 * cp}: each of the {cp}"
            " ranks takes an early and a late chunk of every row"
        )
    if seq_length % (cp * tp):
        degrees = f"parallel.tp={tp}" if cp == 1 else f"parallel.cp={cp} times parallel.tp={tp}"
        problems.append(
            f"data.seq_length {seq_length} is not divisible by {degrees}: between the matrices each rank"
            " holds an equal part of the tokens"
        )
    return problems


def stage_problems(config: ParallelConfig, model: ModelConfig, compiled: bool) -> list[str]:
    """Why a model cannot be cut into the stages of this pipeline; nothing when it can."""
    problems = []
    if config.stages > model.num_layers:
        problems.append(
            f"parallel.pp {config.pp} with {config.stages_here} stage{'s' if config.stages_here > 1 else ''} a process"
            f" makes {config.stages} stages of {model.num_layers} layers, and each stage needs one; lower parallel.pp"
        )
    if config.pp > 1 and config.schedule == "zero_bubble_v" and model.tie_word_embeddings:
        problems.append(
            "parallel.schedule zero_bubble_v puts first and last stage on one process, which then would hold tied"
            " embeddings twice; use zero_bubble, or model.tie_word_embeddings=false"
        )
    if config.splits_backward and compiled:
        problems.append(
            f"parallel.schedule {config.schedule} splits the backward pass, and a compiled one cannot be split;"
            " set train.compile=false or use 1f1b"
        )
    return problems


def micro_batch_problem(config: ParallelConfig, rows: int, micro: int) -> str | None:
    """Why the schedule cannot run a process's `rows` of a step in micro-batches of `micro` rows; None when it can."""

    def fits(micro: int) -> bool:
        count = rows // micro
        rounds = max(1, count // config.pp)
        return config.schedule == "gpipe" or (
            count >= config.pp
            and (config.schedule in ("1f1b", "zero_bubble_v") or count % rounds == 0)
        )

    if config.pp == 1 or fits(micro):
        return None
    fitting = [size for size in range(1, rows + 1) if rows % size == 0 and fits(size)]
    more = f"train.micro_batch_size={fitting[-1]} does" if fitting else "raise train.batch_size"
    return (
        f"parallel.schedule {config.schedule} over {config.pp} processes wants at least {config.pp} micro-batches a"
        f" step, in full rounds of {config.pp} if there are more; {rows} rows in micro-batches of {micro} make"
        f" {rows // micro}, {more}"
    )
