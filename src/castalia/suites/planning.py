"""What a suite will cost, run by run: tokens, FLOPs, GPU-hours, checkpoints and disk. Needs no
torch and no data."""

from typing import Any, NamedTuple

from castalia.cost.estimate import estimate
from castalia.cost.plan import find_gpu
from castalia.recipes import load_config
from castalia.recipes.pythia import NAMES, PUBLISHED_COST
from castalia.suites.members import Member, Suite

HOUR = 3600
GPU = "a100-40"
"""The GPU that Pythia was trained on."""
MFU = 0.3
"""Share of its peak: Pythia's own runs reached 0.18 (70m) to 0.35 (1b), by their GPU-hours."""


class RunPlan(NamedTuple):
    """What one member will cost."""

    name: str
    size: str
    data: str
    seed: Any
    """An integer, or data_seed and weight_seed."""
    recipe: str | None
    parameters: int
    non_embedding: int
    steps: int
    tokens: int
    flops: float
    """Of forward and backward pass, without recomputed activations."""
    gpu_hours: float
    published_gpu_hours: int | None
    """Of the run that the member repeats, where its paper says so."""
    published_mfu: float | None
    """The share of the peak that these hours mean."""
    gpus: int | None
    """GPUs of the published run."""
    checkpoints: int
    disk_bytes: int
    """All checkpoints that are kept, with the optimizer's state."""
    weight_bytes: int
    """The weights among them."""


class SuitePlan(NamedTuple):
    """What a suite will cost."""

    suite: str
    gpu: str
    mfu: float
    runs: list[RunPlan]

    @property
    def total(self) -> dict[str, Any]:
        """Sums over the runs."""
        names = ("tokens", "flops", "gpu_hours", "checkpoints", "disk_bytes", "weight_bytes")
        total: dict[str, Any] = {"runs": len(self.runs)}
        for name in names:
            total[name] = sum(getattr(run, name) for run in self.runs)
        known = [run.published_gpu_hours for run in self.runs]
        total["published_gpu_hours"] = sum(hours for hours in known if hours) or None
        return total

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "suite": self.suite,
            "gpu": self.gpu,
            "mfu": self.mfu,
            "runs": [run._asdict() for run in self.runs],
            "total": self.total,
        }


def plan_suite(suite: Suite, gpu: str = GPU, mfu: float = MFU) -> SuitePlan:
    """The cost of each member on GPUs of one kind.

    mfu  share of the GPU's peak that training reaches.
    Raises  ConfigError for an unknown GPU or a wrong member.
    """
    rate = find_gpu(gpu).tflops * 1e12
    runs = [plan_member(member, rate, mfu) for member in suite.members]
    return SuitePlan(suite.name, gpu, mfu, runs)


def plan_member(member: Member, rate: float, mfu: float) -> RunPlan:
    """The cost of one member.

    rate  FLOP/s of a GPU's peak.
    """
    config = member.config
    cost = estimate(config.workload, processes=1, device="cuda")
    gpus = None
    hours = None
    reached = None
    size = (config.recipe or "").removeprefix("pythia-").removesuffix("-deduped")
    # A member of another length, width or batch is another run than the published one.
    if config.recipe in NAMES and size in PUBLISHED_COST and is_published(member):
        gpus, hours = PUBLISHED_COST[size]
        reached = cost.flops / (hours * HOUR * find_gpu(GPU).tflops * 1e12)
    seed = member.seed if isinstance(member.seed, int) else member.seed.model_dump()
    return RunPlan(
        name=member.name,
        size=member.size,
        data=member.data,
        seed=seed,
        recipe=config.recipe,
        parameters=cost.parameters.total,
        non_embedding=cost.parameters.non_embedding,
        steps=config.train.steps,
        tokens=cost.tokens,
        flops=float(cost.flops),
        gpu_hours=cost.flops / (rate * mfu * HOUR),
        published_gpu_hours=hours,
        published_mfu=reached,
        gpus=gpus,
        checkpoints=cost.disk.kept,
        disk_bytes=cost.disk.bytes_total,
        weight_bytes=4 * cost.parameters.total * cost.disk.kept,
    )


def is_published(member: Member) -> bool:
    """Whether the member's model and length are those of its preset."""
    config = member.config
    own = load_config([str(config.recipe)])
    tokens = own.train.steps * own.tokens_per_step
    return config.train.steps * config.tokens_per_step == tokens and config.model == own.model
