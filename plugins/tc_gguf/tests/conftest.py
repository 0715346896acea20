"""What several tests of the plugin need."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TESTDATA = Path(__file__).resolve().parents[4] / "shared" / "testdata"


@pytest.fixture(scope="session")
def testdata() -> Path:
    """The folder of real models and golden results, which is not part of the repository."""
    if not TESTDATA.is_dir():
        pytest.skip("the test data beside the repository (../shared/testdata) is absent")
    return TESTDATA


# ---- GGUF files made byte by byte, so that no reader or writer of the project is trusted with them ----------------


def text_bytes(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value_bytes(value: Any) -> bytes:
    """Type and value: whole numbers as UINT32, floating ones as FLOAT32, lists by their first, bytes as they are."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, list):
        kind = value_bytes(value[0])[:4]
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(value)) + b"".join(
            value_bytes(each)[4:] for each in value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text_bytes(value)
    kinds = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}
    number, form = kinds[type(value)]
    return struct.pack(f"<I{form}", number, value)


def build_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]],
               version: int = 3, alignment: int = 32) -> bytes:
    """Tensors are type, shape as torch has it, and bytes. Sizes are not checked, so that wrong files can be made."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text_bytes(key) + value_bytes(value) for key, value in metadata.items())
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        head += text_bytes(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(data))
        data += raw + bytes(-len(raw) % alignment)
    return head + bytes(-len(head) % alignment) + data


@pytest.fixture(scope="session")
def make_gguf() -> Callable[..., bytes]:
    """`build_gguf`."""
    return build_gguf


@pytest.fixture
def written(tmp_path: Path) -> Callable[[bytes], Path]:
    """Makes "model.gguf" of the bytes."""
    def written(raw: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(raw)
        return path
    return written


TINY = {"llama.context_length": 32, "llama.embedding_length": 64, "llama.block_count": 2,
        "llama.feed_forward_length": 96, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": 16}
TINY_TENSORS = {
    "attn_norm.weight": (0, (64,)), "ffn_norm.weight": (0, (64,)), "attn_q.weight": (8, (64, 64)),
    "attn_k.weight": (8, (32, 64)), "attn_v.weight": (1, (32, 64)), "attn_output.weight": (2, (64, 64)),
    "ffn_gate.weight": (8, (96, 64)), "ffn_up.weight": (30, (96, 64)), "ffn_down.weight": (2, (64, 96)),
}


@pytest.fixture(scope="session")
def tiny_metadata() -> Mapping[str, Any]:
    """Of a Llama with two layers, vocabulary and all."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(chr(97 + i % 26) * (1 + i // 26)
                                                                                   for i in range(61))]
    return {"general.architecture": "llama", "general.name": "tiny", **TINY, "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
            "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 61], "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}


@pytest.fixture(scope="session")
def tiny_tensors() -> Mapping[str, tuple[int, tuple[int, ...], bytes]]:
    """Of the same, with seeded numbers in F32, F16, BF16, Q8_0 and Q4_0."""
    random = np.random.default_rng(0)

    def stored(kind: int, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...], bytes]:
        numbers = (random.standard_normal(shape) * 0.1).astype(np.float32)
        if kind == 0:
            return kind, shape, numbers.tobytes()
        if kind == 1:
            return kind, shape, numbers.astype(np.float16).tobytes()
        if kind == 30:
            return kind, shape, (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        blocks = random.integers(0, 256, (numbers.size // 32, {2: 18, 8: 34}[kind]), dtype=np.uint8)
        blocks[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        return kind, shape, blocks.tobytes()

    tensors = {"token_embd.weight": stored(8, (320, 64)), "output_norm.weight": stored(0, (64,))}
    for layer in range(2):
        tensors |= {f"blk.{layer}.{name}": stored(*how) for name, how in TINY_TENSORS.items()}
    return tensors


@pytest.fixture(scope="session")
def tiny_gguf(tiny_metadata: Mapping[str, Any], tiny_tensors: Mapping[str, Any]) -> bytes:
    """A whole file of both."""
    return build_gguf(tiny_metadata, tiny_tensors)
