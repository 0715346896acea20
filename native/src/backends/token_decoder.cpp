#include "backends/token_decoder.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/function.h>
#include <ATen/core/jit_type.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "error.h"
#include "json.h"

namespace torchchat {
namespace {

constexpr std::int64_t first_positions = 256;  // of a table, which doubles as sequences grow
constexpr double largest_number = 1e30;
constexpr std::string_view embedding = "model.embed_tokens.", rotary = "model.rotary.";

const at::Tensor& named(const Weights& weights, std::string_view folder, std::string_view name) {
    const auto found = weights.find(std::string(folder) + std::string(name));
    if (found == weights.end()) throw unusable("its decoder needs the weight " + std::string(name));
    return found->second;
}

bool is_matrix(const at::Tensor& tensor, at::ScalarType dtype) {
    return tensor.dim() == 2 && tensor.scalar_type() == dtype && tensor.is_contiguous();
}

double scalar(const nlohmann::json& object, std::string_view key) {
    const nlohmann::json* value = member(object, key);
    if (value == nullptr || !value->is_number() || !(std::abs(value->get<double>()) <= largest_number)) {
        throw unusable("its decoder has a " + std::string(key) + " that is no number");
    }
    return value->get<double>();
}

const nlohmann::json& list_of(const nlohmann::json& described, std::string_view key) {
    const nlohmann::json* listed = member(described, key);
    if (listed == nullptr || !listed->is_array()) throw unusable("its decoder has no " + std::string(key));
    return *listed;
}

std::vector<std::int64_t> numbers_of(const nlohmann::json& described) {
    std::vector<std::int64_t> found;
    for (const auto& each : list_of(described, "numbers")) {
        found.push_back(number({{"numbers", each}}, "numbers", 0, largest_size));
    }
    return found;
}

std::vector<double> scalars_of(const nlohmann::json& described) {
    std::vector<double> found;
    for (const auto& each : list_of(described, "scalars")) found.push_back(scalar({{"scalars", each}}, "scalars"));
    return found;
}

}  // namespace

// ---- embedding --------------------------------------------------------------------------------------------------

Embedding::Embedding(const nlohmann::json* form, std::int64_t columns, at::ScalarType dtype, const Weights& weights)
    : columns_(columns), dtype_(dtype) {
    if (form == nullptr || form->is_null()) {
        values_ = named(weights, embedding, "weight");
        if (!is_matrix(values_, dtype) || values_.size(1) != columns) throw unusable("its embedding is another matrix");
        return;
    }
    bits_ = number(*form, "bits", 4, 8);
    const nlohmann::json* group = member(*form, "group_size");
    group_size_ = group == nullptr || group->is_null() ? columns : number(*form, "group_size", 1, largest_size);
    values_ = named(weights, embedding, "values");
    scales_ = named(weights, embedding, "scales");
    if (flag(*form, "asymmetric", false)) centres_ = named(weights, embedding, "centres");
    const std::int64_t groups = (columns + group_size_ - 1) / group_size_;
    const auto has_groups = [&](const at::Tensor& each) {
        return is_matrix(each, at::kHalf) && each.size(0) == values_.size(0) && each.size(1) == groups;
    };
    const bool fits = (bits_ == 4 || bits_ == 8) && is_matrix(values_, at::kByte) &&
                      values_.size(1) == (bits_ == 8 ? columns : (columns + 1) / 2) && has_groups(scales_) &&
                      (!centres_.defined() || has_groups(centres_));
    if (!fits) throw unusable("its embedding is another matrix than its format says");
}

at::Tensor Embedding::row(Token token) const {
    if (token < 0 || token >= values_.size(0)) {
        throw Error("the model has no token " + std::to_string(token), "the tokenizer belongs to another model");
    }
    return bits_ == 0 ? values_.narrow(0, token, 1) : meaning(token).to(dtype_);
}

// scale * (stored - middle) + centre, in float32.
at::Tensor Embedding::meaning(Token token) const {
    const std::uint8_t* const stored = values_.const_data_ptr<std::uint8_t>() + token * values_.size(1);
    const at::Half* const scales = scales_.const_data_ptr<at::Half>() + token * scales_.size(1);
    const at::Half* const centres =
        centres_.defined() ? centres_.const_data_ptr<at::Half>() + token * centres_.size(1) : nullptr;
    at::Tensor row = at::empty({1, columns_}, at::kFloat);
    float* const out = row.mutable_data_ptr<float>();
    for (std::int64_t column = 0; column < columns_; ++column) {
        const int value = bits_ == 8 ? stored[column] : stored[column / 2] >> (column % 2 == 0 ? 0 : 4) & 15;
        const std::int64_t group = column / group_size_;
        out[column] = static_cast<float>(value - (1 << (bits_ - 1))) * static_cast<float>(scales[group]);
        if (centres != nullptr) out[column] += static_cast<float>(centres[group]);
    }
    return row;
}

// ---- positions --------------------------------------------------------------------------------------------------

RotaryTable::RotaryTable(bool interleaved, double amplitude, const Weights& weights)
    : interleaved_(interleaved), amplitude_(amplitude) {
    const at::Tensor& usual = named(weights, rotary, "short");
    const auto extended = weights.find(std::string(rotary) + "long");  // longrope models' own
    frequencies_ = {usual, extended == weights.end() ? usual : extended->second};
    for (const at::Tensor& each : frequencies_) {
        if (each.dim() != 1 || each.scalar_type() != at::kFloat) throw unusable("its positions have no frequencies");
    }
}

RotaryTable::Angles RotaryTable::of(std::int64_t position, bool extended) {
    const std::lock_guard guard(lock_);
    Angles& table = tables_.at(extended ? 1 : 0);
    if (!table.first.defined() || table.first.size(0) <= position) {
        const auto needed = static_cast<std::uint64_t>(position) + 1;
        table = made(std::max(first_positions, static_cast<std::int64_t>(std::bit_ceil(needed))), extended);
    }
    return {table.first.narrow(0, position, 1), table.second.narrow(0, position, 1)};
}

// By the operators that Python calls, so that the numbers are the same.
RotaryTable::Angles RotaryTable::made(std::int64_t positions, bool extended) const {
    const at::Tensor places = at::arange(positions, at::kLong).to(at::kFloat).unsqueeze(1);
    const at::Tensor angles = places * frequencies_.at(extended ? 1 : 0);  // [positions, head_dim / 2]
    const at::Tensor cosines = angles.cos() * amplitude_, sines = angles.sin() * amplitude_;
    if (interleaved_) return {cosines.repeat_interleave(2, -1), at::stack({-sines, sines}, -1).flatten(-2)};
    return {at::cat({cosines, cosines}, -1), at::cat({-sines, sines}, -1)};
}

// ---- decoder ----------------------------------------------------------------------------------------------------

TokenDecoder::TokenDecoder(const nlohmann::json& described, const Manifest& manifest, const Weights& weights)
    : embedding_(member(described, "embedding"), number(described, "hidden_size", 1, largest_size),
                 dtype_of(manifest.dtype), weights),
      multiplier_(scalar(described, "embedding_multiplier")),
      rotary_(flag(described, "rotary_interleaved", false), scalar(described, "rotary_amplitude"), weights) {
    const c10::ClassTypePtr type = torch::getCustomClass("__torch__.torch.classes.torchchat.Decoder");
    if (type == nullptr) throw unusable("its operators come without a decoder");
    decoder_ = c10::ivalue::Object::create(c10::StrongTypePtr(nullptr, type), 1);
    type->getMethod("__init__")({decoder_, number(described, "hidden_size", 1, largest_size),
                                 named_weights(described, "tensors", weights), numbers_of(described),
                                 scalars_of(described)});
    run_ = &type->getMethod("run");
}

at::Tensor TokenDecoder::logits(Token token, std::int64_t held, bool extended, const Tensors& keys,
                                const Tensors& values) const {
    at::Tensor hidden = embedding_.row(token);
    if (multiplier_ != 1) hidden = hidden * multiplier_;
    const auto [cosines, sines] = rotary_.of(held, extended);
    try {
        return (*run_)({decoder_, hidden, cosines, sines, keys, values, held}).toTensor();
    } catch (const std::exception& error) {
        throw unusable("its decoder failed: " + first_line(error.what()));
    }
}

}  // namespace torchchat
