"""Short stories in simple words, put together from the words and plots in stories.toml.

A story has a hero, a friend, a place, a thing, a problem and its end. `StoryMaker.story` tells one for a
random generator: the same state of the generator gives the same story.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STORIES_FILE = Path(__file__).with_name("stories.toml")

PRONOUNS = {
    "girl": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
    "boy": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
}
QUEENLY = frozenset({"queen", "princess", "hen", "cow", "fairy"})
KINGLY = frozenset({"king", "prince", "knight", "wizard"})
THING_SHARE = 0.5  # of stories: asked for by their thing, else by their hero
REQUESTS = (
    "Tell me a story about {topic}", "Tell me a story about {topic}.", "tell me a story about {topic}",
    "Can you tell me a story about {topic}?", "I would like a story about {topic}.",
    "a story about {topic} please", "Please tell me a short story about {topic}.",
    "Write a story about {topic}", "write me a story about {topic}", "Make up a story about {topic}.",
    "story about {topic}",
    "Tell a story about {topic}!", "Do you know a story about {topic}?",
    "I want to hear a story about {topic}",
    "Now a story about {topic}, please.", "Could you write a little story about {topic}?",
    "how about a story about {topic}",
)
OPEN_REQUESTS = (
    "Tell me a story", "Tell me a story.", "tell me a story please", "Tell me another story.",
    "Another story, please.", "I want a story", "Can you tell me a bedtime story?", "story", "one more story",
    "Write a short story.", "Please tell me a story.", "a new story please", "Let me hear a story.",
)


@dataclass(frozen=True, kw_only=True)
class Story:
    """A story, and the subjects under which somebody could ask for it."""

    text: str
    topics: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StoryMaker:
    """The words and plots of stories.toml."""

    words: Mapping[str, Sequence[str]]
    frames: Mapping[str, Sequence[str]]
    plots: Sequence[Mapping[str, Any]]

    def story(self, chance: random.Random, invented: str | None = None) -> Story:
        """One story, told from `chance`; `invented` is a word for its hero's kind or its thing, in no list.

        A story that is asked for by its thing names the thing in its first sentence.
        """
        plot = chance.choice(self.plots)
        about_thing = chance.random() < THING_SHARE
        hero, thing = (None, invented) if about_thing else (invented, None)
        slots, hero_topics, thing_topics = self._cast(chance, plot, hero, thing)
        openings = self.frames["thing_openings" if about_thing else "openings"]
        beats = [openings, self.frames["habits"], *plot["beats"], self.frames["closings"]]
        sentences = [chance.choice(beat).format_map(slots) for beat in beats]
        topics = thing_topics if about_thing else (*hero_topics, chance.choice(plot["themes"]))
        return Story(text=_paragraphs(sentences, chance), topics=topics)

    def _cast(
        self, chance: random.Random, plot: Mapping[str, Any], invented: str | None, invented_thing: str | None
    ) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
        """What fills the slots of one story, the subjects that its hero makes, and those of its thing."""
        hero = self._hero(chance, invented)
        friend = self._friend(chance, hero["name"])
        plain, adjective = (chance.choice(self.words[key]) for key in (plot["objects"], "object_adjectives"))
        plain = invented_thing or plain
        thing = plain if chance.random() < 0.7 else f"{adjective} {plain}"
        in_place, place = chance.choice(self.words["places"]).split("|")
        animal = chance.choice(self.words["animals"])
        spots = chance.sample(self.words["spots"], 3)
        slots = {
            **hero, "friend": friend, "object": thing, "a_object": with_article(thing), "plain": plain,
            "a_object_capital": capital(with_article(thing)),
            "in_place": in_place, "In_place": capital(in_place), "place": place,
            "animal": with_article(animal), "animal_capital": capital(with_article(animal)),
            "animal_kind": animal,
            "spot": spots[0], "spot_capital": capital(spots[0]), "spot2": spots[1], "spot3": spots[2],
            "food": chance.choice(self.words["foods"]), "hobby": chance.choice(self.words["hobbies"]),
        }
        kind, a_object = with_article(hero["kind"]), slots["a_object"]
        hero_topics = (
            kind, kind, kind, kind, place, f"{kind} {in_place}", f"{kind} named {hero['name']}", hero["name"],
            f"{hero['name']} and {friend}", hero["a_hero"],
        )
        thing_topics = (with_article(plain), with_article(plain), a_object, f"{kind} and {a_object}")
        return slots, hero_topics, thing_topics

    def _hero(self, chance: random.Random, invented: str | None) -> dict[str, str]:
        gender = chance.choice(("girl", "boy"))
        if invented is None and chance.random() < 0.25:
            kind, name = gender, chance.choice(self.words[f"{gender}s"])
        else:
            kind = invented or chance.choice(self.words["heroes"])
            gender = "girl" if kind in QUEENLY else "boy" if kind in KINGLY else gender
            name = chance.choice(self.words["female_names" if gender == "girl" else "male_names"])
        adjective = chance.choice(self.words["hero_adjectives"])
        described = kind if chance.random() < 0.6 else f"{adjective} {kind}"
        pronouns = PRONOUNS[gender]
        return {
            "kind": kind, "name": name, "a_hero": f"{with_article(described)} named {name}", **pronouns,
            "He": capital(pronouns["he"]), "His": capital(pronouns["his"]),
        }

    def _friend(self, chance: random.Random, hero_name: str) -> str:
        groups = ("girls", "boys", "female_names", "male_names")
        return chance.choice([name for group in groups for name in self.words[group] if name != hero_name])


def load_story_maker(path: Path = STORIES_FILE) -> StoryMaker:
    """The maker with the words and plots of `path`."""
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    return StoryMaker(words=raw["words"], frames=raw["frames"], plots=raw["plot"])


def story_request(story: Story, chance: random.Random) -> str:
    """One way of asking for this story."""
    if chance.random() < 0.15:
        return chance.choice(OPEN_REQUESTS)
    return chance.choice(REQUESTS).format(topic=chance.choice(story.topics))


def with_article(words: str) -> str:
    """`a` or `an` before the words, by their first letter."""
    if words == "snow":
        return words
    return f"an {words}" if words[0] in "aeio" else f"a {words}"


def capital(words: str) -> str:
    """The words with a capital first letter."""
    return words[0].upper() + words[1:]


def _paragraphs(sentences: Sequence[str], chance: random.Random) -> str:
    """The story in two or three paragraphs, as a page would have it."""
    if chance.random() < 0.5:
        return " ".join(sentences)
    first, last = 2, len(sentences) - chance.choice((1, 2, 3))
    parts = (sentences[:first], sentences[first:last], sentences[last:])
    return "\n\n".join(" ".join(part) for part in parts)


if __name__ == "__main__":
    print(load_story_maker().story(random.Random()).text)
