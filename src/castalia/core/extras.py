"""Optional dependencies: a missing one is a single sentence with the pip command."""

import importlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from castalia.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
"""The folder above src/ where the package runs from a clone; anything else where it does not."""

NOTICES_OF_TORCHAO = {
    "torchao": "Failed to load",
    "torch.utils._pytree": "is an Enum subclass",
}
"""What is logged while torchao is imported, by logger: it has libraries for other machines than
this one."""


class Extra(NamedTuple):
    """An optional part of Castalia."""

    gives: str
    """What works with it, in a few words."""
    packages: tuple[str, ...]
    """Those that pip installs for it."""

    def versions(self) -> dict[str, str | None]:
        """The installed version of each package; None of those that are missing."""
        return {name: installed_version(name) for name in self.packages}


EXTRAS = {
    "serve": Extra(
        "the server, castalia serve",
        ("llguidance", "fastapi", "uvicorn", "prometheus_client", "jinja2"),
    ),
    "grammar": Extra("texts of a JSON schema, a choice, a pattern", ("llguidance",)),
    "eval": Extra(
        "tasks of lm-evaluation-harness, castalia eval", ("duckdb", "pyarrow", "lm-eval")
    ),
    "results": Extra("the table of results, castalia results", ("duckdb", "pyarrow")),
    "report": Extra("the report pages, castalia report and view", ("duckdb", "pyarrow", "plotly")),
    "hf": Extra("Hugging Face's hub and certificates", ("transformers", "huggingface_hub")),
    "ct2": Extra("the engine CTranslate2", ("ctranslate2",)),
    "llama": Extra("the engine llama.cpp, for GGUF files", ("llama-cpp-python",)),
    "openvino": Extra("the engine OpenVINO", ("openvino",)),
    "parquet": Extra("text and rows in Parquet files", ("pyarrow",)),
    "http": Extra("text from a URL", ("aiohttp",)),
    "chat": Extra("chat templates", ("jinja2",)),
    "spm": Extra("SentencePiece tokenizers", ("sentencepiece",)),
    "ftfy": Extra("repair of broken Unicode", ("ftfy",)),
    "dedup": Extra("near-duplicate documents", ("datasketch",)),
    "trace": Extra("where a text was read, castalia trace", ("pydivsufsort",)),
    "count": Extra("how often terms were read, castalia count", ("ahocorasick_rs", "regex")),
    "optim": Extra("more optimizers, fp8", ("pytorch-optimizer", "torchao")),
    "compiler": Extra("a compiler of the native step, where none is found", ("ziglang",)),
    "tensorboard": Extra("curves for TensorBoard", ("tensorboard",)),
    "wandb": Extra("curves on Weights & Biases", ("wandb",)),
    "comet": Extra("curves on Comet", ("comet_ml",)),
    "mlflow": Extra("curves on MLflow", ("mlflow-skinny",)),
    "trackio": Extra("curves on Trackio", ("trackio",)),
    "s3": Extra("checkpoints and tokens in S3 buckets", ("s3fs",)),
    "ray": Extra("tokenizing on a Ray cluster", ("ray",)),
}
"""The extras of pyproject.toml but those for developers, in the order of use. `fast` is left out:
its packages belong to every installation for which they have wheels."""


def installed_version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import `module`, a dependency of the optional extra `extra`.

    Raises  ConfigError with the purpose and the pip command, if the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # An installed package may itself miss a dependency. That is its own error, not this one.
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise ConfigError(
            f"{purpose} needs {module!r}, which is not installed: {pip_command(extra)}"
        ) from None


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """Import torchao, or what imports it, without its notices about kernels that do not load here.

    transformers imports it with its first model. Other messages of the same loggers are shown.
    """
    filters = {}
    for name, notice in NOTICES_OF_TORCHAO.items():
        filters[name] = partial(is_other_message, notice)
        logging.getLogger(name).addFilter(filters[name])
    try:
        yield
    finally:
        for name, one in filters.items():
            logging.getLogger(name).removeFilter(one)


def is_other_message(notice: str, record: logging.LogRecord) -> bool:
    """Whether a message is not `notice`."""
    return notice not in record.getMessage()


def pip_command(extra: str) -> str:
    """The command that adds an extra to Castalia as it is installed here.

    A clone: `pip install -e '.[serve]'`, with its folder if that is another; a folder or a
    repository that pip installed from: its address; else the name of the package.
    """
    if (ROOT / "pyproject.toml").is_file() and (ROOT / "src" / "castalia").is_dir():
        elsewhere = "" if Path.cwd() == ROOT else f" (in {ROOT})"
        return f"pip install -e '.[{extra}]'{elsewhere}"
    origin = installed_from()
    url = str(origin.get("url", ""))
    if "vcs_info" in origin:
        return f"pip install 'castalia[{extra}] @ {origin['vcs_info']['vcs']}+{url}'"
    if url.startswith("file:") and "dir_info" in origin:
        return f"pip install '{unquote(urlsplit(url).path)}[{extra}]'"
    return f"pip install 'castalia[{extra}]'"


def installed_from() -> dict[str, Any]:
    """What pip recorded about the origin of the installed package; {} if it came by its name.

    Source  PEP 610, direct_url.json.
    """
    try:
        text = distribution("castalia").read_text("direct_url.json")
    except PackageNotFoundError:
        return {}
    origin: dict[str, Any] = json.loads(text) if text else {}
    return origin
