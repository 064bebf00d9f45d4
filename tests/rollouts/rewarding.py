"""Reward functions of the tests, named in configs as tests.rollouts.rewarding:NAME."""

CALLS = []
"""Keyword arguments of each call of `noted`."""


def share_of_e(completions, **columns):
    """How much of a text is the letter e."""
    return [text.count("e") / max(len(text), 1) for text in completions]


def noted(prompts, completions, target):
    """The number of the record, and a note of what it was called with."""
    CALLS.append({"prompts": prompts, "completions": completions, "target": target})
    return [float(number) for number in target]


def only_odd(completions, target, **columns):
    """1 for odd records; it does not judge the others."""
    return [1.0 if number % 2 else None for number in target]


def raising(completions):
    """A bug of the user's."""
    raise KeyError("answer")


def too_few(completions):
    """One number less than it should."""
    return [0.0] * (len(completions) - 1)


def infinite(completions):
    """The last one is no finite number."""
    return [0.0] * (len(completions) - 1) + [float("inf")]


def nothing(completions):
    """No judgement of any."""
    return [None] * len(completions)


no_function = 3
