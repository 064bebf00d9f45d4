"""The harness without its noise and side effects: its log, its bars, its process pools, its seeds.

It draws from the global generators of `random`, numpy and torch, prints, and starts a pool of
processes for each bootstrap. Within `harness_rules` none of this reaches the outside.
"""

import logging
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from castalia.core.extras import require

SEED = 0
OTHER_SEED = 1234
"""lm-eval 0.4.13, defaults.py: seeds of `random`, and of numpy, torch and the few-shot examples."""
NOISY = ("lm_eval", "datasets", "huggingface_hub", "httpx")
LOCK = threading.RLock()
"""The harness's modules are changed for the time of a call."""
DRAWS = 2**22
"""Draws of the bootstrap that exist at a time: 32 MiB of indices."""


def require_harness() -> Any:
    """The package lm_eval.

    Raises  ConfigError with the pip line if it is not installed.
    """
    return require("lm_eval", "eval", "evaluation with lm-evaluation-harness")


@contextmanager
def harness_rules() -> Iterator[None]:
    """Run the harness silently, in this process alone, with its own seeds; restore all after."""
    require_harness()
    import lm_eval.api.metrics as metrics
    import lm_eval.api.task as task

    with LOCK, seeded(), silent_logs():
        bar = task.tqdm
        bootstrap = metrics.bootstrap_stderr
        task.tqdm = no_bar
        metrics.bootstrap_stderr = bootstrap_stderr
        try:
            yield
        finally:
            task.tqdm = bar
            metrics.bootstrap_stderr = bootstrap


def no_bar(items: Any, *args: Any, **options: Any) -> Any:
    """tqdm without a bar."""
    return items


@contextmanager
def seeded() -> Iterator[None]:
    """The harness's seeds; the generators continue afterwards as if nothing had drawn."""
    of_python = random.getstate()
    of_numpy = np.random.get_state()
    of_torch = torch.get_rng_state()
    random.seed(SEED)
    np.random.seed(OTHER_SEED)
    # Not torch.manual_seed, which would seed every GPU too.
    torch.default_generator.manual_seed(OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)


@contextmanager
def silent_logs() -> Iterator[None]:
    """Errors alone reach the log, and datasets shows no bars."""
    import datasets

    bars = datasets.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def bootstrap_stderr(
    function: Callable[[Sequence[Any]], float], values: Sequence[Any], iters: int
) -> float:
    """Standard deviation of `function` over resamples of `values`; the harness's own draws.

    The harness draws in chunks of 1000 resamples, chunk i with `random.Random(i).choices`. numpy's
    generator gives the same numbers, a thousand times as fast for a mean.
    Source  lm-eval 0.4.13, api/metrics.py: bootstrap_stderr; CPython's random.py: choices.
    """
    from lm_eval.api.metrics import nanmean, perplexity, sample_stddev

    size = min(1000, iters)
    chunks = range(iters // size)
    statistics: list[float] = []
    if function not in (perplexity, nanmean):
        for chunk in chunks:
            draws = random.Random(chunk)
            statistics += [function(draws.choices(values, k=len(values))) for _ in range(size)]
        return float(sample_stddev(statistics))
    numbers = np.asarray(values, np.float64)
    for chunk in chunks:
        means = resampled_means(
            numbers, chunk, size, np.nanmean if function is nanmean else np.mean
        )
        statistics += (np.exp(-means) if function is perplexity else means).tolist()
    return float(sample_stddev(statistics))


def resampled_means(
    values: np.ndarray, seed: int, count: int, mean: Callable[..., Any]
) -> np.ndarray:
    """Means of `count` resamples of `values`, drawn as `random.Random(seed).choices` would.

    Shapes  values (N,) -> (count,) float64.
    """
    # A key of one word: `random.seed` gives the Mersenne Twister the same one.
    draws = np.random.RandomState([seed])
    rows = max(1, DRAWS // len(values))
    means = []
    for first in range(0, count, rows):
        wanted = min(rows, count - first)
        places = (draws.random_sample((wanted, len(values))) * len(values)).astype(np.int64)
        means.append(mean(values[places], axis=1))
    return np.concatenate(means)
