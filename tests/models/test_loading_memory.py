"""Loading maps weights: the memory that it takes is that of the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

GIB = 1 << 30
CONFIG = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
          "num_hidden_layers": 10, "num_attention_heads": 32, "num_key_value_heads": 8,
          "max_position_embeddings": 2048, "tie_word_embeddings": False}
PROGRAM = """
import sys
from pathlib import Path
from torchchat_core.memory import peak_rss_bytes
from torchchat_core.models.weights import build_model
from torchchat_core.sources.checkpoints import open_checkpoint
from torchchat_core.sources.local import files_of_folder
from torchchat_core.specs import LoadRequest, ModelRef
from tc_eager.executor import EagerExecutor
import torch
torch.nn.functional.linear(torch.ones(1, 8), torch.ones(8, 8))
before = peak_rss_bytes()
folder = Path(sys.argv[1])
files = files_of_folder(ModelRef(text="m", scheme="file", location=str(folder)), folder)
module = build_model(open_checkpoint(files), getattr(torch, sys.argv[2]))
model = EagerExecutor().load(LoadRequest(device="cpu", dtype="bf16", module=module))
logits = model.session(limit=64).prefill([1, 2, 3])
assert torch.isfinite(logits).all()
assert "torch._dynamo" not in sys.modules, "loading imports the compiler, which takes longer than all else"
print(peak_rss_bytes() - before)
"""


@pytest.fixture(scope="module")
def one_gigabyte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 1 GiB in bfloat16, whose every page differs from zero."""
    folder = tmp_path_factory.mktemp("one_gigabyte")
    hidden, middle, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 512
    shapes = {"model.embed_tokens.weight": (32000, hidden), "lm_head.weight": (32000, hidden),
              "model.norm.weight": (hidden,)}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + "self_attn.q_proj.weight": (hidden, hidden),
                   prefix + "self_attn.o_proj.weight": (hidden, hidden),
                   prefix + "self_attn.k_proj.weight": (kv, hidden), prefix + "self_attn.v_proj.weight": (kv, hidden),
                   prefix + "mlp.gate_proj.weight": (middle, hidden), prefix + "mlp.up_proj.weight": (middle, hidden),
                   prefix + "mlp.down_proj.weight": (hidden, middle), prefix + "input_layernorm.weight": (hidden,),
                   prefix + "post_attention_layernorm.weight": (hidden,)}
    save_file({name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()},
              folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_loading_a_gigabyte_takes_at_most_a_fifth_more(one_gigabyte: Path, dtype: str) -> None:
    """As it is, the file stays mapped; in another dtype of the same size, it is converted and let go."""
    size = (one_gigabyte / "model.safetensors").stat().st_size
    assert 0.95 * GIB < size < 1.1 * GIB
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(one_gigabyte), dtype], capture_output=True, text=True,
                          check=True)
    taken = int(done.stdout)
    assert taken <= 1.2 * size
    assert taken > 0.8 * size  # it did load the weights
