"""`--keep-quantized`: layers run as a GGUF file has them, and mean what the file says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tc_gguf.checkpoint import GgufCheckpoint
from tc_gguf.file import read_split
from torchchat_core import kernels
from torchchat_core.errors import TorchchatError
from torchchat_core.models.transformer import Transformer
from torchchat_core.models.weights import build_model
from torchchat_core.pipeline import ModelRequest, open_model, quantise_model
from torchchat_core.plugins import load_registry
from torchchat_core.quantization import blocks, running
from torchchat_core.quantization.blocks import BlockEmbedding, integer_weights
from torchchat_core.quantization.keeping import KeptCheckpoint, keep_quantised, patterns
from torchchat_core.quantization.layers import QuantizedLinear
from torchchat_core.specs import PackedTensor
from torchchat_core.testing.models import reference_logits

TOKENS = (3, 1, 4, 1, 5, 9, 2, 6)
BYTES = {"q4_0": (2, 32, 18), "q4_1": (3, 32, 20), "q8_0": (8, 32, 34), "q4_k": (12, 256, 144)}  # type, block
Make = Callable[[bytes], Path]


def stored(kind: str, rows: int, columns: int, seed: int = 0) -> bytes:
    """Random blocks whose scales, and minima where there are some, are small numbers."""
    _, elements, size = BYTES[kind]
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (rows * columns // elements, size), dtype=np.uint8)
    for start in (0,) if kind in ("q4_0", "q8_0") else (0, 2):
        data[:, start : start + 2] = random.uniform(-0.02, 0.02, (len(data), 1)).astype(np.float16).view(np.uint8)
    return data.tobytes()


def checkpoint(path: Path) -> GgufCheckpoint:
    return GgufCheckpoint(read_split([path]))


@pytest.fixture(params=["kernel", "pytorch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are taken apart by core's kernel, or by PyTorch."""
    if request.param == "pytorch":
        monkeypatch.setattr(blocks.kernels, "available", lambda **_: False)
    elif not kernels.available():
        pytest.skip("the CPU kernels cannot be built here")


@pytest.fixture
def file(make_gguf: Callable[..., bytes], tiny_metadata: Mapping[str, Any], tiny_tensors: Mapping[str, Any],
         written: Make) -> Callable[..., Path]:
    """The tiny Llama with some of its tensors replaced, by name: (format, rows, columns)."""
    def file(**changed: tuple[str, int, int]) -> Path:
        tensors = dict(tiny_tensors)
        for name, (kind, rows, columns) in changed.items():
            place = name.replace("__", ".") + ".weight"
            tensors[place] = (BYTES[kind][0], (rows, columns), stored(kind, rows, columns))
        return written(make_gguf(tiny_metadata, tensors))
    return file


def both(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Transformer, Transformer, KeptCheckpoint]:
    """The model unpacked, the model kept, and the checkpoint of the latter."""
    kept = keep_quantised(checkpoint(path), path.name)
    return build_model(checkpoint(path), dtype), build_model(kept, dtype), kept


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("rows", [1, 37])
def test_the_integers_stand_for_the_numbers_of_the_file(kind: str, rows: int, file: Callable[..., Path]) -> None:
    place, columns = "extra", 512
    opened = checkpoint(file(**{place: (kind, rows, columns)}))
    packed, exact = opened.packed(f"{place}.weight"), opened.tensor(f"{place}.weight")
    assert packed is not None
    assert opened.block_format(f"{place}.weight") == kind.upper()
    weights = integer_weights(packed)
    assert weights is not None
    for dtype in (torch.float32, torch.bfloat16):
        found, wanted = QuantizedLinear(weights, None).dequantised(dtype), exact.to(dtype)
        if kind in ("q4_0", "q8_0"):
            assert torch.equal(found, wanted)
        elif dtype == torch.float32:  # eight steps of the scale's rounding, and the centre's
            scales, centres = (each.float().repeat_interleave(32, 1) for each in (weights.scales, weights.centres))
            bound = 2**-11 * (8 * scales.abs() + centres.abs()) + 1e-6
            assert bool(((found - wanted).abs() <= bound).all())


@pytest.mark.parametrize("kind", BYTES)
def test_a_mapped_embedding_gives_the_rows_of_the_file(kind: str, file: Callable[..., Path]) -> None:
    opened = checkpoint(file(extra=(kind, 20, 512)))
    packed = opened.packed("extra.weight")
    assert packed is not None
    tokens = torch.tensor([3, 3, 19, 0])
    torch.testing.assert_close(BlockEmbedding(packed, torch.float32)(tokens), opened.tensor("extra.weight")[tokens],
                               atol=2e-6, rtol=0)


def test_layers_that_are_multiplied_as_they_are_stored_give_the_same_logits(file: Callable[..., Path]) -> None:
    unpacked, kept, _ = both(file())
    assert isinstance(kept.model.embed_tokens, BlockEmbedding)
    assert isinstance(kept.lm_head, QuantizedLinear)  # tied to the embedding in the file
    assert isinstance(kept.model.layers[0].self_attn.v_proj, nn.Linear)  # F16 in the file
    assert torch.equal(reference_logits(kept, TOKENS), reference_logits(unpacked, TOKENS))


@pytest.mark.skipif(not kernels.available(), reason="the CPU kernels cannot be built here")
@pytest.mark.parametrize("name", ["TinyStories-656K-Q4_0", "TinyStories-656K-Q8_0", "synth256-Q4_K_M", "synth256-Q8_0"])
def test_the_kernels_differ_from_unpacked_weights_by_the_rounding_of_activations(testdata: Path, name: str) -> None:
    unpacked, kept, _ = both(testdata / "gguf" / f"{name}.gguf")
    running.prepare(kept, torch.float32)
    assert isinstance(kept.model.layers[0].mlp.up_proj, running.PanelLinear)
    wanted = reference_logits(unpacked, TOKENS)
    assert float((reference_logits(kept, TOKENS) - wanted).norm() / wanted.norm()) < 0.03


def test_the_report_names_what_was_kept_and_what_not(testdata: Path) -> None:
    _, _, kept = both(testdata / "gguf" / "synth256-Q4_K_M.gguf")
    assert kept.schemes == ("embedding:int4", "linear:int4")
    assert kept.report.line("bf16") == (
        "layers kept as the file has them: 13 in Q4_K; 3 became bf16: Q6_K, which is not run as it is (lm_head, "
        "model.layers.1.self_attn.v_proj, model.layers.1.mlp.down_proj)")
    assert patterns(["a", "model.layers.0.x", "model.layers.11.x", "model.layers.1.y"]) == [
        "a", "model.layers.*.x", "model.layers.1.y"]


def test_scales_beyond_float16_leave_the_layer_unpacked(file: Callable[..., Path]) -> None:
    path = file(token_embd=("q4_0", 320, 64))
    raw, scale = bytearray(path.read_bytes()), np.float16(np.inf).tobytes()
    at = raw.rindex(stored("q4_0", 320, 64)[:18])
    raw[at : at + 2] = scale
    path.write_bytes(raw)
    _, model, kept = both(path)
    assert isinstance(model.lm_head, nn.Linear)
    assert isinstance(model.model.embed_tokens, nn.Embedding)  # the matrix is the head's too
    assert "scales beyond float16 (lm_head)" in kept.report.line("fp32")


def test_a_matrix_of_another_shape_is_refused(file: Callable[..., Path]) -> None:
    with pytest.raises(TorchchatError, match=r"has the shape \[64, 32\]; the config asks for \[64, 64\]"):
        both(file(blk__0__attn_q=("q8_0", 64, 32)))


def test_data_that_do_not_belong_to_the_shape_are_refused() -> None:
    for kind, shape, size in (("q4_0", (4, 64), 35), ("q4_k", (4, 128), 72), ("q9_9", (4, 64), 36)):
        with pytest.raises(TorchchatError, match=r"block format|has data"):
            integer_weights(PackedTensor(kind=kind, shape=shape, data=torch.zeros(4, size, dtype=torch.uint8)))


def test_a_file_that_was_cut_off_meanwhile_is_told(file: Callable[..., Path]) -> None:
    path = file()
    kept = KeptCheckpoint(checkpoint(path))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(TorchchatError, match="became shorter while it was read"):
        build_model(kept, torch.float32)


def test_what_was_read_does_not_stay_mapped(file: Callable[..., Path]) -> None:
    path = file()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not say what is mapped")

    def mapped() -> int:
        return maps.read_text(encoding="utf-8").count(str(path))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build_model(KeptCheckpoint(checkpoint(path)), torch.bfloat16)
    assert mapped() == 2  # what is used as it is stored: the embedding, and plain tensors of that dtype
    del model
    assert mapped() == 0


# ---- the whole way ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "message"), [
    ({"quantize": "linear:int8"}, "quantised already .*; it is not quantised again"),
    ({"adapter": "."}, "quantised already .*; no adapter can be merged"),
])
def test_kept_layers_are_neither_quantised_again_nor_merged(more: dict[str, str], message: str,
                                                           file: Callable[..., Path]) -> None:
    request = ModelRequest(model=str(file()), keep_quantized=True, device="cpu", **more)
    with pytest.raises(TorchchatError, match=message) as caught, open_model(request, load_registry()):
        pass
    assert caught.value.fix == "leave --keep-quantized out"


@pytest.mark.parametrize(("name", "message"), [
    ("gguf/TinyStories-656K-BF16.gguf", "it holds plain numbers"), ("gguf/synth256-Q6_K.gguf", "it holds Q6_K"),
    ("hf/stories260K", "holds no quantised weights that could be kept")])
def test_a_model_with_nothing_to_keep_is_told(testdata: Path, name: str, message: str) -> None:
    request = ModelRequest(model=str(testdata / name), keep_quantized=True, device="cpu")
    with pytest.raises(TorchchatError, match=message), open_model(request, load_registry()):
        pass


def test_a_folder_that_torchchat_quantised_needs_no_keeping(tmp_path: Path) -> None:
    registry = load_registry()
    quantise_model(ModelRequest(quantize="linear:int8"), tmp_path / "q", registry)
    request = ModelRequest(model=str(tmp_path / "q"), keep_quantized=True, device="cpu")
    with pytest.raises(TorchchatError, match="is always run as it is"), open_model(request, registry):
        pass


def test_the_command_line_runs_kept_layers_and_says_which(testdata: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from torchchat_core.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["generate", str(testdata / "gguf/TinyStories-656K-Q8_0.gguf"), "--keep-quantized", "--prompt", "Once",
              "--temperature", "0", "--max-new-tokens", "8", "--device", "cpu"])
    said = capsys.readouterr()
    assert ended.value.code in (0, None)
    assert said.out.startswith("Once")
    assert "layers kept as the file has them: 16 in Q8_0\n" in said.err
