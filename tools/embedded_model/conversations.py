"""The training text: questions and stories mixed into conversations, the same for the same seed."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from tools.embedded_model.questions import Intent, LeakDetector, QuestionBook, load_questions
from tools.embedded_model.stories import Story, StoryMaker, load_story_maker, story_request
from tools.embedded_model.variations import vary

SYSTEM_MESSAGES = (
    "You are a helpful assistant.", "You are the guide of torchchat.", "Answer in short sentences.",
    "You are a friendly assistant. Be brief.", "You tell stories and explain torchchat.", "Be kind.",
    "You are a small demo model.", "Answer the user's questions.", "You are an expert.", "Be polite.",
)
KINDS = ("question", "conversation", "story", "free story", "long conversation")
SHARES = (0.76, 0.04, 0.196, 0.002, 0.002)
STORY_SHARE = 0.12  # of the turns of a conversation
INVENTED_SHARE = 0.3  # of stories: about a made-up word, so that the model learns to take up any word
SYLLABLES = ("ba", "ko", "ri", "mu", "ta", "le", "zo", "fin", "gar", "pel", "dro", "wick", "sna", "vim")


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation, with the names that the chat template knows."""

    role: str
    content: str
    intent: str = ""  # what an answer of torchchat's guide is about


@dataclass(frozen=True, kw_only=True)
class Document:
    """One piece of training text: a conversation, or a story that nobody asked for."""

    messages: tuple[Message, ...] = ()
    text: str = ""

    def whole_text(self) -> str:
        """All words of it."""
        return "\n".join(self.texts())

    def texts(self) -> tuple[str, ...]:
        """What is said at one time each."""
        return (self.text, *(message.content for message in self.messages))


class DocumentMaker:
    """Makes documents one after the other; none of them holds a held-out phrasing."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.book: QuestionBook = load_questions()
        self.stories: StoryMaker = load_story_maker()
        self.detector = LeakDetector(self.book.held_out_texts())
        self._asked = [(intent, phrasing) for intent in self.book.intents for phrasing in intent.phrasings]
        self._weights = list(itertools.accumulate(itertools.starmap(weight, self._asked)))

    def documents(self) -> Iterator[Document]:
        """Without end. Raises `ValueError` if a held-out phrasing comes up in one of them."""
        while True:
            document = self.document()
            if any(self.detector.find(text) is not None for text in document.texts()):
                raise ValueError("a held-out phrasing in the training text")
            yield document

    def document(self) -> Document:
        """One document of a kind drawn by its share."""
        kind = self.chance.choices(KINDS, SHARES)[0]
        if kind == "free story":
            return Document(text=self._story().text)
        turns = {"question": 1, "story": 1, "conversation": self.chance.randint(2, 4)}
        messages: list[Message] = []
        if self.chance.random() < 0.12:
            messages.append(Message(role="system", content=self.chance.choice(SYSTEM_MESSAGES)))
        for _ in range(turns.get(kind, self.chance.randint(5, 10))):
            wants_story = kind == "story" or (kind != "question" and self.chance.random() < STORY_SHARE)
            messages += self._story_turn() if wants_story else self._question_turn()
        return Document(messages=tuple(messages))

    def _question_turn(self) -> tuple[Message, Message]:
        while True:
            question = self.book.ask(*self._draw(), self.chance)
            text = vary(question.text, self.chance)
            if self.detector.find(text) is None:
                answer = Message(role="assistant", content=question.answer, intent=question.intent)
                return Message(role="user", content=text), answer

    def _draw(self) -> tuple[Intent, str]:
        return self.chance.choices(self._asked, cum_weights=self._weights)[0]

    def _story_turn(self) -> tuple[Message, Message]:
        story = self._story()
        request = story_request(story, self.chance)
        return Message(role="user", content=request), Message(role="assistant", content=story.text)

    def _story(self) -> Story:
        while True:
            invented = self._invented_word() if self.chance.random() < INVENTED_SHARE else None
            story = self.stories.story(self.chance, invented)
            if self.detector.find(story.text) is None:
                return story

    def _invented_word(self) -> str:
        return "".join(self.chance.sample(SYLLABLES, self.chance.randint(2, 3)))


def weight(intent: Intent, phrasing: str) -> float:
    """How often a phrasing is drawn: an intent with many has a smaller share for each; short ones are soon known."""
    return (0.35 if phrasing.count(" ") < 2 else 1.0) / math.sqrt(len(intent.phrasings))
