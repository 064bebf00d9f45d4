"""Rewards of answers, from functions of Python and from a reward model."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from castalia.core.errors import ConfigError, TrainingError
from castalia.inference import load
from castalia.losses.policy import PolicyConfig
from castalia.rollouts.answers import Answer
from castalia.rollouts.functions import Function, reward_function
from castalia.rollouts.prompts import PromptRecord
from castalia.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Reward:
    """One of the rewards that are added up."""

    name: str
    """As the config has it."""
    function: Function
    weight: float

    def __call__(self, answered: "Sequence[Answered]") -> list[float | None]:
        """The rewards of answers, unweighted; None where the function does not judge.

        Raises  TrainingError naming the function, if it raises, or does not return a finite number
                for each answer; the answer is named as well.
        """
        arguments = arguments_of(self.function, answered)
        try:
            values = self.function(**arguments)
        except Exception as error:  # whatever a user's function raises, its name helps
            raise TrainingError(
                f"reward {self.name} raised {type(error).__name__}: {error}; it was called with"
                f" {len(answered)} completions and the arguments {', '.join(arguments)}"
            ) from error
        return checked(self.name, values, answered)


@dataclass(frozen=True)
class Answered:
    """An answer with its prompt."""

    record: PromptRecord
    prompt_ids: list[int]
    answer: Answer

    @property
    def completion(self) -> Any:
        """The answer in the form of its prompt: a text, or one message in a list."""
        if isinstance(self.record.prompt, str):
            return self.answer.text
        return [{"role": "assistant", "content": self.answer.text}]


def open_rewards(options: PolicyConfig, tokenizer: Tokenizer, device: str) -> list[Reward]:
    """The rewards of a policy, each with its weight: functions, and last the reward model.

    Raises  ConfigError naming what cannot be imported, or a reward model without a score head;
            CheckpointError if there is no such model.
    """
    functions = {name: reward_function(name) for name in options.rewards}
    if options.reward_model is not None:
        name = f"model {options.reward_model}"
        functions[name] = model_reward(options.reward_model, tokenizer, device)
    weights = options.reward_weights or [1.0] * len(functions)
    pairs = zip(functions.items(), weights, strict=True)
    return [Reward(name, function, weight) for (name, function), weight in pairs]


def model_reward(path: str, tokenizer: Tokenizer, device: str) -> Function:
    """The score of a reward model for prompt and answer together, as a reward function.

    Takes   tokenizer: that of the answers; ids are passed on if it is the model's own.
    Raises  ConfigError for a model without a score head; CheckpointError if there is none.
    """
    model = load(path, engine="torch", device=device)
    if model.config.head != "score":
        raise ConfigError(
            f"loss.reward_model {path} has model.head={model.config.head}: it computes the next"
            " token, not the score of a text; name a run of the recipe reward, or an exported"
            " ...ForSequenceClassification"
        )
    has_same_ids = model.tokenizer is not None and model.tokenizer.sha256 == tokenizer.sha256

    def score(prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[float]:
        texts: list[Any] = [a + b for a, b in zip(prompt_ids, completion_ids, strict=True)]
        if not has_same_ids:
            texts = [tokenizer.decode(ids) for ids in texts]
        return model.scores(texts)

    return score


def arguments_of(function: Function, answered: Sequence[Answered]) -> dict[str, list[Any]]:
    """What a function is called with: prompts, completions, the ids of both, and the columns of the
    prompts.

    A function without **kwargs gets those that it names, so that it need not name all.
    """
    arguments: dict[str, list[Any]] = {}
    for name in sorted({name for one in answered for name in one.record.columns}):
        arguments[name] = [one.record.columns.get(name) for one in answered]
    # Last: a column of such a name must not take their place.
    arguments["prompts"] = [one.record.prompt for one in answered]
    arguments["completions"] = [one.completion for one in answered]
    arguments["prompt_ids"] = [one.prompt_ids for one in answered]
    arguments["completion_ids"] = [one.answer.ids for one in answered]
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return arguments
    named = {parameter.name for parameter in parameters}
    return {name: values for name, values in arguments.items() if name in named}


def checked(name: str, values: Any, answered: Sequence[Answered]) -> list[float | None]:
    """The values of a function as floats.

    Raises  TrainingError if it is not a finite number, or None, for each answer.
    """
    try:
        listed = list(values)
    except TypeError:
        raise TrainingError(
            f"reward {name} returned {type(values).__name__}; expected a list with one number for"
            " each completion"
        ) from None
    if len(listed) != len(answered):
        raise TrainingError(
            f"reward {name} returned {len(listed)} numbers for {len(answered)} completions;"
            " expected one for each, in their order"
        )
    numbers: list[float | None] = []
    for value, one in zip(listed, answered, strict=True):
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if number is not None and not math.isfinite(number):
            raise TrainingError(
                f"reward {name} returned {value!r} for the completion {one.answer.text[:60]!r} of"
                f" {one.record.where}; expected a finite number"
            )
        numbers.append(number)
    return numbers


def total_rewards(
    rewards: Sequence[Reward], answered: Sequence[Answered]
) -> list[tuple[float, list[float | None]]]:
    """The weighted sum of all rewards of each answer, and the rewards.

    Raises  TrainingError as `Reward`, or if no reward judges an answer.
    """
    if not answered:
        return []
    judged = [reward(answered) for reward in rewards]
    totals = []
    for place, one in enumerate(answered):
        parts = [column[place] for column in judged]
        values = [
            reward.weight * value
            for reward, value in zip(rewards, parts, strict=True)
            if value is not None
        ]
        if not values:
            names = ", ".join(reward.name for reward in rewards)
            raise TrainingError(
                f"no reward judges the completion {one.answer.text[:60]!r} of {one.record.where}:"
                f" all of {names} returned None; at least one must return a number"
            )
        totals.append((sum(values), parts))
    return totals
