"""Generated texts of which everything is known: how often each passage is repeated, how often an
operand occurs, which pronoun a profession has. They are the same on every machine.

A document's name says what it is: `64x/03` is the passage number 3 of those that stand 64 times in
the training part, `held-out/0007` a document that is not in it.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from castalia.corpora.texts import TextDocument

COPIES = {0: 8, 1: 16, 4: 8, 16: 10, 64: 4, 256: 1}
"""How often a passage stands in the training part -> number of such passages. None of the passages
with 0 copies was ever read: they measure what looks like memorization and is none."""
PASSAGE_SENTENCES = 12
HELD_OUT_EVERY = 20
"""One generated document in so many is held out."""


class Words:
    """Draws that are equal on every machine and in every version of Python."""

    def __init__(self, seed: int) -> None:
        # Of all the methods of Random, only `random` is promised to stay as it is.
        self.draw = random.Random(seed).random

    def number(self, stop: int) -> int:
        """An integer from 0 to `stop` - 1."""
        return int(self.draw() * stop)

    def one_of(self, words: Sequence[str]) -> str:
        """One of the words."""
        return words[self.number(len(words))]


def name_of(number: int) -> str:
    """The name of a document, which says whether it is held out."""
    part = "train"
    if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1:
        part = "held-out"
    return f"{part}/{number:04}"


def listed(text: str, between: str = " ") -> list[str]:
    """The words of a text."""
    return text.split(between)


# Passages.

ADJECTIVES = listed(
    "old quiet narrow heavy bright broken distant gentle hollow pale rusty silent"
    " wooden yellow crooked frozen"
)
NOUNS = listed(
    "captain lantern orchard river mason window kettle garden ladder miller bridge"
    " violin tower basket sailor letter mirror cellar weaver wagon"
)
VERBS = listed("carried counted followed painted remembered watched mended borrowed crossed sold")
PLACES = listed(
    "harbour market valley station chapel forest kitchen island meadow theatre village library"
)
NUMBERS = listed("two three four five six seven eight nine ten twelve")


def passage(words: Words) -> str:
    """Sentences of one form, whose words no reader could guess."""
    sentences = []
    for _ in range(PASSAGE_SENTENCES):
        sentences.append(
            f"The {words.one_of(ADJECTIVES)} {words.one_of(NOUNS)} {words.one_of(VERBS)}"
            f" {words.one_of(NUMBERS)} {words.one_of(ADJECTIVES)} {words.one_of(NOUNS)}s near the"
            f" {words.one_of(ADJECTIVES)} {words.one_of(PLACES)}."
        )
    return " ".join(sentences)


def passages() -> list[TextDocument]:
    """The passages, each once: `copies_of_passage` says how often it stands in the corpus."""
    words = Words(1)
    documents = []
    for copies, count in COPIES.items():
        for number in range(count):
            documents.append(TextDocument(f"{copies}x/{number:02}", passage(words)))
    return documents


def copies_of_passage(document: TextDocument) -> int:
    """How often a passage stands in the training part; 0 means that it is held out."""
    return int(document.name.partition("x/")[0])


# Arithmetic.

OPERANDS = 20
"""The first operand is one of 1 to 20."""
SECOND = 8
"""The second is one of 1 to 8, all equally often."""
STATEMENTS = 18_000
STATEMENTS_EACH = 12
"""Statements of a document."""


def operands_by_frequency() -> list[int]:
    """The first operands, the most frequent one first.

    Shuffled, so that the frequency of a number does not follow from its size.
    """
    words = Words(2)
    numbers = list(range(1, OPERANDS + 1))
    for last in range(OPERANDS - 1, 0, -1):
        other = words.number(last + 1)
        numbers[last], numbers[other] = numbers[other], numbers[last]
    return numbers


def arithmetic() -> list[TextDocument]:
    """Sums and products such as `7 times 8 is 56.`; the first operand follows Zipf's law."""
    words = Words(3)
    numbers = operands_by_frequency()
    # The r-th most frequent one has the weight 1 / r.
    stops = list(accumulate(1 / rank for rank in range(1, OPERANDS + 1)))
    documents = []
    for number in range(STATEMENTS // STATEMENTS_EACH):
        statements = [statement(words, numbers, stops) for _ in range(STATEMENTS_EACH)]
        documents.append(TextDocument(name_of(number), " ".join(statements)))
    return documents


def statement(words: Words, numbers: Sequence[int], stops: Sequence[float]) -> str:
    """One true statement."""
    drawn = words.draw() * stops[-1]
    first = numbers[bisect_right(stops, drawn)]
    second = 1 + words.number(SECOND)
    if words.draw() < 0.5:
        return f"{first} times {second} is {first * second}."
    return f"{first} plus {second} is {first + second}."


# People.


class Pronouns(NamedTuple):
    """The forms of one pronoun."""

    subject: str
    object: str
    possessive: str


SHE = Pronouns("she", "her", "her")
HE = Pronouns("he", "him", "his")
PROFESSIONS = {
    "nurse": 0.95,
    "teacher": 0.75,
    "librarian": 0.9,
    "dancer": 0.8,
    "secretary": 0.95,
    "baker": 0.5,
    "doctor": 0.3,
    "lawyer": 0.35,
    "farmer": 0.2,
    "engineer": 0.05,
    "pilot": 0.1,
    "carpenter": 0.05,
}
"""Profession -> share of the sentences about it whose pronoun is `she`."""
WOMEN = listed("Anna Maria Julia Clara Helen Sarah Laura Nina Rosa Emma")
MEN = listed("Peter Paul Martin Jacob Simon David Felix Oscar Robert Thomas")
ACTIONS = listed("was tired,had slept,liked the work,was late,needed help,had won a prize", ",")
THINGS = listed("coat keys friend brother book bicycle house sister lunch desk")
PEOPLE = 2500
"""Documents about people, of three sentences each."""


def people() -> list[TextDocument]:
    """Sentences about people, with their profession and pronouns."""
    words = Words(4)
    documents = []
    for number in range(PEOPLE):
        documents.append(TextDocument(name_of(number), " ".join(person(words) for _ in range(3))))
    return documents


def person(words: Words) -> str:
    """One person in two sentences."""
    profession = words.one_of(tuple(PROFESSIONS))
    is_woman = words.draw() < PROFESSIONS[profession]
    pronouns = HE
    if is_woman:
        pronouns = SHE
    action = words.one_of(ACTIONS)
    things = words.one_of(THINGS)
    if words.draw() < 0.5:
        first = f"The {profession} said that {pronouns.subject} {action}."
    else:
        name = words.one_of(WOMEN if is_woman else MEN)
        article = "a"
        if profession[0] in "aeiou":
            article = "an"
        first = f"{name} is {article} {profession} and {pronouns.subject} {action}."
    if words.draw() < 0.5:
        return f"{first} {pronouns.possessive.capitalize()} {things} was new."
    return f"{first} We gave {pronouns.object} {pronouns.possessive} {things}."


def once_or_held_out(document: TextDocument) -> int:
    """Copies of a document about people or numbers in the training part."""
    if document.name.startswith("held-out/"):
        return 0
    return 1


CopiesOf = Callable[[TextDocument], int]
