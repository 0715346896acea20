"""A model whose answers are scripted: each token follows from the one before, and one answer waits for a marker.

The layer's attention finds a marker token anywhere in the prompt and adds a component to the hidden state; everything
else is zero. So a test can make a model that calls a tool, and answers once the tool's result is in the prompt.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HIDDEN = 256
HEAD_DIM = 64
CONSTANT, MARKED = HIDDEN - 2, HIDDEN - 1  # components of the hidden state
SLOWEST = HEAD_DIM - 1  # the component of a head that rotary embeddings rotate least


def write_scripted_model(folder: Path, template: str, control: Sequence[str], before: Sequence[str],
                         after: Sequence[str], marker: str, bos: str | None = None) -> None:
    """Write a Hugging Face folder whose model says `before`, or `after` if `marker` is in the prompt.

    Both start with the last token of the prompt, which is not said, and end with the token that ends a turn. Texts of
    more than one byte become tokens of their own; those of `control` are special.
    """
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={text: index for index, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    said = [text for text in (*before, *after, marker) if text not in alphabet and text not in control]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in dict.fromkeys(said)])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = tokenizer.get_vocab(with_added_tokens=True)

    size = len(ids)
    embedding = torch.randn(size, HIDDEN, generator=torch.Generator().manual_seed(0))
    embedding[:, CONSTANT], embedding[:, MARKED] = 1.0, 0.0
    directions = embedding[:, :CONSTANT] / embedding[:, :CONSTANT].norm(dim=1, keepdim=True)
    embedding[ids[marker], MARKED] = 8.0
    output = torch.zeros(size, HIDDEN)
    for chain, gain in ((before, 10.0), (after, 8.0)):
        for text, following in itertools.pairwise(chain):
            output[ids[following], :CONSTANT] += directions[ids[text]] * gain
            gain = 10.0
    output[ids[before[1]], MARKED] = -20.0

    query, key, value, mixed = (torch.zeros(HIDDEN, HIDDEN) for _ in range(4))
    query[SLOWEST, CONSTANT] = key[SLOWEST, MARKED] = 16.0
    value[0, MARKED], mixed[MARKED, 0] = 1.0, 0.6
    layer = "model.layers.0."
    save_file({
        "model.embed_tokens.weight": embedding, "lm_head.weight": output, "model.norm.weight": torch.ones(HIDDEN),
        f"{layer}self_attn.q_proj.weight": query, f"{layer}self_attn.k_proj.weight": key,
        f"{layer}self_attn.v_proj.weight": value, f"{layer}self_attn.o_proj.weight": mixed,
        f"{layer}mlp.gate_proj.weight": torch.zeros(64, HIDDEN), f"{layer}mlp.up_proj.weight": torch.zeros(64, HIDDEN),
        f"{layer}mlp.down_proj.weight": torch.zeros(HIDDEN, 64), f"{layer}input_layernorm.weight": torch.ones(HIDDEN),
        f"{layer}post_attention_layernorm.weight": torch.ones(HIDDEN)}, folder / "model.safetensors")
    end = before[-1]
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": size, "hidden_size": HIDDEN, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": HIDDEN // HEAD_DIM, "num_key_value_heads": HIDDEN // HEAD_DIM,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
        "torch_dtype": "float32", "eos_token_id": ids[end]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": bos, "eos_token": end, "add_bos_token": False, "chat_template": template}))
