// What a thread does on the way from embeddings to logits. row_decoding.cpp says how the work is split.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <vector>

#include "attention.h"
#include "decoder_model.h"
#include "rms_norm.h"
#include "stages.h"

namespace torchchat {

constexpr int64_t kRowsMadeByEach = 2;  // up to here every thread makes the inputs of products for itself
// Stages of a layer, and of the head, for few rows and for more; one is only for prompts.
constexpr int64_t kStages = 6, kStagesOfHead = 1, kStagesOfMore = 9, kStagesOfHeadOfMore = 2;

// The rows of whole sequences.
struct Rows {
  std::vector<int64_t> last;  // [sequences], the row of the last token of each
  int64_t count;

  bool are_few() const { return count <= kRowsMadeByEach; }
  bool have_prompts() const { return static_cast<int64_t>(last.size()) < count; }  // several tokens of one sequence

  int64_t stages(int64_t layers) const {
    return are_few() ? layers * kStages + kStagesOfHead : layers * kStagesOfMore + kStagesOfHeadOfMore;
  }
};

// The inputs of products that are made of what an earlier stage wrote.
struct Inputs {
  Inputs(const DecoderModel& model, int64_t rows)
      : normed(rows, model.hidden_, model.rounds_, model.halves_),
        context(rows, model.heads_ * model.size_, model.rounds_, model.halves_) {}

  Input normed, context;
};

// What all threads see. All vectors are [rows, ...].
struct Shared {
  Shared(const DecoderModel& model, const Rows& rows, int64_t threads)
      : hidden(rows.count * model.hidden_), query(rows.count * model.heads_ * model.size_),
        key(rows.count * model.kv_heads_ * model.size_), value(rows.count * model.kv_heads_ * model.size_),
        context(rows.count * model.heads_ * model.size_), inputs(model, rows.are_few() ? 0 : rows.count),
        activations(rows.count, model.widest_, model.rounds_, model.halves_),
        stages(rows.stages(static_cast<int64_t>(model.layers_.size())), threads) {}

  std::vector<float> hidden, query, key, value, context;
  Inputs inputs;  // where the threads make them together
  Input activations;
  Stages stages;
};

// One thread's part of the work. Keys and values are of type Scalar.
template <typename Scalar>
struct Worker {
  Worker(const DecoderModel& model, Shared& shared, const TokenRows& given, const int64_t* held,
         const CacheMemory* const* caches, const Rows& taken, int64_t thread, int64_t threads)
      : model(model), shared(shared), cosine(given.cosine.const_data_ptr<float>()),
        sine(given.sine.const_data_ptr<float>()), first_position(given.first_position), held(held), caches(caches),
        taken(taken), rows(taken.count), place{thread, threads},
        instructions(instructions_in_use), round(choose_round_block(instructions)),
        score(choose_score_keys<Scalar>(instructions)), to_weights(choose_scores_to_weights(instructions)),
        blend(choose_blend_values<Scalar>(instructions)), silu(choose_silu_times(instructions)),
        own_inputs(model, taken.are_few() ? rows : 0),
        sums(2 * rows * kPanelRows),
        weights(room_for_scores(*std::max_element(held, held + rows) + 1)), turned(model.size_), key(model.size_),
        blended(model.size_), newest_key(model.size_), newest_value(model.size_) {}

  void run(int64_t index) {
    const Layer& layer = model.layers_[index];
    const std::vector<Product>& products = layer.products;
    project(&products[kQuery], {shared.query.data(), shared.key.data(), shared.value.data()}, 1.0f,
            [&](int64_t row) { norm(row, row, layer.input_norm); });
    if (taken.have_prompts()) keep(layer, index);
    attend(layer, index);
    add(products[kOutput], inputs().context, [&](int64_t row) { round_context(row); });
    activate(products[kGate], products[kUp], [&](int64_t row) { norm(row, row, layer.feed_forward_norm); });
    add(products[kDown], shared.activations, nullptr);
  }

  // Of the last token of each sequence: [sequences, vocab].
  void make_logits(float* logits) {
    rows = static_cast<int64_t>(taken.last.size());
    project(model.head_.data(), {logits}, model.divisor_, [&](int64_t row) { norm(taken.last[row], row, model.norm_); });
  }

  // A stage of products with an input that `make_row` makes of earlier ones: by every thread for itself, or together.
  template <typename MakeRow, typename Work>
  void multiply(int64_t count, int64_t bytes_of_each, MakeRow make_row, Work work) {
    const auto make = [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) make_row(row);
    };
    if (taken.are_few()) {
      shared.stages.take(place, count, bytes_of_each, [&] { make(0, rows); }, work);
    } else {
      shared.stages.take(place, rows, kLeastPiece, [] {}, make);
      shared.stages.take(place, count, bytes_of_each, [] {}, work);
    }
  }

  template <typename Work>
  void multiply(int64_t count, int64_t bytes_of_each, std::nullptr_t, Work work) {
    shared.stages.take(place, count, bytes_of_each, [] {}, work);
  }

  Inputs& inputs() { return taken.are_few() ? own_inputs : shared.inputs; }

  void norm(int64_t row, int64_t place, const at::Tensor& weight) {
    Input& normed = inputs().normed;
    normalise_row(shared.hidden.data() + row * model.hidden_, weight.const_data_ptr<float>(), model.hidden_, model.eps_,
                  normed.row(place));
    normed.prepare(place, round);
  }

  void round_context(int64_t row) {
    Input& context = inputs().context;
    const int64_t width = model.heads_ * model.size_;
    std::copy_n(shared.context.begin() + row * width, width, context.row(row));
    context.prepare(row, round);
  }

  // Products of the normed states with matrices that follow each other, each to its own place [rows, outputs].
  template <typename MakeRow>
  void project(const Product* products, std::initializer_list<float*> outs, float divisor, MakeRow make_row) {
    int64_t count = 0;
    for (size_t index = 0; index < outs.size(); ++index) count += products[index].panels();
    const auto work = [&](int64_t first, int64_t last) {
      for (int64_t each = first; each < last; ++each) {
        int64_t panel = each;
        const Product* product = products;
        float* const* out = outs.begin();
        for (; panel >= product->panels(); ++product, ++out) panel -= product->panels();
        product->multiply(panel, inputs().normed, rows, instructions, sums.data());
        const int64_t start = panel * kPanelRows, some = std::min(kPanelRows, product->outputs - start);
        for (int64_t row = 0; row < rows; ++row) {
          const float* from = sums.data() + row * kPanelRows;
          float* to = *out + row * product->outputs + start;
          if (divisor == 1.0f) std::copy_n(from, some, to);
          else for (int64_t i = 0; i < some; ++i) to[i] = from[i] / divisor;
        }
      }
    };
    multiply(count, products->bytes_of_panel(), make_row, work);
  }

  // Adds the products to the hidden states.
  template <typename MakeRow>
  void add(const Product& product, const Input& x, MakeRow make_row) {
    multiply(product.panels(), product.bytes_of_panel(), make_row, [&](int64_t first, int64_t last) {
      for (int64_t panel = first; panel < last; ++panel) {
        product.multiply(panel, x, rows, instructions, sums.data());
        const int64_t start = panel * kPanelRows, some = std::min(kPanelRows, product.outputs - start);
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t i = 0; i < some; ++i)
            shared.hidden[row * model.hidden_ + start + i] += sums[row * kPanelRows + i] * model.residual_;
      }
    });
  }

  // silu(gate(x)) * up(x), in blocks of 32, which the next product rounds activations in.
  template <typename MakeRow>
  void activate(const Product& gate, const Product& up, MakeRow make_row) {
    constexpr int64_t kPanels = kBlockColumns / kPanelRows;
    const int64_t blocks = Input::blocks_of(gate.outputs);
    const auto work = [&](int64_t first, int64_t last) {
      float *gates = sums.data(), *ups = gates + rows * kPanelRows, rest[kPanelRows];
      Input& out = shared.activations;
      for (int64_t panel = first * kPanels; panel < std::min(last * kPanels, gate.panels()); ++panel) {
        gate.multiply(panel, inputs().normed, rows, instructions, gates);
        up.multiply(panel, inputs().normed, rows, instructions, ups);
        const int64_t start = panel * kPanelRows, some = std::min(kPanelRows, gate.outputs - start);
        for (int64_t row = 0; row < rows; ++row) {
          float *to = out.row(row) + start, *g = gates + row * kPanelRows, *u = ups + row * kPanelRows;
          if (some == kPanelRows) {
            silu(g, u, to);
          } else {
            silu(g, u, rest);
            std::copy_n(rest, some, to);
          }
        }
      }
      for (int64_t row = 0; row < rows; ++row) {
        if (last == blocks) std::fill(out.row(row) + gate.outputs, out.row(row) + out.stride, 0.0f);
        out.prepare(row, first, last, round);
      }
    };
    multiply(blocks, kPanels * (gate.bytes_of_panel() + up.bytes_of_panel()), make_row, work);
  }

  // Keys and values of all rows go into the caches, where rows behind them look for them.
  void keep(const Layer& layer, int64_t index) {
    shared.stages.take(place, rows * model.kv_heads_, kLeastPiece / model.kv_heads_, [] {}, [&](int64_t first, int64_t last) {
      for (int64_t each = first; each < last; ++each) {
        make_newest(layer, each / model.kv_heads_, each % model.kv_heads_);
        store_newest(index, each / model.kv_heads_, each % model.kv_heads_);
      }
    });
  }

  // Query heads, row by row: those of a key head together, where there are enough of these. Without prompts, the newest
  // key is turned by every thread that needs it, and stored by the one that has the first of its query heads; nobody
  // reads it from the cache in this step.
  void attend(const Layer& layer, int64_t index) {
    const int64_t group = model.heads_ / model.kv_heads_, some = rows * model.kv_heads_ < 2 * place.threads ? 1 : group;
    shared.stages.take(place, rows * model.heads_, kLeastPiece / some, [] {}, [&](int64_t first, int64_t last) {
      int64_t ready = -1;  // the key head whose newest key and value are at hand
      for (int64_t each = first; each < last; ++each) {
        const int64_t row = each / model.heads_, head = each % model.heads_;
        if (each / group != ready) make_newest(layer, row, head / group);
        ready = each / group;
        if (head % group == 0 && !taken.have_prompts()) store_newest(index, row, head / group);
        attend(layer, index, row, head);
      }
    });
  }

  void make_newest(const Layer& layer, int64_t row, int64_t kv_head) {
    const int64_t place = (row * model.kv_heads_ + kv_head) * model.size_;
    turn(row, shared.key.data() + place, layer.key_norm, key.data());
    for (int64_t i = 0; i < model.size_; ++i) newest_key[i] = static_cast<Scalar>(key[i]);
    for (int64_t i = 0; i < model.size_; ++i) newest_value[i] = static_cast<Scalar>(shared.value[place + i]);
  }

  void store_newest(int64_t layer, int64_t row, int64_t kv_head) {
    const CacheMemory::Room& room = caches[row]->rooms_[layer];
    const int64_t offset = (kv_head * room.capacity + held[row]) * model.size_;
    std::copy(newest_key.begin(), newest_key.end(), static_cast<Scalar*>(room.keys) + offset);
    std::copy(newest_value.begin(), newest_value.end(), static_cast<Scalar*>(room.values) + offset);
  }

  void attend(const Layer& layer, int64_t index, int64_t row, int64_t head) {
    const CacheMemory::Room& room = caches[row]->rooms_[index];
    const int64_t size = model.size_, kv_head = head / (model.heads_ / model.kv_heads_), holds = held[row];
    const int64_t first = layer.window > 0 ? std::max<int64_t>(0, holds + 1 - layer.window) : 0, count = holds - first;
    const Scalar* keys = static_cast<const Scalar*>(room.keys) + (kv_head * room.capacity + first) * size;
    const Scalar* values = static_cast<const Scalar*>(room.values) + (kv_head * room.capacity + first) * size;
    const int64_t place = (row * model.heads_ + head) * size;
    turn(row, shared.query.data() + place, layer.query_norm, turned.data());
    for (int64_t i = 0; i < size; ++i) turned[i] *= model.scale_;
    score(turned.data(), keys, count, size, weights.data());
    score(turned.data(), newest_key.data(), 1, size, weights.data() + count);
    to_weights(weights.data(), count + 1);
    blend(weights.data(), values, count, size, blended.data());
    float* out = shared.context.data() + place;
    for (int64_t i = 0; i < size; ++i) out[i] = blended[i] + weights[count] * static_cast<float>(newest_value[i]);
  }

  void turn(int64_t row, const float* x, const at::Tensor& weight, float* out) {
    if (weight.defined()) {
      normalise_row(x, weight.const_data_ptr<float>(), model.size_, model.eps_, blended.data());
      x = blended.data();
    }
    const int64_t angles = (held[row] - first_position) * model.size_;
    rotate(x, cosine + angles, sine + angles, model.size_, model.interleaved_, out);
  }

  const DecoderModel& model;
  Shared& shared;
  const float *cosine, *sine;  // [positions, head_dim]
  int64_t first_position;  // of these
  const int64_t* held;  // [rows], tokens before each
  const CacheMemory* const* caches;  // [rows], of the sequence of each
  const Rows& taken;
  int64_t rows;
  Stages::Place place;
  Instructions instructions;
  RoundBlock round;
  ScoreKeys<Scalar> score;
  ScoresToWeights to_weights;
  BlendValues<Scalar> blend;
  SiluTimes silu;
  Inputs own_inputs;
  std::vector<float> sums, weights, turned, key, blended;
  std::vector<Scalar> newest_key, newest_value;
};

}  // namespace torchchat
