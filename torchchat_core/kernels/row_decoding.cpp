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
constexpr int64_t kRowsOfAThread = 16, kRowsOfSmallModels = 4;
constexpr int64_t kGroupsOfAThread = 4;  // at most, where matrices are near: who is through early takes more
// Products of a thread that are worth waiting for it: with attention and all else some half a millisecond.
constexpr int64_t kProductsOfAThread = 1 << 22;

// The rows of some of the sequences, and the threads that take them through the layers.
template <typename Scalar>
struct Group {
  // `ends`: the first row behind each of all sequences; `sequences`: those of this group. `held` and `caches`: [rows].
  Group(const DecoderModel& model, const std::vector<int64_t>& ends, Share sequences, const TokenRows& given,
        const int64_t* held, const CacheMemory* const* caches, float* logits, int64_t threads)
      : model(model), rows(rows_of(ends, sequences)), shared(model, rows, threads),
        logits(logits + sequences.first * model.head_[0].outputs) {
    const int64_t before = first_row(ends, sequences);
    embed(given, before);
    workers.reserve(threads);
    for (int64_t thread = 0; thread < threads; ++thread)
      workers.emplace_back(model, shared, given, held + before, caches + before, rows, thread, threads);
  }

  // Rounded to Scalar when it is multiplied, as the model does it.
  void embed(const TokenRows& given, int64_t before) {
    const auto* const table = given.embedding.const_data_ptr<Scalar>();
    const auto multiplier = static_cast<float>(given.multiplier);
    for (int64_t row = 0; row < rows.count; ++row) {
      const Scalar* from = table + given.tokens[before + row] * model.hidden_;
      float* to = shared.hidden.data() + row * model.hidden_;
      for (int64_t i = 0; i < model.hidden_; ++i)
        to[i] = static_cast<float>(static_cast<Scalar>(static_cast<float>(from[i]) * multiplier));
    }
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
    for (size_t layer = 0; layer < model.layers_.size(); ++layer) worker.run(static_cast<int64_t>(layer));
    worker.make_logits(logits);
    shared.stages.finish(worker.place);
  }

  const DecoderModel& model;
  const Rows rows;
  Shared shared;
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

int64_t threads_of(const DecoderModel& model, int64_t rows) {
  return rows == 1 ? model.threads() : threads_for(model.weights_ * rows / kProductsOfAThread);
}

// In how many groups the rows are taken; one group is for all threads together.
int64_t groups_of(const DecoderModel& model, int64_t rows, int64_t threads) {
  if (threads == 1) return 1;
  if (model.is_near()) return std::clamp<int64_t>(rows / kRowsOfSmallModels, 1, threads * kGroupsOfAThread);
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
void run_as(const DecoderModel& model, const TokenRows& rows, const std::vector<int64_t>& ends,
            const std::vector<int64_t>& held, const std::vector<const CacheMemory*>& caches, float* logits) {
  const auto all = static_cast<int64_t>(held.size());
  const int64_t threads = threads_of(model, all);
  const std::vector<Share> parts = parts_of(ends, groups_of(model, all, threads));
  const auto count = static_cast<int64_t>(parts.size());
  const auto job = std::make_shared<Groups<Scalar>>(count > 1 ? std::min(threads, count) : threads);
  for (const Share& part : parts)
    job->groups.emplace_back(model, ends, part, rows, held.data(), caches.data(), logits, count > 1 ? 1 : threads);
  run_together(job, job->threads, &model);
}

// Raises an error for tokens that the tables do not have.
void check(const DecoderModel& model, const TokenRows& rows, const std::vector<int64_t>& held) {
  TORCH_CHECK(rows.embedding.dim() == 2 && rows.embedding.size(1) == model.hidden_ && rows.embedding.is_contiguous() &&
                  rows.embedding.device().is_cpu(),
              "the embedding has to be [n, ", model.hidden_, "], on the CPU");
  for (const int64_t token : rows.tokens)
    TORCH_CHECK(0 <= token && token < rows.embedding.size(0), "there is no token ", token);
  for (const at::Tensor* each : {&rows.cosine, &rows.sine}) {
    TORCH_CHECK(each->is_contiguous() && each->scalar_type() == at::kFloat && each->device().is_cpu(),
                "cosine and sine have to be float32, on the CPU");
    const int64_t count = each->numel() / model.size_;
    for (const int64_t position : held)
      TORCH_CHECK(rows.first_position <= position && position - rows.first_position < count,
                  "cosine and sine of ", count, " positions, which do not have ", position);
  }
}

}  // namespace

at::Tensor decode_rows(const DecoderModel& model, const TokenRows& rows, const std::vector<const CacheMemory*>& caches,
                       const std::vector<int64_t>& counts, const std::vector<int64_t>& lengths) {
  TORCH_CHECK(!model.layers_.empty() && !model.head_.empty(), "a decoder without layers or without a head");
  const size_t sequences = counts.size();
  TORCH_CHECK(sequences > 0 && lengths.size() == sequences && caches.size() == sequences,
              "sequences of ", sequences, " counts, ", lengths.size(), " lengths and ", caches.size(), " caches");
  const auto all = static_cast<int64_t>(rows.tokens.size()), layers = static_cast<int64_t>(model.layers_.size());
  const at::ScalarType type = rows.embedding.scalar_type();
  std::vector<int64_t> ends, held;  // of each sequence the first row behind it; of each row the tokens before it
  std::vector<const CacheMemory*> caches_of_rows;
  for (size_t sequence = 0; sequence < sequences; ++sequence) {
    const CacheMemory& cache = *caches[sequence];
    const int64_t count = counts[sequence], length = lengths[sequence], before = ends.empty() ? 0 : ends.back();
    TORCH_CHECK(0 < count && count <= all - before && 0 <= length && length <= std::numeric_limits<int32_t>::max(),
                count, " tokens behind ", length, ", of ", all - before);
    TORCH_CHECK(cache.layers() == layers && cache.kv_heads() == model.kv_heads_ && cache.size() == model.size_ &&
                    cache.type() == type && length + count <= cache.capacity_,
                "a cache of ", cache.layers(), " layers and ", cache.keys_[0].sizes(), " for ", layers, " layers, ",
                model.kv_heads_, " heads of ", model.size_, " and ", length + count, " positions");
    ends.push_back(before + count);
    for (int64_t i = 0; i < count; ++i) held.push_back(length + i);
    caches_of_rows.insert(caches_of_rows.end(), count, &cache);
  }
  TORCH_CHECK(ends.back() == all, all, " tokens for sequences of ", ends.back());
  check(model, rows, held);
  at::Tensor out =
      at::empty({static_cast<int64_t>(sequences), model.head_[0].outputs}, rows.embedding.options().dtype(at::kFloat));
  float* logits = out.mutable_data_ptr<float>();
  if (type == at::kFloat) run_as<float>(model, rows, ends, held, caches_of_rows, logits);
  else if (type == at::kBFloat16) run_as<at::BFloat16>(model, rows, ends, held, caches_of_rows, logits);
  else TORCH_CHECK(false, "the tokens are of ", type, "; they have to be float32 or bfloat16");
  return out;
}

}  // namespace torchchat
