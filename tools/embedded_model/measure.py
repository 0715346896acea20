"""Measures the embedded model on phrasings that training never saw, decoded greedily.

    python -m tools.embedded_model.measure

The prompt is the chat template of the folder, rendered. An answer is right when it holds every keyword of the
question's intent. Prints the share of right answers to the questions as they are written, with one typing
error in each, and as a second turn after a story; and the share of stories that speak of what was asked for.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from tools.embedded_model.conversations import Message
from tools.embedded_model.questions import Question, load_questions
from tools.embedded_model.stories import load_story_maker
from tools.embedded_model.train import DEFAULT_OUTPUT, load_weights
from tools.embedded_model.variations import with_typing_error
from tools.embedded_model.vocabulary import END, render
from torchchat_core.models.attention import CachedAttention, Segment
from torchchat_core.models.config import config_from_hugging_face
from torchchat_core.models.kv_cache import KVCache
from torchchat_core.models.transformer import Transformer

MEASURE_SEED = 1234
STORY_REQUESTS = 50
LONGEST_ANSWER = 100  # tokens
LONGEST_STORY = 320


@dataclass(frozen=True, kw_only=True)
class EmbeddedModel:
    """The model of a folder, with all that a conversation needs."""

    transformer: Transformer
    tokenizer: Tokenizer
    chat_template: str

    @torch.inference_mode()
    def answer(self, messages: Sequence[Message], longest: int = LONGEST_ANSWER) -> str:
        """What it says next in at most `longest` tokens, always taking the likeliest one."""
        config = self.transformer.config
        cache = KVCache(config, config.max_context, torch.float32, torch.device("cpu"))
        step = self.tokenizer.encode(render(messages, self.chat_template), add_special_tokens=False).ids
        end, answer = self.tokenizer.token_to_id(END), list[int]()
        while len(answer) < longest:
            positions = torch.arange(cache.length, cache.length + len(step))
            attend = CachedAttention(config, [Segment(cache, len(step))])
            last = torch.tensor([len(step) - 1])
            logits = self.transformer(torch.tensor(step), positions, attend, rows=last)  # [1, vocab]
            cache.advance(len(step))
            step = [int(logits[0].argmax())]
            if step[0] == end:
                break
            answer += step
        return self.tokenizer.decode(answer)


def load_model(folder: Path) -> EmbeddedModel:
    """The model in `folder`, in float32."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    transformer = Transformer(config_from_hugging_face(config))
    load_weights(transformer, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    template = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    return EmbeddedModel(transformer=transformer, tokenizer=tokenizer, chat_template=template)


def measure_questions(
    model: EmbeddedModel,
    questions: Sequence[Question],
    ask: Callable[[Question], list[Message]],
    show_wrong: bool = False,
) -> float:
    """The share of questions answered rightly, each asked as `ask` says."""
    right = 0
    for question in questions:
        answer = model.answer(ask(question))
        right += question.is_answered_by(answer)
        if show_wrong and not question.is_answered_by(answer):
            print(f"  wrong [{question.intent}] {question.text}\n      -> {answer}")
    return right / len(questions)


def measure_stories(model: EmbeddedModel, chance: random.Random) -> float:
    """The share of stories that name the hero or the thing that was asked for."""
    words = load_story_maker().words
    right = 0
    for _ in range(STORY_REQUESTS):
        noun = chance.choice([*words["heroes"], *words["toys"], *words["small"], *words["useful"]])
        article = "an" if noun[0] in "aeio" else "a"
        request = Message(role="user", content=f"Tell me a story about {article} {noun}.")
        right += noun in model.answer([request], LONGEST_STORY)
    return right / STORY_REQUESTS


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--show-wrong", action="store_true", help="print the wrong answers")
    parser.add_argument("--quick", action="store_true", help="the first figure alone")
    parser.add_argument("--validation", action="store_true", help="the phrasings for tuning, nothing else")
    parser.add_argument("--threads", type=int, default=1, help="more than one rarely helps so small a model")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chance = random.Random(MEASURE_SEED)
    model = load_model(arguments.folder)
    book = load_questions()
    questions = book.held_out_questions(chance)
    story = Message(role="assistant", content=load_story_maker().story(chance).text)

    def plainly(question: Question) -> list[Message]:
        return [Message(role="user", content=question.text)]

    def with_error(question: Question) -> list[Message]:
        return [Message(role="user", content=with_typing_error(question.text, chance))]

    def after_story(question: Question) -> list[Message]:
        return [Message(role="user", content="Tell me a story."), story, *plainly(question)]

    if arguments.validation:
        questions = book.validation_questions(chance)
        share = measure_questions(model, questions, plainly, arguments.show_wrong)
        print(f"{len(questions)} phrasings for tuning: {share:.1%}")
        return
    print(f"{len(questions)} held-out phrasings, greedy")
    print(f"as written:            {measure_questions(model, questions, plainly, arguments.show_wrong):.1%}")
    if not arguments.quick:
        print(f"with a typing error:   {measure_questions(model, questions, with_error):.1%}")
        print(f"as a second turn:      {measure_questions(model, questions, after_story):.1%}")
        print(f"stories on what was asked for: {measure_stories(model, chance):.1%} of {STORY_REQUESTS}")
        seen = [book.ask(intent, chance.choice(intent.phrasings), chance) for intent in book.intents]
        share = measure_questions(model, seen, plainly)
        print(f"for contrast, {len(seen)} phrasings that training saw: {share:.1%}")


if __name__ == "__main__":
    main()
