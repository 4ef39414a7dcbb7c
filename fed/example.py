"""Made-up sentences to try a federation with, where no data is at hand: an example, and nothing to measure by."""

from __future__ import annotations

import random
from typing import Final

SEED: Final = 7
"""Of the choice of sentences: any will do, and the same sentences are made everywhere."""

_THINGS: Final[dict[str, tuple[str, ...]]] = {
    "kitchen": ("the soup", "the bread", "the coffee", "our dinner", "the cake", "the salad"),
    "travel": ("the train ride", "the hotel room", "the ferry", "the guided tour", "the airport bus", "the campsite"),
    "shop": ("the umbrella", "the lamp", "the backpack", "the headphones", "the chair", "the alarm clock"),
}

_SAID: Final[dict[str, tuple[str, ...]]] = {
    "good": (
        "{thing} was better than we had hoped",
        "we would choose {thing} again at once",
        "{thing} made the whole day brighter",
        "nothing at all was wrong with {thing}",
        "everybody praised {thing}",
        "{thing} was worth every cent",
    ),
    "bad": (
        "{thing} was worse than we had feared",
        "we would never choose {thing} again",
        "{thing} spoiled the whole day",
        "hardly anything was right with {thing}",
        "everybody complained about {thing}",
        "{thing} was a waste of money",
    ),
}

_ENDS: Final = ("", ", I must say", ", as we told the neighbours", ", and that is all there is to it")


def rows() -> list[dict[str, str]]:
    """Sentences with what they say (`label`: good or bad) and what they speak of (`topic`), in random order."""
    found = [
        {"text": said.format(thing=thing).capitalize() + end + ".", "label": label, "topic": topic}
        for topic, things in _THINGS.items()
        for thing in things
        for label, sentences in _SAID.items()
        for said in sentences
        for end in _ENDS
    ]
    random.Random(SEED).shuffle(found)
    return found
