"""Arrays that are much longer than the model is large are refused before a Python object is made for each entry."""

from __future__ import annotations

import re
import struct
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tc_gguf.checkpoint import GgufCheckpoint
from tc_gguf.file import read_split
from tc_gguf.reader import GgufTokenizerReader
from tc_gguf.vocabulary import MAXIMUM_TOKENS, read_vocabulary
from torchchat_core.errors import TorchchatError

UINT8, UINT32, FLOAT32, TEXT, ARRAY = 0, 4, 6, 8, 9
COUNT = MAXIMUM_TOKENS + 1
SIZE = 10 << 20  # bytes that each file has at least


def array_bytes(kind: int, count: int, content: bytes) -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, count) + content


def texts(count: int) -> bytes:
    """Short ones, all of them different."""
    return array_bytes(TEXT, count, b"".join(struct.pack("<Q6s", 6, b"%06x" % number) for number in range(count)))


def distinct(count: int) -> bytes:
    return array_bytes(UINT32, count, np.arange(count, dtype="<u4").tobytes())


GPT2 = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.scores": None}
CASES: Mapping[str, tuple[Callable[[], Mapping[str, Any]], str]] = {
    "tokens": (lambda: {"tokenizer.ggml.tokens": texts(COUNT), **GPT2},
               f"has {COUNT} tokens; at most {MAXIMUM_TOKENS}"),
    "empty tokens": (lambda: {"tokenizer.ggml.tokens": array_bytes(TEXT, SIZE // 8, bytes(SIZE))},
                     f"has {SIZE // 8} tokens; at most {MAXIMUM_TOKENS}"),
    "more tokens than rows": (lambda: {"tokenizer.ggml.tokens": texts(SIZE // 14)},
                              f"has {SIZE // 14} tokens; its token_embd.weight has rows for 320"),
    "token types": (lambda: {"tokenizer.ggml.token_type": array_bytes(UINT8, SIZE, b"\1" * SIZE)},
                    f"has {SIZE} entries, for 320 tokens"),
    "scores": (lambda: {"tokenizer.ggml.scores": array_bytes(FLOAT32, SIZE // 4, bytes(SIZE))},
               f"has {SIZE // 4} entries, for 320 tokens"),
    "merges": (lambda: {**GPT2, "tokenizer.ggml.merges": array_bytes(TEXT, SIZE // 11, struct.pack("<Q3s", 3, b"a b")
                                                                     * (SIZE // 11 + 1))[: -11]},
               rf"merges in model\.gguf has {SIZE // 11} entries; the 320 tokens can have \d+"),
    "template names": (lambda: {"tokenizer.chat_templates": texts(SIZE // 14)},
                       f"has {SIZE // 14} entries; at most 4096"),
    "query heads": (lambda: {"llama.attention.head_count": distinct(SIZE // 4)}, "entries in .* for 2 layers"),
    "key-value heads": (lambda: {"llama.attention.head_count_kv": distinct(SIZE // 4)}, "entries in .* for 2 layers"),
    "feed-forward lengths": (lambda: {"llama.feed_forward_length": distinct(SIZE // 4)}, "entries in .* for 2 layers"),
    "a list for a number": (lambda: {"llama.context_length": array_bytes(UINT8, SIZE, bytes(SIZE))},
                            f"context_length is a list of {SIZE} numbers"),
    "a list for a switch": (lambda: {"llama.attn_logit_softcapping": array_bytes(UINT8, SIZE, bytes(SIZE))},
                            f"attn_logit_softcapping is a list of {SIZE} numbers"),
    "an alignment": (lambda: {"general.alignment": array_bytes(UINT8, SIZE, bytes(SIZE))},
                     f"has a list of {SIZE} numbers as general.alignment"),
    "a text with an emoji": (lambda: {"tokenizer.huggingface.json": "\N{GRINNING FACE}" + "a" * SIZE}, "^$"),
    "a template with an emoji": (lambda: {"tokenizer.chat_template": "\N{GRINNING FACE}" + "a" * SIZE},
                                 f"chat_template is a text of {SIZE + 4} bytes in model.gguf; it has to be a text of"),
}


def errors(path: Path) -> list[str]:
    """What opening the model and reading its tokenizer say."""
    def read_tokenizer() -> None:
        reader = GgufTokenizerReader()
        if reader.accepts(path):
            reader.read(path, {})

    said = []
    for use in (lambda: GgufCheckpoint(read_split([path])), read_tokenizer):
        try:
            use()
        except TorchchatError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("name", CASES)
def test_arrays_of_ten_megabytes_take_no_more_than_four_times_the_file(
    name: str, written: Callable[[bytes], Path], make_gguf: Callable[..., bytes], tiny_gguf: bytes,
    tiny_metadata: Mapping[str, Any], tiny_tensors: Mapping[str, Any]
) -> None:
    assert errors(written(tiny_gguf)) == []  # what is imported then is not counted
    make, message = CASES[name]
    metadata = {key: value for key, value in {**tiny_metadata, **make()}.items() if value is not None}
    path = written(make_gguf(metadata, tiny_tensors))
    size = path.stat().st_size
    assert size > SIZE
    tracemalloc.start()
    try:
        said = errors(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert re.search(message, "\n".join(said))
    assert peak < 4 * size


def test_types_and_scores_that_a_file_leaves_out_stay_compact(
    written: Callable[[bytes], Path], make_gguf: Callable[..., bytes]
) -> None:
    tokens = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": texts(1000)}
    vocabulary = read_vocabulary(read_split([written(make_gguf(tokens, {}))]))
    assert memoryview(vocabulary.types).nbytes == 1000  # type: ignore[arg-type]
    assert memoryview(vocabulary.scores).nbytes == 4000  # type: ignore[arg-type]
