// Memory for weights that are read in full for every token, on large pages where the system has them: looking up the
// places of small pages costs some 5 % of a token's time. Matrices share regions, one behind the other in the order in
// which they are asked for; a region goes back to the system when the last of its matrices is gone.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace torchchat {

#if defined(__linux__)

constexpr int64_t kLargePage = 2 << 20;    // bytes, of x86-64 and of most others
constexpr int64_t kRegion = 32 << 20;      // bytes; pages that no matrix has reached yet take no memory
constexpr int64_t kWeightAlignment = 128;  // bytes: no two matrices share a line of the cache

struct Region {
  explicit Region(int64_t bytes) : bytes(bytes) {
    // One page more than is needed, so that a large page can begin anywhere in the first.
    mapped = mmap(nullptr, bytes + kLargePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(mapped != MAP_FAILED, "there is no memory for ", bytes, " bytes of weights");
    const auto address = reinterpret_cast<uintptr_t>(mapped);
    begin = static_cast<uint8_t*>(mapped) + (kLargePage - address % kLargePage) % kLargePage;
    madvise(begin, bytes, MADV_HUGEPAGE);  // where it is refused, small pages serve
  }
  ~Region() { munmap(mapped, bytes + kLargePage); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  int64_t bytes, used = 0;
  void* mapped;
  uint8_t* begin;
};

// uint8 [bytes], not filled.
inline at::Tensor weight_memory(int64_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<Region> latest;
  const int64_t needed = (bytes + kWeightAlignment - 1) / kWeightAlignment * kWeightAlignment;
  const std::lock_guard<std::mutex> guard(mutex);
  std::shared_ptr<Region> region = latest.lock();
  if (!region || region->bytes - region->used < needed) {
    region = std::make_shared<Region>((std::max(needed, kRegion) + kLargePage - 1) / kLargePage * kLargePage);
    latest = region;
  }
  uint8_t* data = region->begin + region->used;
  region->used += needed;
  return at::from_blob(data, {bytes}, [region](void*) {}, at::TensorOptions().dtype(at::kByte));
}

#else

inline at::Tensor weight_memory(int64_t bytes) { return at::empty({bytes}, at::TensorOptions().dtype(at::kByte)); }

#endif

}  // namespace torchchat
