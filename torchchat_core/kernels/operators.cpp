// The kernels as operators of PyTorch: torchchat::quantized_linear(s), pack_quantized, unpack_quantized,
// in_weight_memory, unpack_ggml, take_apart_ggml, dense_linear(s), rms_norm, cached_attention, batched_attention.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/library.h>

#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "attention.h"
#include "bfloat16_linear.h"
#include "float32_linear.h"
#include "ggml_blocks.h"
#include "ggml_integers.h"
#include "packing.h"
#include "parallel.h"
#include "quantized_linear.h"
#include "rms_norm.h"
#include "weight_memory.h"

namespace torchchat {
namespace {

constexpr int64_t kFewTokens = 8;  // that attend head by head; more of them are worth PyTorch's blocked kernel
constexpr size_t kWorthOneDnn = 3 << 18;  // bytes of weights: its preparation takes some 15 microseconds
// Tile sizes of a large matrix multiplication: minimum and maximum outputs per tile, tiles per thread, and minimum rows per
// tile. Rows are split only if there are too few outputs for all threads.
constexpr int64_t kMinOutputs = 64, kMaxOutputs = 256, kTilesPerThread = 2, kMinRows = 128;
// Cost of one multiplication in attention scores relative to one in a large matrix, head by head and in blocks.
constexpr int64_t kCostPerScore = 16, kCostPerBlockedScore = 4;
constexpr int64_t kRowsAtOnce = 192;  // of activations: their int8 values stay in the second-level cache

constexpr const char* kInstructionNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};  // in the order of the enum

std::string name_of(Instructions instructions) { return kInstructionNames[static_cast<int>(instructions)]; }

// Chooses the instructions, "" for the best ones; which are in use now.
std::string use_instructions(const std::string& name) {
  const Instructions best = best_instructions();
  const auto* found = std::find(std::begin(kInstructionNames), std::end(kInstructionNames), name);
  TORCH_CHECK(name.empty() || found != std::end(kInstructionNames), "instructions are ", name,
              "; known are portable, avx2, avx512 and avx512_bf16");
  const auto chosen = name.empty() ? best : static_cast<Instructions>(found - std::begin(kInstructionNames));
  TORCH_CHECK(chosen <= best, "this processor has no ", name, "; its best are ", name_of(best));
  instructions_in_use = chosen;
  return name_of(chosen);
}

PanelLayout checked_layout(int64_t columns, int64_t bits, int64_t group_size, bool asymmetric) {
  TORCH_CHECK(bits == 4 || bits == 8, "bits is ", bits, "; it has to be 4 or 8");
  TORCH_CHECK(columns > 0, "a matrix without columns");
  TORCH_CHECK(group_size > 0 && group_size % kBlockColumns == 0, "group_size is ", group_size,
              "; it has to be a multiple of ", kBlockColumns);
  const int64_t blocks = (columns + kBlockColumns - 1) / kBlockColumns;
  return {static_cast<int>(bits), asymmetric, blocks, std::min(group_size / kBlockColumns, blocks)};
}

// values uint8 [outputs, bytes of a row], as packing.h has them, scales and offsets float16 [outputs, groups] -> panels,
// uint8 [bytes].
at::Tensor pack_quantized(const at::Tensor& values, const at::Tensor& scales, const std::optional<at::Tensor>& offsets,
                          int64_t columns, int64_t bits, int64_t group_size) {
  const PanelLayout layout = checked_layout(columns, bits, group_size, offsets.has_value());
  const int64_t row_bytes = bits == 8 ? columns : (columns + 1) / 2;
  TORCH_CHECK(values.dim() == 2 && values.scalar_type() == at::kByte && values.size(1) == row_bytes,
              "values have to be uint8 [outputs, ", row_bytes, "]");
  const int64_t outputs = values.size(0);
  for (const at::Tensor* each : {&scales, offsets ? &*offsets : &scales})
    TORCH_CHECK(each->dim() == 2 && each->scalar_type() == at::kHalf && each->size(0) == outputs &&
                    each->size(1) == layout.groups(),
                "scales and offsets have to be float16 [", outputs, ", ", layout.groups(), "]");
  const at::Tensor from = values.contiguous(), factors = scales.contiguous();
  const at::Tensor shifts = offsets ? offsets->contiguous() : at::Tensor();
  const auto halves = [](const at::Tensor& numbers) {
    return reinterpret_cast<const uint16_t*>(numbers.const_data_ptr<at::Half>());
  };
  const StoredRows stored{from.const_data_ptr<uint8_t>(), outputs,         columns, row_bytes,
                          halves(factors),                offsets ? halves(shifts) : nullptr};
  at::Tensor packed = weight_memory(panels_of(outputs) * layout.panel_bytes());
  uint8_t* target = packed.mutable_data_ptr<uint8_t>();
  const auto pack = bits == 8 ? pack_panel<8> : pack_panel<4>;
  for_range(panels_of(outputs), kPanelRows * columns * kCostPerByte, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel)
      pack(layout, stored, panel, target + panel * layout.panel_bytes());
  });
  return packed;
}

// A copy of packed weights that lie elsewhere, such as in a file that is mapped with small pages.
at::Tensor in_weight_memory(const at::Tensor& packed) {
  TORCH_CHECK(packed.dim() == 1 && packed.scalar_type() == at::kByte && packed.is_contiguous(),
              "packed weights have to be contiguous uint8 [bytes]");
  at::Tensor copy = weight_memory(packed.numel());
  const uint8_t* from = packed.const_data_ptr<uint8_t>();
  uint8_t* to = copy.mutable_data_ptr<uint8_t>();
  for_range(packed.numel(), kCostPerByte, [&](int64_t first, int64_t last) {
    std::memcpy(to + first, from + first, last - first);
  });
  return copy;
}

void check_packed(const at::Tensor& packed, const PanelLayout& layout, int64_t outputs) {
  TORCH_CHECK(packed.is_contiguous() && packed.scalar_type() == at::kByte && packed.device().is_cpu(),
              "packed weights have to be contiguous uint8 on the CPU");
  TORCH_CHECK(outputs > 0 && packed.numel() == panels_of(outputs) * layout.panel_bytes(), "packed weights have ",
              packed.numel(), " bytes, which are not those of ", outputs, " rows of ", layout.blocks, " blocks");
}

// The matrix that the panels stand for: float32 [outputs, columns].
at::Tensor unpack_quantized(const at::Tensor& packed, int64_t outputs, int64_t columns, int64_t bits,
                            int64_t group_size, bool asymmetric) {
  const PanelLayout layout = checked_layout(columns, bits, group_size, asymmetric);
  check_packed(packed, layout, outputs);
  at::Tensor matrix = at::empty({outputs, columns}, packed.options().dtype(at::kFloat));
  const uint8_t* source = packed.const_data_ptr<uint8_t>();
  float* target = matrix.mutable_data_ptr<float>();
  for_range(panels_of(outputs), kPanelRows * columns * kCostPerByte, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      const uint8_t* at = source + panel * layout.panel_bytes();
      for (int64_t begin = 0; begin < layout.blocks; begin += layout.group) {
        const int64_t end = std::min(begin + layout.group, layout.blocks);
        const auto* scales = reinterpret_cast<const uint16_t*>(at + (end - begin) * layout.block_bytes());
        for (int64_t block = begin; block < end; ++block, at += layout.block_bytes())
          for (int64_t lane = 0; lane < kPanelRows && panel * kPanelRows + lane < outputs; ++lane)
            for (int64_t column = 0; column < kBlockColumns && block * kBlockColumns + column < columns; ++column) {
              const int32_t stored = stored_weight(at, layout.bits, lane, column) - layout.zero();
              const float offset = asymmetric ? half_to_float(scales[kPanelRows + lane]) : 0.0f;
              target[(panel * kPanelRows + lane) * columns + block * kBlockColumns + column] =
                  half_to_float(scales[lane]) * static_cast<float>(stored) + offset;
            }
        at += layout.scale_bytes();
      }
    }
  });
  return matrix;
}

// Packed matrices that multiply the same activations; their outputs stand side by side.
struct Matrices {
  std::vector<const uint8_t*> data;
  std::vector<int64_t> outputs;

  int64_t panels() const {
    return std::accumulate(outputs.begin(), outputs.end(), int64_t{0},
                           [](int64_t sum, int64_t each) { return sum + panels_of(each); });
  }
};

template <typename Scalar>
void multiply(const at::Tensor& x, const Matrices& matrices, const float* bias, const PanelLayout& layout,
              at::Tensor& out) {
  const int64_t rows = x.size(0), columns = x.size(1), width = out.size(1), bytes = layout.panel_bytes();
  const Instructions instructions = instructions_in_use;
  const RoundBlock round = choose_round_block(instructions);
  const MultiplyPanel multiply_panel = choose_multiply_panel(instructions, layout.bits);
  const Scalar* from = x.const_data_ptr<Scalar>();
  Scalar* to = out.mutable_data_ptr<Scalar>();
  RoundedRows rounded(rows, columns);
  for_range(rows, columns * kCostPerByte, [&](int64_t begin, int64_t end) {
    round_rows(from, columns, begin, end, round, rounded);
  });
  for_range(matrices.panels(), std::max(rows * columns * kPanelRows, bytes * kCostPerByte), [&](int64_t begin, int64_t end) {
    std::vector<float> products(std::min(rows, kRowsAtOnce) * kPanelRows);
    for (int64_t first = 0; first < rows; first += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, rows - first);
      int64_t before = 0, left = 0;  // panels and outputs of the matrices before this one
      for (size_t index = 0; index < matrices.data.size(); ++index) {
        const int64_t outputs = matrices.outputs[index], panels = panels_of(outputs);
        const int64_t last = std::min(end - before, panels);
        for (int64_t panel = std::max<int64_t>(begin - before, 0); panel < last; ++panel) {
          multiply_panel(layout, matrices.data[index] + panel * bytes, rounded, first, count, products.data());
          const int64_t start = panel * kPanelRows, lanes = std::min(kPanelRows, outputs - start);
          for (int64_t row = 0; row < count; ++row)
            for (int64_t lane = 0; lane < lanes; ++lane)
              to[(first + row) * width + left + start + lane] = static_cast<Scalar>(
                  products[row * kPanelRows + lane] + (bias ? bias[left + start + lane] : 0.0f));
        }
        before += panels;
        left += outputs;
      }
    }
  });
}

at::Tensor multiply_all(const at::Tensor& x, at::TensorList packed, const std::optional<at::Tensor>& bias,
                        at::IntArrayRef outputs, int64_t bits, int64_t group_size, bool asymmetric) {
  TORCH_CHECK(x.dim() == 2 && x.device().is_cpu(), "x has to be [rows, columns] on the CPU");
  TORCH_CHECK(!packed.empty() && packed.size() == outputs.size(), packed.size(), " matrices, and outputs of ",
              outputs.size());
  const PanelLayout layout = checked_layout(x.size(1), bits, group_size, asymmetric);
  Matrices matrices;
  for (size_t index = 0; index < packed.size(); ++index) {
    check_packed(packed[index], layout, outputs[index]);
    matrices.data.push_back(packed[index].const_data_ptr<uint8_t>());
    matrices.outputs.push_back(outputs[index]);
  }
  const int64_t width = std::accumulate(outputs.begin(), outputs.end(), int64_t{0});
  const at::Tensor rows = x.contiguous();
  const at::Tensor added = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  TORCH_CHECK(!bias || added.numel() == width, "the bias has ", added.numel(), " values for ", width, " outputs");
  const float* shift = bias ? added.const_data_ptr<float>() : nullptr;
  at::Tensor out = at::empty({x.size(0), width}, x.options());
  if (x.scalar_type() == at::kFloat) multiply<float>(rows, matrices, shift, layout, out);
  else if (x.scalar_type() == at::kBFloat16) multiply<at::BFloat16>(rows, matrices, shift, layout, out);
  else if (x.scalar_type() == at::kHalf) multiply<at::Half>(rows, matrices, shift, layout, out);
  else TORCH_CHECK(false, "x is of ", x.scalar_type(), "; it has to be float32, bfloat16 or float16");
  return out;
}

// x [rows, columns] of float32, bfloat16 or float16 -> [rows, outputs] of the same dtype.
at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                            int64_t outputs, int64_t bits, int64_t group_size, bool asymmetric) {
  return multiply_all(x, packed, bias, outputs, bits, group_size, asymmetric);
}

// The same with several matrices, whose outputs stand side by side: [rows, sum of outputs]. The activations are
// rounded once, and the threads meet once.
at::Tensor quantized_linears(const at::Tensor& x, at::TensorList packed, const std::optional<at::Tensor>& bias,
                             at::IntArrayRef outputs, int64_t bits, int64_t group_size, bool asymmetric) {
  return multiply_all(x, packed, bias, outputs, bits, group_size, asymmetric);
}

// Sums of one row of weights with `count` rows of activations.
template <typename Scalar>
struct RowProducts;

template <>
struct RowProducts<at::BFloat16> {
  MultiplyRow multiply_row = choose_multiply_row(instructions_in_use);
  void operator()(const at::BFloat16* weights, const at::BFloat16* x, int64_t columns, int64_t count, float* sums) const {
    multiply_row(reinterpret_cast<const uint16_t*>(weights), reinterpret_cast<const uint16_t*>(x), columns, count, sums);
  }
};

template <>
struct RowProducts<float> {
  MultiplyFloatRows multiply_rows = choose_multiply_float_rows(instructions_in_use);
  void operator()(const float* weights, const float* x, int64_t columns, int64_t count, float* sums) const {
    multiply_rows(weights, 1, x, columns, count, columns, sums, 1);
  }
};

// A few rows: x [count, columns] times weights [outputs, columns] each, the outputs side by side.
template <typename Scalar>
at::Tensor few_rows(const at::Tensor& x, at::TensorList weights, const std::optional<at::Tensor>& bias) {
  const int64_t count = x.size(0), columns = x.size(1);
  int64_t width = 0;
  for (const at::Tensor& weight : weights) width += weight.size(0);
  const at::Tensor rows = x.contiguous(), added = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  TORCH_CHECK(!bias || added.numel() == width, "the bias has ", added.numel(), " values for ", width, " outputs");
  at::Tensor out = at::empty({count, width}, x.options());
  const Scalar* from = rows.const_data_ptr<Scalar>();
  const float* shift = bias ? added.const_data_ptr<float>() : nullptr;
  Scalar* to = out.mutable_data_ptr<Scalar>();
  const RowProducts<Scalar> products;
  const auto bytes = static_cast<int64_t>(sizeof(Scalar)) * columns;
  for_range(width, std::max(count * columns, bytes * kCostPerByte), [&](int64_t begin, int64_t end) {
    std::vector<float> sums(count);
    int64_t left = 0;  // outputs of the matrices before this one
    for (const at::Tensor& weight : weights) {
      const Scalar* data = weight.const_data_ptr<Scalar>();
      const int64_t outputs = weight.size(0), last = std::min(end - left, outputs);
      for (int64_t output = std::max<int64_t>(begin - left, 0); output < last; ++output) {
        products(data + output * columns, from, columns, count, sums.data());
        for (int64_t row = 0; row < count; ++row)
          to[row * width + left + output] = static_cast<Scalar>(sums[row] + (shift ? shift[left + output] : 0.0f));
      }
      left += outputs;
    }
  });
  return out;
}

// float32 through oneDNN, where this PyTorch has it: at::linear goes to MKL, which on AMD processors is slower.
at::Tensor many_float32_rows(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                            c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
  static const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  if (!found.has_value()) return at::linear(x, weight, bias);
  static const auto linear = found->typed<Linear>();
  return linear.call(x, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

at::Tensor multiply_by_pytorch(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                               bool by_one_dnn) {
  return by_one_dnn ? many_float32_rows(x, weight, bias) : at::linear(x, weight, bias);
}

// A tile of a matrix multiplication: a range of rows of x times a range of outputs of one of several matrices, whose
// outputs are adjacent in the result.
struct Tile {
  const at::Tensor& weight;
  int64_t first, count, column;  // first row of the weight, number of rows, first column of the result
  int64_t first_row, rows;       // of x
};

// Splits a multiplication into tiles. Small matrices are not split, and with one thread no matrix is.
std::vector<Tile> tiles_of(int64_t rows, at::TensorList weights, int64_t width, int64_t threads) {
  const int64_t wanted = kTilesPerThread * threads;
  const int64_t outputs_per_tile = std::clamp((width / wanted + kMinOutputs - 1) / kMinOutputs * kMinOutputs, kMinOutputs,
                                              kMaxOutputs);
  const int64_t row_tiles = std::clamp<int64_t>(wanted * outputs_per_tile / width, 1, std::max<int64_t>(1, rows / kMinRows));
  const int64_t rows_per_tile = threads > 1 ? (rows + row_tiles - 1) / row_tiles : rows;
  std::vector<Tile> tiles;
  int64_t column = 0;
  for (const at::Tensor& weight : weights) {
    const int64_t outputs = weight.size(0);
    const int64_t step = threads > 1 && weight.nbytes() >= kWorthOneDnn ? outputs_per_tile : outputs;
    for (int64_t first = 0; first < outputs; first += step)
      for (int64_t row = 0; row < rows; row += rows_per_tile)
        tiles.push_back({weight, first, std::min(step, outputs - first), column + first, row,
                         std::min(rows_per_tile, rows - row)});
    column += outputs;
  }
  return tiles;
}

// Multiplies many rows with PyTorch's matmul, each tile on one of the engine's own threads.
at::Tensor many_rows(const at::Tensor& x, at::TensorList weights, const std::optional<at::Tensor>& bias) {
  int64_t width = 0;
  for (const at::Tensor& weight : weights) width += weight.size(0);
  const int64_t threads = threads_for(x.size(0) * x.size(1) * width / kCostPerThread);
  const std::vector<Tile> tiles = tiles_of(x.size(0), weights, width, threads);
  const auto count = static_cast<int64_t>(tiles.size());
  const PyTorchInTasks by_pytorch;
  at::Tensor out = count == 1 ? at::Tensor() : at::empty({x.size(0), width}, x.options());
  const auto multiply = [&](const Tile& tile) {
    const auto shift = bias ? std::optional(bias->narrow(0, tile.column, tile.count)) : std::nullopt;
    const bool by_one_dnn = x.scalar_type() == at::kFloat && tile.weight.nbytes() >= kWorthOneDnn;
    const at::Tensor product = multiply_by_pytorch(x.narrow(0, tile.first_row, tile.rows),
                                                   tile.weight.narrow(0, tile.first, tile.count), shift, by_one_dnn);
    if (count == 1) out = product;
    else out.narrow(0, tile.first_row, tile.rows).narrow(1, tile.column, tile.count).copy_(product);
  };
  for_chunks(count, 1, threads, [&](int64_t first, int64_t last) {
    by_pytorch([&] {
      for (int64_t index = first; index < last; ++index) multiply(tiles[index]);
    });
  });
  return out;
}

// x [rows, columns] times weights [outputs, columns], all of one dtype, the outputs side by side: kernels of ours for a
// few rows, PyTorch's for many.
at::Tensor multiply_dense(const at::Tensor& x, at::TensorList weights, const std::optional<at::Tensor>& bias) {
  bool few = x.size(0) <= kFewRows;
  for (const at::Tensor& weight : weights) {
    TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), "x has to be [rows, columns], a "
                "weight [outputs, columns]");
    TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "x is of ", x.scalar_type(), ", a weight of ",
                weight.scalar_type());
    TORCH_CHECK(x.device().is_cpu() && weight.device().is_cpu(), "x and the weights have to be on the CPU");
    few = few && weight.is_contiguous();
  }
  if (few && x.scalar_type() == at::kBFloat16) return few_rows<at::BFloat16>(x, weights, bias);
  if (few && x.scalar_type() == at::kFloat) return few_rows<float>(x, weights, bias);
  return many_rows(x, weights, bias);
}

// Turns the restriction of PyTorch's operations to the calling thread on or off, and returns the previous state. The
// engine's own loops keep their threads.
bool keep_pytorch_serial(bool serial) {
  thread_local std::optional<SerialPyTorch> held;
  const bool before = held.has_value();
  if (serial && !before) held.emplace();
  if (!serial) held.reset();
  return before;
}

at::Tensor dense_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  return multiply_dense(x, weight, bias);
}

// The same with several weights: [rows, sum of outputs].
at::Tensor dense_linears(const at::Tensor& x, at::TensorList weights, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(!weights.empty(), "there are no weights");
  return multiply_dense(x, weights, bias);
}

// Puts the rows of `from` [n, kv_heads, size] into `cache` [kv_heads, capacity, size] behind `held` positions.
template <typename Scalar>
void store_rows(const at::Tensor& from, at::Tensor& cache, int64_t held) {
  const int64_t capacity = cache.size(1), size = cache.size(2);
  const Scalar* rows = from.const_data_ptr<Scalar>();
  Scalar* to = cache.mutable_data_ptr<Scalar>();
  for (int64_t row = 0; row < from.size(0); ++row)
    for (int64_t head = 0; head < from.size(1); ++head)
      std::memcpy(to + (head * capacity + held + row) * size, rows + row * from.stride(0) + head * from.stride(1),
                  size * sizeof(Scalar));
}

// One head of one token: `from` [size], `keys` and `values` [count, size] -> `to` [size].
template <typename Scalar>
class HeadAttention {
 public:
  HeadAttention(int64_t most, int64_t size, double scale)
      : size_(size), scale_(static_cast<float>(scale)), weights_(room_for_scores(most)), wide_(size), blended_(size) {}

  void operator()(const Scalar* from, const Scalar* keys, const Scalar* values, int64_t count, Scalar* to) {
    for (int64_t i = 0; i < size_; ++i) wide_[i] = static_cast<float>(from[i]) * scale_;
    score_(wide_.data(), keys, count, size_, weights_.data());
    to_weights_(weights_.data(), count);
    blend_(weights_.data(), values, count, size_, blended_.data());
    for (int64_t i = 0; i < size_; ++i) to[i] = static_cast<Scalar>(blended_[i]);
  }

 private:
  int64_t size_;
  float scale_;
  std::vector<float> weights_, wide_, blended_;
  ScoreKeys<Scalar> score_ = choose_score_keys<Scalar>(instructions_in_use);
  ScoresToWeights to_weights_ = choose_scores_to_weights(instructions_in_use);
  BlendValues<Scalar> blend_ = choose_blend_values<Scalar>(instructions_in_use);
};

// Attention of a few tokens, head by head. `keys` and `values` [kv_heads, capacity, size] hold this step's already;
// the token `row` sees those before `held + row + 1`, and of them the last `window`.
template <typename Scalar>
at::Tensor attend_few(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, int64_t held,
                      int64_t window, double scale) {
  const int64_t count = query.size(0), heads = query.size(1), size = query.size(2), capacity = keys.size(1);
  const int64_t group = heads / keys.size(0), row_stride = query.stride(0), head_stride = query.stride(1);
  at::Tensor out = at::empty({count, heads * size}, query.options());
  const Scalar *queries = query.const_data_ptr<Scalar>(), *all_keys = keys.const_data_ptr<Scalar>(),
               *all_values = values.const_data_ptr<Scalar>();
  Scalar* to = out.mutable_data_ptr<Scalar>();
  for_range(heads, (held + count) * size * count * kCostPerScore, [&](int64_t begin, int64_t end) {
    HeadAttention<Scalar> attend(held + count, size, scale);
    for (int64_t head = begin; head < end; ++head)
      for (int64_t row = 0; row < count; ++row) {
        const int64_t last = held + row + 1, first = window > 0 ? std::max<int64_t>(0, last - window) : 0;
        const int64_t place = (head / group * capacity + first) * size;
        attend(queries + row * row_stride + head * head_stride, all_keys + place, all_values + place, last - first,
               to + (row * heads + head) * size);
      }
  });
  return out;
}

// The same for many tokens, by PyTorch's kernel.
at::Tensor attend_many(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, int64_t held,
                       int64_t window, double scale) {
  const int64_t count = query.size(0), length = held + count;
  std::optional<at::Tensor> mask;
  if (held > 0 || (window > 0 && length > window)) {
    const at::Tensor column = at::arange(length), row = at::arange(held, length).unsqueeze(1);
    mask = column.le(row);
    if (window > 0) mask = mask->logical_and(column.gt(row.sub(window)));
  }
  const at::Tensor queries = query.transpose(0, 1).unsqueeze(0), all_keys = keys.narrow(1, 0, length).unsqueeze(0),
                   all_values = values.narrow(1, 0, length).unsqueeze(0);  // [1, heads, positions, size]
  const int64_t heads = query.size(1), group = heads / keys.size(0);
  at::Tensor out = at::empty({count, heads, query.size(2)}, query.options());
  const PyTorchInTasks by_pytorch;
  const auto attend = [&](int64_t first, int64_t last) {
    const int64_t query_heads = last - first, kv = first / group, kv_heads = (last - 1) / group + 1 - kv;
    const at::Tensor context = at::scaled_dot_product_attention(
        queries.narrow(1, first, query_heads), all_keys.narrow(1, kv, kv_heads), all_values.narrow(1, kv, kv_heads), mask,
        0.0, !mask.has_value(), scale, query_heads != kv_heads);
    out.narrow(1, first, query_heads).copy_(context.squeeze(0).transpose(0, 1));
  };
  const int64_t threads = threads_for(heads * count * length * query.size(2) * kCostPerBlockedScore / kCostPerThread);
  for_chunks(heads, threads > 1 ? 1 : heads, threads,
             [&](int64_t first, int64_t last) { by_pytorch([&] { attend(first, last); }); });
  return out.view({count, -1});
}

// [n, heads, size] with the numbers of each head side by side; the heads may lie apart.
at::Tensor rows_of_heads(const at::Tensor& x) { return x.stride(2) == 1 ? x : x.contiguous(); }

// Puts key and value [n, kv_heads, size] into the caches [kv_heads, capacity, size] behind place[0] positions that
// they hold, and has query [n, heads, size] attend causally to all of them, or to place[1] of them where that is not
// 0: -> [n, heads * size]. `place` is a tensor so that a compiled graph is the same at every length.
at::Tensor cached_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::Tensor& keys,
                            at::Tensor& values, const at::Tensor& place, double scale) {
  TORCH_CHECK(place.scalar_type() == at::kLong && place.numel() == 2 && place.is_contiguous() &&
                  place.device().is_cpu(),
              "place has to be int64 [2] on the CPU: positions held, and the window or 0");
  const int64_t held = place.const_data_ptr<int64_t>()[0], window = place.const_data_ptr<int64_t>()[1];
  TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && keys.dim() == 3, "query, key and the caches have three dimensions");
  const int64_t count = query.size(0), heads = query.size(1), size = query.size(2), kv_heads = keys.size(0);
  TORCH_CHECK(key.sizes() == value.sizes() && key.size(0) == count && key.size(1) == kv_heads && key.size(2) == size,
              "key and value have to be [", count, ", ", kv_heads, ", ", size, "]");
  TORCH_CHECK(keys.sizes() == values.sizes() && keys.size(2) == size && keys.is_contiguous() && values.is_contiguous(),
              "the caches have to be contiguous and of one shape, [kv_heads, capacity, ", size, "]");
  for (const at::Tensor* each : {&key, &value, &std::as_const(keys), &std::as_const(values)})
    TORCH_CHECK(each->scalar_type() == query.scalar_type() && each->device().is_cpu() && query.device().is_cpu(),
                "query, key, value and the caches have to be of one dtype, on the CPU");
  TORCH_CHECK(count > 0 && kv_heads > 0 && size > 0 && heads % kv_heads == 0, heads, " heads over ", kv_heads,
              " kv_heads for ", count, " tokens");
  TORCH_CHECK(held >= 0 && window >= 0 && held <= keys.size(1) - count, held, " positions and ", count,
              " more do not fit a cache of ", keys.size(1));
  const auto attend = [&](auto number) {
    using Scalar = decltype(number);
    store_rows<Scalar>(rows_of_heads(key), keys, held);
    store_rows<Scalar>(rows_of_heads(value), values, held);
    return count > kFewTokens ? attend_many(query, keys, values, held, window, scale)
                              : attend_few<Scalar>(rows_of_heads(query), keys, values, held, window, scale);
  };
  if (query.scalar_type() == at::kFloat) return attend(float());
  if (query.scalar_type() == at::kBFloat16) return attend(at::BFloat16());
  if (query.scalar_type() == at::kHalf) return attend(at::Half());
  TORCH_CHECK(false, "the query is of ", query.scalar_type(), "; it has to be float32, bfloat16 or float16");
}

// One token of each of several sequences, as `batched_attention` has it.
template <typename Scalar>
at::Tensor attend_each(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::TensorList keys,
                       at::TensorList values, at::IntArrayRef held, int64_t window, double scale) {
  const int64_t count = query.size(0), heads = query.size(1), size = query.size(2), kv_heads = key.size(1);
  const int64_t row_stride = query.stride(0), head_stride = query.stride(1);
  int64_t longest = 0, all = 0;
  for (int64_t row = 0; row < count; ++row) {
    at::Tensor to_keys = keys[row], to_values = values[row];
    store_rows<Scalar>(key.narrow(0, row, 1), to_keys, held[row]);
    store_rows<Scalar>(value.narrow(0, row, 1), to_values, held[row]);
    longest = std::max(longest, held[row] + 1);
    all += held[row] + 1;
  }
  at::Tensor out = at::empty({count, heads * size}, query.options());
  const Scalar* queries = query.const_data_ptr<Scalar>();
  Scalar* to = out.mutable_data_ptr<Scalar>();
  for_range(count * heads, all / count * size * kCostPerScore, [&](int64_t begin, int64_t end) {
    HeadAttention<Scalar> attend(longest, size, scale);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t row = at / heads, head = at % heads, last = held[row] + 1;
      const int64_t first = window > 0 ? std::max<int64_t>(0, last - window) : 0;
      const int64_t place = (head * kv_heads / heads * keys[row].size(1) + first) * size;
      attend(queries + row * row_stride + head * head_stride, keys[row].const_data_ptr<Scalar>() + place,
             values[row].const_data_ptr<Scalar>() + place, last - first, to + at * size);
    }
  });
  return out;
}

// `cached_attention` of one token of each of n sequences at once: query [n, heads, size], key and value [n, kv_heads,
// size], a cache and the number of positions that it holds for each of them -> [n, heads * size].
at::Tensor batched_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                             at::TensorList keys, at::TensorList values, at::IntArrayRef held, int64_t window,
                             double scale) {
  TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && key.sizes() == value.sizes(),
              "query, key and value have three dimensions");
  const int64_t count = query.size(0), heads = query.size(1), size = query.size(2), kv_heads = key.size(1);
  TORCH_CHECK(count > 0 && kv_heads > 0 && size > 0 && heads % kv_heads == 0 && key.size(0) == count &&
                  key.size(2) == size && window >= 0,
              heads, " heads over ", kv_heads, " kv_heads for ", count, " tokens");
  const auto many = static_cast<size_t>(count);
  TORCH_CHECK(keys.size() == many && values.size() == many && held.size() == many, count,
              " tokens need as many caches and lengths");
  for (const at::Tensor* each : {&query, &key, &value})
    TORCH_CHECK(each->scalar_type() == query.scalar_type() && each->device().is_cpu(),
                "query, key and value have to be of one dtype, on the CPU");
  for (size_t row = 0; row < many; ++row) {
    for (const at::Tensor* each : {&keys[row], &values[row]})
      TORCH_CHECK(each->dim() == 3 && each->size(0) == kv_heads && each->size(2) == size && each->is_contiguous() &&
                      each->scalar_type() == query.scalar_type() && each->device().is_cpu(),
                  "a cache has to be contiguous, [", kv_heads, ", capacity, ", size, "], of the query's dtype");
    TORCH_CHECK(keys[row].sizes() == values[row].sizes() && held[row] >= 0 && held[row] < keys[row].size(1), held[row],
                " positions and one more do not fit a cache of ", keys[row].size(1));
  }
  const at::Tensor queries = rows_of_heads(query), new_keys = rows_of_heads(key), new_values = rows_of_heads(value);
  if (query.scalar_type() == at::kFloat)
    return attend_each<float>(queries, new_keys, new_values, keys, values, held, window, scale);
  if (query.scalar_type() == at::kBFloat16)
    return attend_each<at::BFloat16>(queries, new_keys, new_values, keys, values, held, window, scale);
  if (query.scalar_type() == at::kHalf)
    return attend_each<at::Half>(queries, new_keys, new_values, keys, values, held, window, scale);
  TORCH_CHECK(false, "the query is of ", query.scalar_type(), "; it has to be float32, bfloat16 or float16");
}

// The rows of x [rows, columns], with a weight [columns].
template <typename Scalar>
void normalise(const at::Tensor& x, const at::Tensor& weight, float eps, at::Tensor& out) {
  const int64_t columns = x.size(1);
  const Scalar *from = x.const_data_ptr<Scalar>(), *factors = weight.const_data_ptr<Scalar>();
  Scalar* to = out.mutable_data_ptr<Scalar>();
  for_range(x.size(0), columns * kCostPerByte, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      normalise_row(from + row * columns, factors, columns, eps, to + row * columns);
  });
}

// x [..., columns] -> the same shape and dtype.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  TORCH_CHECK(x.dim() > 0 && weight.dim() == 1 && x.size(-1) == weight.size(0), "x has to be [..., columns], the weight "
              "[columns]");
  TORCH_CHECK(x.scalar_type() == weight.scalar_type() && x.device().is_cpu() && weight.device().is_cpu(),
              "x and the weight have to be of one dtype, on the CPU");
  const at::Tensor rows = x.reshape({-1, x.size(-1)}).contiguous(), factors = weight.contiguous();
  at::Tensor out = at::empty(rows.sizes(), rows.options());
  if (x.scalar_type() == at::kFloat) normalise<float>(rows, factors, static_cast<float>(eps), out);
  else if (x.scalar_type() == at::kBFloat16) normalise<at::BFloat16>(rows, factors, static_cast<float>(eps), out);
  else if (x.scalar_type() == at::kHalf) normalise<at::Half>(rows, factors, static_cast<float>(eps), out);
  else TORCH_CHECK(false, "x is of ", x.scalar_type(), "; it has to be float32, bfloat16 or float16");
  return out.view(x.sizes());
}

template <typename Format>
void unpack_format(const at::Tensor& blocks, at::Tensor& out) {
  const int64_t count = blocks.size(0);
  TORCH_CHECK(blocks.size(1) == Format::kBytes, "a block has ", blocks.size(1), " bytes; it has to have ",
              Format::kBytes);
  TORCH_CHECK(out.numel() == count * Format::kElements, "out has ", out.numel(), " elements for ", count, " blocks of ",
              Format::kElements);
  const uint8_t* from = blocks.const_data_ptr<uint8_t>();
  const Instructions instructions = instructions_in_use;
  const auto run = [&](auto* to) {
    for_range(count, Format::kElements * kCostPerByte, [&](int64_t begin, int64_t end) {
      unpack_blocks<Format>(from + begin * Format::kBytes, end - begin, to + begin * Format::kElements, instructions);
    });
  };
  if (out.scalar_type() == at::kFloat) run(out.mutable_data_ptr<float>());
  else if (out.scalar_type() == at::kBFloat16) run(out.mutable_data_ptr<at::BFloat16>());
  else if (out.scalar_type() == at::kHalf) run(out.mutable_data_ptr<at::Half>());
  else TORCH_CHECK(false, "out is of ", out.scalar_type(), "; it has to be float32, bfloat16 or float16");
}

// blocks uint8 [n, bytes] of a format of ggml -> out, n times its elements in one of three dtypes.
void unpack_ggml(const at::Tensor& blocks, const std::string& format, at::Tensor& out) {
  TORCH_CHECK(blocks.dim() == 2 && blocks.scalar_type() == at::kByte && blocks.is_contiguous() && out.is_contiguous() &&
                  blocks.device().is_cpu() && out.device().is_cpu(),
              "blocks have to be contiguous uint8 [blocks, bytes] on the CPU, and out contiguous");
  if (format == "Q8_0") unpack_format<Q8_0>(blocks, out);
  else if (format == "Q4_0") unpack_format<Q4_0>(blocks, out);
  else if (format == "Q4_K") unpack_format<Q4_K>(blocks, out);
  else if (format == "Q5_K") unpack_format<Q5_K>(blocks, out);
  else if (format == "Q6_K") unpack_format<Q6_K>(blocks, out);
  else TORCH_CHECK(false, "there is no format ", format, " here; known are Q8_0, Q4_0, Q4_K, Q5_K and Q6_K");
}

template <typename Format>
void take_apart(const at::Tensor& blocks, at::Tensor& values, at::Tensor& scales, std::optional<at::Tensor>& centres) {
  const int64_t count = blocks.size(0);
  TORCH_CHECK(blocks.size(1) == Format::kBytes && values.numel() == count * Format::kValueBytes &&
                  scales.numel() == count * Format::kGroups && centres.has_value() == Format::kCentres &&
                  (!centres || centres->numel() == scales.numel()),
              "values, scales and centres have to be those of ", count, " blocks of ", Format::kBytes, " bytes");
  const uint8_t* from = blocks.const_data_ptr<uint8_t>();
  uint8_t* to = values.mutable_data_ptr<uint8_t>();
  at::Half* factors = scales.mutable_data_ptr<at::Half>();
  at::Half* middles = centres ? centres->mutable_data_ptr<at::Half>() : nullptr;
  for_range(count, Format::kBytes * kCostPerByte, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      Format::take(from + block * Format::kBytes, to + block * Format::kValueBytes, factors + block * Format::kGroups,
                   Format::kCentres ? middles + block * Format::kGroups : nullptr);
  });
}

// blocks uint8 [n, bytes] of a format of ggml -> values uint8, scales and centres float16, as ggml_integers.h has them.
void take_apart_ggml(const at::Tensor& blocks, const std::string& format, at::Tensor& values, at::Tensor& scales,
                     std::optional<at::Tensor> centres) {
  TORCH_CHECK(blocks.dim() == 2, "blocks have to be [blocks, bytes]");
  for (const at::Tensor* each : {&blocks, &std::as_const(values), &std::as_const(scales),
                                 centres ? &std::as_const(*centres) : &std::as_const(scales)})
    TORCH_CHECK(each->is_contiguous() && each->device().is_cpu(), "all tensors have to be contiguous, on the CPU");
  TORCH_CHECK(blocks.scalar_type() == at::kByte && values.scalar_type() == at::kByte &&
                  scales.scalar_type() == at::kHalf && (!centres || centres->scalar_type() == at::kHalf),
              "blocks and values have to be uint8, scales and centres float16");
  if (format == "q8_0") take_apart<Q8_0Integers>(blocks, values, scales, centres);
  else if (format == "q4_0") take_apart<Q4_0Integers>(blocks, values, scales, centres);
  else if (format == "q4_1") take_apart<Q4_1Integers>(blocks, values, scales, centres);
  else if (format == "q4_k") take_apart<Q4_KIntegers>(blocks, values, scales, centres);
  else TORCH_CHECK(false, "there is no format ", format, " here; known are q8_0, q4_0, q4_1 and q4_k");
}

}  // namespace
}  // namespace torchchat

TORCH_LIBRARY(torchchat, library) {
  library.def("pack_quantized(Tensor values, Tensor scales, Tensor? offsets, int columns, int bits, int group_size) -> "
              "Tensor");
  library.def("in_weight_memory(Tensor packed) -> Tensor");
  library.def("unpack_quantized(Tensor packed, int outputs, int columns, int bits, int group_size, bool asymmetric) -> "
              "Tensor");
  library.def("quantized_linear(Tensor x, Tensor packed, Tensor? bias, int outputs, int bits, int group_size, bool "
              "asymmetric) -> Tensor");
  library.def("quantized_linears(Tensor x, Tensor[] packed, Tensor? bias, int[] outputs, int bits, int group_size, bool "
              "asymmetric) -> Tensor");
  library.def("unpack_ggml(Tensor blocks, str format, Tensor(a!) out) -> ()");
  library.def("take_apart_ggml(Tensor blocks, str format, Tensor(a!) values, Tensor(b!) scales, Tensor(c!)? centres) -> "
              "()");
  library.def("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def("dense_linears(Tensor x, Tensor[] weights, Tensor? bias) -> Tensor");
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def("cached_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor "
              "place, float scale) -> Tensor");
  library.def("batched_attention(Tensor query, Tensor key, Tensor value, Tensor(a!)[] keys, Tensor(b!)[] values, int[] "
              "held, int window, float scale) -> Tensor");
  library.def("use_instructions(str name) -> str", &torchchat::use_instructions);
  library.def("keep_pytorch_serial(bool serial) -> bool", &torchchat::keep_pytorch_serial);
}

TORCH_LIBRARY_IMPL(torchchat, CPU, library) {
  library.impl("pack_quantized", &torchchat::pack_quantized);
  library.impl("in_weight_memory", &torchchat::in_weight_memory);
  library.impl("unpack_quantized", &torchchat::unpack_quantized);
  library.impl("quantized_linear", &torchchat::quantized_linear);
  library.impl("quantized_linears", &torchchat::quantized_linears);
  library.impl("unpack_ggml", &torchchat::unpack_ggml);
  library.impl("take_apart_ggml", &torchchat::take_apart_ggml);
  library.impl("dense_linear", &torchchat::dense_linear);
  library.impl("dense_linears", &torchchat::dense_linears);
  library.impl("rms_norm", &torchchat::rms_norm);
  library.impl("cached_attention", &torchchat::cached_attention);
  library.impl("batched_attention", &torchchat::batched_attention);
}
