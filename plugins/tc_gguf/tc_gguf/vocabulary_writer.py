"""A vocabulary as the metadata of a GGUF file: the other direction of `vocabulary`."""

from __future__ import annotations

import gguf

from tc_gguf.vocabulary import BYTE_LEVEL, NAMED, NONE, SENTENCEPIECE, USUAL, Vocabulary


def write_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary | None) -> None:
    """Adds the keys of the vocabulary, or the one key that says that there is none."""
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.kind == SENTENCEPIECE:
        writer.add_token_scores([float(score) for score in vocabulary.scores])
        writer.add_add_space_prefix(vocabulary.adds_space)
        writer.add_bool("tokenizer.ggml.remove_extra_whitespaces", vocabulary.removes_extra_spaces)
    if vocabulary.kind == BYTE_LEVEL:
        writer.add_token_merges(list(vocabulary.merges))
    for name in NAMED:
        token = getattr(vocabulary, f"{name}_id")
        if token is None and vocabulary.kind == SENTENCEPIECE and name in USUAL:
            token = NONE  # without the key it would be a usual one
        if token is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    others = [name for name in vocabulary.templates if name != "default"]
    for name, template in vocabulary.templates.items():
        writer.add_string("tokenizer.chat_template" + ("" if name == "default" else f".{name}"), template)
    writer.add_array("tokenizer.chat_templates", others)
