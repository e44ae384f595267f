// SPDX-License-Identifier: Apache-2.0
// Runs the block algorithm of csrc/cuda/select_clip.h on the host, one index after another.
#include <vector>

#include "select_clip.h"

// What a block's threads do between two barriers may happen in any order: 0 ascending, 1 descending, 2 every third.
struct HostBlock {
  int order;
  template <class F>
  void each(int32_t n, F f) const {
    if (order == 0) {
      for (int32_t i = 0; i < n; ++i) f(i);
    } else if (order == 1) {
      for (int32_t i = n - 1; i >= 0; --i) f(i);
    } else {
      for (int32_t first = 2; first >= 0; --first) {
        for (int32_t i = first; i < n; i += 3) f(i);
      }
    }
  }
  void add(uint32_t* to, uint32_t x) const { *to += x; }
};

extern "C" void select_clip_host(int32_t* chosen, int32_t* other, int32_t start, int32_t n, int32_t wanted,
                                 const int64_t* counter, int64_t id, const void* classes, int64_t class_bytes,
                                 const float* scores, const int32_t* log2_table, int64_t stream, int order) {
  std::vector<uint64_t> keys(n);
  Selection selection;
  memset(&selection, 0xAB, sizeof selection);  // shared memory begins with anything
  const Draw draw = {counter, (uint32_t)stream, (uint32_t)id, classes, class_bytes, scores, log2_table};
  const Clip clip = {start, n, wanted, chosen, other};
  select_clip(HostBlock{order}, selection, keys.data(), clip, draw);
}
