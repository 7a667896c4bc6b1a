#include "buffer.h"

#include <atomic>
#include <cstdlib>

#include "pages.h"

namespace microscale {
namespace {

constexpr size_t kAlign = 64;  // also what lies in front of the memory, and says how much there is
constexpr size_t kLeastKept = size_t{1} << 20, kMostKept = size_t{64} << 20;
#ifdef __SANITIZE_ADDRESS__
constexpr int kKept = 0;  // a block of another size would hide what is read beyond its end
#else
constexpr int kKept = 4;
#endif

struct alignas(kAlign) Block {
  size_t bytes;  // behind this
};
std::atomic<Block *> kept[kKept + 1];

Block *make(size_t bytes) {
  const size_t all = bytes + sizeof(Block), alignment = all < kLargePage ? kAlign : kLargePage;
  const size_t rounded = (all + alignment - 1) / alignment * alignment;
  void *memory = rounded < bytes ? nullptr : std::aligned_alloc(alignment, rounded);
  if (!memory) return nullptr;
  use_large_pages(memory, rounded);
  Block *block = static_cast<Block *>(memory);
  block->bytes = rounded - sizeof(Block);
  return block;
}

}  // namespace

void *take_memory(size_t bytes) {
  if (bytes >= kLeastKept)
    for (int i = 0; i < kKept; ++i) {
      Block *block = kept[i].exchange(nullptr, std::memory_order_acquire);
      if (!block) continue;
      if (block->bytes >= bytes && block->bytes / 4 <= bytes) return block + 1;
      give_memory(block + 1);
    }
  Block *block = make(bytes);
  return block ? block + 1 : nullptr;
}

void give_memory(void *memory) {
  if (!memory) return;
  Block *block = static_cast<Block *>(memory) - 1;
  if (block->bytes >= kLeastKept && block->bytes <= kMostKept)
    for (int i = 0; i < kKept; ++i) {
      Block *none = nullptr;
      if (kept[i].compare_exchange_strong(none, block, std::memory_order_release, std::memory_order_relaxed)) return;
    }
  std::free(block);
}

}  // namespace microscale
