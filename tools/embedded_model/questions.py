"""What can be asked: the intents of questions.toml, and which of their phrasings training never sees."""

from __future__ import annotations

import itertools
import random
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

QUESTIONS_FILE = Path(__file__).with_name("questions.toml")
HELD_OUT_SHARE = 0.18
SHORTEST_HELD_OUT = 3  # words: shorter phrasings are part of too many other texts
SLOT = re.compile(r"\{(\w+)\}")
WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, kw_only=True)
class Intent:
    """One fact: ways of asking for it, what may be answered, and what a right answer holds."""

    id: str
    phrasings: tuple[str, ...]  # training sees these
    held_out: tuple[str, ...]  # and never these
    answers: tuple[str, ...]
    keywords: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with its slots filled."""

    intent: str
    text: str
    answer: str
    keywords: tuple[str, ...]

    def is_answered_by(self, answer: str) -> bool:
        """Whether the answer holds every keyword."""
        return all(keyword in answer for keyword in self.keywords)


@dataclass(frozen=True, kw_only=True)
class QuestionBook:
    """All intents, and the words that fill their slots."""

    intents: tuple[Intent, ...]
    slots: Mapping[str, Sequence[str]]
    defaults: Mapping[str, str]

    def ask(self, intent: Intent, phrasing: str, chance: random.Random) -> Question:
        """The question that this phrasing makes, its slots filled at random."""
        named = dict(self.defaults)

        def fill(match: re.Match[str]) -> str:
            named[match[1]] = chance.choice(self.slots[match[1]])
            return named[match[1]]

        text = SLOT.sub(fill, phrasing)
        return Question(intent=intent.id, text=text, answer=fill_named(chance.choice(intent.answers), named),
                        keywords=tuple(fill_named(keyword, named) for keyword in intent.keywords))

    def held_out_questions(self, chance: random.Random) -> list[Question]:
        """Every phrasing that training never saw, once."""
        return [self.ask(intent, phrasing, chance) for intent in self.intents for phrasing in intent.held_out]

    def held_out_texts(self) -> Iterable[str]:
        """Every held-out phrasing with every filling of its slots."""
        for phrasing in itertools.chain.from_iterable(intent.held_out for intent in self.intents):
            fillings = [self.slots[name] for name in SLOT.findall(phrasing)]
            pieces = SLOT.sub("\0", phrasing).split("\0")
            for words in itertools.product(*fillings):
                yield "".join(itertools.chain.from_iterable(zip(pieces, (*words, ""), strict=True)))


class LeakDetector:
    """Finds held-out phrasings in text, whatever the case and the punctuation."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._phrases = {normalised(text) for text in texts}
        self._lengths = sorted({phrase.count(" ") + 1 for phrase in self._phrases})

    def find(self, text: str) -> str | None:
        """The first held-out phrasing that stands in the text as whole words, or None."""
        words = normalised(text).split(" ")
        for length in self._lengths:
            for start in range(len(words) - length + 1):
                phrase = " ".join(words[start : start + length])
                if phrase in self._phrases:
                    return phrase
        return None


def load_questions(path: Path = QUESTIONS_FILE, seed: int = 0) -> QuestionBook:
    """The intents of `path`; `seed` decides which phrasings are held out."""
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    phrasings = {entry["id"]: tuple(entry["phrasings"].strip().splitlines()) for entry in raw["intent"]}
    everything = [normalised(phrasing) for group in phrasings.values() for phrasing in group]
    everything += [normalised(answer) for entry in raw["intent"] for answer in entry["answers"]]
    held_out = {name: choose_held_out(group, everything, random.Random(f"{seed}:{name}"))
                for name, group in phrasings.items()}
    intents = tuple(
        Intent(id=entry["id"], answers=tuple(entry["answers"]), keywords=tuple(entry["keywords"]),
               held_out=tuple(sorted(held_out[entry["id"]])),
               phrasings=tuple(text for text in phrasings[entry["id"]] if text not in held_out[entry["id"]]))
        for entry in raw["intent"]
    )
    return QuestionBook(intents=intents, slots=raw["slots"], defaults=raw["defaults"])


def choose_held_out(phrasings: Sequence[str], everything: Sequence[str], chance: random.Random) -> set[str]:
    """About 18 % of an intent's phrasings, none of them part of another text."""
    fit = [phrasing for phrasing in phrasings if stands_alone(normalised(phrasing), everything)]
    return set(chance.sample(fit, min(len(fit), max(1, round(HELD_OUT_SHARE * len(phrasings))))))


def stands_alone(phrase: str, everything: Sequence[str]) -> bool:
    """Whether the phrase is long enough, and part of no text but its own."""
    inside = sum(f" {phrase} " in f" {text} " for text in everything)
    return phrase.count(" ") + 1 >= SHORTEST_HELD_OUT and inside == 1


def normalised(text: str) -> str:
    """Lower case, words alone, one space between them."""
    return " ".join(WORD.findall(text.lower()))


def fill_named(text: str, named: Mapping[str, str]) -> str:
    """The text with the slots that have a name filled; other braces stay."""
    return SLOT.sub(lambda match: named.get(match[1], match[0]), text)
