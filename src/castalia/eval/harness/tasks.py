"""Tasks of the harness, built once and evaluated on many checkpoints."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from castalia.core.errors import ConfigError
from castalia.eval.harness.encoding import TextEncoder
from castalia.eval.harness.quiet import OTHER_SEED, harness_rules, require_harness
from castalia.eval.harness.sources import local_first
from castalia.inference import LanguageModel
from castalia.results.task_hash import Prompting, config_hash


class Part(NamedTuple):
    """What one requested name stands for: a task, a group, or the tasks of a tag."""

    name: str
    loaded: dict[str, Any]
    """The harness's own: `tasks` and `groups` by name, `group_map`."""

    @property
    def tasks(self) -> dict[str, Any]:
        """Tasks by name."""
        tasks: dict[str, Any] = self.loaded["tasks"]
        return tasks

    def hashes(self, prompting: Prompting) -> dict[str, str]:
        """Hash of the config and the prompts of each task and group; a group's covers its tasks,
        and their shots where they differ."""
        hashes = {
            name: config_hash(task.dump_config(), prompting) for name, task in self.tasks.items()
        }
        for name, group in self.loaded["groups"].items():
            tasks = group.get_all_tasks()
            shots = {task.config.num_fewshot for task in tasks}
            members = [hashes[task.task_name] for task in tasks]
            if len(shots) > 1:
                # No column says it of a group whose tasks differ in it.
                members = [f"{hashes[t.task_name]}, {t.config.num_fewshot} shots" for t in tasks]
            hashes[name] = config_hash({**(group.to_dict() or {}), "task": sorted(members)})
        return hashes


@dataclass
class TaskSet:
    """Tasks with their data and requests, which are built once for all checkpoints.

    Results do not depend on what was evaluated before. One evaluation at a time.
    """

    parts: list[Part]
    shots: int | None = None
    """Examples before each question; None for what each task says."""
    limit: float | None = None
    """Documents of each task at most; below 1, a share of them."""
    seed: int = OTHER_SEED
    """Seed of the choice of examples."""
    built: dict[str, Any] = field(default_factory=dict)
    """By task, what its requests were built for."""
    encoders: dict[str, TextEncoder] = field(default_factory=dict)
    """By tokenizer."""

    @property
    def names(self) -> list[str]:
        """Names of the tasks, without groups."""
        return [name for part in self.parts for name in part.tasks]

    @property
    def requests(self) -> dict[str, int]:
        """Requests of each name, as `Say` counts them."""
        return {
            part.name: sum(one.repeats for task in part.tasks.values() for one in task.instances)
            for part in self.parts
        }

    def build(self) -> None:
        """Build the requests of all tasks, without a chat template."""
        from lm_eval.evaluator_utils import get_sample_size

        for part in self.parts:
            for name, task in part.tasks.items():
                task.build_all_requests = once(name, task, self)
                limit = get_sample_size(task, self.limit)
                task.build_all_requests(limit=limit, apply_chat_template=False)

    def prompting(self, chat_template: str | None = None) -> Prompting:
        """How prompts are written, besides what the tasks say."""
        return Prompting(chat_template, fewshot_seed=self.seed)

    def split(self) -> "list[TaskSet]":
        """One TaskSet for each requested name; tokens and requests stay shared."""
        return [
            TaskSet([part], self.shots, self.limit, self.seed, self.built, self.encoders)
            for part in self.parts
        ]

    def each_task(self) -> "list[TaskSet]":
        """One TaskSet for each task, without groups; tokens and requests stay shared."""
        parts = [
            Part(name, {"tasks": {name: task}, "groups": {}, "group_map": {}})
            for part in self.parts
            for name, task in part.tasks.items()
        ]
        return replace(self, parts=parts).split()

    def encoder(self, model: LanguageModel) -> TextEncoder:
        """The tokenizer of a model, with the tokens of earlier checkpoints."""
        encoder = TextEncoder(model)
        known = self.encoders.setdefault(encoder.key, encoder)
        if known is not encoder:
            encoder.share(known)
        return encoder


def open_tasks(
    names: str | Sequence[str],
    *,
    include: Sequence[str] = (),
    shots: int | None = None,
    limit: float | None = None,
    seed: int = OTHER_SEED,
    unsafe: bool = False,
) -> TaskSet:
    """Tasks by the harness's names (tasks, groups, tags, wildcards), YAML files, or folders of
    them.

    include  folders or files of more tasks, which names may refer to; a name in them wins over the
             harness's own.
    shots    examples before each question; tasks that fix 0 keep 0. None: what each task says.
    limit    documents of each task at most; below 1, a share of them.
    seed     of the choice of examples, by default the harness's.
    unsafe   run tasks that execute code that a model wrote.
    Raises   ConfigError for an unknown name, a broken file, a missing package, or a task that is
             not safe; DataError if a task's data is not there.
    """
    if isinstance(names, str):
        names = [names]
    else:
        names = list(names)
    if not names:
        raise ConfigError("no task is named; give the name of a task or the path of a YAML file")
    if limit is not None and limit <= 0:
        raise ConfigError(f"limit must be above 0, got {limit}")
    require_harness()
    from castalia.eval.harness.catalog import Catalog  # it imports the harness

    with harness_rules(), local_first():
        catalog = Catalog(names, include, unsafe=unsafe)
        parts = [Part(name, catalog.load(name)) for name in catalog.chosen]
        require_distinct(parts)
        for part in parts:
            for task in part.tasks.values():
                set_shots(task, shots)
                task.set_fewshot_seed(seed=seed)
        tasks = TaskSet(parts, shots, limit, seed)
        tasks.build()
    return tasks


def set_shots(task: Any, shots: int | None) -> None:
    """The number of examples of a task, as `lm_eval.simple_evaluate` sets it."""
    default = task.get_config("num_fewshot")
    if shots is None:
        if default is None:
            task.set_config(key="num_fewshot", value=0)
    elif default != 0:
        task.set_config(key="num_fewshot", value=shots)


def require_distinct(parts: Sequence[Part]) -> None:
    """Raises  ConfigError if a task comes with two names."""
    owners: dict[str, str] = {}
    for part in parts:
        for name in part.tasks:
            owner = owners.setdefault(name, part.name)
            if owner != part.name:
                raise ConfigError(
                    f"task {name} is named twice: by {owner} and by {part.name}; leave one out"
                )


def once(name: str, task: Any, tasks: TaskSet) -> Callable[..., None]:
    """`build_all_requests` of a task that builds its requests for one checkpoint alone.

    The harness builds them at every call and appends answers to them. Requests are built again only
    if something that they depend on is different, such as a chat template.
    """
    build = task.build_all_requests

    def build_once(*, limit: Any, apply_chat_template: Any, **options: Any) -> None:
        chat = options.get("chat_template")
        # A method is another object for each model; what counts is what the template writes.
        template = (chat.__self__.template, options["tokenizer_name"]) if chat is not None else None
        key = (limit, template)
        if tasks.built.get(name) != key:
            # The same examples whatever was drawn before.
            task.set_fewshot_seed(seed=tasks.seed)
            build(limit=limit, apply_chat_template=apply_chat_template, **options)
            tasks.built[name] = key
        for instance in task.instances:
            instance.resps = []
            instance.filtered_resps = {}

    return build_once
