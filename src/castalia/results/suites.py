"""Suites that were published with results: sizes, parameters, steps and tokens, as data."""

from castalia.results.schema import Labels

PYTHIA_SIZES = {
    "14m": 14_067_712,
    "31m": 30_494_720,
    "70m": 70_426_624,
    "160m": 162_322_944,
    "410m": 405_334_016,
    "1b": 1_011_781_632,
    "1.4b": 1_414_647_808,
    "2.8b": 2_775_208_960,
    "6.9b": 6_857_302_016,
    "12b": 11_846_072_320,
}
"""Total parameters: 2Vd + L(12d² + 13d) + 2d with the padded vocabulary V.

Source  the model cards, EleutherAI/pythia-70m and its siblings.
"""
FORMER_SIZES = {
    "19m": "70m",
    "125m": "160m",
    "350m": "410m",
    "800m": "1b",
    "1.3b": "1.4b",
    "2.7b": "2.8b",
    "6.7b": "6.9b",
    "13b": "12b",
}
"""Names of the sizes until January 2023 -> names since. Only models of v0 had the former ones.

Source  the model cards of Pythia, "naming convention".
"""
PYTHIA_STEPS = 143_000
PYTHIA_BATCH = 2_097_152
"""Tokens of one step: 1024 rows of 2048 tokens."""
PYTHIA_SEED = 1234
"""GPT-NeoX's default, which the arguments in the results of v0 record."""
OPT_SIZES = {
    "125m": 125_239_296,
    "350m": 331_196_416,
    "1.3b": 1_315_758_080,
    "2.7b": 2_651_596_800,
    "6.7b": 6_658_473_984,
    "13b": 12_853_473_280,
    "30b": 29_974_540_288,
    "66b": 65_719_701_504,
}
"""Total parameters, counted from the configs of facebook/opt-125m and its siblings; the output
layer is tied to the embedding."""
BLOOM_SIZES = {
    "560m": 559_214_592,
    "1b1": 1_065_314_304,
    "1b7": 1_722_408_960,
    "3b": 3_002_557_440,
    "7b1": 7_069_016_064,
}
"""Total parameters, counted from the configs of bigscience/bloom-560m and its siblings; the output
layer is tied to the embedding."""


def pythia(
    suite: str,
    size: str,
    step: int | None,
    *,
    deduped: bool = False,
    variant: str = "",
    seed: int = PYTHIA_SEED,
    steps: int = PYTHIA_STEPS,
    checkpoint: str | None = None,
) -> Labels:
    """A checkpoint of a Pythia model.

    size   a key of PYTHIA_SIZES.
    step   by the model's own count.
    steps  of its whole training. Every run read the same tokens: with half the steps, twice the
           tokens a step.
    """
    tokens = None
    if step is not None:
        tokens = step * PYTHIA_BATCH * PYTHIA_STEPS // steps
    model = f"pythia-{size}"
    if deduped:
        model += "-deduped"
    return Labels(
        suite=suite,
        model=model,
        variant=variant,
        size=size,
        parameters=PYTHIA_SIZES[size],
        seed=seed,
        step=step,
        last_step=steps,
        tokens=tokens,
        checkpoint=checkpoint,
    )
