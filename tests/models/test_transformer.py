"""The transformer agrees with transformers' implementation of every architecture and every rope scaling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tc_eager.executor import EagerExecutor
from torchchat_core.errors import TorchchatError
from torchchat_core.models.attention import RowAttention
from torchchat_core.models.config import ARCHITECTURES, config_from_hugging_face, config_from_meta
from torchchat_core.models.hugging_face_config import config_to_hugging_face
from torchchat_core.models.rotary import RotaryEmbedding
from torchchat_core.models.weights import build_model
from torchchat_core.sources.checkpoints import open_checkpoint
from torchchat_core.sources.local import files_of_folder
from torchchat_core.specs import LoadRequest, ModelRef

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 10000.0, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}
FACTORS = [1.0, 1.1, 1.4, 2.5]
ROPE = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn without truncation": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
                                "truncate": False, "beta_fast": 16, "beta_slow": 2},
    "yarn with mscale": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16, "mscale": 0.7,
                         "mscale_all_dim": 0.5},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16,
                 "short_factor": FACTORS, "long_factor": [3 * factor for factor in FACTORS]},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with tied embeddings": ("Llama", {"tie_word_embeddings": True}),
    "llama with its own head_dim": ("Llama", {"head_dim": 16}),
    "llama without grouped queries": ("Llama", {"num_key_value_heads": 4}),
    "mistral with a sliding window": ("Mistral", {"sliding_window": 7}),
    "mistral without a window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with a window in some layers": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5,
                                                     "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "granite": ("Granite", {"embedding_multiplier": 12.0, "attention_multiplier": 0.015625,
                            "residual_multiplier": 0.22, "logits_scaling": 8.0}),
    "llama with dynamic rope": ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    **{f"llama with {name} rope": ("Llama", {"rope_scaling": fields}) for name, fields in ROPE.items()},
}


@pytest.fixture(scope="module")
def reference() -> Any:
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, reference: Any, tmp_path: Path) -> None:
    family, fields = CASES[case]
    torch.manual_seed(0)
    config = getattr(reference, f"{family}Config")(**{**SIZES, **fields})
    config._attn_implementation = "eager"
    theirs = getattr(reference, f"{family}ForCausalLM")(config).eval()
    for parameter in theirs.parameters():  # their initial values are too small to tell one formula from another
        parameter.data += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(3, 96, (40,)).tolist()
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens]), use_cache=False).logits[0]

    files = files_of_folder(ModelRef(text="t", scheme="file", location=str(tmp_path)), tmp_path)
    module = build_model(open_checkpoint(files), torch.float32)
    model = EagerExecutor().load(LoadRequest(device="cpu", dtype="fp32", module=module))
    at_once = model.session().score(tokens)
    in_steps = model.session()
    stepwise = torch.stack([in_steps.prefill(tokens[:9]), *(in_steps.decode(token) for token in tokens[9:20]),
                            *in_steps.score(tokens[20:])])
    torch.testing.assert_close(at_once, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(stepwise, expected[8:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("scaling", "context"), [
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
    ({"type": "yarn", "factor": 4.0}, 256),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
    ({"rope_type": "linear", "factor": 2.5}, 160),
    ({"type": "dynamic", "factor": 4.0}, 256),
    ({"rope_type": "linear", "factor": 0.5}, 64),
    ({"rope_type": "yarn", "factor": 1e9}, 1 << 22),
    (ROPE["llama3"], 64),
    (ROPE["longrope"], 64),
])
def test_yarn_and_linear_scaling_lengthen_the_context(scaling: dict[str, Any], context: int) -> None:
    sizes = {"model_type": "llama", **SIZES, "rope_scaling": scaling}
    config = config_from_hugging_face(sizes)
    assert config.max_context == context
    if context < 1 << 22:
        assert config_from_hugging_face(config_to_hugging_face(config)) == config


EVERY_KEY = {
    **SIZES, "head_dim": 8, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention"], "embedding_multiplier": 1.0, "attention_multiplier": 1.0,
    "residual_multiplier": 1.0, "logits_scaling": 1.0, "rope_parameters": None,
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("scaling", ROPE)
def test_any_invalid_value_in_config_json_is_a_short_error(
        model_type: str, scaling: str, with_strange_values: Any, message_of: Any) -> None:
    def build(raw: dict[str, Any]) -> None:
        config = config_from_hugging_face(raw)
        if config.head_dim < 1000:
            RotaryEmbedding(config)

    raw = {"model_type": model_type, **EVERY_KEY, "rope_scaling": ROPE[scaling]}
    nested = {**raw, "rope_parameters": {**ROPE[scaling], "rope_theta": 1e4}}
    for damaged in (*with_strange_values(raw), *with_strange_values(nested)):
        message = message_of(lambda: build(damaged))  # noqa: B023 - it is called at once
        assert len(message.encode()) < 300


def test_any_invalid_value_in_params_json_is_a_short_error(with_strange_values: Any,
                                                           message_of: Any) -> None:
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1,
              "max_seq_len": 64, "head_dim": 8, "rope_theta": 1e4, "use_scaled_rope": True, "sliding_window": 4,
              "rope_scaling_factor": 8.0, "moe": None}
    shapes = {"model.embed_tokens.weight": (96, 32), "model.layers.0.mlp.gate_proj.weight": (48, 32)}
    for damaged in with_strange_values(params):
        assert len(message_of(lambda: config_from_meta(damaged, shapes))) < 300  # noqa: B023 - it is called at once


def test_longrope_keeps_its_short_factors_within_the_original_context(reference: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = reference.LlamaForCausalLM(reference.LlamaConfig(**SIZES, rope_scaling=ROPE["longrope"])).eval()
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(3, 96, (12,)).tolist()
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens]), use_cache=False).logits[0]
    files = files_of_folder(ModelRef(text="t", scheme="file", location=str(tmp_path)), tmp_path)
    model = EagerExecutor().load(LoadRequest(device="cpu", dtype="fp32",
                                             module=build_model(open_checkpoint(files), torch.float32)))
    torch.testing.assert_close(model.session(limit=16).score(tokens), expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(model.session(limit=17).score(tokens), expected, atol=2e-5, rtol=1e-4)


@pytest.fixture
def dynamic(reference: Any, tmp_path: Path) -> tuple[Any, Any]:
    """A model of 64 positions with dynamic NTK scaling to 256: a function that runs transformers, and our model."""
    torch.manual_seed(0)
    config = reference.LlamaConfig(**SIZES, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    config._attn_implementation = "eager"
    theirs = reference.LlamaForCausalLM(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    files = files_of_folder(ModelRef(text="t", scheme="file", location=str(tmp_path)), tmp_path)
    module = build_model(open_checkpoint(files), torch.float32)

    @torch.inference_mode()
    def grown(prompt: list[int], answer: list[int]) -> torch.Tensor:
        """Return transformers' logits at the last token of a new prompt and at each token decoded after it."""
        theirs(torch.tensor([[1]]))  # forgets the frequencies of an earlier, longer sequence
        step = theirs(torch.tensor([prompt]), use_cache=True)
        logits = [step.logits[0, -1]]
        for token in answer:
            step = theirs(torch.tensor([[token]]), past_key_values=step.past_key_values, use_cache=True)
            logits.append(step.logits[0, -1])
        return torch.stack(logits)

    return grown, EagerExecutor().load(LoadRequest(device="cpu", dtype="fp32", module=module))


DYNAMIC_TOKENS = [(7 * i * i + i) % 93 + 3 for i in range(200)]


@pytest.mark.parametrize("prompt", [50, 63, 64, 65, 150])
def test_dynamic_rope_follows_the_length_as_in_transformers(prompt: int, dynamic: tuple[Any, Any]) -> None:
    grown, model = dynamic
    tokens = DYNAMIC_TOKENS[: prompt + 30]
    session = model.session()
    ours = [session.prefill(tokens[:prompt]), *(session.decode(token) for token in tokens[prompt:])]
    torch.testing.assert_close(torch.stack(ours), grown(tokens[:prompt], tokens[prompt:]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("held", [[10], [70], [40, 60, 80], [99]])
def test_with_dynamic_rope_answers_do_not_depend_on_the_cache(held: list[int], dynamic: tuple[Any, Any]
                                                              ) -> None:
    grown, model = dynamic
    tokens = DYNAMIC_TOKENS[:110]
    expected = grown(tokens[:100], tokens[100:])
    session = model.session()
    for start, end in zip([0, *held], held, strict=False):
        session.prefill(tokens[start:end])
    for forked in (session, session.fork(held[-1])):
        ours = [forked.prefill(tokens[held[-1] : 100]), *(forked.decode(token) for token in tokens[100:])]
        torch.testing.assert_close(torch.stack(ours), expected, atol=1e-4, rtol=1e-3)
    session.truncate(30)
    short = torch.stack([session.prefill(tokens[30:50]), session.decode(tokens[50])])
    torch.testing.assert_close(short, grown(tokens[:50], tokens[50:51]), atol=1e-4, rtol=1e-3)


def test_with_dynamic_rope_batched_sequences_equal_single_ones(dynamic: tuple[Any, Any]) -> None:
    grown, model = dynamic
    lengths = (20, 64, 90)
    sessions = [model.session() for _ in lengths]
    first = model.prefill_batch(sessions, [DYNAMIC_TOKENS[:length] for length in lengths])
    second = model.decode_batch(sessions, [DYNAMIC_TOKENS[length] for length in lengths])
    for row, length in enumerate(lengths):
        expected = grown(DYNAMIC_TOKENS[:length], DYNAMIC_TOKENS[length : length + 1])
        torch.testing.assert_close(torch.stack([first[row], second[row]]), expected, atol=1e-4, rtol=1e-3)


def test_a_runtime_with_fixed_frequencies_rejects_dynamic_rope_beyond_the_original_context() -> None:
    raw = {"model_type": "llama", **SIZES, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    rotary = RotaryEmbedding(config_from_hugging_face(raw))
    assert not rotary.extends(64)
    with pytest.raises(TorchchatError, match="changes its frequencies beyond 64 positions"):
        rotary.extends(65)


def test_golden_logits_of_a_trained_model(testdata: Path) -> None:
    import numpy

    folder = testdata / "hf" / "TinyStories-656K"
    files = files_of_folder(ModelRef(text="t", scheme="file", location=str(folder)), folder)
    model = EagerExecutor().load(LoadRequest(device="cpu", dtype="fp32",
                                             module=build_model(open_checkpoint(files), torch.float32)))
    prompts = json.loads((testdata / "golden/TinyStories-656K/greedy_ids.json").read_text())["prompts"]
    expected = torch.from_numpy(numpy.load(testdata / "golden/TinyStories-656K/logits_prompt0_first64pos.f32.npy"))
    logits = model.session().score(prompts[0]["ids"][: len(expected)])
    assert float((logits - expected).abs().max()) < 1e-4


def test_training_rows_agree_with_cached_sequences(make_tiny_model: Any) -> None:
    module = make_tiny_model(sliding_window=5, rope_interleaved=True)
    rows = torch.randint(0, 96, (3, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(20).repeat(3)
    together = module(rows.flatten(), positions, RowAttention(module.config, 3)).unflatten(0, (3, 20))
    model = EagerExecutor().load(LoadRequest(device="cpu", dtype="fp32", module=module))
    for row, expected in zip(rows.tolist(), together, strict=True):
        torch.testing.assert_close(model.session().score(row), expected, atol=1e-5, rtol=1e-4)
