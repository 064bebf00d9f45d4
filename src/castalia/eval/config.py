"""The config section `eval`: what is evaluated while a run trains, and when. Needs no torch."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from castalia.config.base import Config


class EvalConfig(Config):
    """Tasks and samples of a run, at some of its steps. Read by train/hooks/evaluate.py."""

    tasks: list[str] = []
    """Tasks of lm-evaluation-harness by name, or paths of task YAMLs, which need the extra `eval`;
    bits_per_byte is the text of data.valid."""
    include: list[str] = []
    """Folders of further task YAMLs, whose names `tasks` may use."""
    every: NonNegativeInt = 0
    """Steps between evaluations; 0 is none by steps."""
    at_saves: bool = False
    """Evaluate at the steps that the save policy saves, too."""
    at_start: bool = False
    """Evaluate the start weights, too."""
    at_end: bool = True
    """Evaluate after the last step, too."""
    shots: NonNegativeInt | None = None
    """Examples before each question; null is each task's own number."""
    limit: PositiveInt | Annotated[float, Field(gt=0, lt=1)] | None = None
    """Documents of each task, or the share of them; null is all."""
    batch: PositiveInt = 16
    """Rows in a forward pass."""
    bootstrap: NonNegativeInt = 1000
    """Resamples for the standard errors that have no formula, such as perplexity's; 0 leaves all
    standard errors out."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype of weights and arithmetic. fp32 evaluates the weights that train, without a copy on one
    rank; the others copy them."""
    samples: list[str] = []
    """Prompts that the model continues at each evaluation, into samples/samples.json."""
    sample_tokens: PositiveInt = 64
    """Tokens of a sample, at most."""
    sample_temperature: NonNegativeFloat = 0.0
    """Temperature of the samples; 0 is greedy."""
    sample_top_k: NonNegativeInt = 0
    """Most likely tokens that samples are drawn among; 0 is all."""
    sample_seed: NonNegativeInt = 0
    """Seed of the samples, the same at every step."""
    validations: bool | None = None
    """Put the held-out loss and bits per byte of each validation into the results table, too; null
    does so where the extra `results` is installed."""
    results_prefix: str | None = Field(None, min_length=1)
    """Write the harness's own results of each evaluation, too, to
    PREFIX_eval_results_MM-DD-YYYY-HH-MM-SS.json, as GPT-NeoX does."""

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate."""
        return bool(self.tasks or self.samples)
