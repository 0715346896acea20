// Tokens of several sequences, or of one, from their embeddings to the logits of each sequence's last one. The threads
// start once, go through the stages of all layers together, and nothing is allocated or looked up in between. A matrix is
// read once for all rows, and each row attends to the caches of its sequence, up to its own position. It computes what
// torchchat_core.models.transformer does, in float32 between the products. A row's numbers are formed in one order:
// logits and caches are the same bit for bit as if the tokens had come one by one, whatever stands beside them.
//
// Products are split by outputs in panels of 16, attention by rows and heads. Norms and the rounding of activations are
// done by every thread for itself where rows are few, which is quicker than waiting for one that does it.
//
// Many rows are split among the threads, each of which goes through all layers alone: matrices are read once by each, and
// nobody waits for anyone before the end.

#include <ATen/ops/empty.h>

#include <deque>
#include <limits>
#include <memory>

#include "crew.h"
#include "decoder_model.h"
#include "decoding_worker.h"

namespace torchchat {
namespace {

// Rows of a thread from which it is arithmetic that takes the time, and not the reading of matrices; those that are near
// in any case pay off for fewer.
constexpr int64_t kRowsOfAThread = 16, kRowsOfSmallModels = 4, kBytesNearby = 8 << 20;
constexpr int64_t kGroupsOfAThread = 4;  // at most, where matrices are near: who is through early takes more
// Products of a thread that are worth waiting for it: with attention and all else some half a millisecond.
constexpr int64_t kProductsOfAThread = 1 << 22;

// The rows of some of the sequences, and the threads that take them through the layers.
template <typename Scalar>
struct Group {
  // `ends`: the first row behind each of all sequences; `sequences`: those of this group.
  Group(const DecoderModel& model, const std::vector<int64_t>& ends, Share sequences, const Scalar* hidden,
        const float* cosine, const float* sine, const std::vector<at::Tensor>& keys,
        const std::vector<at::Tensor>& values, const int64_t* held, float* logits, int64_t threads)
      : model(model), rows(rows_of(ends, sequences)), shared(model, rows, threads), caches(model.layers_.size()),
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
                           rows, thread, threads);
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

  void run(int64_t thread) {
    Worker<Scalar>& worker = workers[thread];
    for (size_t index = 0; index < caches.size(); ++index) worker.run(model.layers_[index], caches[index]);
    worker.make_logits(logits);
    shared.stages.finish(worker.place);
  }

  const DecoderModel& model;
  const Rows rows;
  Shared shared;
  std::vector<Caches<Scalar>> caches;  // [layers]
  std::vector<Worker<Scalar>> workers;
  float* logits;
};

// One group, through which all threads go, or several, each of which is for one thread.
template <typename Scalar>
struct Groups : Job {
  explicit Groups(int64_t threads) : threads(threads), stages(1, threads) {}

  void run(int64_t thread) override {
    if (groups.size() == 1) {
      groups[0].run(thread);
      return;
    }
    Stages::Place place{thread, threads};
    stages.take(place, static_cast<int64_t>(groups.size()), kLargestPiece, [] {}, [&](int64_t first, int64_t last) {
      for (int64_t group = first; group < last; ++group) groups[group].run(0);
    });
    stages.finish(place);
  }

  std::deque<Group<Scalar>> groups;  // made before the threads come: nothing may be thrown there
  int64_t threads;
  Stages stages;
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
  return rows == 1 ? model.threads() : threads_at_most(size.weights * rows / kProductsOfAThread);
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
  const int64_t threads = threads_of(model, size, rows);
  const std::vector<Share> parts = parts_of(ends, groups_of(size.bytes, rows, threads));
  const auto count = static_cast<int64_t>(parts.size());
  const auto job = std::make_shared<Groups<Scalar>>(count > 1 ? std::min(threads, count) : threads);
  for (const Share& part : parts)
    job->groups.emplace_back(model, ends, part, hidden.const_data_ptr<Scalar>(), cosine, sine, keys, values, held.data(),
                             logits, count > 1 ? 1 : threads);
  run_together(job, job->threads, &model);
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
