"""Decoding speed of tc-eager beside transformers' eager `generate`, one after the other in the same process.

    python tools/compare_transformers.py [--shape stories110M] [--dtype fp32] [--json]

Both run models of the same shape with random weights, greedily, and are measured in turns, so that a change in the
machine's speed meets both. The rate counts the tokens after the first: prefill is left out of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tc_eager.executor import EagerExecutor, EagerModel
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.transformer import Transformer
from torchchat_core.models.weights import TORCH_DTYPES
from torchchat_core.specs import LoadRequest

SHAPES = {
    "stories15M": {"vocab_size": 32000, "hidden_size": 288, "intermediate_size": 768, "num_layers": 6, "num_heads": 6},
    "stories110M": {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_layers": 12,
                    "num_heads": 12},
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Tokens per second, round by round, and the weights that each token reads."""

    shape: str
    dtype: str
    ours: list[float]
    theirs: list[float]
    weight_bytes: int

    @property
    def ratio(self) -> float:
        """The median over the rounds of ours divided by theirs."""
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))


def compare(shape: str, dtype: str, new_tokens: int, rounds: int) -> Comparison:
    """Measures both, in turns, after one round that is not counted."""
    torch.manual_seed(0)
    config = shape_config(shape)
    ours, weight_bytes = our_model(config, TORCH_DTYPES[dtype], dtype)
    theirs = _their_model(config, TORCH_DTYPES[dtype])
    runs = [(_our_rate(ours, new_tokens), _their_rate(theirs, new_tokens)) for _ in range(rounds + 1)][1:]
    return Comparison(shape=shape, dtype=dtype, ours=[run[0] for run in runs], theirs=[run[1] for run in runs],
                      weight_bytes=weight_bytes)


def shape_config(shape: str, max_context: int = 1024) -> ModelConfig:
    """The configuration of a named shape."""
    sizes = SHAPES[shape]
    return ModelConfig(architecture="llama", num_kv_heads=sizes["num_heads"], max_context=max_context,
                       tied_embeddings=True,
                       head_dim=sizes["hidden_size"] // sizes["num_heads"], **sizes)


def our_model(config: ModelConfig, torch_dtype: torch.dtype, dtype: str) -> tuple[EagerModel, int]:
    """A loaded model with random weights, and the bytes of them that a token reads."""
    module = Transformer(config).requires_grad_(False).eval()
    for name, parameter in list(module.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, torch.nn.Parameter(parameter.to(torch_dtype), False))
    module.lm_head.weight = module.model.embed_tokens.weight
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    return EagerExecutor().load(LoadRequest(device="cpu", dtype=dtype, module=module)), weight_bytes


def _their_model(config: ModelConfig, torch_dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, max_position_embeddings=config.max_context,
        tie_word_embeddings=True, pad_token_id=0,
    )).to(torch_dtype).eval()


PROMPT = list(range(5, 21))


def _our_rate(model: EagerModel, new_tokens: int) -> float:
    session = model.session()
    token = int(session.prefill(PROMPT).argmax())

    def decode() -> None:
        nonlocal token
        for _ in range(new_tokens):
            token = int(session.decode(token).argmax())

    return new_tokens / _seconds(decode)


def _their_rate(model: Any, new_tokens: int) -> float:
    prompt = torch.tensor([PROMPT])

    def generate(count: int) -> None:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count,
                       do_sample=False)

    first = _seconds(lambda: generate(1))
    return new_tokens / (_seconds(lambda: generate(new_tokens + 1)) - first)


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="stories110M")
    parser.add_argument("--dtype", choices=TORCH_DTYPES, action="append", help="may be repeated; fp32 and bf16")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = [compare(arguments.shape, dtype, arguments.new_tokens, arguments.rounds)
             for dtype in arguments.dtype or ("fp32", "bf16")]
    if arguments.json:
        print(json.dumps([{**vars(each), "ratio": each.ratio} for each in found]))
        return
    print(f"{'shape':<12} {'dtype':<6} {'tc-eager':>18} {'transformers':>18} {'ratio':>6} {'weights read':>13}")
    for each in found:
        median = statistics.median(each.ours)
        cells = [f"{statistics.median(rates):.1f} ({min(rates):.0f}-{max(rates):.0f}) t/s"
                 for rates in (each.ours, each.theirs)]
        print(f"{each.shape:<12} {each.dtype:<6} {cells[0]:>18} {cells[1]:>18} {each.ratio:>6.2f} "
              f"{median * each.weight_bytes / 1e9:>8.1f} GB/s")


if __name__ == "__main__":
    main()
