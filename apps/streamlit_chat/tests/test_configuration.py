"""How a conversation is answered: checked where it comes from a page or a file."""

from __future__ import annotations

import pytest

from tc_streamlit_chat.configuration import Configuration
from torchchat_core.errors import TorchchatError
from torchchat_core.pipeline import ModelRequest

FULL = Configuration(model="small", executor="eager", quantize="linear:int8", device="cpu", dtype="fp32",
                     system="Be kind.", max_new_tokens=9, stop=("\n", "END"), num_samples=2, transcript=True,
                     sampling={"temperature": 0.5, "logit_bias": {7: -1.0}, "seed": 3})


def test_it_comes_back_from_json() -> None:
    assert Configuration.from_json(FULL.to_json()) == FULL


@pytest.mark.parametrize("text", ["", "7", "null", "[1]",
                                  '{"sampling": 7, "stop": "x", "model": 1, "num_samples": true}',
                                  '{"sampling": {"temperature": "hot"}}', '{"sampling": {"temperature": -1}}',
                                  '{"num_samples": 1000}', '{"max_new_tokens": 0}', '{"stop": [""]}', "[" * 100_000])
def test_what_cannot_be_taken_is_left_at_its_default(text: str) -> None:
    assert Configuration.from_json(text) == Configuration()


def test_what_is_right_beside_it_is_taken() -> None:
    found = Configuration.from_json('{"system": "kept", "num_samples": -3, "unknown": 1}')
    assert found == Configuration(system="kept")


@pytest.mark.parametrize(("values", "message"), [
    ({"sampling": {"temperature": float("nan")}}, "temperature is nan"),
    ({"sampling": {"heat": 1}}, "no sampling option"),
    ({"num_samples": 0}, "num_samples is 0"), ({"stop": ("",)}, "stop string is empty")])
def test_values_out_of_range_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(TorchchatError, match=message):
        Configuration(**values)  # type: ignore[arg-type]


def test_what_was_chosen_goes_before_what_the_models_makers_say() -> None:
    options = Configuration(sampling={"temperature": 0.1}).options({"temperature": 0.9, "top_k": 5})
    assert (options.sampling.temperature, options.sampling.top_k) == (0.1, 5)


def test_the_command_lines_model_keeps_its_files_and_another_one_brings_its_own() -> None:
    base = ModelRequest(checkpoint_path="weights.pt", tokenizer_path="t.model", executor="compile", quantize="cpu",
                        device="cpu", defaults=frozenset({"executor"}))
    assert Configuration().request(base) == base
    other = Configuration(model="other", quantize="").request(base)
    assert (other.model, other.checkpoint_path, other.tokenizer_path, other.quantize) == ("other", None, None, None)
    assert (other.executor, other.device) == ("compile", "cpu")
    assert Configuration(executor="eager").request(base).defaults == frozenset()  # asked for now


def test_device_and_dtype_go_before_those_of_the_command_line() -> None:
    base = ModelRequest(device="cpu", dtype="fp16", defaults=frozenset({"dtype"}))
    assert Configuration().request(base) == base
    chosen = Configuration(device="cuda", dtype="fp32").request(base)
    assert (chosen.device, chosen.dtype, chosen.defaults) == ("cuda", "fp32", frozenset())
    assert Configuration(dtype="").request(base).dtype is None  # the checkpoint's own
