// A decoder for PyTorch: torch.classes.torchchat.Decoder and Cache, and the operator torchchat::decode_token. What it does
// is in row_decoding.cpp.

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "decoder_model.h"

namespace torchchat {
namespace {

// All caches that there are, by numbers: a list of these is handed over in no time, one of objects is not.
class KnownCaches {
 public:
  int64_t add(const std::shared_ptr<const CacheMemory>& memory) {
    const std::lock_guard guard(lock_);
    known_.emplace(++last_, memory);
    return last_;
  }

  void forget(int64_t number) {
    const std::lock_guard guard(lock_);
    known_.erase(number);
  }

  std::vector<std::shared_ptr<const CacheMemory>> find(const std::vector<int64_t>& numbers) {
    std::vector<std::shared_ptr<const CacheMemory>> found;
    found.reserve(numbers.size());
    const std::lock_guard guard(lock_);
    for (const int64_t number : numbers) {
      const auto place = known_.find(number);
      found.push_back(place == known_.end() ? nullptr : place->second.lock());
      TORCH_CHECK(found.back() != nullptr, "there is no cache ", number);
    }
    return found;
  }

 private:
  std::mutex lock_;
  std::unordered_map<int64_t, std::weak_ptr<const CacheMemory>> known_;
  int64_t last_ = 0;
};

KnownCaches& known_caches() {
  static auto* known = new KnownCaches;  // never deleted: caches may go at the end of the process
  return *known;
}

struct Cache : torch::CustomClassHolder {
  Cache(const std::vector<at::Tensor>& keys, const std::vector<at::Tensor>& values)
      : memory(std::make_shared<CacheMemory>(keys, values)), number(known_caches().add(memory)) {}
  ~Cache() override { known_caches().forget(number); }

  std::shared_ptr<const CacheMemory> memory;
  int64_t number;
};

struct Decoder : torch::CustomClassHolder, DecoderModel {
  using DecoderModel::DecoderModel;

  // The next token of one sequence, whose caches hold `held` positions: hidden [1, hidden], and cosine and sine of its
  // position -> logits, float32 [1, vocabulary].
  at::Tensor run(const at::Tensor& hidden, const at::Tensor& cosine, const at::Tensor& sine,
                 const std::vector<at::Tensor>& keys, const std::vector<at::Tensor>& values, int64_t held) const {
    const CacheMemory cache(keys, values);
    return decode_rows(*this, {hidden, {0}, 1.0, cosine, sine, held}, {&cache}, {1}, {held});
  }

  // `decode_rows` of decoder_model.h, with tables that begin at position 0, and the numbers of caches.
  at::Tensor run_rows(const at::Tensor& embedding, const std::vector<int64_t>& tokens, double multiplier,
                      const at::Tensor& cosine, const at::Tensor& sine, const std::vector<int64_t>& caches,
                      const std::vector<int64_t>& counts, const std::vector<int64_t>& lengths) const {
    const auto found = known_caches().find(caches);  // nobody takes them away before the end
    std::vector<const CacheMemory*> memory;
    memory.reserve(found.size());
    for (const auto& each : found) memory.push_back(each.get());
    return decode_rows(*this, {embedding, tokens, multiplier, cosine, sine, 0}, memory, counts, lengths);
  }
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
  using torchchat::Cache;
  using torchchat::Decoder;
  library.def("decode_token(Tensor hidden, Tensor cosine, Tensor sine, Tensor[] tensors, int[] numbers, float[] "
              "scalars, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor place) -> Tensor");
  library.class_<Cache>("Cache")
      .def(torch::init<std::vector<at::Tensor>, std::vector<at::Tensor>>())
      .def("number", [](const c10::intrusive_ptr<Cache>& cache) { return cache->number; });
  library.class_<Decoder>("Decoder")
      .def(torch::init([](int64_t hidden, std::vector<at::Tensor> tensors, std::vector<int64_t> numbers,
                          std::vector<double> scalars) {
        auto decoder = torchchat::decoder_of(hidden, tensors, numbers, scalars);
        decoder->pack_near();
        return decoder;
      }))
      .def("run", &Decoder::run)
      .def("run_rows", &Decoder::run_rows);
}

TORCH_LIBRARY_IMPL(torchchat, CPU, library) { library.impl("decode_token", &torchchat::decode_token); }
