"""The tokenizer of the embedded model, learned from the training text, and its chat template."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Template
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tools.embedded_model.conversations import Document, DocumentMaker, Message

BEGIN, END = "<|begin|>", "<|end|>"
ROLE_TOKENS = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
SPECIAL_TOKENS = [BEGIN, END, *ROLE_TOKENS.values()]
VOCABULARY_SIZE = 2048
CONTEXT = 1024  # positions
DOCUMENTS_READ = 30_000
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the role has to be system, user or assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE of 2048 entries: any Unicode text can be written in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


def make_tokenizer(seed: int) -> Tokenizer:
    """The tokenizer for the documents of `seed`."""
    documents = itertools.islice(DocumentMaker(seed).documents(), DOCUMENTS_READ)
    return train_tokenizer(document.whole_text() for document in documents)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, as Hugging Face's libraries read them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    form = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    special = {str(index): {"content": token, **form} for index, token in enumerate(SPECIAL_TOKENS)}
    config = {
        "added_tokens_decoder": special,
        "bos_token": BEGIN,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": CONTEXT,
        "pad_token": END,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, value: object) -> None:
    """The value as readable JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def render(messages: Sequence[Message], template: str = CHAT_TEMPLATE) -> str:
    """The conversation as the model sees it, up to where the assistant begins to speak."""
    turns = [{"role": message.role, "content": message.content} for message in messages]
    text: str = Template(template).render(messages=turns, bos_token=BEGIN, add_generation_prompt=True)
    return text


@dataclass(frozen=True)
class Encoded:
    """The tokens of a document, what of it is learned, and where an answer about an intent begins."""

    ids: list[int]
    learned: list[bool]
    intents: list[str]  # at the token before an answer the intent of the answer, else nothing

    def beginning(self, count: int) -> Encoded:
        """The first tokens alone."""
        return Encoded(self.ids[:count], self.learned[:count], self.intents[:count])


def encode_document(tokenizer: Tokenizer, document: Document) -> Encoded:
    """Learned is what the assistant says, or all of a free story.

    The ids of a conversation are those of its rendered chat template.
    """
    begin, end, *roles = range(len(SPECIAL_TOKENS))
    role_ids = dict(zip(ROLE_TOKENS, roles, strict=True))
    ids, learned, intents = [begin], [False], [""]
    for message in document.messages or (Message(role="", content=document.text),):
        if message.role:
            ids.append(role_ids[message.role])
            learned.append(False)
            intents.append(message.intent)
        piece = [*tokenizer.encode(message.content.strip(), add_special_tokens=False).ids, end]
        ids += piece
        learned += [message.role in ("", "assistant")] * len(piece)
        intents += [""] * len(piece)
    return Encoded(ids, learned, intents)
