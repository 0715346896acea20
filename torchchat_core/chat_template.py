"""Chat templates: what makes one prompt of a conversation's messages."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateSyntaxError, nodes

from torchchat_core.errors import TorchchatError, quoted, shortened
from torchchat_core.small_files import read_json, read_text
from torchchat_core.specs import ModelFiles, Tokenizer
from torchchat_core.template_limits import limited, measure
from torchchat_core.template_sandbox import chat_environment
from torchchat_core.tokenizers.declared import token_name

LONGEST_SOURCE = 64 * 1024  # the longest in use have some 20 thousand characters
LARGEST_GIVEN = 1 << 40  # the caller's own messages are measured, not limited
BUILT_IN = Path(__file__).parent / "data" / "templates"

TURN_ENDS = (
    "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "</s>", "<|endoftext|>",
    "<|end_of_text|>", "<|return|>", "<|call|>", "<|END_OF_TURN_TOKEN|>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
)

CHAT_NAME = re.compile(r"(?<![a-z])(instruct|chat)(?![a-z])", re.IGNORECASE)
LLAMA2_NAME = re.compile(r"(?<![a-z])(llama[-_. ]?2.*[-_. ]chat|code[-_. ]?llama.*[-_. ]instruct)(?![a-z])",
                         re.IGNORECASE)
MISTRAL_NAME = re.compile(r"(?<![a-z])(mistral|mixtral).*[-_. ]instruct(?![a-z])", re.IGNORECASE)


class ChatTemplate:
    """A Jinja template in a sandbox, with the names that `transformers` gives to chat templates.

    `bos_token` and `eos_token` are texts; one that is None is undefined in the template. `tool_source` is another
    template, for conversations with tools. Raises `TorchchatError` where a source is too long or no template.
    """

    def __init__(self, source: str, *, bos_token: str | None, eos_token: str | None,
                 tool_source: str | None = None) -> None:
        self.source = source
        self.tool_source = tool_source
        self.bos_token = bos_token
        self.eos_token = eos_token
        self._template = _compiled(source)
        self._tool_template = self._template if tool_source is None else _compiled(tool_source, "tool_use")

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Every attribute name and string constant in the template source: the message fields that it may read."""
        found: set[str] = set()
        for source in {self.source, self.tool_source or self.source}:
            with limited():
                tree = chat_environment().parse(source)
                found.update(node.attr for node in tree.find_all(nodes.Getattr))
                found.update(node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
        return frozenset(found)

    def render(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None,
               add_generation_prompt: bool = True, variables: Mapping[str, Any] | None = None) -> str:
        """The prompt. `variables` are further ones of the template, by name.

        Raises `TorchchatError` where there are no messages, or where the template refuses them, fails, reaches for
        attributes that are none of its business, or takes too long or too much memory.
        """
        if not messages:
            raise TorchchatError("the conversation has no messages; it needs at least one")
        names = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        given: dict[str, Any] = {name: text for name, text in names.items() if text is not None}
        given |= {"messages": messages, "tools": tools, "documents": None,
                  "add_generation_prompt": add_generation_prompt, **(variables or {})}
        template = self._template if tools is None else self._tool_template
        try:
            with limited(measure(given, LARGEST_GIVEN)):
                return template.render(given)
        except TorchchatError:
            raise
        except RecursionError as error:
            raise TorchchatError("the chat template was stopped: it calls itself without end") from error
        except Exception as error:
            raise TorchchatError(f"the chat template failed{_place(error)}: "
                                 f"{shortened(str(error)) or type(error).__name__}",
                                 "it does not suit these messages, or is wrong") from error


def find_chat_template(files: ModelFiles, settings: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of a model: chat_template.jinja, that in `settings` (tokenizer_config.json) or in the tokenizer's
    own file, or a built-in one. additional_chat_templates/tool_use.jinja replaces the one for tools, as in
    `transformers`.

    A model without either gets a built-in template only where its control tokens and its name agree that it was
    trained for conversations in that format; names are the last parts of what the user typed, of where that leads,
    and of the folder:

    - Llama 3: the tokenizer has <|start_header_id|> and <|eot_id|>, a name says "instruct" or "chat";
    - Llama 2: it has <s> and </s>, a name says "llama 2 ... chat" or "code llama ... instruct";
    - Mistral: it has <s> and </s>, a name says "mistral ... instruct" or "mixtral ... instruct".

    Any other model is taken for a base model: None. Raises `TorchchatError` for a template that is malformed.
    """
    tool_source = None
    named = {path.stem: path for path in files.more_chat_templates}
    if files.chat_template is not None:
        source = read_text(files.chat_template)
        if files.chat_template.suffix == ".json":
            source, tool_source = _sources(read_json(files.chat_template).get("chat_template"))
    elif "default" in named:
        source = read_text(named["default"])
    elif settings.get("chat_template") is not None:
        source, tool_source = _sources(settings["chat_template"])
    elif tokenizer.chat_template is not None:
        source, tool_source = _sources(tokenizer.chat_template)
    else:
        name = _built_in(files, tokenizer)
        if name is None:
            return None
        source = read_text(BUILT_IN / f"{name}.jinja")
    if "tool_use" in named:
        tool_source = read_text(named["tool_use"])
    return ChatTemplate(source, bos_token=_token_text(settings, "bos_token", tokenizer, tokenizer.bos_id),
                        eos_token=_token_text(settings, "eos_token", tokenizer, tokenizer.eos_id),
                        tool_source=tool_source)


def end_tokens(template: ChatTemplate, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the control tokens known to end a turn that the template writes and the tokenizer has."""
    text = template.source + (template.tool_source or "")
    found = (tokenizer.encode(name, special=True) for name in TURN_ENDS if name in text)
    return frozenset(ids[0] for ids in found if len(ids) == 1)


def _compiled(source: str, name: str | None = None) -> Template:
    what = "the chat template" if name is None else f"the chat template {quoted(name)}"
    if len(source) > LONGEST_SOURCE:
        raise TorchchatError(f"{what} has {len(source)} characters; {LONGEST_SOURCE} is the most")
    try:
        with limited():
            return chat_environment().template(source)
    except TemplateSyntaxError as error:
        raise TorchchatError(f"{what} is wrong in line {error.lineno}: "
                             f"{shortened(error.message or '')}") from error
    except Exception as error:  # Python's own limits: nesting of brackets and of blocks
        raise TorchchatError(f"{what} cannot be compiled: {type(error).__name__}: "
                             f"{shortened(str(error))}") from error


def _place(error: BaseException) -> str:
    """" in line N" of the template, where the traceback, which Jinja rewrites, says so."""
    line, step = None, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<template>":
            line = step.tb_lineno
        step = step.tb_next
    return "" if line is None else f" in line {line}"


def _sources(declared: object) -> tuple[str, str | None]:
    """The template for conversations, and that for conversations with tools where there is one."""
    if isinstance(declared, str):
        return declared, None
    entries = declared if isinstance(declared, list) else []
    named = {entry.get("name"): entry.get("template") for entry in entries if isinstance(entry, dict)}
    default, tool_use = named.get("default"), named.get("tool_use")
    if not isinstance(default, str):
        raise TorchchatError(f"chat_template is {quoted(declared)}; it has to be a text, or a list of objects with "
                             "\"name\" and \"template\" of which one is called \"default\"")
    return default, tool_use if isinstance(tool_use, str) else None


def _built_in(files: ModelFiles, tokenizer: Tokenizer) -> str | None:
    folder = files.root.parent if files.root.name == "original" else files.root  # of Meta's files in hub repositories
    names = [Path(text).name for text in (files.ref.text, files.ref.location)] + [folder.name]
    control = tokenizer.special_tokens.keys()
    if control >= {"<|start_header_id|>", "<|eot_id|>"}:
        return "llama3" if any(map(CHAT_NAME.search, names)) else None
    if control >= {"<s>", "</s>"}:
        if any(map(LLAMA2_NAME.search, names)):
            return "llama2"
        if any(map(MISTRAL_NAME.search, names)):
            return "mistral_v3" if "[INST]" in control else "mistral"
    return None


def _token_text(settings: Mapping[str, Any], key: str, tokenizer: Tokenizer, token: int | None) -> str | None:
    """What the settings call a token, else its text in the tokenizer."""
    by_id = {number: text for text, number in tokenizer.special_tokens.items()}
    return token_name(settings, key) or (None if token is None else by_id.get(token))
