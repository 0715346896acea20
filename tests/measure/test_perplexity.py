"""Perplexity: windows, the figure itself by hand and on the real models, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from torchchat_core.errors import TorchchatError
from torchchat_core.measure.perplexity import Block, perplexity_of, scored_blocks
from torchchat_core.measure.text import encoded, measured_text, text_windows
from torchchat_core.testing.models import TinyTokenizer

TEXTS = {"tinystories_2MiB": "tinystories_2MiB.txt", "wikitext2_test_raw": "wikitext2-test.raw",
         "tinyshakespeare": "tinyshakespeare.txt"}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("executor", ["eager", "compile"])
@pytest.mark.parametrize("model", ["stories260K", "TinyStories-656K"])
def test_the_real_models_have_the_golden_perplexity_within_a_tenth_of_a_percent(
        model: str, executor: str, text: str, testdata: Path, torchchat: Callable[..., Any]) -> None:
    pytest.importorskip(f"tc_{executor}", reason=f"tc-{executor} is not installed")
    golden = json.loads((testdata / "golden/perplexity.json").read_text())["results"][text][model.replace("-", "_")]
    done = torchchat("perplexity", testdata / "hf" / model, "--file", testdata / "text" / TEXTS[text], "--json",
                     "--executor", executor, "--device", "cpu", "-d", "fp32")
    found = json.loads(done.out)
    assert (found["executor"], found["window"], found["tokens"]) == (executor, 256, golden["tokens"])
    assert found["mean_nll"] == pytest.approx(golden["mean_nll"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(golden["ppl"], rel=0.001)


@pytest.mark.parametrize(("plugin", "suffix"), [("tc_aoti", ".pt2"), ("tc_executorch", ".pte")])
@pytest.mark.parametrize("model", ["stories260K", "TinyStories-656K"])
def test_an_exported_model_has_the_golden_perplexity_and_agrees_with_the_one_it_was_made_of(
        model: str, plugin: str, suffix: str, testdata: Path, torchchat: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip(plugin, reason=f"{plugin} is not installed")
    path, source = tmp_path / f"model{suffix}", testdata / "hf" / model
    exported = torchchat("export", source, "-d", "fp32", "-o", path)
    assert exported.code == 0, exported.err
    golden = json.loads((testdata / "golden/perplexity.json").read_text())["results"]
    for text, name in TEXTS.items():
        found = json.loads(torchchat("perplexity", path, "--file", testdata / "text" / name, "--json").out)
        assert found["perplexity"] == pytest.approx(golden[text][model.replace("-", "_")]["ppl"], rel=1e-5)
    agreed = torchchat("verify", source, path, "-d", "fp32", "--executor", "eager", "--device", "cpu")
    assert agreed.code == 0, agreed.out + agreed.err


@pytest.mark.parametrize("bos", [1, None])
@pytest.mark.parametrize("stride", [1, 3, 6])
def test_windows_with_a_stride_predict_every_token_once_with_the_context_before_it(bos: int | None, stride: int
                                                                                  ) -> None:
    ids = list(range(10, 37))
    windows = text_windows(ids, bos, 7, stride)
    assert [token for window in windows for token in window.expected] == (ids if bos is not None else ids[1:])
    for window in windows:
        own = window.fed[1:] if bos is not None else window.fed
        assert len(window.fed) <= 6
        assert list(window.expected) == ids[ids.index(window.expected[-1]) + 1 - len(window.expected) :][
            : len(window.expected)]
        assert [*own, window.expected[-1]] == ids[ids.index(window.expected[-1]) - len(own) :][: len(own) + 1]


@pytest.mark.parametrize("stride", [0, 7])
def test_a_stride_that_leaves_tokens_out_is_refused(stride: int) -> None:
    with pytest.raises(TorchchatError, match=f"--stride is {stride} tokens; with windows of 7 it goes from 1 to 6"):
        text_windows([1, 2, 3], 1, 7, stride)


def test_the_context_of_a_window_is_read_and_only_what_follows_is_scored() -> None:
    class Watched(OneAnswer):
        read: list[int] = []  # noqa: RUF012

        def prefill(self, tokens: tuple[int, ...]) -> torch.Tensor:
            self.read.append(len(tokens))
            return self.logits

    model: Any = Watched([0.0, 0.0, 0.0])
    found = perplexity_of(scored_blocks(model, text_windows([0, 1, 2] * 10, 1, 16, 5), "made"))
    assert found.tokens == 30
    assert found.mean_nll == pytest.approx(math.log(3))
    assert Watched.read == [10, 10, 10]


@pytest.mark.parametrize(("arguments", "message"), [
    (("--window", "1000000"), "--window is 1000000 tokens"), (("--stride", "300"), "--stride is 300 tokens"),
    (("--file", "/no/such/file"), "cannot be read"), (("--characters", "none"), "expected a whole number"),
])
def test_what_cannot_be_measured_is_told_in_one_sentence(arguments: tuple[str, ...], message: str,
                                                         torchchat: Callable[..., Any]) -> None:
    done = torchchat("perplexity", "--device", "cpu", *arguments)
    assert done.code in (1, 2)
    assert message in done.err
    assert "Traceback" not in done.err


def test_all_characters_of_a_text_are_read_where_that_is_asked_for(torchchat: Callable[..., Any], tmp_path: Path
                                                                  ) -> None:
    (tmp_path / "long.txt").write_text("One word. " * 1000)
    shown = [torchchat("perplexity", "--device", "cpu", "--file", tmp_path / "long.txt", *more).out
             for more in ((), ("--characters", "all"))]
    assert "long.txt, the first 8000 of 10000 characters" in shown[0]
    assert "long.txt, 10000 characters" in shown[1]
    assert "bits per byte" in shown[1]


@pytest.mark.parametrize("size", [2, 3, 5, 100])
def test_with_bos_every_token_is_predicted_once_and_each_window_begins_with_bos(size: int) -> None:
    ids = list(range(10, 27))
    windows = text_windows(ids, 1, size)
    assert [token for window in windows for token in window.expected] == ids
    assert all(window.fed == (1, *window.expected[:-1]) for window in windows)
    assert all(len(window.fed) <= size - 1 for window in windows)


@pytest.mark.parametrize("size", [2, 3, 5, 17, 100])
def test_without_bos_every_token_but_the_first_is_predicted_once_after_the_one_before_it(size: int) -> None:
    ids = list(range(10, 27))
    windows = text_windows(ids, None, size)
    assert [token for window in windows for token in window.expected] == ids[1:]
    assert [token for window in windows for token in window.fed] == ids[:-1]


def test_a_window_of_one_token_is_refused() -> None:
    with pytest.raises(TorchchatError, match="a window of 1 tokens predicts nothing"):
        text_windows([1, 2, 3], 1, 1)


def test_perplexity_and_bits_per_byte_are_those_computed_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.5, 0.375]], dtype=torch.float64)
    found = perplexity_of([Block(probabilities.log(), torch.tensor([0, 0]))])
    assert found.perplexity == pytest.approx(4)  # the geometric mean of 2 and 8
    assert found.bits_per_byte(2) == pytest.approx(2)  # 1 and 3 bits over two bytes
    assert found.tokens == 2


class OneAnswer:
    """A model that says the same logits everywhere."""

    vocab_size, max_context, device, dtype = 3, 16, "cpu", "fp32"

    def __init__(self, logits: list[float]) -> None:
        self.logits, self.closed = torch.tensor(logits), 0

    def session(self, limit: int | None = None) -> Any:
        return self

    def score(self, tokens: tuple[int, ...]) -> torch.Tensor:
        return self.logits.expand(len(tokens), -1)

    def close(self) -> None:
        self.closed += 1


def test_blocks_hold_every_position_and_sessions_are_closed() -> None:
    model: Any = OneAnswer([0.0, 0.0, 0.0])
    ids = [index % 3 for index in range(100)]
    blocks = list(scored_blocks(model, text_windows(ids, 1, 50), "made"))
    assert torch.cat([block.expected for block in blocks]).tolist() == ids
    assert perplexity_of(blocks).mean_nll == pytest.approx(math.log(3))
    assert model.closed == 3


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_refused(wrong: float) -> None:
    model: Any = OneAnswer([0.0, wrong, 0.0])
    with pytest.raises(TorchchatError, match="logits that are not numbers"):
        perplexity_of(scored_blocks(model, text_windows([0, 1], 1), "made"))


def test_a_text_without_probability_is_refused() -> None:
    model: Any = OneAnswer([0.0, -math.inf, 0.0])
    with pytest.raises(TorchchatError, match="takes the text to be impossible"):
        perplexity_of(scored_blocks(model, text_windows([0, 1], 1), "made"))


# ---- texts --------------------------------------------------------------------------------------------------------


def test_the_text_of_our_own_is_read_whole() -> None:
    text = measured_text()
    assert 7000 < text.read == text.whole == len(text.content) <= 8000
    assert text.description.startswith("torchchat's own text, 7")
    assert "only differences between models and recipes are meaningful" in (text.note or "")


def test_of_a_long_text_the_beginning_is_read_and_separators_go(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("One.<|endoftext|>Two." + "x" * 100, encoding="utf-8")
    text = measured_text(path, 21)
    assert text.note is None
    assert text.content == "One.Two."
    assert text.description == "long.txt, the first 21 of 121 characters"


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b" \n", "holds no text"),
                                                  (b"\xff\xfe\x00", "not UTF-8")])
def test_a_file_without_text_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(TorchchatError, match=message):
        measured_text(tmp_path / "bad.txt")


def test_a_text_of_one_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(TorchchatError, match="has 1 tokens; at least 2"):
        encoded(measured_text(tmp_path / "short.txt"), TinyTokenizer())
