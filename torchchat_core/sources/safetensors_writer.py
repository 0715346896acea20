"""Writing safetensors tensor by tensor, so that a model larger than the memory can be written.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of a JSON header, the header with
dtype, shape and place of every tensor, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from torchchat_core import progress

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
SHARD_BYTES = 5 * 10**9  # about; what Hugging Face's own tools have used
INDEX = "model.safetensors.index.json"
Shapes = Mapping[str, tuple[int, ...]]
Dtypes = Mapping[str, torch.dtype]


def write_safetensors(folder: Path, shapes: Shapes, dtypes: torch.dtype | Dtypes, read: Callable[[str], Tensor],
                      shard_bytes: int = SHARD_BYTES) -> None:
    """Writes model.safetensors, or shards of at most `shard_bytes` (or one tensor) with their index, into `folder`.

    `read` gives each tensor once, in the order of `shapes`, with that shape and dtype, of `DTYPES`: the same for all,
    or by name. No more than one tensor is held at a time. Raises `OSError` where a file cannot be written.
    """
    kinds = dict.fromkeys(shapes, dtypes) if isinstance(dtypes, torch.dtype) else dtypes
    shards = list(_shards(shapes, kinds, shard_bytes))
    for number, shard in enumerate(shards, 1):
        _write_file(folder / _name(number, len(shards)), shard, kinds, read)
    if len(shards) > 1:
        places = {name: _name(number, len(shards)) for number, shard in enumerate(shards, 1) for name in shard}
        index = {"metadata": {"total_size": _bytes(shapes, kinds)}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _bytes(shapes: Shapes, dtypes: Dtypes) -> int:
    return sum(math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items())


def _name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _shards(shapes: Shapes, dtypes: Dtypes, limit: int) -> Iterator[Shapes]:
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        bytes_of_tensor = math.prod(shape) * dtypes[name].itemsize
        if shard and size + bytes_of_tensor > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += bytes_of_tensor
    yield shard


def _write_file(path: Path, shapes: Shapes, dtypes: Dtypes, read: Callable[[str], Tensor]) -> None:
    with path.open("wb") as file, progress.task(path.name, total=_bytes(shapes, dtypes), unit="B") as task:
        file.write(_header(shapes, dtypes))
        for name in shapes:
            content = read(name).contiguous().flatten().view(torch.uint8).numpy()
            file.write(content.data)
            task.advance(content.nbytes)


def _header(shapes: Shapes, dtypes: Dtypes) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": DTYPES[dtypes[name]], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text
