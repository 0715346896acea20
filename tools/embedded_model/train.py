"""Trains the embedded model and writes it as a Hugging Face folder.

    python -m tools.embedded_model.train --minutes 40

The schedule ends after --steps steps or --minutes minutes, whichever comes first: the learning rate falls to
zero by then. The folder is written anew every --save-every steps, so an early stop leaves a usable model.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from tools.embedded_model.conversations import Document, DocumentMaker
from tools.embedded_model.questions import load_questions
from tools.embedded_model.vocabulary import (
    BEGIN,
    CONTEXT,
    END,
    VOCABULARY_SIZE,
    Encoded,
    encode_document,
    make_tokenizer,
    write_json,
    write_tokenizer,
)
from torchchat_core.models.attention import RowAttention
from torchchat_core.models.config import ModelConfig, config_from_hugging_face
from torchchat_core.models.transformer import Transformer

DEFAULT_OUTPUT = Path(__file__).parents[2] / "torchchat_core" / "data" / "embedded"
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "dtype": "bfloat16",
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": CONTEXT,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": VOCABULARY_SIZE,
}
WARM_UP_STEPS = 40
DECAY_SHARE = 0.6  # of the run, at its end
LONGEST_ANSWER = 80  # tokens: what is longer is a story
SHORTENED_SHARE = 0.9  # of single answers and of stories
LEARNED_BEGINNINGS = (6, 10, 16)  # tokens
LEARNED_STORY_BEGINNING = 18
DROPOUT = 0.1
INTENT_WEIGHT = 0.5  # of the loss of telling the intent before the answer begins
LONGEST_SHORT_ROW = 96  # tokens
GROUP = 1536  # documents sorted by length together, so that a batch has little padding


@dataclass(frozen=True)
class Batch:
    """Rows of equal length: tokens, targets and intents [rows * length]; a target of -100 is not learned."""

    tokens: Tensor
    targets: Tensor
    intents: Tensor  # the number of the intent of the answer that begins after a token, else -100
    rows: int


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write")
    parser.add_argument("--start-from", type=Path, nargs="+",
                        help="folder whose tokenizer and weights to go on with; of several the mean of the weights")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=45.0, help="wall time of the training steps")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens of a step, padding included")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250, help="steps")
    return parser.parse_args()


def main() -> None:
    """Makes the tokenizer, trains, and writes the folder."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    model = new_model(config_from_hugging_face(MODEL))
    if arguments.start_from is None:
        tokenizer = make_tokenizer(arguments.seed)
    else:
        tokenizer = Tokenizer.from_file(str(arguments.start_from[0] / "tokenizer.json"))
        load_weights(model, *arguments.start_from)
    write_tokenizer(tokenizer, arguments.output)
    print(f"{sum(parameter.numel() for parameter in model.parameters())} parameters", flush=True)
    train(model, tokenizer, arguments)
    write_model(model, tokenizer, arguments.output)


def new_model(config: ModelConfig) -> Transformer:
    """A model with fresh weights; what is added to the residual stream starts smaller with depth."""
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.num_layers) if into_residual else 0.02)
    return model


def load_weights(model: Transformer, *folders: Path) -> None:
    """The weights of a folder that `write_model` wrote, or the mean of several folders' weights."""
    parts = [load_file(folder / "model.safetensors") for folder in folders]
    tensors = {name: torch.stack([part[name].float() for part in parts]).mean(0) for name in parts[0]}
    model.load_state_dict({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})


def train(model: Transformer, tokenizer: Tokenizer, arguments: argparse.Namespace) -> None:
    """Next-token prediction on what the assistant says, in bfloat16 with weights in float32."""
    intent_head = nn.Linear(model.config.hidden_size, len(load_questions().intents))
    optimizers = make_optimizers(model, intent_head, arguments.learning_rate, arguments.weight_decay)
    add_dropout(model)
    batches = make_batches(tokenizer, arguments.seed, arguments.batch_tokens)
    start, tokens_seen, mean_loss = time.monotonic(), 0, 0.0
    for step, batch in enumerate(itertools.islice(batches, arguments.steps), start=1):
        elapsed = (time.monotonic() - start) / 60
        progress = max(step / arguments.steps, elapsed / arguments.minutes)
        if progress > 1:
            break
        for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
            group["lr"] = arguments.learning_rate * learning_rate_share(step, progress)
        loss = learn(model, intent_head, batch, optimizers)
        tokens_seen += batch.tokens.numel()
        mean_loss = loss if step == 1 else 0.98 * mean_loss + 0.02 * loss
        if step % 25 == 0:
            report = f"step {step}  loss {mean_loss:.4f}  {elapsed:.1f} min  {tokens_seen / 1e6:.2f} M tokens"
            print(report, flush=True)
        if step % arguments.save_every == 0:
            write_model(model, tokenizer, arguments.output)


def make_optimizers(
    model: Transformer, intent_head: nn.Linear, learning_rate: float, weight_decay: float
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) needs fewer steps; `match_rms_adamw` gives
    its updates the size of AdamW's, so that both take the same learning rate.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = [*intent_head.parameters()]
    for name, parameter in model.named_parameters():
        (matrices if parameter.dim() == 2 and "layers" in name else others).append(parameter)
    muon = torch.optim.Muon(matrices, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(others, learning_rate, betas=(0.9, 0.95), weight_decay=0.0)


def learning_rate_share(step: int, progress: float) -> float:
    """A linear warm-up, a plain, and a linear way down to zero where `progress` is 1."""
    return min(1.0, step / WARM_UP_STEPS, (1 - progress) / DECAY_SHARE)


def add_dropout(model: Transformer) -> None:
    """Drops part of what is added to the residual stream, and of the embedding, while the model trains."""
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "down_proj")):
            module.register_forward_hook(lambda _, __, output: F.dropout(output, DROPOUT))


class ShortRowAttention(RowAttention):
    """The same written out: for rows as short as a question this is faster than the fused one."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.unflatten(0, (self.rows, -1)).transpose(1, 2) for x in (query, key, value))
        length, group = query.shape[2], query.shape[1] // key.shape[1]
        if length > LONGEST_SHORT_ROW:
            return super().__call__(layer, *(x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)))
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * self.config.attention_scale  # [rows, heads, length, length]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(value.dtype)
        return (weights @ value).transpose(1, 2).reshape(self.rows * length, -1)


def learn(
    model: Transformer, intent_head: nn.Linear, batch: Batch, optimizers: Sequence[torch.optim.Optimizer]
) -> float:
    """One step; the loss in nats per learned token.

    A head that is thrown away afterwards has to tell the intent where the answer begins: there the model
    learns to gather what was asked, which the first words of an answer, often the same ones, teach it less.
    """
    length = batch.tokens.numel() // batch.rows
    positions = torch.arange(length).repeat(batch.rows)
    learned = (batch.targets >= 0).nonzero()[:, 0]
    beginnings = (batch.intents >= 0).nonzero()[:, 0]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(batch.tokens, positions, ShortRowAttention(model.config, batch.rows), False)
        logits = model.lm_head(hidden[learned])  # [learned tokens, vocab]
        guesses = intent_head(hidden[beginnings])
    loss = F.cross_entropy(logits.float(), batch.targets[learned])
    total = loss
    if len(beginnings):
        total = loss + INTENT_WEIGHT * F.cross_entropy(guesses.float(), batch.intents[beginnings])
    model.zero_grad()
    intent_head.zero_grad()
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


def make_batches(tokenizer: Tokenizer, seed: int, batch_tokens: int) -> Iterator[Batch]:
    """Batches without end, of documents of similar length, in random order."""
    chance = random.Random(seed)
    maker = DocumentMaker(seed)
    numbers = {intent.id: number for number, intent in enumerate(maker.book.intents)}
    documents = (
        shortened(document, encode_document(tokenizer, document), chance) for document in maker.documents()
    )
    order = torch.Generator().manual_seed(seed)
    while True:
        group = sorted(itertools.islice(documents, GROUP), key=lambda encoded: len(encoded.ids))
        batches = list(cut(group, batch_tokens))
        for index in torch.randperm(len(batches), generator=order).tolist():
            yield pad(batches[index], numbers)


def shortened(document: Document, encoded: Encoded, chance: random.Random) -> Encoded:
    """Mostly only the beginning of a single answer, and of a story.

    There it is decided which answer is given; the rest is soon known by heart, and costs as much time.
    """
    if len(document.messages) not in (2, 3) or chance.random() >= SHORTENED_SHARE:
        return encoded
    is_story = sum(encoded.learned) > LONGEST_ANSWER
    count = LEARNED_STORY_BEGINNING if is_story else chance.choice(LEARNED_BEGINNINGS)
    return encoded.beginning(encoded.learned.index(True) + count)


def cut(documents: Sequence[Encoded], batch_tokens: int) -> Iterator[list[Encoded]]:
    """Documents sorted by length, in runs of at most `batch_tokens` tokens with padding."""
    run: list[Encoded] = []
    for whole in documents:
        encoded = whole.beginning(CONTEXT)
        if run and len(encoded.ids) * (len(run) + 1) > batch_tokens:
            yield run
            run = []
        run.append(encoded)
    yield run


def pad(run: Sequence[Encoded], numbers: Mapping[str, int]) -> Batch:
    """Rows as long as the longest document: token t is input, token t + 1 the target where it is learned."""
    length = len(run[-1].ids) - 1
    tokens = torch.zeros(len(run), length, dtype=torch.long)
    targets = torch.full((len(run), length), -100)
    intents = torch.full((len(run), length), -100)
    for row, encoded in enumerate(run):
        count = len(encoded.ids) - 1
        values = torch.tensor(encoded.ids)
        tokens[row, :count] = values[:-1]
        targets[row, :count] = torch.where(torch.tensor(encoded.learned[1:]), values[1:], -100)
        intents[row, :count] = torch.tensor([numbers.get(intent, -100) for intent in encoded.intents[:-1]])
    return Batch(tokens.flatten(), targets.flatten(), intents.flatten(), len(run))


def write_model(model: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    """config.json, generation_config.json and model.safetensors, in bfloat16."""
    begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
    tokens = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
    write_json(folder / "config.json", {**MODEL, **tokens})
    write_json(folder / "generation_config.json", {**tokens, "do_sample": True, "temperature": 0.2})
    tensors = {name: parameter.detach().to(torch.bfloat16) for name, parameter in model.named_parameters()}
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(folder / "model.safetensors")


if __name__ == "__main__":
    main()
