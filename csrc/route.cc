// Router logits to experts and their weights. Rows are few and short: on the calling thread.
#include <algorithm>
#include <cmath>

#include "buffer.h"
#include "floats.h"
#include "operands.h"
#include "small.h"

namespace microscale {
namespace {

bool above(float a, float b) { return std::isnan(a) ? !std::isnan(b) : a > b; }

// The best `chosen` of `logits`, best first, ones that are equal in ascending order.
void best(const float *logits, int64_t experts, int64_t chosen, int64_t *ids) {
  int64_t found = 0;
  for (int64_t e = 0; e < experts; ++e) {
    int64_t place = found;
    while (place > 0 && above(logits[e], logits[ids[place - 1]])) --place;
    if (place == chosen) continue;
    found = std::min(found + 1, chosen);
    std::copy_backward(ids + place, ids + found - 1, ids + found);
    ids[place] = e;
  }
}

}  // namespace
}  // namespace microscale

extern "C" int ms_route(int level, int dtype, const void *logits, int64_t m, int64_t experts, int router,
                        int renormalize, int rounded, int64_t chosen, int64_t *ids, float *weights) {
  using namespace microscale;
  const StandardFloats floats;
  if (dtype < 0 || dtype >= MS_DTYPES || m < 0 || chosen < 1 || experts < chosen || router < 0 ||
      router >= MS_ROUTERS || rounded < 0 || rounded >= MS_DTYPES)
    return MS_BAD_ARGUMENT;
  const Small *small = small_for(level);
  if (!small) return MS_BAD_LEVEL;
  Buffer<float> row(experts);
  if (!row) return MS_NO_MEMORY;
  for (int64_t i = 0; i < m; ++i, ids += chosen, weights += chosen) {
    small->load(dtype, static_cast<const uint8_t *>(logits) + i * experts * element_bytes(dtype), experts, row.get());
    best(row.get(), experts, chosen, ids);
    const float most = row[ids[0]];
    float all = 0, shares = 0;
    for (int64_t j = 0; j < chosen; ++j) shares += weights[j] = std::exp(row[ids[j]] - most);
    if (router == MS_SOFTMAX_TOPK && !renormalize)
      for (int64_t e = 0; e < experts; ++e) all += std::exp(row[e] - most);
    else
      all = shares;
    for (int64_t j = 0; j < chosen; ++j) weights[j] /= all;
    small->round(rounded, weights, chosen);
  }
  return MS_OK;
}
