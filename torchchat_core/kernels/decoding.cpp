// A decoder for PyTorch: torch.classes.torchchat.Decoder, and the operator torchchat::decode_token. What it does is in
// row_decoding.cpp.

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "decoder_model.h"

namespace torchchat {
namespace {

struct Decoder : torch::CustomClassHolder, DecoderModel {
  using DecoderModel::DecoderModel;

  // The next token of one sequence, whose caches hold `held` positions: as `run_rows`.
  at::Tensor run(const at::Tensor& hidden, const at::Tensor& cosine, const at::Tensor& sine,
                 std::vector<at::Tensor> keys, std::vector<at::Tensor> values, int64_t held) const {
    return decode_rows(*this, hidden, cosine, sine, keys, values, {1}, {held});
  }

  // `decode_rows` of decoder_model.h.
  at::Tensor run_rows(const at::Tensor& hidden, const at::Tensor& cosine, const at::Tensor& sine,
                      std::vector<at::Tensor> keys, std::vector<at::Tensor> values, std::vector<int64_t> counts,
                      std::vector<int64_t> lengths) const {
    return decode_rows(*this, hidden, cosine, sine, keys, values, counts, lengths);
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
