"""What can be wrong with a task, as one sentence that names the task and the way out."""

from collections.abc import Iterator
from contextlib import contextmanager

from castalia.core.errors import CastaliaError, ConfigError, DataError

LOCAL = (
    "to use local data, write a task file with `dataset_path: json` and `dataset_kwargs:"
    " {data_files: {test: FILE.jsonl}}`, and name it with --tasks FILE.yaml"
)


@contextmanager
def task_problems(name: str) -> Iterator[None]:
    """Errors of the harness and of datasets while a task is built, as Castalia's.

    Raises  ConfigError for a missing package or a wrong config; DataError if the data is not there.
    """
    try:
        yield
    except CastaliaError:
        raise
    except ImportError as error:
        package = error.name or "a package"
        raise ConfigError(
            f"task {name} needs {package}, which is not installed ({error}); install it with pip"
        ) from None
    except Exception as error:  # datasets and huggingface_hub raise dozens of kinds
        if is_about_data(error):
            raise DataError(
                f"task {name}: its data cannot be read ({first_line(error)}); {LOCAL}"
            ) from None
        raise ConfigError(
            f"task {name} cannot be built: {type(error).__name__}: {first_line(error)}"
        ) from error


def is_about_data(error: BaseException) -> bool:
    """Whether an error says that data is missing, unreachable or damaged."""
    if isinstance(error, OSError):
        return True
    root = type(error).__module__.split(".")[0]
    return root in ("datasets", "huggingface_hub", "requests", "httpx", "pyarrow", "fsspec")


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
