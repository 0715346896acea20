"""Find tokens that structure a conversation although the model's files declare them as ordinary text."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jinja2 import nodes

from torchchat_core.chat_template import ChatTemplate
from torchchat_core.errors import TorchchatError
from torchchat_core.specs import Tokenizer
from torchchat_core.template_sandbox import chat_environment
from torchchat_core.tokenizers.words import Words

CONTENT = "\ue000"  # stands for the content of each message in rendered conversations
WORD = re.compile(r"\w+")


def unnamed_control_tokens(tokenizer: Tokenizer, template: ChatTemplate | None, end_ids: Collection[int]
                           ) -> dict[str, int]:
    """Return text -> id of control tokens that ordinary text encodes to, so that messages could inject them.

    These are the added tokens that end an answer and those that the template writes around messages. Texts that the
    template looks for in messages ("</think>") are excluded, because messages need them; so are white space and words.
    """
    texts = {text: token for text, token in _text_tokens(tokenizer).items() if text.strip()}
    found = {text: token for text, token in texts.items() if token in end_ids}
    if template is None or not texts.keys() - found.keys():
        return found
    rendered = list(_conversations(template))
    present = [name for name in (*texts, *tokenizer.special_tokens) if any(name in text for text in rendered)]
    splitter = Words(present)
    written = {part for text in rendered for part, is_word in splitter.split(text) if is_word}
    candidates = [text for text in written if text in texts and not WORD.fullmatch(text)]
    searched = list(_searched_texts(template.source)) if candidates else []
    return found | {text: texts[text] for text in sorted(candidates) if not any(text in each for each in searched)}


def _text_tokens(tokenizer: Tokenizer) -> Mapping[str, int]:
    found: Mapping[str, int] = getattr(tokenizer, "text_tokens", {})
    return found


def _conversations(template: ChatTemplate) -> Iterator[str]:
    """Yield plain conversations rendered by the template; those that it rejects are skipped."""
    user, assistant, system = ({"role": role, "content": CONTENT} for role in ("user", "assistant", "system"))
    for messages in ([user], [user, assistant, user], [system, user, assistant, user]):
        try:
            yield template.render(messages, add_generation_prompt=False)
        except TorchchatError:
            continue


def _searched_texts(source: str) -> Iterator[str]:
    """Yield the texts that the template compares messages with or passes to their methods."""
    for node in chat_environment().parse(source).find_all((nodes.Compare, nodes.Call)):
        if isinstance(node, nodes.Compare) or isinstance(_callee(node), nodes.Getattr):
            yield from (each.value for each in node.find_all(nodes.Const) if isinstance(each.value, str))


def _callee(node: Any) -> Any:
    return node.node
