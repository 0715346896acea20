// Tokens from their embeddings to their logits, one of each of several sequences: the threads start once for a token, go
// through its stages together, and nothing is allocated or looked up in between. A matrix is read once for all rows, and
// each row attends to caches of its own. It computes what torchchat_core.models.transformer does, in float32 between the
// products. A row's logits are the same bit for bit, whatever stands beside it.
//
// Products are split by outputs in panels of 16, attention by rows and heads. Norms and the rounding of activations are
// done by every thread for itself where rows are few, which is quicker than waiting for one that does it.
//
// Many rows are split among the threads, each of which goes through all layers alone: matrices are read once by each, and
// nobody waits for anyone before the end.

#include <ATen/ops/empty.h>

#include <deque>

#include "attention.h"
#include "decoder_model.h"
#include "rms_norm.h"
#include "stages.h"

namespace torchchat {
namespace {

constexpr int64_t kFewRows = 2;
// Stages of a layer, and of the head, for few rows and for more.
constexpr int64_t kStages = 5, kStagesOfHead = 1, kStagesOfMore = 8, kStagesOfHeadOfMore = 2;
// Rows of a thread from which it is arithmetic that takes the time, and not the reading of matrices; those that are near
// in any case pay off for fewer.
constexpr int64_t kRowsOfAThread = 16, kRowsOfSmallModels = 4, kBytesNearby = 8 << 20;
constexpr int64_t kGroupsOfAThread = 4;  // at most, where matrices are near: who is through early takes more
// Products of a thread that are worth waiting for it: with attention and all else some half a millisecond.
constexpr int64_t kProductsOfAThread = 1 << 22;

int64_t stages_of(int64_t layers, int64_t rows) {
  return rows <= kFewRows ? layers * kStages + kStagesOfHead : layers * kStagesOfMore + kStagesOfHeadOfMore;
}

// The inputs of products that are made of what an earlier stage wrote.
struct Inputs {
  Inputs(const DecoderModel& model, int64_t rows)
      : normed(rows, model.hidden_, model.rounds_, model.halves_),
        context(rows, model.heads_ * model.size_, model.rounds_, model.halves_) {}

  Input normed, context;
};

// What all threads see. All vectors are [rows, ...].
struct Shared {
  Shared(const DecoderModel& model, int64_t rows, int64_t threads)
      : hidden(rows * model.hidden_), query(rows * model.heads_ * model.size_), key(rows * model.kv_heads_ * model.size_),
        value(rows * model.kv_heads_ * model.size_), context(rows * model.heads_ * model.size_),
        inputs(model, rows <= kFewRows ? 0 : rows),
        activations(rows, model.widest_, model.rounds_, model.halves_),
        stages(stages_of(static_cast<int64_t>(model.layers_.size()), rows), threads) {}

  std::vector<float> hidden, query, key, value, context;
  Inputs inputs;  // where the threads make them together
  Input activations;
  Stages stages;
};

// The caches of one layer, of all rows.
template <typename Scalar>
struct Caches {
  std::vector<Scalar*> keys, values;  // each [kv_heads, capacity, head_dim]
  std::vector<int64_t> capacities;
};

// One thread's part of the work.
template <typename Scalar>
struct Worker {
  Worker(const DecoderModel& model, Shared& shared, const float* cosine, const float* sine,
         const int64_t* held, int64_t rows, int64_t thread)
      : model(model), shared(shared), cosine(cosine), sine(sine), held(held), rows(rows), place{thread, 1},
        instructions(instructions_in_use), round(choose_round_block(instructions)),
        score(choose_score_keys<Scalar>(instructions)), to_weights(choose_scores_to_weights(instructions)),
        blend(choose_blend_values<Scalar>(instructions)),
        own_inputs(model, rows <= kFewRows ? rows : 0),
        sums(2 * rows * kPanelRows),
        weights(*std::max_element(held, held + rows) + 1), turned(model.size_), key(model.size_),
        blended(model.size_), newest_key(model.size_), newest_value(model.size_) {}

  void run(const Layer& layer, const Caches<Scalar>& caches) {
    const std::vector<Product>& products = layer.products;
    project(&products[kQuery], {shared.query.data(), shared.key.data(), shared.value.data()}, layer.input_norm);
    attend(layer, caches);
    add(products[kOutput], inputs().context, [&](int64_t row) { round_context(row); });
    activate(products[kGate], products[kUp], layer.feed_forward_norm);
    add(products[kDown], shared.activations, nullptr);
  }

  void make_logits(float* logits) { project(model.head_.data(), {logits}, model.norm_, model.divisor_); }

  // A stage of products with an input that `make_row` makes of earlier ones: by every thread for itself, or together.
  template <typename MakeRow, typename Work>
  void multiply(int64_t count, int64_t bytes_of_each, MakeRow make_row, Work work) {
    const auto make = [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) make_row(row);
    };
    if (rows <= kFewRows) {
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

  Inputs& inputs() { return rows <= kFewRows ? own_inputs : shared.inputs; }

  void norm(int64_t row, const at::Tensor& weight) {
    Input& normed = inputs().normed;
    normalise_row(shared.hidden.data() + row * model.hidden_, weight.const_data_ptr<float>(), model.hidden_, model.eps_,
                  normed.row(row));
    normed.prepare(row, round);
  }

  void round_context(int64_t row) {
    Input& context = inputs().context;
    const int64_t width = model.heads_ * model.size_;
    std::copy_n(shared.context.begin() + row * width, width, context.row(row));
    context.prepare(row, round);
  }

  // Products of the normed states with matrices that follow each other, each to its own place [rows, outputs].
  void project(const Product* products, std::initializer_list<float*> outs, const at::Tensor& weight,
               float divisor = 1.0f) {
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
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t i = 0; i < some; ++i)
            (*out)[row * product->outputs + start + i] = sums[row * kPanelRows + i] / divisor;
      }
    };
    multiply(count, products->bytes_of_panel(), [&](int64_t row) { norm(row, weight); }, work);
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
  void activate(const Product& gate, const Product& up, const at::Tensor& weight) {
    constexpr int64_t kPanels = kBlockColumns / kPanelRows;
    const int64_t blocks = Input::blocks_of(gate.outputs);
    const auto work = [&](int64_t first, int64_t last) {
      float *gates = sums.data(), *ups = gates + rows * kPanelRows;
      Input& out = shared.activations;
      for (int64_t panel = first * kPanels; panel < std::min(last * kPanels, gate.panels()); ++panel) {
        gate.multiply(panel, inputs().normed, rows, instructions, gates);
        up.multiply(panel, inputs().normed, rows, instructions, ups);
        const int64_t start = panel * kPanelRows, some = std::min(kPanelRows, gate.outputs - start);
        for (int64_t row = 0; row < rows; ++row) {
          float *to = out.row(row) + start, *g = gates + row * kPanelRows, *u = ups + row * kPanelRows;
          for (int64_t i = 0; i < some; ++i) to[i] = g[i] / (1.0f + std::exp(-g[i])) * u[i];
        }
      }
      for (int64_t row = 0; row < rows; ++row) {
        if (last == blocks) std::fill(out.row(row) + gate.outputs, out.row(row) + out.stride, 0.0f);
        out.prepare(row, first, last, round);
      }
    };
    multiply(blocks, kPanels * (gate.bytes_of_panel() + up.bytes_of_panel()), [&](int64_t row) { norm(row, weight); },
             work);
  }

  // Query heads, row by row: those of a key head together, where there are enough of these. The newest key is turned by
  // every thread that needs it, and stored by the one that has the first of its query heads; nobody reads it from the
  // cache in this step.
  void attend(const Layer& layer, const Caches<Scalar>& caches) {
    const int64_t group = model.heads_ / model.kv_heads_, some = rows * model.kv_heads_ < 2 * place.threads ? 1 : group;
    shared.stages.take(place, rows * model.heads_, kLeastPiece / some, [] {}, [&](int64_t first, int64_t last) {
      int64_t ready = -1;  // the key head whose newest key and value are at hand
      for (int64_t each = first; each < last; ++each) {
        const int64_t row = each / model.heads_, head = each % model.heads_;
        if (each / group != ready) make_newest(layer, row, head / group);
        ready = each / group;
        attend(layer, caches, row, head);
      }
    });
  }

  void make_newest(const Layer& layer, int64_t row, int64_t kv_head) {
    const int64_t place = (row * model.kv_heads_ + kv_head) * model.size_;
    turn(row, shared.key.data() + place, layer.key_norm, key.data());
    for (int64_t i = 0; i < model.size_; ++i) newest_key[i] = static_cast<Scalar>(key[i]);
    for (int64_t i = 0; i < model.size_; ++i) newest_value[i] = static_cast<Scalar>(shared.value[place + i]);
  }

  void attend(const Layer& layer, const Caches<Scalar>& caches, int64_t row, int64_t head) {
    const int64_t size = model.size_, group = model.heads_ / model.kv_heads_, holds = held[row];
    const int64_t first = layer.window > 0 ? std::max<int64_t>(0, holds + 1 - layer.window) : 0, count = holds - first;
    Scalar* keys = caches.keys[row] + head / group * caches.capacities[row] * size;
    Scalar* values = caches.values[row] + head / group * caches.capacities[row] * size;
    if (head % group == 0) {
      std::copy(newest_key.begin(), newest_key.end(), keys + holds * size);
      std::copy(newest_value.begin(), newest_value.end(), values + holds * size);
    }
    const int64_t place = (row * model.heads_ + head) * size;
    turn(row, shared.query.data() + place, layer.query_norm, turned.data());
    for (int64_t i = 0; i < size; ++i) turned[i] *= model.scale_;
    score(turned.data(), keys + first * size, count, size, weights.data());
    score(turned.data(), newest_key.data(), 1, size, weights.data() + count);
    to_weights(weights.data(), count + 1);
    blend(weights.data(), values + first * size, count, size, blended.data());
    float* out = shared.context.data() + place;
    for (int64_t i = 0; i < size; ++i) out[i] = blended[i] + weights[count] * static_cast<float>(newest_value[i]);
  }

  void turn(int64_t row, const float* x, const at::Tensor& weight, float* out) {
    if (weight.defined()) {
      normalise_row(x, weight.const_data_ptr<float>(), model.size_, model.eps_, blended.data());
      x = blended.data();
    }
    rotate(x, cosine + row * model.size_, sine + row * model.size_, model.size_, model.interleaved_, out);
  }

  const DecoderModel& model;
  Shared& shared;
  const float *cosine, *sine;
  const int64_t* held;
  int64_t rows;
  Stages::Place place;
  Instructions instructions;
  RoundBlock round;
  ScoreKeys<Scalar> score;
  ScoresToWeights to_weights;
  BlendValues<Scalar> blend;
  Inputs own_inputs;
  std::vector<float> sums, weights, turned, key, blended;
  std::vector<Scalar> newest_key, newest_value;
};

// Some of the rows, and the threads that take them through the layers.
template <typename Scalar>
struct Group {
  Group(const DecoderModel& model, Share rows, const Scalar* hidden, const float* cosine, const float* sine,
        const std::vector<at::Tensor>& keys, const std::vector<at::Tensor>& values, const int64_t* held, float* logits,
        int64_t threads)
      : model(model), shared(model, rows.last - rows.first, threads), caches(model.layers_.size()),
        logits(logits + rows.first * model.head_[0].outputs) {
    const int64_t count = rows.last - rows.first, layers = static_cast<int64_t>(caches.size());
    hidden += rows.first * model.hidden_;
    for (int64_t i = 0; i < count * model.hidden_; ++i) shared.hidden[i] = static_cast<float>(hidden[i]);
    for (int64_t i = rows.first * layers; i < rows.last * layers; ++i) {
      Caches<Scalar>& layer = caches[i % layers];
      layer.keys.push_back(keys[i].mutable_data_ptr<Scalar>());
      layer.values.push_back(values[i].mutable_data_ptr<Scalar>());
      layer.capacities.push_back(keys[i].size(1));
    }
    workers.reserve(threads);
    for (int64_t thread = 0; thread < threads; ++thread)
      workers.emplace_back(model, shared, cosine + rows.first * model.size_, sine + rows.first * model.size_,
                           held + rows.first, count, thread);
  }

  void run(int64_t thread, int64_t threads) {
    Worker<Scalar>& worker = workers[thread];
    worker.place.threads = threads;
    for (size_t index = 0; index < caches.size(); ++index) worker.run(model.layers_[index], caches[index]);
    worker.make_logits(logits);
  }

  const DecoderModel& model;
  Shared shared;
  std::vector<Caches<Scalar>> caches;  // [layers]
  std::vector<Worker<Scalar>> workers;
  float* logits;
};

struct Size {
  int64_t bytes = 0, weights = 0;

  void add(const Product& product) {
    bytes += static_cast<int64_t>(product.weight.nbytes());
    weights += product.outputs * product.columns;
  }
};

Size size_of(const DecoderModel& model) {
  Size size;
  size.add(model.head_[0]);
  for (const Layer& layer : model.layers_)
    for (const Product& product : layer.products) size.add(product);
  return size;
}

int64_t threads_of(const DecoderModel& model, const Size& size, int64_t rows) {
  if (rows == 1) return model.threads();
  return omp_in_parallel() ? 1 : std::clamp<int64_t>(size.weights * rows / kProductsOfAThread, 1, at::get_num_threads());
}

// In how many groups the rows are taken; one group is for all threads together.
int64_t groups_of(int64_t bytes, int64_t rows, int64_t threads) {
  if (threads == 1) return 1;
  if (bytes <= kBytesNearby) return std::clamp<int64_t>(rows / kRowsOfSmallModels, 1, threads * kGroupsOfAThread);
  return rows >= threads * kRowsOfAThread ? threads : 1;
}

template <typename Scalar>
void run_as(const DecoderModel& model, const at::Tensor& hidden, const float* cosine, const float* sine,
            const std::vector<at::Tensor>& keys, const std::vector<at::Tensor>& values, const std::vector<int64_t>& held,
            float* logits) {
  const auto rows = static_cast<int64_t>(held.size());
  const Size size = size_of(model);
  const int64_t threads = threads_of(model, size, rows);
  const int64_t count = groups_of(size.bytes, rows, threads);
  std::deque<Group<Scalar>> groups;  // made here: nothing may be thrown where the threads are
  for (int64_t group = 0; group < count; ++group)
    groups.emplace_back(model, share_of(rows, group, count), hidden.const_data_ptr<Scalar>(), cosine, sine, keys, values,
                        held.data(), logits, count > 1 ? 1 : threads);
  if (count > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(std::min(threads, count)))
    for (int64_t group = 0; group < count; ++group) groups[group].run(0, 1);
    return;
  }
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
  groups[0].run(omp_get_thread_num(), omp_get_num_threads());  // which may be fewer than were asked for
}

}  // namespace

at::Tensor decode_rows(const DecoderModel& model, const at::Tensor& hidden, const at::Tensor& cosine,
                       const at::Tensor& sine, const std::vector<at::Tensor>& keys,
                       const std::vector<at::Tensor>& values, const std::vector<int64_t>& held) {
  TORCH_CHECK(!model.layers_.empty() && !model.head_.empty(), "a decoder without layers or without a head");
  const auto rows = static_cast<int64_t>(held.size()), layers = static_cast<int64_t>(model.layers_.size());
  TORCH_CHECK(rows > 0 && hidden.dim() == 2 && hidden.size(0) == rows && hidden.size(1) == model.hidden_ &&
                  hidden.is_contiguous(), "the tokens have to be [", rows, ", ", model.hidden_, "]");
  for (const at::Tensor* each : {&cosine, &sine})
    TORCH_CHECK(each->numel() == rows * model.size_ && each->is_contiguous() && each->scalar_type() == at::kFloat,
                "cosine and sine have to be float32 of ", model.size_, " numbers for each of ", rows, " rows");
  for (const std::vector<at::Tensor>* caches : {&keys, &values}) {
    TORCH_CHECK(static_cast<int64_t>(caches->size()) == rows * layers, "caches of ", caches->size(), " layers for ",
                rows, " rows of ", layers);
    for (size_t i = 0; i < caches->size(); ++i) {
      const at::Tensor &each = (*caches)[i], &key = keys[i];
      const int64_t holds = held[i / model.layers_.size()];
      TORCH_CHECK(each.dim() == 3 && each.size(0) == model.kv_heads_ && each.size(2) == model.size_ &&
                      each.is_contiguous() && each.scalar_type() == hidden.scalar_type() && 0 <= holds &&
                      holds < each.size(1) && each.size(1) == key.size(1),
                  "a cache of ", each.sizes(), " for ", model.kv_heads_, " heads of ", model.size_, " and position ", holds);
    }
  }
  at::Tensor out = at::empty({rows, model.head_[0].outputs}, hidden.options().dtype(at::kFloat));
  const float *cosines = cosine.const_data_ptr<float>(), *sines = sine.const_data_ptr<float>();
  float* logits = out.mutable_data_ptr<float>();
  if (hidden.scalar_type() == at::kFloat) run_as<float>(model, hidden, cosines, sines, keys, values, held, logits);
  else if (hidden.scalar_type() == at::kBFloat16)
    run_as<at::BFloat16>(model, hidden, cosines, sines, keys, values, held, logits);
  else TORCH_CHECK(false, "the tokens are of ", hidden.scalar_type(), "; they have to be float32 or bfloat16");
  return out;
}

}  // namespace torchchat
