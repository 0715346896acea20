"""How byte-level vocabularies cut text into words before bytes are merged, by the names in `tokenizer.ggml.pre`.

A GGUF file holds the name alone, and what it means is fixed by llama.cpp (src/llama-vocab.cpp): some regular
expressions, applied one after the other, each to the pieces that the one before it left. Where a model's own
tokenizer.json has an expression that llama.cpp rewrites for its engine, the table has the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchchat_core.errors import TorchchatError, did_you_mean, quoted


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """One way of cutting text."""

    expressions: tuple[str, ...]  # in the syntax of Oniguruma, which the tokenizers library uses
    ignore_merges: bool = False  # a word that is a token stays one, whether merges lead to it or not
    adds_bos: bool = False  # where the file does not say whether texts start with BOS


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = "|".join([_CONTRACTIONS, _WORD, r"\p{N}{1,3}", _SYMBOLS, _SPACES])
_QWEN2 = "|".join([_CONTRACTIONS, _WORD, r"\p{N}", _SYMBOLS, _SPACES])
_QWEN35 = "|".join([_CONTRACTIONS, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
                    _SPACES])
_SEED = "|".join([_CONTRACTIONS, _WORD, r"\p{N}{1}", r" ?[^\s\p{L}\p{N}\r\n]+", _SPACES])
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"]
_SYMBOLS_OR_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = "|".join([*_CASED, r"\p{N}", _SYMBOLS_OR_PATHS, _SPACES])
_GPT4O = "|".join([*(f"{word}{_CONTRACTIONS}?" for word in _CASED), r"\p{N}{1,3}", _SYMBOLS_OR_PATHS, _SPACES])
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_DEEPSEEK = (r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
             r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# Letters with case in the alphabets that DeepSeek's first tokenizer knows: Latin, Greek, Cyrillic, ...
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943")
_DEEPSEEK_LLM_PUNCTUATION = r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_FAR_EAST = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CHINESE_OR_JAPANESE = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"

_KINDS: Mapping[tuple[str, ...], PreTokenizer] = {
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "mellum", "gigachat",
     "a.x-4.0", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "modern-bert",
     "jina-v1-en", "jina-v2-code", "roberta-bpe"): PreTokenizer(expressions=(_GPT2,)),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
     "jina-v5-nano"):
        PreTokenizer(expressions=(_LLAMA3,), ignore_merges=True, adds_bos=True),
    ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4", "glm5"): PreTokenizer(expressions=(_LLAMA3,)),
    ("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "stablelm2", "hunyuan", "solar-open", "grok-2", "f2llmv2"):
        PreTokenizer(expressions=(_QWEN2,)),
    ("qwen35",): PreTokenizer(expressions=(_QWEN35,)),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"):
        PreTokenizer(expressions=(r"\p{N}", _GPT2)),
    ("tekken",): PreTokenizer(expressions=(_TEKKEN,), ignore_merges=True, adds_bos=True),
    ("gpt-4o", "llama4", "kanana2", "minimax-m2", "talkie"): PreTokenizer(expressions=(_GPT4O,)),
    ("deepseek-coder",):
        PreTokenizer(expressions=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _FAR_EAST, r"\p{N}")),
    ("deepseek-llm",):
        PreTokenizer(expressions=(r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", _DEEPSEEK_LLM_PUNCTUATION, r"\s+$", _FAR_EAST,
                                  r"\p{N}+")),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"):
        PreTokenizer(expressions=(r"\p{N}{1,3}", _CHINESE_OR_JAPANESE, _DEEPSEEK)),
    ("seed-coder",): PreTokenizer(expressions=(_SEED,)),
    ("falcon",): PreTokenizer(expressions=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    ("poro-chat", "bloom", "gpt3-finnish"): PreTokenizer(expressions=(_BLOOM,)),
    ("viking",): PreTokenizer(expressions=(_BLOOM, r"\p{N}")),
    ("default",): PreTokenizer(expressions=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {name: kind for names, kind in _KINDS.items() for name in names}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The way of cutting text that `tokenizer.ggml.pre` names. Raises `TorchchatError` for an unknown name."""
    if name not in PRE_TOKENIZERS:
        hint = did_you_mean(name, PRE_TOKENIZERS)
        raise TorchchatError(f"the pre-tokenizer {quoted(name)} is not known; known are {', '.join(PRE_TOKENIZERS)}",
                             f"pass the model's own tokenizer.json with --tokenizer-path{f'; {hint}' if hint else ''}")
    return PRE_TOKENIZERS[name]


def as_tokenizer_json(expressions: tuple[str, ...]) -> dict[str, Any]:
    """The "pre_tokenizer" of a tokenizer.json that cuts text by the expressions, and writes bytes as characters."""
    splits = [{"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
              for expression in expressions]
    return {"type": "Sequence", "pretokenizers": [*splits, BYTES]}


BYTES: Mapping[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def name_of(declared: object, ignore_merges: bool) -> str | None:
    """The name for a tokenizer.json's "pre_tokenizer"; None where it cuts text in a way that has none."""
    expressions = _expressions(declared)
    return next((name for name, kind in PRE_TOKENIZERS.items()
                 if kind.expressions == expressions and kind.ignore_merges == ignore_merges), None)


def _expressions(declared: object) -> tuple[str, ...] | None:
    """The expressions that a "pre_tokenizer" applies before it writes bytes as characters; None for other kinds."""
    steps = declared.get("pretokenizers") if isinstance(declared, dict) and declared.get("type") == "Sequence" else None
    found: list[str] = []
    for step in steps if isinstance(steps, list) else [declared]:
        expression = _expression(step) if isinstance(step, dict) else None
        if expression is None:
            return None
        found += [expression] if expression else []
    return tuple(found)


def _expression(step: dict[str, Any]) -> str | None:
    """The expression of one step; "" where it cuts nothing, None where it is of no kind that GGUF files have."""
    kind, pattern = step.get("type"), step.get("pattern")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return _GPT2 if step.get("use_regex", True) else ""
    if kind == "Digits":
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    isolated = step.get("behavior") == "Isolated" and not step.get("invert")
    if kind == "Split" and isolated and isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        return str(pattern["Regex"])
    return None
