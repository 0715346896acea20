// Tokens of several sequences from their embeddings to the logits of each sequence's last one: what decoding.cpp does for
// one token. A matrix is read once for all rows, and each row attends to the caches of its sequence, up to its own
// position. A row's numbers are formed in the order in which decoding.cpp forms them: logits and caches are the same bit
// for bit as if the tokens had come one by one, whatever stands beside them.
//
// Many rows are split among the threads, each of which goes through all layers alone: matrices are read once by each, and
// nobody waits for anyone before the end. A few rows of a model that is larger than the caches of the processor go
// through the layers together: products are split by outputs, attention by rows and key heads, norms and the rounding of
// activations by rows, and the threads wait for each other after each of these.

#include <ATen/ops/empty.h>

#include <deque>
#include <limits>

#include "attention.h"
#include "decoder_model.h"
#include "rms_norm.h"

namespace torchchat {
namespace {

constexpr int64_t kStages = 6;  // of a layer, whose work is taken in pieces; the head is one more
// Rows of a thread from which it is arithmetic that takes the time, and not the reading of matrices; those that are near
// in any case pay off for fewer.
constexpr int64_t kRowsOfAThread = 16, kRowsOfSmallModels = 4, kBytesNearby = 8 << 20;
constexpr int64_t kGroupsOfAThread = 4;  // at most, where matrices are near: who is through early takes more
// Products of a thread that are worth waiting for it: with attention and all else some half a millisecond.
constexpr int64_t kProductsOfAThread = 1 << 22;

// What all threads see. All vectors are [rows, ...].
struct Shared {
  Shared(const DecoderModel& model, int64_t rows, int64_t threads)
      : hidden(rows * model.hidden_), query(rows * model.heads_ * model.size_), key(rows * model.kv_heads_ * model.size_),
        value(rows * model.kv_heads_ * model.size_), normed(rows, model.hidden_, model.rounds_, model.halves_),
        context(rows, model.heads_ * model.size_, model.rounds_, model.halves_),
        activations(rows, model.widest_, model.rounds_, model.halves_),
        stages(static_cast<int64_t>(model.layers_.size()) * kStages + 1, threads) {}

  std::vector<float> hidden, query, key, value;
  Input normed, context, activations;
  Stages stages;
};

// The rows of whole sequences.
struct Rows {
  std::vector<int64_t> last;  // [sequences], the row of the last token of each
  int64_t count;

  bool has_prompts() const { return static_cast<int64_t>(last.size()) < count; }  // several tokens of one sequence
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
         const int64_t* held, const Rows& taken, int64_t thread)
      : model(model), shared(shared), cosine(cosine), sine(sine), held(held), taken(taken), rows(taken.count),
        thread(thread), instructions(instructions_in_use), round(choose_round_block(instructions)),
        score(choose_score_keys<Scalar>(instructions)), to_weights(choose_scores_to_weights(instructions)),
        blend(choose_blend_values<Scalar>(instructions)), sums(2 * rows * kPanelRows),
        weights(*std::max_element(held, held + rows) + 1), turned(model.size_), key(model.size_), blended(model.size_) {}

  void run(const Layer& layer, const Caches<Scalar>& caches) {
    const std::vector<Product>& products = layer.products;
    norm(layer.input_norm);
    wait();
    project(&products[kQuery], {shared.query.data(), shared.key.data(), shared.value.data()});
    wait();
    attend(layer, caches);
    wait();
    const Share own = share_of(rows, thread, threads);
    for (int64_t row = own.first; row < own.last; ++row) shared.context.prepare(row, round);
    wait();
    add(products[kOutput], shared.context);
    wait();
    norm(layer.feed_forward_norm);
    wait();
    activate(products[kGate], products[kUp]);
    wait();
    add(products[kDown], shared.activations);
    wait();
  }

  // Of the last token of each sequence: [sequences, vocab].
  void make_logits(float* logits) {
    const auto count = static_cast<int64_t>(taken.last.size());
    const Share own = share_of(count, thread, threads);
    for (int64_t index = own.first; index < own.last; ++index) norm(taken.last[index], index, model.norm_);
    wait();
    rows = count;
    project(model.head_.data(), {logits}, model.divisor_);
  }

  void wait() const {
    if (threads == 1) return;
#pragma omp barrier
  }

  template <typename Work>
  void take(int64_t count, int64_t bytes_of_each, Work work) {
    shared.stages.take(stage++, thread, threads, count, bytes_of_each, work);
  }

  void norm(const at::Tensor& weight) {
    const Share own = share_of(rows, thread, threads);
    for (int64_t row = own.first; row < own.last; ++row) norm(row, row, weight);
  }

  void norm(int64_t row, int64_t place, const at::Tensor& weight) {
    normalise_row(shared.hidden.data() + row * model.hidden_, weight.const_data_ptr<float>(), model.hidden_, model.eps_,
                  shared.normed.row(place));
    shared.normed.prepare(place, round);
  }

  // Products of the normed states with matrices that follow each other, each to its own place [rows, outputs].
  void project(const Product* products, std::initializer_list<float*> outs, float divisor = 1.0f) {
    int64_t count = 0;
    for (size_t index = 0; index < outs.size(); ++index) count += products[index].panels();
    take(count, products->bytes_of_panel(), [&](int64_t first, int64_t last) {
      for (int64_t place = first; place < last; ++place) {
        int64_t panel = place;
        const Product* product = products;
        float* const* out = outs.begin();
        for (; panel >= product->panels(); ++product, ++out) panel -= product->panels();
        product->multiply(panel, shared.normed, rows, instructions, sums.data());
        const int64_t start = panel * kPanelRows, some = std::min(kPanelRows, product->outputs - start);
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t i = 0; i < some; ++i)
            (*out)[row * product->outputs + start + i] = sums[row * kPanelRows + i] / divisor;
      }
    });
  }

  // Adds the products to the hidden states.
  void add(const Product& product, const Input& x) {
    take(product.panels(), product.bytes_of_panel(), [&](int64_t first, int64_t last) {
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
  void activate(const Product& gate, const Product& up) {
    constexpr int64_t kPanels = kBlockColumns / kPanelRows;
    const int64_t blocks = Input::blocks_of(gate.outputs);
    take(blocks, kPanels * (gate.bytes_of_panel() + up.bytes_of_panel()), [&](int64_t first, int64_t last) {
      float *gates = sums.data(), *ups = gates + rows * kPanelRows;
      Input& out = shared.activations;
      for (int64_t panel = first * kPanels; panel < std::min(last * kPanels, gate.panels()); ++panel) {
        gate.multiply(panel, shared.normed, rows, instructions, gates);
        up.multiply(panel, shared.normed, rows, instructions, ups);
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
    });
  }

  // The query heads of one key head, row by row. Keys and values of a row go into the cache first, and those of all rows
  // before any other thread may look for them.
  void attend(const Layer& layer, const Caches<Scalar>& caches) {
    const int64_t mean = static_cast<int64_t>(weights.size()) * model.size_ * static_cast<int64_t>(sizeof(Scalar));
    const int64_t count = rows * model.kv_heads_;
    const bool apart = taken.has_prompts() && threads > 1;
    if (apart) {
      take(count, 2 * model.size_ * static_cast<int64_t>(sizeof(float)), [&](int64_t first, int64_t last) {
        for (int64_t each = first; each < last; ++each) keep(layer, caches, each / model.kv_heads_, each % model.kv_heads_);
      });
      wait();
    }
    take(count, 2 * mean, [&](int64_t first, int64_t last) {
      for (int64_t each = first; each < last; ++each) {
        const int64_t row = each / model.kv_heads_, kv_head = each % model.kv_heads_;
        if (!apart) keep(layer, caches, row, kv_head);
        attend(layer, caches, row, kv_head);
      }
    });
  }

  void keep(const Layer& layer, const Caches<Scalar>& caches, int64_t row, int64_t kv_head) {
    const int64_t size = model.size_, place = (row * model.kv_heads_ + kv_head) * size;
    const int64_t offset = (kv_head * caches.capacities[row] + held[row]) * size;
    turn(row, shared.key.data() + place, layer.key_norm, key.data());
    for (int64_t i = 0; i < size; ++i) caches.keys[row][offset + i] = static_cast<Scalar>(key[i]);
    for (int64_t i = 0; i < size; ++i) caches.values[row][offset + i] = static_cast<Scalar>(shared.value[place + i]);
  }

  void attend(const Layer& layer, const Caches<Scalar>& caches, int64_t row, int64_t kv_head) {
    const int64_t size = model.size_, group = model.heads_ / model.kv_heads_, holds = held[row];
    const int64_t first = layer.window > 0 ? std::max<int64_t>(0, holds + 1 - layer.window) : 0, count = holds - first;
    const Scalar* keys = caches.keys[row] + (kv_head * caches.capacities[row] + first) * size;
    const Scalar* values = caches.values[row] + (kv_head * caches.capacities[row] + first) * size;
    const Scalar* newest_value = values + count * size;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      turn(row, shared.query.data() + (row * model.heads_ + head) * size, layer.query_norm, turned.data());
      for (int64_t i = 0; i < size; ++i) turned[i] *= model.scale_;
      score(turned.data(), keys, count, size, weights.data());
      score(turned.data(), keys + count * size, 1, size, weights.data() + count);
      to_weights(weights.data(), count + 1);
      blend(weights.data(), values, count, size, blended.data());
      float* out = shared.context.row(row) + head * size;
      for (int64_t i = 0; i < size; ++i) out[i] = blended[i] + weights[count] * static_cast<float>(newest_value[i]);
    }
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
  const Rows& taken;
  int64_t rows, thread, threads = 1, stage = 0;
  Instructions instructions;
  RoundBlock round;
  ScoreKeys<Scalar> score;
  ScoresToWeights to_weights;
  BlendValues<Scalar> blend;
  std::vector<float> sums, weights, turned, key, blended;
};

// The rows of some of the sequences, and the threads that take them through the layers.
template <typename Scalar>
struct Group {
  // `ends`: the first row behind each of all sequences; `sequences`: those of this group.
  Group(const DecoderModel& model, const std::vector<int64_t>& ends, Share sequences, const Scalar* hidden,
        const float* cosine, const float* sine, const std::vector<at::Tensor>& keys,
        const std::vector<at::Tensor>& values, const int64_t* held, float* logits, int64_t threads)
      : model(model), rows(rows_of(ends, sequences)), shared(model, rows.count, threads), caches(model.layers_.size()),
        logits(logits + sequences.first * model.head_[0].outputs) {
    const int64_t before = first_row(ends, sequences), layers = static_cast<int64_t>(caches.size());
    hidden += before * model.hidden_;
    for (int64_t i = 0; i < rows.count * model.hidden_; ++i) shared.hidden[i] = static_cast<float>(hidden[i]);
    for (int64_t sequence = sequences.first; sequence < sequences.last; ++sequence)
      for (int64_t i = 0; i < layers; ++i) {
        const at::Tensor &key = keys[sequence * layers + i], &value = values[sequence * layers + i];
        const int64_t count = ends[sequence] - (sequence > 0 ? ends[sequence - 1] : 0);
        caches[i].keys.insert(caches[i].keys.end(), count, key.mutable_data_ptr<Scalar>());
        caches[i].values.insert(caches[i].values.end(), count, value.mutable_data_ptr<Scalar>());
        caches[i].capacities.insert(caches[i].capacities.end(), count, key.size(1));
      }
    workers.reserve(threads);
    for (int64_t thread = 0; thread < threads; ++thread)
      workers.emplace_back(model, shared, cosine + before * model.size_, sine + before * model.size_, held + before,
                           rows, thread);
  }

  static int64_t first_row(const std::vector<int64_t>& ends, Share sequences) {
    return sequences.first > 0 ? ends[sequences.first - 1] : 0;
  }

  static Rows rows_of(const std::vector<int64_t>& ends, Share sequences) {
    const int64_t before = first_row(ends, sequences);
    Rows rows{{}, ends[sequences.last - 1] - before};
    for (int64_t sequence = sequences.first; sequence < sequences.last; ++sequence)
      rows.last.push_back(ends[sequence] - 1 - before);
    return rows;
  }

  void run(int64_t thread, int64_t threads) {
    Worker<Scalar>& worker = workers[thread];
    worker.threads = threads;
    for (size_t index = 0; index < caches.size(); ++index) worker.run(model.layers_[index], caches[index]);
    worker.make_logits(logits);
  }

  const DecoderModel& model;
  const Rows rows;
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

// In how many groups the rows are taken; one group is for all threads together.
int64_t groups_of(int64_t bytes, int64_t rows, int64_t threads) {
  if (threads == 1) return 1;
  if (bytes <= kBytesNearby) return std::clamp<int64_t>(rows / kRowsOfSmallModels, 1, threads * kGroupsOfAThread);
  return rows >= threads * kRowsOfAThread ? threads : 1;
}

// The sequences in so many parts of about as many rows.
std::vector<Share> parts_of(const std::vector<int64_t>& ends, int64_t count) {
  const auto sequences = static_cast<int64_t>(ends.size());
  std::vector<Share> parts;
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    if (parts.empty() || ends[sequence] > share_of(ends.back(), static_cast<int64_t>(parts.size()) - 1, count).last)
      if (static_cast<int64_t>(parts.size()) < count) parts.push_back({sequence, sequence});
    parts.back().last = sequence + 1;
  }
  return parts;
}

template <typename Scalar>
void run_as(const DecoderModel& model, const at::Tensor& hidden, const float* cosine, const float* sine,
            const std::vector<at::Tensor>& keys, const std::vector<at::Tensor>& values,
            const std::vector<int64_t>& ends, const std::vector<int64_t>& held, float* logits) {
  const auto rows = static_cast<int64_t>(held.size());
  const Size size = size_of(model);
  const int64_t threads = omp_in_parallel() ? 1 : std::clamp<int64_t>(
      size.weights * rows / kProductsOfAThread, 1, at::get_num_threads());
  const std::vector<Share> parts = parts_of(ends, groups_of(size.bytes, rows, threads));
  const auto count = static_cast<int64_t>(parts.size());
  std::deque<Group<Scalar>> groups;  // made here: nothing may be thrown where the threads are
  for (const Share& part : parts)
    groups.emplace_back(model, ends, part, hidden.const_data_ptr<Scalar>(), cosine, sine, keys, values, held.data(),
                        logits, count > 1 ? 1 : threads);
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
                       const std::vector<at::Tensor>& values, const std::vector<int64_t>& counts,
                       const std::vector<int64_t>& lengths) {
  TORCH_CHECK(!model.layers_.empty() && !model.head_.empty(), "a decoder without layers or without a head");
  const auto sequences = static_cast<int64_t>(counts.size()), layers = static_cast<int64_t>(model.layers_.size());
  TORCH_CHECK(sequences > 0 && lengths.size() == counts.size() && hidden.dim() == 2 && hidden.size(1) == model.hidden_ &&
                  hidden.is_contiguous(), "the tokens have to be [n, ", model.hidden_, "], of sequences with lengths");
  const int64_t rows = hidden.size(0);
  std::vector<int64_t> ends, held;  // of each sequence the first row behind it; of each row the tokens before it
  for (int64_t sequence = 0, end = 0; sequence < sequences; ++sequence) {
    TORCH_CHECK(0 < counts[sequence] && counts[sequence] <= rows - end && 0 <= lengths[sequence] &&
                    lengths[sequence] <= std::numeric_limits<int32_t>::max(),
                counts[sequence], " tokens behind ", lengths[sequence], ", of ", rows - end);
    ends.push_back(end += counts[sequence]);
    for (int64_t i = 0; i < counts[sequence]; ++i) held.push_back(lengths[sequence] + i);
  }
  TORCH_CHECK(ends.back() == rows, rows, " tokens for sequences of ", ends.back());
  for (const at::Tensor* each : {&cosine, &sine})
    TORCH_CHECK(each->numel() == rows * model.size_ && each->is_contiguous() && each->scalar_type() == at::kFloat,
                "cosine and sine have to be float32 of ", model.size_, " numbers for each of ", rows, " tokens");
  for (const std::vector<at::Tensor>* caches : {&keys, &values}) {
    TORCH_CHECK(static_cast<int64_t>(caches->size()) == sequences * layers, "caches of ", caches->size(),
                " layers for ", sequences, " sequences of ", layers);
    for (size_t i = 0; i < caches->size(); ++i) {
      const at::Tensor &each = (*caches)[i], &key = keys[i];
      const int64_t holds = lengths[i / model.layers_.size()], last = holds + counts[i / model.layers_.size()] - 1;
      TORCH_CHECK(each.dim() == 3 && each.size(0) == model.kv_heads_ && each.size(2) == model.size_ &&
                      each.is_contiguous() && each.scalar_type() == hidden.scalar_type() && 0 <= holds &&
                      last < each.size(1) && each.size(1) == key.size(1),
                  "a cache of ", each.sizes(), " for ", model.kv_heads_, " heads of ", model.size_, " and position ", last);
    }
  }
  at::Tensor out = at::empty({sequences, model.head_[0].outputs}, hidden.options().dtype(at::kFloat));
  const float *cosines = cosine.const_data_ptr<float>(), *sines = sine.const_data_ptr<float>();
  float* logits = out.mutable_data_ptr<float>();
  if (hidden.scalar_type() == at::kFloat)
    run_as<float>(model, hidden, cosines, sines, keys, values, ends, held, logits);
  else if (hidden.scalar_type() == at::kBFloat16)
    run_as<at::BFloat16>(model, hidden, cosines, sines, keys, values, ends, held, logits);
  else TORCH_CHECK(false, "the tokens are of ", hidden.scalar_type(), "; they have to be float32 or bfloat16");
  return out;
}

}  // namespace torchchat
