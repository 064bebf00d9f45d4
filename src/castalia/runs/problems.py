"""Rules that span sections of a run's config, a function for each subject."""

from pathlib import Path
from typing import TYPE_CHECKING

from castalia.adapters import adapter_of
from castalia.core.errors import ConfigError
from castalia.cost.divisibility import context_problems
from castalia.data.batch_sizes import ramp_problem
from castalia.data.curriculum import Curriculum
from castalia.losses import LOSSES, Loss
from castalia.losses.labelled import labelled_problems
from castalia.losses.policy import PolicyConfig
from castalia.mixing.mixer import MIXERS
from castalia.optim import OPTIMIZERS
from castalia.optim.widths import width_rule
from castalia.rollouts.functions import reward_function

if TYPE_CHECKING:
    from castalia.runs.config import RunConfig


ROWS_IN = {
    "text": "texts (data.chat, data.train)",
    "pairs": "pairs of answers (data.pairs)",
    "labelled": "labelled answers (data.labelled)",
    "prompts": "prompts (data.prompts)",
}
"""What the rows of a loss are, and the key that names them."""


def start_problems(config: "RunConfig") -> list[str]:
    """What the start of a run asks for and cannot have."""
    start = config.model.start
    train = config.train
    begin = config.schedule.begin
    if begin and not (train.start_step and train.start_optimizer):
        return [
            f"schedule.begin {begin} counts the updates of an earlier run: set model.start to it,"
            " train.start_step=true and train.start_optimizer=true"
        ]
    if begin >= train.steps:
        return [f"schedule.begin {begin} leaves nothing of train.steps {train.steps}; raise it"]
    if start is None:
        return [
            f"train.{name}=true takes the state of another run, but model.start is not set"
            for name in ("start_optimizer", "start_step")
            if getattr(config.train, name)
        ]
    if Path(start).absolute().is_relative_to(Path(config.output).absolute()):
        return [
            f"model.start {start} is in output {config.output}: a run resumes from its own newest"
            " checkpoint; delete model.start, or choose another output to continue from an earlier"
            " step"
        ]
    return []


def intervention_problems(config: "RunConfig") -> list[str]:
    """Interventions that the rows of a run cannot have."""
    kinds = {section.kind for section in config.data.interventions}
    if not kinds:
        return []
    data = config.data
    loss = LOSSES[config.loss.kind]
    problems = []
    if loss.rows not in ("text", "pairs"):
        problems.append(f"loss.kind {config.loss.kind} reads {ROWS_IN[loss.rows]}")
    elif loss.reference:
        problems.append(
            f"loss.kind {config.loss.kind} compares with the reference's scores of unchanged texts"
        )
    if data.paired and kinds & {"drop", "insert"}:
        problems.append("drop and insert would change one answer of a pair alone")
    if "insert" in kinds and (data.packing != "packed" or data.labels or data.texts):
        problems.append(
            "insert puts documents anywhere in a row: data.packing must be packed and"
            " without data.labels"
        )
    if "insert" in kinds and data.document_mask == "documents":
        problems.append(
            "insert adds documents that the order does not know: use data.document_mask=eod"
        )
    return [f"data.interventions: {problem}" for problem in problems]


def optimizer_problems(config: "RunConfig") -> list[str]:
    """A schedule or a precision that does not suit the optimizer."""
    kind = config.optim.kind
    if OPTIMIZERS[kind].averaged is None:
        return []
    problems = []
    if config.schedule.name != "constant":
        problems.append(
            f"optim.kind {kind} averages the weights in place of a falling rate: set"
            f" schedule.name=constant, got {config.schedule.name}; schedule.warmup stays"
        )
    # The weights that train follow from the state, to the last bit; drawn ones do not.
    if config.train.parameters == "bf16_stochastic":
        problems.append(
            f"optim.kind {kind} has fp32 weights in its state: set train.parameters=bf16"
        )
    return problems


def expert_problems(config: "RunConfig") -> list[str]:
    """What experts need of a run."""
    moe = getattr(config.model, "moe", None)
    parameters = config.train.parameters
    problems = []
    if moe and moe.bias_rate and parameters != "fp32":
        problems.append(
            f"model.moe.bias_rate {moe.bias_rate} moves biases by small steps, which"
            f" train.parameters={parameters} rounds away; set train.parameters=fp32"
        )
    return problems


def curriculum_problems(config: "RunConfig") -> list[str]:
    """Lengths of a curriculum's rows that do not fit the run."""
    curriculum = config.curriculum
    length = config.data.seq_length
    if curriculum.kind == "none":
        return []
    if LOSSES[config.loss.kind].rows != "text":
        # The end of an answer would be missing, where a score is read and a text is judged.
        return [
            f"curriculum.kind={curriculum.kind} cuts rows at their end, but loss.kind"
            f" {config.loss.kind} needs whole answers; set curriculum.kind=none"
        ]
    longest = max([curriculum.shortest, curriculum.longest or 0, *curriculum.lengths])
    if longest > length:
        return [
            f"curriculum: rows of {longest} tokens are longer than data.seq_length {length}; lower"
            " the curriculum's lengths"
        ]
    lengths = Curriculum(curriculum, length, config.train.steps).lengths(config.train.steps)
    for each in lengths:
        if problems := context_problems(each, config.parallel):
            return [f"curriculum, length {each}: {problem}" for problem in problems]
    return []


def adapter_problems(config: "RunConfig") -> list[str]:
    """What an adapter needs and does not get."""
    kind = config.adapter.kind
    if kind == "none":
        return []
    problems = adapter_of(config.adapter).problems(config.adapter, config.model)
    if config.model.start is None:
        problems.append(
            f"adapter.kind={kind} trains beside the frozen weights of another model: set"
            " model.start to a run, a Hugging Face folder or a hub model; adapter.kind=none trains"
            " a model from drawn weights"
        )
    problems += room_problems(config)
    drawn = [key for key in ("start_missing", "start_vocab") if getattr(config.model, key)]
    problems += [
        f"model.{key} draws weights that the base lacks, but adapter.kind={kind} saves the adapter"
        f" alone: train a model with it first, and set model.{key} back for the adapter"
        for key in drawn
    ]
    if config.train.start_optimizer or config.train.start_step:
        problems.append(
            f"adapter.kind={kind} trains other parameters than model.start did, so that its"
            " optimizer's state and step have no meaning here; set train.start_optimizer=false"
            " train.start_step=false"
        )
    if kind == "dora" and config.train.compile and config.parallel.tp > 1:
        # torch 2.13 recurses without end in the graph of the lengths of split rows.
        problems.append(
            f"adapter.kind=dora does not compile under parallel.tp={config.parallel.tp}; set"
            " train.compile=false"
        )
    return problems


def width_problems(config: "RunConfig") -> list[str]:
    """A family or an optimizer that μP does not know."""
    try:
        rule = width_rule(config.model, config.optim)
        if rule is not None:
            rule.is_hidden("embed.weight")
    except ConfigError as error:
        return [str(error)]
    return []


def ramp_problems(config: "RunConfig") -> list[str]:
    """Options that a growing batch does not go with."""
    train = config.train
    if train.batch_ramp is None:
        return []
    problems = []
    if why := ramp_problem(train.batch_size, train.batch_ramp):
        problems.append(f"train.batch_ramp: {why}")
    if config.mixing.plans:
        problems.append(
            f"train.batch_ramp: mixing.kind {config.mixing.kind} plans batches of one size; set"
            " train.batch_ramp=null"
        )
    if train.epochs is not None:
        problems.append(
            "train.batch_ramp: train.epochs counts full batches; set train.steps and"
            " train.epochs=null"
        )
    if config.parallel.pp > 1 and train.micro_batch_size is None:
        problems.append(
            "train.batch_ramp: a pipeline needs micro-batches of one size; set"
            " train.micro_batch_size"
        )
    return problems


def room_problems(config: "RunConfig") -> list[str]:
    """What does not go together with places in front of every row."""
    room = adapter_of(config.adapter).room(config.adapter)
    if not room:
        return []
    kind = config.adapter.kind
    problems = []
    if room >= config.data.seq_length:
        problems.append(
            f"adapter.tokens {room} leaves no room in rows of data.seq_length"
            f" {config.data.seq_length}; lower it"
        )
    if config.data.document_mask is not None:
        problems.append(
            f"adapter.kind={kind} stands in front of a row, and data.document_mask keeps all but"
            " its first document from seeing it; set data.document_mask=null data.packing=unpacked"
        )
    if config.eval.evaluates:
        problems.append(
            f"adapter.kind={kind}: tasks and samples during training would not read the prompt;"
            " leave out eval.tasks and eval.samples, and evaluate the run afterwards"
        )
    if config.loss.kind != "next_token":
        problems.append(
            f"adapter.kind={kind} trains on the next token only, got loss.kind {config.loss.kind};"
            " use adapter.kind=lora"
        )
    return problems


def epochs_problems(config: "RunConfig") -> list[str]:
    """Options under which a pass over the data has no meaning."""
    if config.train.epochs is None:
        return []
    problems = []
    if config.mixing.plans:
        problems.append(
            f"train.epochs passes over every source alike, but mixing.kind {config.mixing.kind}"
            " chooses the rows of each step; set train.steps and train.epochs=null"
        )
    weighed = [key for key in ("weights", "document_alpha") if getattr(config.data, key)]
    problems += [
        f"train.epochs passes over every source alike, so that data.{key} has no effect; set one of"
        " them to null"
        for key in weighed
    ]
    return problems


def mixing_problems(config: "RunConfig") -> list[str]:
    """Requirements of the mixing section that other sections do not meet."""
    mixing = config.mixing
    problems = []
    # An option that nothing reads is a misunderstanding, not a preference.
    if idle := mixing.idle():
        names = ", ".join(f"mixing.{name}" for name in idle)
        problems.append(
            f"{names}: without effect on GPT-NeoX's blend; set mixing.planned=true or another"
            " mixing.kind"
        )
    if "val_loss" in MIXERS[mixing.kind].needs and config.train.eval_every is None:
        problems.append(
            f"mixing.kind {mixing.kind} learns from held-out losses: set train.eval_every and"
            " data.valid"
        )
    if mixing.kind == "doremi" and mixing.reference is None:
        problems.append(
            "mixing.kind doremi needs mixing.reference, the losses of a reference model by source"
        )
    return problems


def loss_problems(config: "RunConfig") -> list[str]:
    """Requirements of the loss that other sections do not meet."""
    kind = config.loss.kind
    loss = LOSSES[kind]
    problems = []
    if loss.head != config.model.head:
        reads = {"vocab": "the logits of the next token", "score": "the score of a text"}
        problems.append(
            f"loss.kind {kind} reads {reads[loss.head]}, which model.head={config.model.head} does"
            f" not compute; set model.head={loss.head} or another loss.kind"
        )
    # A mixer that needs nothing but the step number has fixed shares and learns from no loss.
    learns = MIXERS[config.mixing.kind].needs - {"step"}
    if learns and not loss.by_source:
        problems.append(
            f"mixing.kind {config.mixing.kind} learns from the loss of each source, which loss.kind"
            f" {kind} does not return; use mixing.kind=static or another loss"
        )
    problems += row_problems(config, loss) + reference_problems(config)
    if loss.whole_rows and config.parallel.cp > 1:
        problems.append(
            f"loss.kind {kind} needs whole rows, but parallel.cp={config.parallel.cp} splits them;"
            " set parallel.cp=1"
        )
    return problems


def row_problems(config: "RunConfig", loss: type[Loss]) -> list[str]:
    """Rows that the loss reads and the data do not give."""
    kind = config.loss.kind
    if config.data.paired and loss.rows != "pairs":
        return [
            f"loss.kind {kind} reads {ROWS_IN[loss.rows]}, but data.pairs or data.chosen names"
            f" pairs of answers; choose a loss of pairs: {', '.join(losses_of('pairs'))}"
        ]
    if "prompts" in config.data.texts and loss.rows != "prompts":
        return [
            f"loss.kind {kind} reads {ROWS_IN[loss.rows]}, but data.prompts has prompts without"
            f" answers; choose a loss that answers them: {', '.join(losses_of('prompts'))}"
        ]
    if loss.rows == "labelled" or config.data.labelled:
        rows = config.train.micro_batch_size or config.train.batch_size
        return labelled_problems(config.data, config.loss, rows)
    if isinstance(config.loss, PolicyConfig):
        return policy_problems(config, config.loss)
    names_data = config.data.train or config.data.corpus
    if loss.rows == "pairs" and names_data and not config.data.paired:
        return [
            f"loss.kind {kind} reads pairs of a preferred and a rejected answer, but the data are"
            " texts; name the pairs with data.chosen and data.rejected"
        ]
    return []


def policy_problems(config: "RunConfig", options: PolicyConfig) -> list[str]:
    """What a loss asks for that learns from answers to prompts, and cannot have."""
    data = config.data
    kind = config.loss.kind
    problems = []
    others = [name for name in data.texts if name != "prompts"]
    if others or (data.corpus and not data.train_prefixes and not data.prompts):
        named = others[0] if others else "corpus"
        problems.append(
            f"loss.kind {kind} reads prompts, which the model answers itself, but data.{named} is"
            " something else; name the prompts in data.prompts"
        )
    if data.packing != "unpacked" or data.order != "neox":
        problems.append(
            f"loss.kind {kind} needs each prompt in a row of its own: set data.packing=unpacked and"
            " data.order=neox"
        )
    if config.optim.kind == "schedule_free":
        problems.append(
            f"loss.kind {kind} draws answers with the weights that it trains, but schedule_free"
            " evaluates their average; choose another optim.kind"
        )
    if data.tokenizer is None and config.model.start is None:
        problems.append(f"loss.kind {kind}: rewards judge texts; set data.tokenizer")
    if not options.rewards and options.reward_model is None:
        problems.append(
            f"loss.kind {kind} has no reward: name functions in loss.rewards, module:function each,"
            " or a model in loss.reward_model"
        )
    count = len(options.rewards) + (options.reward_model is not None)
    if options.reward_weights is not None and len(options.reward_weights) != count:
        problems.append(
            f"loss.reward_weights has {len(options.reward_weights)} numbers for {count} rewards;"
            " give one for each"
        )
    for name in options.rewards:
        # Imported now: a misspelled function must not appear after the data were prepared.
        try:
            reward_function(name)
        except ConfigError as error:
            problems.append(str(error))
    if options.max_tokens >= data.seq_length:
        problems.append(
            f"loss.max_tokens {options.max_tokens} leaves no room for a prompt in rows of"
            f" data.seq_length {data.seq_length}; raise the one or lower the other"
        )
    if options.completions % (options.answers_at_once or 1):
        problems.append(
            f"loss.completions {options.completions} is not divisible by loss.answers_at_once"
            f" {options.answers_at_once}"
        )
    return problems + stage_conflicts(config, options)


def stage_conflicts(config: "RunConfig", options: PolicyConfig) -> list[str]:
    """Sections that cannot go with rows that are answers."""
    kind = config.loss.kind
    problems = []
    elsewhere = config.adapter.kind != "none" or config.device == "cuda"
    if options.engine == "native" and (elsewhere or options.dtype == "fp16"):
        problems.append(
            "loss.engine native computes whole models on CPUs, in fp32 or bf16: with an adapter,"
            " device=cuda or loss.dtype=fp16 set loss.engine=torch"
        )
    if config.mixing.plans and options.updates > 1:
        problems.append(
            f"loss.updates {options.updates} takes the same rows several times, but mixing.kind"
            f" {config.mixing.kind} plans the rows of each step; set loss.updates=1"
        )
    if config.train.batch_ramp and options.updates > 1:
        problems.append(
            f"loss.updates {options.updates} takes the same rows several times, which"
            " train.batch_ramp would cut otherwise each time; set loss.updates=1"
        )
    if config.curriculum.kind != "none":
        problems.append(
            f"curriculum.kind {config.curriculum.kind} shortens rows, and loss.kind {kind} makes"
            " its own; set curriculum.kind=none"
        )
    return problems


def reference_problems(config: "RunConfig") -> list[str]:
    """Ways to the reference model that the layout or the packing do not have."""
    kind = getattr(config.loss, "reference", None)
    data = config.data
    pp = config.parallel.pp
    problems = []
    if kind == "live" and pp > 1:
        problems.append(
            f"loss.reference=live runs a second whole model, but parallel.pp={pp} cuts it into"
            " stages; use loss.reference=cached, whose numbers are the same"
        )
    apart = data.document_mask == "documents" or data.neox_exact
    if kind == "cached" and data.packing == "pack_until_overflow" and not apart:
        problems.append(
            "loss.reference=cached has each answer alone, but data.packing=pack_until_overflow lets"
            " it see the answers before it: set data.document_mask=documents, or"
            " data.packing=unpacked"
        )
    return problems


def losses_of(rows: str) -> list[str]:
    """Names of the losses that read such rows."""
    return [name for name in LOSSES if LOSSES[name].rows == rows]
