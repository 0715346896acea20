// One token from its embedding to its logits, as torch.classes.torchchat.Decoder: the threads start once for a token,
// wait for each other five times a layer, and nothing is allocated or looked up in between. For one token of each of
// several sequences there is row_decoding.cpp.
//
// It computes what torchchat_core.models.transformer does, in float32 between the products. Work is split
// by outputs in panels of 16, and attention by heads; norms and the rounding of activations are done by every thread
// for itself, which is quicker than waiting for one that does it. A thread that is through with its part of the outputs
// helps with what is left of the others' parts: where something else takes a core's time, nobody waits for it long.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <vector>

#include "attention.h"
#include "decoder_model.h"
#include "rms_norm.h"

namespace torchchat {
namespace {

constexpr int64_t kStages = 4;  // of a layer, after each of which all threads wait; the head is one more

struct Decoder : torch::CustomClassHolder, DecoderModel {
  using DecoderModel::DecoderModel;

  // hidden [1, hidden], cosine and sine float32 [head_dim] of its position, and the caches of all layers, each
  // [kv_heads, capacity, head_dim], which hold `held` positions and get one more -> logits, float32 [1, vocabulary].
  at::Tensor run(const at::Tensor& hidden, const at::Tensor& cosine, const at::Tensor& sine,
                 std::vector<at::Tensor> keys, std::vector<at::Tensor> values, int64_t held) const {
    TORCH_CHECK(!layers_.empty() && !head_.empty(), "a decoder without layers or without a head");
    TORCH_CHECK(hidden.dim() == 2 && hidden.size(0) == 1 && hidden.size(1) == hidden_ && hidden.is_contiguous(),
                "the token has to be [1, ", hidden_, "]");
    for (const at::Tensor* each : {&cosine, &sine})
      TORCH_CHECK(each->numel() == size_ && each->is_contiguous() && each->scalar_type() == at::kFloat,
                  "cosine and sine have to be float32 of ", size_, " numbers");
    TORCH_CHECK(keys.size() == layers_.size() && values.size() == layers_.size(), "caches of ", keys.size(), " and ",
                values.size(), " layers for ", layers_.size());
    for (const std::vector<at::Tensor>* caches : {&keys, &values})
      for (const at::Tensor& each : *caches)
        TORCH_CHECK(each.dim() == 3 && each.size(0) == kv_heads_ && each.size(2) == size_ && each.is_contiguous() &&
                        each.scalar_type() == hidden.scalar_type() && 0 <= held && held < each.size(1),
                    "a cache of ", each.sizes(), " for ", kv_heads_, " heads of ", size_, " and position ", held);
    at::Tensor out = at::empty({1, head_[0].outputs}, hidden.options().dtype(at::kFloat));
    if (hidden.scalar_type() == at::kFloat) run_as<float>(hidden, cosine, sine, keys, values, held, out);
    else if (hidden.scalar_type() == at::kBFloat16)
      run_as<at::BFloat16>(hidden, cosine, sine, keys, values, held, out);
    else TORCH_CHECK(false, "the token is of ", hidden.scalar_type(), "; it has to be float32 or bfloat16");
    return out;
  }

  // The same for the next tokens of several sequences, one after the other: hidden [rows, hidden], cosine and sine
  // [rows, head_dim], the caches of the first sequence's layers, then the second's, ..., how many tokens each gets, and
  // how many it holds. Logits [sequences, vocab], of the last token of each.
  at::Tensor run_rows(const at::Tensor& hidden, const at::Tensor& cosine, const at::Tensor& sine,
                      std::vector<at::Tensor> keys, std::vector<at::Tensor> values, std::vector<int64_t> counts,
                      std::vector<int64_t> lengths) const {
    return decode_rows(*this, hidden, cosine, sine, keys, values, counts, lengths);
  }

 private:
  // What all threads see.
  struct Shared {
    std::vector<float> hidden, query, key, value, context;
    Input activations;
    Stages stages;
  };

  template <typename Scalar>
  void run_as(const at::Tensor& hidden, const at::Tensor& cosine, const at::Tensor& sine,
              const std::vector<at::Tensor>& keys, const std::vector<at::Tensor>& values, int64_t held,
              at::Tensor& out) const {
    const Scalar* from = hidden.const_data_ptr<Scalar>();
    float* logits = out.mutable_data_ptr<float>();
    const int64_t count = threads();
    Shared shared{std::vector<float>(from, from + hidden_), std::vector<float>(heads_ * size_),
                  std::vector<float>(kv_heads_ * size_), std::vector<float>(kv_heads_ * size_),
                  std::vector<float>(heads_ * size_), Input(1, widest_, rounds_, halves_),
                  Stages(layers_.size() * kStages + 1, count)};
    std::vector<Scalar*> key_data, value_data;
    for (const at::Tensor& each : keys) key_data.push_back(each.mutable_data_ptr<Scalar>());
    for (const at::Tensor& each : values) value_data.push_back(each.mutable_data_ptr<Scalar>());
    const float *cosines = cosine.const_data_ptr<float>(), *sines = sine.const_data_ptr<float>();
    std::vector<Worker<Scalar>> workers;  // made here: nothing may be thrown where the threads are
    workers.reserve(count);
    for (int64_t thread = 0; thread < count; ++thread)
      workers.emplace_back(*this, shared, cosines, sines, held, thread);
#pragma omp parallel num_threads(static_cast<int>(count)) if (count > 1)
    {
      Worker<Scalar>& worker = workers[omp_get_thread_num()];
      worker.threads = omp_get_num_threads();  // which may be fewer than were asked for
      for (size_t index = 0; index < layers_.size(); ++index)
        worker.run(layers_[index], key_data[index], value_data[index], keys[index].size(1));
      worker.make_logits(logits);
    }
  }

  // One thread's part of the work.
  template <typename Scalar>
  struct Worker {
    Worker(const Decoder& decoder, Shared& shared, const float* cosine, const float* sine, int64_t held, int64_t thread)
        : decoder(decoder), shared(shared), cosine(cosine), sine(sine), held(held), thread(thread),
          instructions(instructions_in_use), round(choose_round_block(instructions)),
          score(choose_score_keys<Scalar>(instructions)), to_weights(choose_scores_to_weights(instructions)),
          blend(choose_blend_values<Scalar>(instructions)),
          normed(1, decoder.hidden_, decoder.rounds_, decoder.halves_),
          context(1, decoder.heads_ * decoder.size_, decoder.rounds_, decoder.halves_), weights(held + 1),
          turned(decoder.size_), key(decoder.size_), blended(decoder.size_), newest_key(decoder.size_),
          newest_value(decoder.size_) {}

    void run(const Layer& layer, Scalar* keys, Scalar* values, int64_t capacity) {
      norm(layer.input_norm);
      project(&layer.products[kQuery], {shared.query.data(), shared.key.data(), shared.value.data()});
      wait();
      attend(layer, keys, values, capacity);
      wait();
      std::copy(shared.context.begin(), shared.context.end(), context.values.begin());
      context.prepare(0, round);
      add(layer.products[kOutput], context);
      wait();
      norm(layer.feed_forward_norm);
      activate(layer.products[kGate], layer.products[kUp]);
      wait();
      add(layer.products[kDown], shared.activations);
      wait();
    }

    void make_logits(float* logits) {
      norm(decoder.norm_);
      project(decoder.head_.data(), {logits}, decoder.divisor_);
    }

    void wait() const {
#pragma omp barrier
    }

    template <typename Work>
    void take(int64_t count, int64_t bytes_of_each, Work work) {
      shared.stages.take(stage++, thread, threads, count, bytes_of_each, work);
    }

    void norm(const at::Tensor& weight) {
      normalise_row(shared.hidden.data(), weight.const_data_ptr<float>(), decoder.hidden_, decoder.eps_,
                normed.values.data());
      normed.prepare(0, round);
    }

    // Products of the normed state with matrices that follow each other, each to its own place.
    void project(const Product* products, std::initializer_list<float*> outs, float divisor = 1.0f) {
      int64_t count = 0;
      for (size_t index = 0; index < outs.size(); ++index) count += products[index].panels();
      take(count, products->bytes_of_panel(), [&](int64_t first, int64_t last) {
        for (int64_t place = first; place < last; ++place) {
          int64_t panel = place;
          const Product* product = products;
          float* const* out = outs.begin();
          for (; panel >= product->panels(); ++product, ++out) panel -= product->panels();
          float sums[kPanelRows];
          product->multiply(panel, normed, 1, instructions, sums);
          const int64_t start = panel * kPanelRows;
          for (int64_t i = 0; i < std::min(kPanelRows, product->outputs - start); ++i) (*out)[start + i] = sums[i] / divisor;
        }
      });
    }

    // Adds the product to the hidden state.
    void add(const Product& product, const Input& x) {
      take(product.panels(), product.bytes_of_panel(), [&](int64_t first, int64_t last) {
        float sums[kPanelRows];
        for (int64_t panel = first; panel < last; ++panel) {
          product.multiply(panel, x, 1, instructions, sums);
          const int64_t start = panel * kPanelRows, count = std::min(kPanelRows, product.outputs - start);
          for (int64_t i = 0; i < count; ++i) shared.hidden[start + i] += sums[i] * decoder.residual_;
        }
      });
    }

    // silu(gate(x)) * up(x), in blocks of 32, which the next product rounds activations in.
    void activate(const Product& gate, const Product& up) {
      constexpr int64_t kPanels = kBlockColumns / kPanelRows;
      const int64_t blocks = (gate.outputs + kBlockColumns - 1) / kBlockColumns;
      take(blocks, kPanels * (gate.bytes_of_panel() + up.bytes_of_panel()), [&](int64_t first, int64_t last) {
        float gates[kPanelRows], ups[kPanelRows];
        Input& out = shared.activations;
        for (int64_t panel = first * kPanels; panel < std::min(last * kPanels, gate.panels()); ++panel) {
          gate.multiply(panel, normed, 1, instructions, gates);
          up.multiply(panel, normed, 1, instructions, ups);
          const int64_t start = panel * kPanelRows, count = std::min(kPanelRows, gate.outputs - start);
          for (int64_t i = 0; i < count; ++i) out.values[start + i] = gates[i] / (1.0f + std::exp(-gates[i])) * ups[i];
        }
        if (last == blocks) std::fill(out.values.begin() + gate.outputs, out.values.end(), 0.0f);
        out.prepare(0, first, last, round);
      });
    }

    // The query heads of this thread. A key head's newest key is turned by every thread that needs it, and stored by
    // the one that has the first of its query heads; nobody reads it from the cache in this step.
    void attend(const Layer& layer, Scalar* keys, Scalar* values, int64_t capacity) {
      const int64_t size = decoder.size_, group = decoder.heads_ / decoder.kv_heads_;
      const Share share = share_of(decoder.heads_, thread, threads);
      const int64_t first = layer.window > 0 ? std::max<int64_t>(0, held + 1 - layer.window) : 0, count = held - first;
      int64_t ready = -1;  // the key head whose newest key and value are at hand
      for (int64_t head = share.first; head < share.last; ++head) {
        const int64_t kv_head = head / group, place = kv_head * capacity * size;
        if (kv_head != ready) {
          turn(shared.key.data() + kv_head * size, layer.key_norm, key.data());
          for (int64_t i = 0; i < size; ++i) newest_key[i] = static_cast<Scalar>(key[i]);
          for (int64_t i = 0; i < size; ++i) newest_value[i] = static_cast<Scalar>(shared.value[kv_head * size + i]);
          ready = kv_head;
        }
        if (head % group == 0) {
          std::copy(newest_key.begin(), newest_key.end(), keys + place + held * size);
          std::copy(newest_value.begin(), newest_value.end(), values + place + held * size);
        }
        turn(shared.query.data() + head * size, layer.query_norm, turned.data());
        for (int64_t i = 0; i < size; ++i) turned[i] *= decoder.scale_;
        score(turned.data(), keys + place + first * size, count, size, weights.data());
        score(turned.data(), newest_key.data(), 1, size, weights.data() + count);
        to_weights(weights.data(), count + 1);
        blend(weights.data(), values + place + first * size, count, size, blended.data());
        for (int64_t i = 0; i < size; ++i)
          shared.context[head * size + i] = blended[i] + weights[count] * static_cast<float>(newest_value[i]);
      }
    }

    void turn(const float* x, const at::Tensor& weight, float* out) {
      if (weight.defined()) {
        normalise_row(x, weight.const_data_ptr<float>(), decoder.size_, decoder.eps_, blended.data());
        x = blended.data();
      }
      rotate(x, cosine, sine, decoder.size_, decoder.interleaved_, out);
    }

    const Decoder& decoder;
    Shared& shared;
    const float *cosine, *sine;
    int64_t held, thread, threads = 1, stage = 0;
    Instructions instructions;
    RoundBlock round;
    ScoreKeys<Scalar> score;
    ScoresToWeights to_weights;
    BlendValues<Scalar> blend;
    Input normed, context;
    std::vector<float> weights, turned, key, blended;
    std::vector<Scalar> newest_key, newest_value;
  };
};

// Takes tensors and numbers one after the other from the flat lists that `decode_token` is given.
struct Parts {
  const at::Tensor& tensor() {
    TORCH_CHECK(next_tensor < tensors.size(), "a decoder of ", tensors.size(), " tensors, which are too few");
    return tensors[next_tensor++];
  }

  int64_t number() {
    TORCH_CHECK(next_number < numbers.size(), "a decoder of ", numbers.size(), " numbers, which are too few");
    return numbers[next_number++];
  }

  std::optional<at::Tensor> optional_tensor(bool there) {
    return there ? std::optional<at::Tensor>(tensor()) : std::nullopt;
  }

  at::TensorList tensors;
  at::IntArrayRef numbers;
  size_t next_tensor = 0, next_number = 0;
};

void add_product_of(Parts& parts, Decoder& decoder) {
  const int64_t outputs = parts.number(), columns = parts.number(), bits = parts.number(), group = parts.number();
  const bool asymmetric = parts.number() != 0, biased = parts.number() != 0;
  const at::Tensor& weight = parts.tensor();
  decoder.add_product(weight, parts.optional_tensor(biased), outputs, columns, bits, group, asymmetric);
}

// A `Decoder` of lists, which kernels/decoding.py puts together:
// numbers: heads, kv_heads, head_dim, interleaved, layers, whether queries and keys have norms; then for each layer its
//   window and seven products of six numbers (outputs, columns, bits, group size, asymmetric, biased); then the head;
// scalars: eps, what scores, residuals and logits are multiplied or divided by;
// tensors: for each layer its products, each with its bias, and its norms; then the head and the last norm.
c10::intrusive_ptr<Decoder> decoder_of(int64_t hidden, at::TensorList tensors, at::IntArrayRef numbers,
                                       at::ArrayRef<double> scalars) {
  TORCH_CHECK(scalars.size() == 4, "a decoder of ", scalars.size(), " scalars");
  Parts parts{tensors, numbers};
  const int64_t heads = parts.number(), kv_heads = parts.number(), size = parts.number(), interleaved = parts.number();
  const int64_t layers = parts.number(), normed = parts.number();
  auto decoder = c10::make_intrusive<Decoder>(hidden, heads, kv_heads, size, interleaved != 0, scalars[0], scalars[1],
                                              scalars[2]);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const int64_t window = parts.number();
    for (int product = 0; product < kProducts; ++product) add_product_of(parts, *decoder);
    const at::Tensor &input_norm = parts.tensor(), &feed_forward_norm = parts.tensor();
    const auto query_norm = parts.optional_tensor(normed != 0), key_norm = parts.optional_tensor(normed != 0);
    decoder->add_layer(input_norm, feed_forward_norm, query_norm, key_norm, window);
  }
  add_product_of(parts, *decoder);
  decoder->set_head(parts.tensor(), scalars[3]);
  return decoder;
}

// The same as one operator, so that graphs can have it; who keeps a `Decoder` does not put it together for every token.
// place[0] positions are held by the caches.
at::Tensor decode_token(const at::Tensor& hidden, const at::Tensor& cosine, const at::Tensor& sine,
                        at::TensorList tensors, at::IntArrayRef numbers, at::ArrayRef<double> scalars,
                        at::TensorList keys, at::TensorList values, const at::Tensor& place) {
  TORCH_CHECK(hidden.dim() == 2, "a token of ", hidden.sizes());
  TORCH_CHECK(place.scalar_type() == at::kLong && place.numel() >= 1 && place.device().is_cpu(),
              "place has to be int64 on the CPU");
  return decoder_of(hidden.size(1), tensors, numbers, scalars)
      ->run(hidden, cosine, sine, keys.vec(), values.vec(), place.const_data_ptr<int64_t>()[0]);
}

}  // namespace
}  // namespace torchchat

TORCH_LIBRARY_FRAGMENT(torchchat, library) {
  using torchchat::Decoder;
  library.def("decode_token(Tensor hidden, Tensor cosine, Tensor sine, Tensor[] tensors, int[] numbers, float[] "
              "scalars, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor place) -> Tensor");
  library.class_<Decoder>("Decoder")
      .def(torch::init([](int64_t hidden, std::vector<at::Tensor> tensors, std::vector<int64_t> numbers,
                          std::vector<double> scalars) {
        return torchchat::decoder_of(hidden, tensors, numbers, scalars);
      }))
      .def("run", &Decoder::run)
      .def("run_rows", &Decoder::run_rows);
}

TORCH_LIBRARY_IMPL(torchchat, CPU, library) { library.impl("decode_token", &torchchat::decode_token); }
