"""The .bin files of llama2.c: float32 without a magic number (legacy), version 1, and version 2 in int8.

Facts from https://github.com/karpathy/llama2.c, export.py. All numbers are little-endian. The sizes are seven int32:
dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len. Tensors follow in a fixed order, those of
one kind for all layers together.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torchchat_core.errors import TorchchatError

MAGIC = b"24ka"  # 0x616b3432
SIZES = struct.Struct("<7i")
NAMES = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
HEADER_BYTES = 256  # of versions 1 and 2, zeros at the end
MAXIMUM = 1 << 24  # of any size: a larger one is a damaged file
MAXIMUM_LAYERS = 1024
DAMAGED = "the file is damaged or incomplete; fetch it again"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its values from `offset` on and, in version 2, a float32 scale for each group after them."""

    shape: tuple[int, ...]
    offset: int
    group: int | None = None  # values that share a scale; None: float32 without scales


@dataclass(frozen=True)
class Header:
    """What a file says of itself: sizes by the names of llama2.c's `model_args`, tensors by Meta's names."""

    model_args: Mapping[str, int]
    places: Mapping[str, Place]


def read_header(path: Path) -> Header | None:
    """The header of a llama2.c file, or None for a file of another kind.

    A legacy file has no mark: it is one where its size is, to the byte, what its first seven numbers ask for.
    Raises `TorchchatError` where a file with the mark has sizes that cannot be, or is not as long as they ask for.
    """
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    size = path.stat().st_size
    if start.startswith(MAGIC):
        return _marked(path.name, start, size)
    if len(start) < SIZES.size:
        return None
    sizes = dict(zip(NAMES, SIZES.unpack_from(start), strict=True))
    shared = sizes["vocab_size"] > 0
    sizes["vocab_size"] = abs(sizes["vocab_size"])
    if _wrong(sizes) is not None:
        return None
    places, end = _legacy_places(sizes, shared)
    return Header(sizes, places) if end == size else None


def _marked(name: str, start: bytes, size: int) -> Header:
    if len(start) < HEADER_BYTES:
        raise TorchchatError(f"{name} ends within its header, after {len(start)} bytes", DAMAGED)
    (version,) = struct.unpack_from("<i", start, 4)
    sizes = dict(zip(NAMES, SIZES.unpack_from(start, 8), strict=True))
    shared, group = struct.unpack_from("<Bi", start, 8 + SIZES.size)
    if version not in (1, 2):
        raise TorchchatError(f"{name} is a llama2.c file of version {version}; versions 1 and 2 are known")
    wrong = _wrong(sizes)
    if wrong is not None:
        raise TorchchatError(f"{wrong} is {sizes[wrong]} in the header of {name}, which cannot be", DAMAGED)
    if version == 2 and not (0 < group <= sizes["dim"] and sizes["dim"] % group == 0 == sizes["hidden_dim"] % group):
        raise TorchchatError(f"the group size is {group} in the header of {name}; it has to divide {sizes['dim']} and "
                             f"{sizes['hidden_dim']}", DAMAGED)
    places, end = _places(_marked_order(sizes, bool(shared)), HEADER_BYTES, group if version == 2 else None)
    if end != size:
        raise TorchchatError(f"{name} has {size} bytes; its header asks for {end}", DAMAGED)
    return Header(sizes, places)


def _wrong(sizes: Mapping[str, int]) -> str | None:
    """The name of a size that cannot be."""
    for name, size in sizes.items():
        if not 0 < size <= (MAXIMUM_LAYERS if name == "n_layers" else MAXIMUM):
            return name
    if sizes["dim"] % sizes["n_heads"]:
        return "n_heads"
    return "n_kv_heads" if sizes["n_heads"] % sizes["n_kv_heads"] else None


# ---- the order of the tensors -------------------------------------------------------------------------------------


Order = Iterator[tuple[str, tuple[int, ...]]]


def _matrices(sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    dim, hidden = sizes["dim"], sizes["hidden_dim"]
    keys = dim // sizes["n_heads"] * sizes["n_kv_heads"]
    return {"attention.wq": (dim, dim), "attention.wk": (keys, dim), "attention.wv": (keys, dim),
            "attention.wo": (dim, dim), "feed_forward.w1": (hidden, dim), "feed_forward.w2": (dim, hidden),
            "feed_forward.w3": (hidden, dim), "attention_norm": (dim,), "ffn_norm": (dim,)}


def _layers(sizes: Mapping[str, int], *kinds: str) -> Order:
    shapes = _matrices(sizes)
    for kind in kinds:
        for layer in range(sizes["n_layers"]):
            yield f"layers.{layer}.{kind}.weight", shapes[kind]


def _legacy_order(sizes: Mapping[str, int], shared: bool) -> Order:
    embedding = (sizes["vocab_size"], sizes["dim"])
    table = (sizes["max_seq_len"], sizes["dim"] // sizes["n_heads"] // 2)
    yield "tok_embeddings.weight", embedding
    yield from _layers(sizes, "attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
                       "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    yield "norm.weight", (sizes["dim"],)
    yield "freqs_cos", table
    yield "freqs_sin", table
    if not shared:
        yield "output.weight", embedding


def _marked_order(sizes: Mapping[str, int], shared: bool) -> Order:
    embedding = (sizes["vocab_size"], sizes["dim"])
    yield from _layers(sizes, "attention_norm", "ffn_norm")
    yield "norm.weight", (sizes["dim"],)
    yield "tok_embeddings.weight", embedding
    yield from _layers(sizes, "attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1",
                       "feed_forward.w2", "feed_forward.w3")
    if not shared:
        yield "output.weight", embedding


def _legacy_places(sizes: Mapping[str, int], shared: bool) -> tuple[dict[str, Place], int]:
    return _places(_legacy_order(sizes, shared), SIZES.size, None)


def _places(order: Order, offset: int, group: int | None) -> tuple[dict[str, Place], int]:
    """The places of the tensors, and where the last one ends. Norms are float32 in all versions."""
    places = {}
    for name, shape in order:
        count = math.prod(shape)
        quantised = group is not None and len(shape) == 2
        places[name] = Place(shape, offset, group if quantised else None)
        offset += count + 4 * (count // group) if quantised and group else 4 * count
    return places, offset


# ---- the tensors --------------------------------------------------------------------------------------------------


def mapped_tensors(path: Path, header: Header) -> Callable[[str], Tensor]:
    """Maps the file; what is returned gives a tensor by its name, float32, mapped where it is not quantised."""
    content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    return lambda name: _tensor(content, header.places[name])


def _tensor(content: Tensor, place: Place) -> Tensor:
    count = math.prod(place.shape)
    if place.group is None:
        return _floats(content, place.offset, count).view(place.shape)
    values = content[place.offset:place.offset + count].view(torch.int8).view(-1, place.group)
    scales = _floats(content, place.offset + count, count // place.group)
    return (values.float() * scales[:, None]).view(place.shape)


def _floats(content: Tensor, offset: int, count: int) -> Tensor:
    part = content[offset:offset + 4 * count]
    return (part if offset % 4 == 0 else part.clone()).view(torch.float32)
