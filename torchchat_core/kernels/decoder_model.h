// What a decoder is made of: its matrices, norms and numbers, which are checked once, and the input of products.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "bfloat16_linear.h"
#include "float32_linear.h"
#include "float32_panels.h"
#include "parallel.h"
#include "quantized_linear.h"

namespace torchchat {

constexpr int64_t kBytesOfAThread = 1 << 18;  // of a layer's weights, or the head's, that are worth a thread
constexpr int64_t kBytesNearby = 8 << 20;  // of all matrices, which caches of the processor keep

// The input of products: rows as they are, rounded to int8 and as bfloat16, of which only what is needed is made.
struct Input {
  Input(int64_t rows, int64_t columns, bool rounds, bool halves)
      : columns(columns), stride(rounds || halves ? blocks_of(columns) * kBlockColumns : columns), values(rows * stride),
        rounded(rounds ? rows : 0, columns), halves(halves ? rows * columns : 0) {}

  static int64_t blocks_of(int64_t columns) { return (columns + kBlockColumns - 1) / kBlockColumns; }

  float* row(int64_t index) { return values.data() + index * stride; }
  const float* row(int64_t index) const { return values.data() + index * stride; }

  // Makes what is needed of the blocks [first, last) of 32 values of a row.
  void prepare(int64_t index, int64_t first, int64_t last, RoundBlock round) {
    const float* from = row(index);
    if (rounded.rows > 0)
      for (int64_t block = first; block < last; ++block) {
        const int64_t place = index * rounded.blocks + block;
        round(from + block * kBlockColumns, rounded.values.data() + place * kBlockColumns, rounded.scales[place],
              rounded.counts[place]);
      }
    if (!halves.empty())
      for (int64_t i = first * kBlockColumns; i < std::min(last * kBlockColumns, columns); ++i)
        halves[index * columns + i] = c10::BFloat16(from[i]);
  }

  void prepare(int64_t index, RoundBlock round) { prepare(index, 0, blocks_of(columns), round); }

  int64_t columns, stride;
  std::vector<float> values;  // [rows, stride], filled up with zeros to whole blocks
  RoundedRows rounded;
  std::vector<c10::BFloat16> halves;  // [rows, columns]
};

// A matrix [outputs, columns] that is packed, bfloat16 or float32, and perhaps a bias.
struct Product {
  at::Tensor weight, bias;
  int64_t outputs, columns, bits;  // bits 0: not packed
  PanelLayout layout{};
  std::vector<float> near{};  // float32 weights in panels, where the decoder is small

  int64_t panels() const { return panels_of(outputs); }
  int64_t bytes_of_panel() const { return static_cast<int64_t>(weight.nbytes()) / panels(); }
  bool rounds() const { return bits > 0; }
  bool halves() const { return bits == 0 && weight.scalar_type() == at::kBFloat16; }

  // 16 outputs, or those that are left of them, for each of `rows` rows of x: out [rows, 16]. A row's are the same
  // bit for bit however many there are.
  void multiply(int64_t panel, const Input& x, int64_t rows, Instructions instructions, float* out) const {
    const int64_t first = panel * kPanelRows, count = std::min(kPanelRows, outputs - first);
    if (bits > 0) {
      const uint8_t* data = weight.const_data_ptr<uint8_t>() + panel * layout.panel_bytes();
      choose_multiply_panel(instructions, layout.bits)(layout, data, x.rounded, 0, rows, out);
    } else if (halves()) {
      const auto* data = reinterpret_cast<const uint16_t*>(weight.const_data_ptr<at::BFloat16>()) + first * columns;
      multiply_halves(data, count, reinterpret_cast<const uint16_t*>(x.halves.data()), rows, instructions, out);
    } else if (!near.empty()) {
      choose_multiply_float_panel(instructions)(near.data() + first * columns, columns, x.values.data(), x.stride, rows, out);
    } else {
      const float* data = weight.const_data_ptr<float>() + first * columns;
      choose_multiply_float_rows(instructions)(data, count, x.values.data(), x.stride, rows, columns, out, kPanelRows);
    }
    if (bias.defined())
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < count; ++i) out[row * kPanelRows + i] += bias.const_data_ptr<float>()[first + i];
  }

 private:
  void multiply_halves(const uint16_t* data, int64_t count, const uint16_t* x, int64_t rows, Instructions instructions,
                       float* out) const {
    constexpr int64_t kAtOnce = 16;
    const auto multiply_row = choose_multiply_row(instructions);
    float sums[kAtOnce];
    for (int64_t begin = 0; begin < rows; begin += kAtOnce) {
      const int64_t some = std::min(kAtOnce, rows - begin);
      for (int64_t i = 0; i < count; ++i) {
        multiply_row(data + i * columns, x + begin * columns, columns, some, sums);
        for (int64_t row = 0; row < some; ++row) out[(begin + row) * kPanelRows + i] = sums[row];
      }
    }
  }
};

enum Place { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kProducts };

struct Layer {
  std::vector<Product> products;  // in the order of `Place`
  at::Tensor input_norm, feed_forward_norm, query_norm, key_norm;  // float32; the last two may be undefined
  int64_t window;  // positions that are seen, or 0 for all
};

// Turns the pairs of one head by their angles; `sine` has its signs already.
inline void rotate(const float* x, const float* cosine, const float* sine, int64_t size, bool interleaved, float* out) {
  const int64_t half = size / 2;
  if (interleaved)
    for (int64_t i = 0; i < size; ++i) out[i] = x[i] * cosine[i] + x[i ^ 1] * sine[i];
  else
    for (int64_t i = 0; i < half; ++i) {
      out[i] = x[i] * cosine[i] + x[i + half] * sine[i];
      out[i + half] = x[i + half] * cosine[i + half] + x[i] * sine[i + half];
    }
}

struct DecoderModel {
  DecoderModel(int64_t hidden, int64_t heads, int64_t kv_heads, int64_t head_dim, bool interleaved, double eps,
          double scale, double residual)
      : hidden_(hidden), heads_(heads), kv_heads_(kv_heads), size_(head_dim), interleaved_(interleaved),
        eps_(static_cast<float>(eps)), scale_(static_cast<float>(scale)), residual_(static_cast<float>(residual)) {
    TORCH_CHECK(hidden > 0 && kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && head_dim > 0 && head_dim % 2 == 0,
                heads, " heads over ", kv_heads, " kv_heads of ", head_dim, " for ", hidden, " numbers");
  }

  ~DecoderModel() { wait_for_crew(this); }
  DecoderModel(const DecoderModel&) = delete;
  DecoderModel& operator=(const DecoderModel&) = delete;

  // The next of the products of a layer, in the order of `Place`: packed weights with their bits, or with bits 0 a
  // matrix of bfloat16 or float32 [outputs, columns].
  void add_product(const at::Tensor& weight, const std::optional<at::Tensor>& bias, int64_t outputs, int64_t columns,
                   int64_t bits, int64_t group_size, bool asymmetric) {
    TORCH_CHECK(weight.device().is_cpu() && weight.is_contiguous(), "weights have to be contiguous, on the CPU");
    TORCH_CHECK(outputs > 0 && columns > 0, "a matrix of ", outputs, " rows and ", columns, " columns");
    Product product{weight, at::Tensor(), outputs, columns, bits, {}};
    if (bits > 0) {
      TORCH_CHECK((bits == 4 || bits == 8) && group_size > 0 && group_size % kBlockColumns == 0, bits,
                  " bits in groups of ", group_size);
      const int64_t blocks = (columns + kBlockColumns - 1) / kBlockColumns;
      product.layout = {static_cast<int>(bits), asymmetric, blocks, std::min(group_size / kBlockColumns, blocks)};
      TORCH_CHECK(weight.scalar_type() == at::kByte &&
                      weight.numel() == product.panels() * product.layout.panel_bytes(),
                  "packed weights have ", weight.numel(), " bytes, which are not those of ", outputs, " rows of ",
                  columns);
    } else {
      TORCH_CHECK(weight.scalar_type() == at::kBFloat16 || weight.scalar_type() == at::kFloat, "a matrix of ",
                  weight.scalar_type(), "; it has to be bfloat16 or float32");
      TORCH_CHECK(weight.dim() == 2 && weight.size(0) == outputs && weight.size(1) == columns, "a matrix of ",
                  weight.sizes(), " and not of ", outputs, " rows of ", columns);
    }
    if (bias) {
      product.bias = bias->to(at::kFloat).contiguous();
      TORCH_CHECK(product.bias.numel() == outputs, "the bias has ", product.bias.numel(), " values for ", outputs,
                  " outputs");
    }
    bytes_ += static_cast<int64_t>(weight.nbytes());
    weights_ += outputs * columns;
    waiting_.push_back(std::move(product));
  }

  // A layer of the seven products that were added last.
  void add_layer(const at::Tensor& input_norm, const at::Tensor& feed_forward_norm,
                 const std::optional<at::Tensor>& query_norm, const std::optional<at::Tensor>& key_norm,
                 int64_t window) {
    TORCH_CHECK(waiting_.size() == kProducts, "a layer of ", waiting_.size(), " products; it has ", int{kProducts});
    const int64_t inner = heads_ * size_, kv = kv_heads_ * size_, wide = waiting_[kGate].outputs;
    const int64_t outputs[] = {inner, kv, kv, hidden_, wide, wide, hidden_};
    const int64_t columns[] = {hidden_, hidden_, hidden_, inner, hidden_, hidden_, wide};
    for (int place = 0; place < kProducts; ++place)
      TORCH_CHECK(waiting_[place].outputs == outputs[place] && waiting_[place].columns == columns[place], "product ",
                  place, " is of ", waiting_[place].outputs, " rows of ", waiting_[place].columns, " and not of ",
                  outputs[place], " of ", columns[place]);
    layers_.push_back({std::move(waiting_), norm_of(input_norm, hidden_), norm_of(feed_forward_norm, hidden_),
                       query_norm ? norm_of(*query_norm, size_) : at::Tensor(),
                       key_norm ? norm_of(*key_norm, size_) : at::Tensor(), window});
    waiting_.clear();
    widest_ = std::max(widest_, wide);
    for (const Product& product : layers_.back().products) {
      rounds_ = rounds_ || product.rounds();
      halves_ = halves_ || product.halves();
    }
  }

  // The last norm, and the product that was added last, which makes the logits; they are divided by `divisor`.
  void set_head(const at::Tensor& norm, double divisor) {
    TORCH_CHECK(waiting_.size() == 1 && waiting_[0].columns == hidden_ && divisor != 0, "a head of ", waiting_.size(),
                " products");
    norm_ = norm_of(norm, hidden_);
    head_ = std::move(waiting_);
    waiting_.clear();
    divisor_ = static_cast<float>(divisor);
    rounds_ = rounds_ || head_[0].rounds();
    halves_ = halves_ || head_[0].halves();
  }

  bool is_near() const { return bytes_ <= kBytesNearby; }

  // Copies the float32 matrices of a small decoder into panels, which pays off where it decodes more than one token.
  void pack_near() {
    if (!is_near()) return;
    const auto pack = [](std::vector<Product>& products) {
      for (Product& product : products)
        if (product.bits == 0 && !product.halves())
          product.near = float_panels_of(product.weight.const_data_ptr<float>(), product.outputs, product.columns);
    };
    pack(head_);
    for (Layer& layer : layers_) pack(layer.products);
  }

  static at::Tensor norm_of(const at::Tensor& weight, int64_t size) {
    TORCH_CHECK(weight.dim() == 1 && weight.size(0) == size && weight.device().is_cpu(), "a norm of ", weight.sizes(),
                " for ", size, " numbers");
    return weight.to(at::kFloat).contiguous();
  }

  // How many are worth their while for one row.
  int64_t threads() const {
    int64_t bytes = 0;
    for (const Product& product : layers_.front().products) bytes += static_cast<int64_t>(product.weight.nbytes());
    bytes = std::max(bytes, static_cast<int64_t>(head_[0].weight.nbytes()));
    return threads_for(bytes / kBytesOfAThread);
  }

  int64_t hidden_, heads_, kv_heads_, size_;
  bool interleaved_;
  float eps_, scale_, residual_, divisor_ = 1.0f;
  at::Tensor norm_;
  std::vector<Product> waiting_, head_;  // the head is one product
  std::vector<Layer> layers_;
  int64_t widest_ = 0, bytes_ = 0, weights_ = 0;  // the last two: of all matrices
  bool rounds_ = false, halves_ = false;
};

// Where the keys and values of one sequence are. The memory stays the same while there is a `CacheMemory` of it.
struct CacheMemory {
  struct Room {
    void *keys, *values;  // [kv_heads, capacity, head_dim]
    int64_t capacity;
  };

  // Keys and values of each layer, [kv_heads, capacity, head_dim], all of one type.
  CacheMemory(const std::vector<at::Tensor>& keys, const std::vector<at::Tensor>& values) : keys_(keys), values_(values) {
    TORCH_CHECK(!keys.empty() && keys.size() == values.size(), "keys of ", keys.size(), " layers and values of ",
                values.size());
    for (size_t layer = 0; layer < keys.size(); ++layer) {
      const at::Tensor &key = keys[layer], &value = values[layer], &first = keys[0];
      for (const at::Tensor* each : {&key, &value})
        TORCH_CHECK(each->dim() == 3 && each->is_contiguous() && each->device().is_cpu() &&
                        each->scalar_type() == first.scalar_type() && each->size(0) == first.size(0) &&
                        each->size(1) == key.size(1) && each->size(2) == first.size(2),
                    "a cache of ", each->sizes(), " in layer ", layer, ", beside one of ", first.sizes());
      rooms_.push_back({key.mutable_data_ptr(), value.mutable_data_ptr(), key.size(1)});
      capacity_ = layer == 0 ? key.size(1) : std::min(capacity_, key.size(1));
    }
  }

  int64_t layers() const { return static_cast<int64_t>(rooms_.size()); }
  int64_t kv_heads() const { return keys_[0].size(0); }
  int64_t size() const { return keys_[0].size(2); }
  at::ScalarType type() const { return keys_[0].scalar_type(); }

  std::vector<at::Tensor> keys_, values_;  // which keep the memory
  std::vector<Room> rooms_;  // [layers]
  int64_t capacity_ = 0;  // of the smallest room
};

// What stands for the tokens of sequences: rows of tables.
struct TokenRows {
  const at::Tensor& embedding;  // [n, hidden]
  const std::vector<int64_t>& tokens;  // [rows], which of the n each is
  double multiplier;  // of the embedding
  const at::Tensor &cosine, &sine;  // float32 [positions, head_dim], or with more dimensions of size 1
  int64_t first_position;  // of these
};

// The next tokens of several sequences, one after the other: row_decoding.cpp. Tokens, the caches of each sequence, how
// many tokens it gets, and how many it holds -> logits of the last token of each, float32 [sequences, vocabulary].
at::Tensor decode_rows(const DecoderModel& model, const TokenRows& rows, const std::vector<const CacheMemory*>& caches,
                       const std::vector<int64_t>& counts, const std::vector<int64_t>& lengths);

}  // namespace torchchat
