"""Generated instruction data for `ftw demo`: sources that differ in what they are worth for a small target.

Called by `ftw.experiment.job`. Everything follows from one seed; no file and no network is needed. The target
asks small arithmetic word problems. The pool holds, in the proportions of `SHARES`:

- useful: word problems of the same kinds about other people and things;
- redundant: six of the useful ones, over and over;
- irrelevant: letters turned round or spelt out, and sentences in an invented language;
- corrupted: prompts like the target's, with the response of some other sample of the pool, as a slipped column
  makes it, or with the right one's characters shuffled.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ftw.experiment.data import Sample

SHARES: Mapping[str, float] = {"useful": 0.10, "redundant": 0.20, "irrelevant": 0.45, "corrupted": 0.25}
"""Most of what is on offer does not help, as in a pool scraped together from everywhere."""

DISTINCT_REDUNDANT = 6


@dataclass(frozen=True)
class DemoData:
    """What a job needs. `generic` is text for pre-training: it shares the words, but not the tasks."""

    pool: list[Sample]
    target: list[Sample]
    test: list[Sample]
    generic: list[Sample]


def demo_data(seed: int = 0, *, pool: int = 1600, target: int = 32, test: int = 192, generic: int = 600) -> DemoData:
    """The demo's data; the same for the same seed. Target and test are disjoint draws of one distribution."""
    rng = random.Random(seed)
    wanted = _distinct(lambda: _problem(rng, *TARGET_WORLD, source="target"), target + test, set())
    taken = {sample.prompt for sample in wanted}
    counts = {source: round(share * pool) for source, share in SHARES.items()}
    useful = _distinct(lambda: _problem(rng, *POOL_WORLD, source="useful"), counts["useful"], taken)
    repeated = [Sample(each.prompt, each.response, "redundant") for each in useful[:DISTINCT_REDUNDANT]]
    redundant = [repeated[index % len(repeated)] for index in range(counts["redundant"])]
    irrelevant = [_irrelevant(rng) for _ in range(counts["irrelevant"])]
    others = [sample.response for sample in useful + redundant + irrelevant]
    corrupted = _distinct(lambda: _corrupted(rng, others), counts["corrupted"], taken)
    mixture = useful + redundant + irrelevant + corrupted
    rng.shuffle(mixture)
    return DemoData(mixture, wanted[:target], wanted[target:], [_generic(rng) for _ in range(generic)])


World = tuple[Sequence[str], Sequence[str], Sequence[str]]
"""Names, things, places."""

TARGET_WORLD: World = (
    ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry"),
    ("apples", "books", "coins", "eggs", "marbles", "pens", "stamps", "shells"),
    ("garden", "market", "school", "harbour"),
)
POOL_WORLD: World = (
    ("Ida", "Jonas", "Karin", "Leo", "Mona", "Nils", "Olga", "Paul"),
    ("cards", "pears", "stones", "cups", "nuts", "keys", "buttons", "candles"),
    ("kitchen", "station", "library", "park"),
)


def _problem(
    rng: random.Random, names: Sequence[str], things: Sequence[str], places: Sequence[str], source: str
) -> Sample:
    name, thing, place = rng.choice(names), rng.choice(things), rng.choice(places)
    a, b = rng.randint(2, 30), rng.randint(2, 20)
    kind = rng.randrange(3)
    if kind == 0:
        prompt = rng.choice(
            (
                f"{name} has {a} {thing} and finds {b} more in the {place}. How many {thing} now?",
                f"There are {a} {thing} in the {place}. {name} brings {b} more. How many in all?",
            )
        )
        answer = f"( {a} + {b} ) = {a + b}"
    elif kind == 1:
        a += b  # so that nobody gives away more than there is
        prompt = rng.choice(
            (
                f"{name} had {a} {thing} and lost {b} in the {place}. How many {thing} are left?",
                f"There were {a} {thing} in the {place}. {name} took {b}. How many are left?",
            )
        )
        answer = f"( {a} - {b} ) = {a - b}"
    else:
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        prompt = rng.choice(
            (
                f"{name} fills {a} bags with {b} {thing} each. How many {thing} in all?",
                f"In the {place} {name} sees {a} boxes of {b} {thing}. How many {thing} in all?",
            )
        )
        answer = f"( {a} * {b} ) = {a * b}"
    return Sample(prompt, answer, source)


def _irrelevant(rng: random.Random) -> Sample:
    words = [rng.choice((*POOL_WORLD[1], *TARGET_WORLD[1], *POOL_WORLD[2])) for _ in range(rng.randint(2, 3))]
    kind = rng.randrange(3)
    if kind == 0:
        return Sample(f"Write backwards: {' '.join(words)}", " ".join(words)[::-1], "irrelevant")
    if kind == 1:
        return Sample(f"Spell with dashes: {' '.join(words)}", " ".join("-".join(word) for word in words), "irrelevant")
    return Sample(f"Say in Velaric: {' '.join(words)}", " ".join(_velaric(word) for word in words), "irrelevant")


def _velaric(word: str) -> str:
    return "".join(SYLLABLES[ord(letter) % len(SYLLABLES)] for letter in word[:5])


SYLLABLES = ("ka", "lo", "mi", "tu", "ren", "so", "vel", "ani", "dor")


def _corrupted(rng: random.Random, others: Sequence[str]) -> Sample:
    asked = _problem(rng, *TARGET_WORLD, source="corrupted")
    shuffled = rng.random() < 0.5
    answer = asked.response
    while answer == asked.response:  # by chance the wrong answer can be the right one
        answer = "".join(rng.sample(answer, len(answer))).strip() if shuffled else rng.choice(others)
    return Sample(asked.prompt, answer, "corrupted")


def _generic(rng: random.Random) -> Sample:
    names, things, places = (a + b for a, b in zip(map(tuple, TARGET_WORLD), map(tuple, POOL_WORLD), strict=True))
    name, thing, place = rng.choice(names), rng.choice(things), rng.choice(places)
    first = rng.choice(
        (
            f"{name} went to the {place} in the morning.",
            f"The {place} was full of {thing}.",
            f"There were {rng.randint(2, 60)} {thing} near the {place}.",
        )
    )
    second = rng.choice(
        (
            f"{name} looked at the {thing} for a long time.",
            f"It was {rng.randint(2, 12)} o'clock, and nobody was left in the {place}.",
            f"In all of the {place} there were no better {thing}.",
            f"Then {name} counted {', '.join(str(n) for n in range(rng.randint(1, 40), 60)[:5])}.",
        )
    )
    return Sample(first, second, "generic")


def _distinct(draw: Callable[[], Sample], count: int, taken: set[str]) -> list[Sample]:
    found: list[Sample] = []
    seen = set(taken)
    while len(found) < count:
        sample = draw()
        if sample.prompt not in seen:
            seen.add(sample.prompt)
            found.append(sample)
    return found
