"""Whether a model fits a layout, checked on the config before any rank starts."""

from castalia.distributed.config import ParallelConfig
from castalia.models.config import TransformerConfig
from castalia.models.families import family_of
from castalia.models.kinds import KINDS
from castalia.models.model_config import ModelConfig


def layout_problems(model: ModelConfig, seq_length: int, parallel: ParallelConfig) -> list[str]:
    """One sentence for each size of the model that the degrees of `parallel` do not divide."""
    family = family_of(model)
    problems = family.divides(model, parallel) + vocabulary_problems(model, parallel.tp)
    if parallel.cp > 1 and not family.can_split_rows(model):
        problems.append(
            f"{whole_row_reader(model)} reads each row from its beginning, so"
            f" parallel.cp={parallel.cp} ranks cannot share one; set parallel.cp=1"
        )
    problems += expert_problems(model, parallel)
    return problems + context_problems(seq_length, parallel)


def expert_problems(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    """The experts over parallel.ep, and their width over parallel.tp."""
    moe = getattr(model, "moe", None)
    ep = parallel.ep
    tp = parallel.tp
    if moe is None:
        if ep == 1:
            return []
        return [f"parallel.ep={ep} splits experts, and the model has none; set model.moe or ep=1"]
    problems = []
    if moe.experts % ep:
        problems.append(
            f"model.moe.experts {moe.experts} is not divisible by parallel.ep={ep}: each rank holds"
            " an equal part of the experts; change either"
        )
    width = model.expert_size  # type: ignore[attr-defined]
    if moe.split_over_tp and width % tp:
        problems.append(
            f"the width {width} of an expert is not divisible by parallel.tp={tp}: with"
            " model.moe.split_over_tp each rank holds an equal part of every expert; change"
            " model.moe.expert_size, or set split_over_tp=false"
        )
    if parallel.dp_shard and parallel.dp_shard * parallel.cp % ep:
        problems.append(
            f"parallel.ep={ep} does not divide parallel.dp_shard={parallel.dp_shard} times"
            f" parallel.cp={parallel.cp}: the ranks that split the experts are taken from these"
        )
    return problems


def whole_row_reader(model: ModelConfig) -> str:
    """What of a model cannot share a row, in words: a kind of layer, or its family."""
    if isinstance(model, TransformerConfig):
        for kind in model.block_kinds:
            if not KINDS[kind].splits_rows:
                return f"the layer {kind} of model.pattern"
    return f"model.family {model.family}"


def vocabulary_problems(model: ModelConfig, tp: int) -> list[str]:
    """The padded vocabulary over parallel.tp ranks."""
    size = model.padded_vocab_size
    if size % tp == 0:
        return []
    unit = model.make_vocab_size_divisible_by * tp
    return [
        f"the padded vocabulary {size} is not divisible by parallel.tp={tp}: each rank holds an"
        f" equal part of it; model.make_vocab_size_divisible_by={unit} pads it to fit"
    ]


def context_problems(seq_length: int, parallel: ParallelConfig) -> list[str]:
    """The tokens of a row over parallel.cp * parallel.tp ranks."""
    cp = parallel.cp
    tp = parallel.tp
    problems = []
    if cp > 1 and seq_length % (2 * cp):
        # Late positions look at more keys; an early and a late chunk balance each rank.
        problems.append(
            f"data.seq_length {seq_length} is not divisible by 2 * parallel.cp = {2 * cp}: each of"
            f" the {cp} ranks takes an early and a late chunk of every row"
        )
    if seq_length % (cp * tp):
        if cp == 1:
            degrees = f"parallel.tp={tp}"
        else:
            degrees = f"parallel.cp={cp} times parallel.tp={tp}"
        problems.append(
            f"data.seq_length {seq_length} is not divisible by {degrees}: between the matrices each"
            " rank holds an equal part of the tokens"
        )
    return problems


def stage_problems(config: ParallelConfig, model: ModelConfig, compiled: bool) -> list[str]:
    """Why a model cannot be cut into the stages of this pipeline; an empty list if it can."""
    problems = []
    if config.stages > model.num_layers:
        stages = "1 stage"
        if config.stages_here != 1:
            stages = f"{config.stages_here} stages"
        problems.append(
            f"parallel.pp {config.pp} with {stages} a rank makes {config.stages} stages of"
            f" {model.num_layers} layers, and each stage needs one; lower parallel.pp"
        )
    if config.pp > 1 and config.schedule == "zero_bubble_v" and model.tied_head:
        # The copies of a tied weight are summed between two ranks, which here are the same.
        problems.append(
            "parallel.schedule zero_bubble_v puts the first and the last stage on one rank, which"
            " would hold tied embeddings twice; use zero_bubble or model.tie_word_embeddings=false"
        )
    if config.splits_backward and compiled:
        problems.append(
            f"parallel.schedule {config.schedule} splits the backward pass, which torch.compile"
            " makes one piece; set train.compile=false or use 1f1b"
        )
    return problems


def micro_batch_problem(config: ParallelConfig, rows: int, micro: int) -> str | None:
    """Why the schedule cannot run a rank's `rows` of a step in micro-batches of `micro` rows.

    None if it can.
    """
    if config.pp == 1 or schedule_fits(config, rows // micro):
        return None
    fitting = [
        size
        for size in range(1, rows + 1)
        if rows % size == 0 and schedule_fits(config, rows // size)
    ]
    remedy = "raise train.batch_size"
    if fitting:
        remedy = f"train.micro_batch_size={fitting[-1]} fits"
    return (
        f"parallel.schedule {config.schedule} over {config.pp} ranks needs at least {config.pp}"
        f" micro-batches a step, and a multiple of {config.pp} if there are more; {rows} rows in"
        f" micro-batches of {micro} make {rows // micro}; {remedy}"
    )


def schedule_fits(config: ParallelConfig, count: int) -> bool:
    """Whether the schedule can run `count` micro-batches in a step, by torch's own rules."""
    if config.schedule == "gpipe":
        return True
    if count < config.pp:
        return False
    if config.schedule in ("1f1b", "zero_bubble_v"):
        return True
    # The interleaved schedules work in rounds of equal size.
    rounds = max(1, count // config.pp)
    return count % rounds == 0
