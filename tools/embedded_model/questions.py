"""What can be asked: the intents of questions.toml and phrasings.toml, and the phrasings training never sees."""

from __future__ import annotations

import itertools
import random
import re
import tomllib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

QUESTIONS_FILE = Path(__file__).with_name("questions.toml")
PHRASINGS_FILE = Path(__file__).with_name("phrasings.toml")
VALIDATION_PART = 20  # one in so many of the phrasings in phrasings.toml is for tuning, not for training
SLOT = re.compile(r"\{(\w+)\}")
WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, kw_only=True)
class Intent:
    """One fact: ways of asking for it, what may be answered, and what a right answer holds."""

    id: str
    phrasings: tuple[str, ...]  # training sees these
    held_out: tuple[str, ...]  # and never these
    validation: tuple[str, ...]  # nor these, which may be looked at for tuning
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

    def validation_questions(self, chance: random.Random) -> list[Question]:
        """Every phrasing that is kept for tuning, once."""
        return [self.ask(intent, phrasing, chance) for intent in self.intents for phrasing in intent.validation]

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


def load_questions(path: Path = QUESTIONS_FILE, more_path: Path = PHRASINGS_FILE) -> QuestionBook:
    """The intents of `path`, with the phrasings of `more_path` that do not hold a held-out one."""
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    more = tomllib.loads(more_path.read_text(encoding="utf-8"))
    intents = tuple(
        Intent(id=entry["id"], answers=tuple(entry["answers"]), keywords=tuple(entry["keywords"]),
               phrasings=lines_of(entry["phrasings"]), held_out=lines_of(entry["held_out"]), validation=())
        for entry in raw["intent"]
    )
    book = QuestionBook(intents=intents, slots={**raw["slots"], **more["slots"]}, defaults=raw["defaults"])
    detector = LeakDetector(book.held_out_texts())
    seen = {normalised(phrasing) for intent in intents for phrasing in intent.phrasings}
    return replace(book, intents=tuple(
        with_more_phrasings(intent, more["phrasings"].get(intent.id, ""), detector, seen) for intent in intents
    ))


def with_more_phrasings(intent: Intent, lines: str, detector: LeakDetector, seen: set[str]) -> Intent:
    """The intent with these lines shared out between training and validation; each is added to `seen`."""
    training, validation = list(intent.phrasings), list[str]()
    for line in lines_of(lines):
        known = normalised(line)
        if known in seen or detector.find(line) is not None:
            continue
        seen.add(known)
        (validation if zlib.crc32(line.encode()) % VALIDATION_PART == 0 else training).append(line)
    return replace(intent, phrasings=tuple(training), validation=tuple(validation))


def lines_of(text: str) -> tuple[str, ...]:
    """The lines, without those that are empty."""
    return tuple(line for line in text.splitlines() if line.strip())


def normalised(text: str) -> str:
    """Lower case, words alone, one space between them."""
    return " ".join(WORD.findall(text.lower()))


def fill_named(text: str, named: Mapping[str, str]) -> str:
    """The text with the slots that have a name filled; other braces stay."""
    return SLOT.sub(lambda match: named.get(match[1], match[0]), text)
