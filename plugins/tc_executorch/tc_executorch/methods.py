"""A transformer as the methods of an ExecuTorch program.

Between two attentions lies one subgraph of XNNPACK: the output projection and feed-forward of a layer, and the
queries, keys and values of the next one, turned by their angles. Attention with its KV cache is ExecuTorch's operator
`llama::sdpa_with_kv_cache`, which costs what the sequence is long.

Queries and keys are computed as two halves, each with half of the rows: the rotation takes one dimension of each pair
from either. That puts the dimensions of a head in another order, the same in queries and keys, on which their products
do not depend. The halves and the values come from one product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as nodes
from executorch.exir.scalar_type import ScalarType
from torch import Tensor, nn

from tc_executorch.constants import constant
from tc_executorch.delegate import Rows, Subgraph, Value, stacked
from tc_executorch.program import Method, Program
from torchchat_core.errors import TorchchatError
from torchchat_core.models.transformer import Attention, DecoderLayer, RMSNorm, Transformer
from torchchat_core.quantization.layers import QuantizedEmbedding, QuantizedLinear


@dataclass(frozen=True)
class Lengths:
    """What is fixed when a model is exported."""

    context: int  # positions of the KV cache
    prefill: int  # tokens that a step may have
    score: int  # the same, of steps that give logits at every position


@dataclass
class Angles:
    """cos and sin of the positions of a step, [1, n, 1, head_dim / 2]."""

    cos: int
    sin: int


class Writer:
    """Writes one method: tokens [1, n] int64 and the position of the first, [1] int64, in; logits out.

    With `every`, logits [n, vocab] of every position, else [1, vocab] of the last one.
    """

    def __init__(self, program: Program, name: str, model: Transformer, lengths: Lengths, every: bool,
                 advance: Callable[[int], None]) -> None:
        self.program, self.model, self.config = program, model, model.config
        self.context, self.count, self.every = lengths.context, lengths.score if every else lengths.prefill, every
        self.method: Method = program.method(name)
        self.advance = advance  # told of each subgraph

    def write(self) -> None:
        method, config = self.method, self.config
        caches = [(self.cache(f"keys.{layer}"), self.cache(f"values.{layer}")) for layer in range(config.num_layers)]
        tokens = method.tensor((1, self.count), ScalarType.LONG)
        position = method.tensor((1,), ScalarType.LONG, dynamic=False)
        method.inputs = [tokens, position]
        start, count, angles = self.prologue(tokens, position)
        hidden = self.embedded(tokens)
        context: int | None = None
        for layer, (keys, values) in enumerate(caches):
            query, key, value, hidden = self.before_attention(layer, hidden, context, angles)
            context = self.attended(query, key, value, keys, values, start, count)
            self.advance(1)
        assert context is not None
        method.outputs = [self.after_attention(hidden, context)]
        self.advance(1)

    def cache(self, name: str) -> int:
        shape = (1, self.context, self.config.num_kv_heads, self.config.head_dim)
        return self.method.tensor(shape, dynamic=False, name=name)

    # ---- outside of XNNPACK ---------------------------------------------------------------------------------------

    def prologue(self, tokens: int, position: int) -> tuple[int, int, Angles]:
        """The number of tokens held, that of tokens given, and their angles."""
        method, one = self.method, self.method.number(1)
        count, start, end = method.number(0), method.number(0), method.number(0)
        method.call("aten::sym_size", "int", [tokens, one, count])
        method.call("aten::_local_scalar_dense", "", [position, start])
        method.call("executorch_prim::add", "Scalar", [start, count, end])
        tables = rotary_tables(self.model, self.context)
        found = []
        for table in tables:
            whole = method.constant(table.shape, ScalarType.FLOAT, constant(lambda table=table: table))  # type: ignore[misc]
            rows = method.tensor((1, self.count, 1, table.shape[3]))
            found.append(method.kernel("aten::slice_copy", "Tensor_out", [whole, one, start, end, one], rows))
        return start, count, Angles(*found)

    def embedded(self, tokens: int) -> int:
        """[n, hidden]."""
        method, layer = self.method, self.model.model.embed_tokens
        flat = method.view(tokens, (self.count,), ScalarType.LONG, sizes=(-1,))
        out = method.tensor((self.count, self.config.hidden_size))
        if isinstance(layer, QuantizedEmbedding):
            return self.quantised_rows(layer, flat, out)
        weight = layer.weight
        table = method.constant(weight.shape, ScalarType.FLOAT, constant(weight.float))
        return method.kernel("aten::embedding", "out", [table, flat, method.number(-1), method.truth(False),
                                                        method.truth(False)], out)

    def quantised_rows(self, layer: QuantizedEmbedding, flat: int, out: int) -> int:
        method, bits = self.method, layer.format.bits
        scales = method.constant(layer.scales.shape, ScalarType.FLOAT, constant(layer.scales.float))
        if bits == 4:  # two to a byte as here, but the even column in the upper half
            stored = constant(lambda: layer.values << 4 | layer.values >> 4)
            table = method.constant(layer.values.shape, ScalarType.BYTE, stored)
        else:
            table = method.constant(layer.values.shape, ScalarType.CHAR, constant(lambda: layer.values ^ 128))
        least, most = -layer.format.middle, layer.format.middle - 1
        return method.kernel(f"quantized_decomposed::embedding_{'4bit' if bits == 4 else 'byte'}", "out", [
            table, scales, method.nothing(), method.number(least), method.number(most), flat], out)

    def attended(self, query: int, key: int, value: int, keys: int, values: int, start: int, count: int) -> int:
        """[n, heads * head_dim] of queries and keys [1, n, heads, head_dim], and values [n, kv_heads * head_dim].

        Keys and values of this step are in the cache then.
        """
        method, config = self.method, self.config
        value = method.view(value, (1, self.count, config.num_kv_heads, config.head_dim),
                            sizes=(1, -1, config.num_kv_heads, config.head_dim))
        out = method.tensor((1, self.count, config.num_heads, config.head_dim))
        method.kernel("llama::sdpa_with_kv_cache", "out", [
            query, key, value, keys, values, start, count, method.nothing(), method.real(0.0), method.truth(True),
            method.real(config.attention_scale)], out)
        method.release(query, key, value)
        width = config.num_heads * config.head_dim
        return method.view(out, (self.count, width), sizes=(-1, width))

    def last_row(self, tensor: int, width: int) -> int:
        """Of [n, width] the last position, [1, width]."""
        method = self.method
        out = method.tensor((1, width))
        return method.kernel("aten::slice_copy", "Tensor_out", [tensor, method.number(0), method.number(-1),
                                                                method.nothing(), method.number(1)], out)

    # ---- the subgraphs --------------------------------------------------------------------------------------------

    def before_attention(self, index: int, hidden: int, context: int | None, angles: Angles
                         ) -> tuple[int, int, int, int]:
        """Queries, keys and values of a layer, and its input: the output of the layer before, where there is one."""
        method, config, rows = self.method, self.config, self.count
        layer: DecoderLayer = self.model.model.layers[index]  # type: ignore[assignment]
        graph = Subgraph(self.program.constants)
        arguments = [hidden, angles.cos, angles.sin, *([] if context is None else [context])]
        x = graph.input((rows, config.hidden_size))
        cos, sin = (graph.input((1, rows, 1, config.head_dim // 2)) for _ in range(2))
        heads, kv_heads = ((1, rows, count, config.head_dim) for count in (config.num_heads, config.num_kv_heads))
        attended = None if context is None else graph.input((rows, config.num_heads * config.head_dim))
        shapes = heads, kv_heads, (rows, config.num_kv_heads * config.head_dim)
        out_query, out_key, out_value = (graph.output(shape) for shape in shapes)
        results = [method.tensor(shape) for shape in shapes]
        if attended is not None:
            below: DecoderLayer = self.model.model.layers[index - 1]  # type: ignore[assignment]
            out_hidden = graph.output(x.shape)
            results.append(method.tensor(x.shape))
            x = finished(graph, below, x, attended, out_hidden)
        elif config.embedding_multiplier != 1.0:
            out_hidden = graph.output(x.shape)
            results.append(method.tensor(x.shape))
            x = graph.multiply(x, graph.scalar(config.embedding_multiplier), out_hidden)
        projected(graph, layer, x, (cos, sin), (out_query, out_key, out_value))
        method.delegate(graph.serialised(), [*arguments, *results])
        if len(results) == 4:
            method.release(hidden)
        if context is not None:
            method.release(context)
        return results[0], results[1], results[2], results[3] if len(results) == 4 else hidden

    def after_attention(self, hidden: int, context: int) -> int:
        """The logits."""
        config, rows = self.config, self.count
        width = config.num_heads * config.head_dim
        if not self.every:  # from here on the other positions matter to nobody
            rows, hidden, context = 1, self.last_row(hidden, config.hidden_size), self.last_row(context, width)
        graph = Subgraph(self.program.constants)
        x, attended = graph.input((rows, config.hidden_size)), graph.input((rows, width))
        out = graph.output((rows, config.vocab_size))
        x = finished(graph, self.model.model.layers[-1], x, attended)  # type: ignore[arg-type]
        x = normed(graph, self.model.model.norm, x)
        plain = config.logits_divisor == 1.0
        logits = multiplied(graph, [Rows(self.model.lm_head)], x, rounded_for(graph, [self.model.lm_head], x),
                            into=out if plain else None)
        if not plain:
            graph.multiply(logits, graph.scalar(1.0 / config.logits_divisor), out)
        result = self.method.tensor((rows, config.vocab_size))
        self.method.delegate(graph.serialised(), [hidden, context, result])
        return result


def rotary_tables(model: Transformer, context: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, [1, context, 1, head_dim / 2]: one of each pair of equal columns."""
    rotary = model.model.rotary
    cos, signed = rotary(torch.arange(context), rotary.extends(context))
    half = cos.shape[2] // 2
    columns = slice(1, None, 2) if rotary.interleaved else slice(half, None)  # those with the sine as it is
    return cos[None, :, :, columns].contiguous(), signed[None, :, :, columns].contiguous()


def halves(heads: int, head_dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Rows of a projection: the first of each pair that is turned together, and the second."""
    rows = torch.arange(heads * head_dim).view(heads, head_dim)
    if interleaved:
        return rows[:, 0::2].flatten(), rows[:, 1::2].flatten()
    return rows[:, : head_dim // 2].flatten(), rows[:, head_dim // 2 :].flatten()


def projected(graph: Subgraph, layer: DecoderLayer, x: Value, angles: tuple[Value, Value],
              out: tuple[Value, Value, Value]) -> None:
    """Queries and keys [1, n, heads, head_dim] of a layer, and values [n, kv_heads * head_dim], from [n, hidden]."""
    attention = layer.self_attn
    x = normed(graph, layer.input_layernorm, x)
    parts = [Rows(linear, rows) for linear, heads in ((attention.q_proj, attention.num_heads),
                                                      (attention.k_proj, attention.num_kv_heads))
             for rows in halves(heads, attention.head_dim, attention.rope_interleaved)]
    parts.append(Rows(attention.v_proj))
    rounded = rounded_for(graph, [part.layer for part in parts], x)
    products = multiplied_together(graph, parts, x, rounded, [None, None, None, None, out[2]])
    turned(graph, attention, attention.num_heads, attention.q_norm, products[0:2], angles, out[0])
    turned(graph, attention, attention.num_kv_heads, attention.k_norm, products[2:4], angles, out[1])


def turned(graph: Subgraph, attention: Attention, heads: int, norm: RMSNorm | None, products: Sequence[Value],
           angles: tuple[Value, Value], out: Value) -> None:
    """Both halves of a projection, normed where the model does that, and turned: [1, n, heads, head_dim]."""
    shape = (1, products[0].shape[0], heads, attention.head_dim // 2)
    first, second = (graph.reshape(each, shape, dynamic=1) for each in products)
    if norm is not None:
        first, second = normed_halves(graph, norm, first, second, attention.rope_interleaved)
    cos, sin = angles
    left = graph.subtract(graph.multiply(first, cos), graph.multiply(second, sin))
    right = graph.add(graph.multiply(second, cos), graph.multiply(first, sin))
    graph.concatenate(left, right, axis=3, into=out)


def normed_halves(graph: Subgraph, norm: RMSNorm, first: Value, second: Value, interleaved: bool
                  ) -> tuple[Value, Value]:
    """RMSNorm over heads whose dimensions are in two values [1, n, heads, head_dim / 2]."""
    _, rows, heads, half = first.shape
    means = [graph.mean_of_squares(graph.reshape(each, (rows * heads, half), dynamic=0)) for each in (first, second)]
    mean = graph.multiply(graph.add(*means), graph.scalar(0.5))
    scale = graph.reshape(inverse_root(graph, mean, norm.eps), (1, rows, heads, 1), dynamic=1)
    weights = halves(1, 2 * half, interleaved)
    left, right = (graph.multiply(graph.multiply(each, scale), graph.constant(norm.weight[chosen]))
                   for each, chosen in zip((first, second), weights, strict=True))
    return left, right


def finished(graph: Subgraph, layer: DecoderLayer, x: Value, attended: Value, into: Value | None = None) -> Value:
    """The rest of a layer behind its attention, which gave [n, heads * head_dim]: [n, hidden]."""
    output = layer.self_attn.o_proj
    x = added(graph, layer, x, multiplied(graph, [Rows(output)], attended, rounded_for(graph, [output], attended)))
    return added(graph, layer, x, fed_forward(graph, layer, x), into)


def fed_forward(graph: Subgraph, layer: DecoderLayer, x: Value) -> Value:
    mlp = layer.mlp
    x = normed(graph, layer.post_attention_layernorm, x)
    rounded = rounded_for(graph, [mlp.gate_proj, mlp.up_proj], x)
    gate, up = (multiplied(graph, [Rows(each)], x, rounded) for each in (mlp.gate_proj, mlp.up_proj))
    silu = graph.multiply(gate, graph.unary(nodes.XNNSigmoid, gate))
    hidden = graph.multiply(silu, up)
    return multiplied(graph, [Rows(mlp.down_proj)], hidden, rounded_for(graph, [mlp.down_proj], hidden))


def added(graph: Subgraph, layer: DecoderLayer, x: Value, update: Value, into: Value | None = None) -> Value:
    if layer.residual_multiplier != 1.0:
        update = graph.multiply(update, graph.scalar(layer.residual_multiplier))
    return graph.add(x, update, into)


def normed(graph: Subgraph, norm: RMSNorm, x: Value) -> Value:
    scale = inverse_root(graph, graph.mean_of_squares(x), norm.eps)
    return graph.multiply(graph.multiply(x, scale), graph.constant(norm.weight))


def inverse_root(graph: Subgraph, mean: Value, eps: float) -> Value:
    return graph.unary(nodes.XNNReciprocalSquareRoot, graph.add(mean, graph.scalar(eps)))


def rounds(layer: nn.Module) -> bool:
    return isinstance(layer, QuantizedLinear) and layer.format.activations == "int8"


def rounded_for(graph: Subgraph, layers: list[nn.Module], x: Value) -> Value:
    """The value as int8 where one of the layers is multiplied with that, else itself."""
    return graph.rounded(x) if any(map(rounds, layers)) else x


def multiplied_together(graph: Subgraph, parts: Sequence[Rows], x: Value, rounded: Value,
                        into: Sequence[Value | None]) -> list[Value]:
    """Products with several layers, in one where their weights are alike: threads wait for each other after each."""
    if len({kind_of(part.layer) for part in parts}) > 1:
        return [multiplied(graph, [part], x, rounded, out) for part, out in zip(parts, into, strict=True)]
    product, first, found = multiplied(graph, parts, x, rounded), 0, []
    for part, out in zip(parts, into, strict=True):
        found.append(graph.columns(product, first, part.count, out))
        first += part.count
    return found


def kind_of(layer: nn.Module) -> object:
    """What is equal for layers whose weights can stand in one matrix."""
    return layer.format if isinstance(layer, QuantizedLinear) else type(layer)


def multiplied(graph: Subgraph, parts: Sequence[Rows], x: Value, rounded: Value, into: Value | None = None) -> Value:
    """The product with linear layers of one kind, one below the other."""
    layer, bias = parts[0].layer, biases(parts)
    if isinstance(layer, QuantizedLinear):
        if rounds(layer) or bias is None:
            return graph.linear(rounded if rounds(layer) else x, graph.integers(parts), bias, into)
        product = graph.linear(x, graph.integers(parts), None)
        return graph.add(product, graph.constant(bias), into)  # the kernel would multiply the bias with the scales
    if not isinstance(layer, nn.Linear):
        raise TorchchatError(f"an ExecuTorch file cannot hold a layer of the kind {type(layer).__name__}")
    return graph.linear(x, graph.weights(parts), bias, into)


def biases(parts: Sequence[Rows]) -> Tensor | None:
    """One number for each row, or None where no layer has a bias."""
    if all(part.layer.bias is None for part in parts):
        return None
    return stacked([torch.zeros(part.count) if part.layer.bias is None else part.of(part.layer.bias).float()
                    for part in parts])
