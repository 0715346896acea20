"""What C++ puts together from pieces is what Jinja makes of the template."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from probing import Probe, ProbeError

from torchchat_core.chat_pieces import chat_pieces
from torchchat_core.chat_template import BUILT_IN, ChatTemplate
from torchchat_core.errors import TorchchatError

REAL = ["Qwen-Qwen2.5-7B-Instruct", "google-gemma-2-2b-it", "meta-llama-Llama-3.1-8B-Instruct",
        "meta-llama-Llama-3.2-3B-Instruct", "microsoft-Phi-3.5-mini-instruct", "mistralai-Mistral-Nemo-Instruct-2407"]
TEXTS = ["Hello!", " padded\n", "line\n\nline", "\x1fodd\u2003", "1 + 1", "user", "<|im_end|>", "\u00e9\u4e16",
         "{{ 1 }}"]


def template_of(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>")


def conversations() -> list[tuple[str | None, list[tuple[str, str | None]]]]:
    chance = random.Random(5)
    found: list[tuple[str | None, list[tuple[str, str | None]]]] = []
    for count in (1, 1, 2, 2, 3, 4, 7):
        for system in (None, chance.choice(TEXTS)):
            turns: list[tuple[str, str | None]] = [(chance.choice(TEXTS), chance.choice(TEXTS)) for _ in range(count)]
            found.append((system, [*turns[:-1], (turns[-1][0], None)]))
    return found


def messages(system: str | None, turns: list[tuple[str, str | None]]) -> list[dict[str, str]]:
    made = [] if system is None else [{"role": "system", "content": system}]
    for user, assistant in turns:
        made.append({"role": "user", "content": user})
        if assistant is not None:
            made.append({"role": "assistant", "content": assistant})
    return made


def outcome(call: Any) -> str | None:
    try:
        return str(call())
    except (ProbeError, TorchchatError):
        return None


def compare(template: ChatTemplate, probe: Probe) -> int:
    pieces, rendered = chat_pieces(template), 0
    for system, turns in conversations():
        expected = outcome(lambda: template.render(messages(system, turns)))  # noqa: B023 - called at once
        found = outcome(lambda: probe.ask("render", pieces=pieces, system=system, turns=turns))  # noqa: B023
        assert found == expected
        rendered += found is not None
    return rendered


@pytest.mark.parametrize("name", REAL)
def test_prompts_of_real_templates_are_those_of_jinja(name: str, testdata: Path, probe: Probe) -> None:
    rendered = compare(template_of((testdata / f"templates/{name}.jinja").read_text("utf-8")), probe)
    assert rendered == (7 if "gemma" in name else 14)  # that one refuses system messages


@pytest.mark.parametrize("name", [path.name for path in sorted(BUILT_IN.glob("*.jinja"))])
def test_prompts_of_built_in_templates_are_those_of_jinja(name: str, probe: Probe) -> None:
    assert compare(template_of((BUILT_IN / name).read_text("utf-8")), probe) == 14


THINKING = ("{% for m in messages %}"
            "{% set text = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content %}"
            "<|{{ m.role }}|>{{ text }}{% endfor %}<|assistant|>")


def test_a_message_that_the_template_looks_into_is_refused(probe: Probe) -> None:
    pieces = chat_pieces(template_of(THINKING))
    assert pieces["unless"] == {"assistant": ["</think>"]}
    turns = [["question", "thought</think>answer"], ["more", None]]
    with pytest.raises(ProbeError, match="</think>"):
        probe.ask("render", pieces=pieces, system=None, turns=turns)
    turns[0][1] = "answer"
    assert probe.ask("render", pieces=pieces, system=None, turns=turns) == \
        "<|user|>question<|assistant|>answer<|user|>more<|assistant|>"


@pytest.mark.parametrize(("source", "reason"), [
    ("{{ messages[-1].content }}", "or leaves one out"),
    ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "another order"),
    ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "leaves a message out"),
    ("{% for m in messages %}{{ m.content[:9] }}{% endfor %}", "something else"),
    ("{% for m in messages %}{{ loop.index }} {{ m.content }}{% endfor %}", "something else"),
])
def test_what_pieces_cannot_say_is_refused_with_the_reason(source: str, reason: str, probe: Probe) -> None:
    pieces = chat_pieces(template_of(source))
    with pytest.raises(ProbeError, match=reason):
        probe.ask("render", pieces=pieces, system=None, turns=[["a", "b"], ["c", "d"], ["e", "f"], ["g", None]])
