// SPDX-License-Identifier: Apache-2.0
// select_tokens and block_marks. Compiled once for each instruction set; MT_LEVEL is the namespace.
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "kernels.h"
#include "philox.h"

MT_DECLARE_KERNELS(MT_LEVEL)

namespace {

const uint32_t MASK = 4, MASK_SHAPE = 5;  // Purpose in kernels/philox/reference.py
const uint32_t SIDE_STREAM = 0, START_STREAM = 1;
const int64_t LAST = INT64_MAX;
const int64_t FEW = 24;  // keys that are ranked by comparing each with each

inline int64_t thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Return the key of rank k (from 0) among n >= 1 keys >= 0, and how many are smaller. Keys are counted by the highest
// 8 bits in which they differ, then those of the bucket that holds rank k by the next ones. scratch: n keys.
inline int64_t key_of_rank(const int64_t* keys, int64_t n, int64_t k, int64_t* scratch, int64_t& smaller) {
  smaller = 0;
  while (n > FEW) {
    int64_t differ = 0;
    for (int64_t i = 0; i < n; ++i) differ |= keys[i] ^ keys[0];
    if (!differ) return keys[0];
    const int top = 63 - __builtin_clzll((uint64_t)differ), shift = top > 7 ? top - 7 : 0;
    int32_t counts[256] = {};
    for (int64_t i = 0; i < n; ++i) ++counts[keys[i] >> shift & 255];
    int64_t bucket = 0, below = 0;
    while (below + counts[bucket] <= k) below += counts[bucket++];
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t key = keys[i];
      if ((key >> shift & 255) == bucket) scratch[kept++] = key;
    }
    smaller += below;
    k -= below;
    keys = scratch;
    n = kept;
  }
  for (int64_t i = 0; i < n; ++i) {
    int64_t less = 0, equal = 0;
    for (int64_t j = 0; j < n; ++j) {
      less += keys[j] < keys[i];
      equal += keys[j] == keys[i];
    }
    if (less <= k && k < less + equal) {
      smaller += less;
      return keys[i];
    }
  }
  return LAST;  // not reached: one key has rank k
}

inline int64_t class_of(const void* classes, int64_t bytes, int64_t i) {
  return bytes == 1 ? ((const uint8_t*)classes)[i]
                    : bytes == 4 ? ((const int32_t*)classes)[i] : ((const int64_t*)classes)[i];
}

inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// out[i] <- min over step * j, j < side, of in[i - step * j], for i < count; in has numbers before its start.
inline void sliding_minimum(int64_t* __restrict out, const int64_t* in, int64_t count, int64_t side, int64_t step) {
  for (int64_t i = 0; i < count; ++i) out[i] = in[i];
  for (int64_t j = 1; j < side; ++j) {
    const int64_t* before = in - step * j;
    for (int64_t i = 0; i < count; ++i) out[i] = smaller_of(out[i], before[i]);
  }
}

}  // namespace

namespace MT_LEVEL {

void select_tokens(int32_t* visible, int32_t* masked, const int64_t* cu_tokens, const int64_t* cu_visible,
                   int64_t clips, const int64_t* counter, const int64_t* clip_ids, const void* classes,
                   int64_t class_bytes, bool shared, int64_t* workspace, int64_t longest, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1 && cu_tokens[clips] > 65536)
  {
    int64_t* keys = workspace + thread_number() * (4 * longest + 32);
    int64_t* scratch = keys + longest;
    int32_t* ids[2] = {(int32_t*)(scratch + longest), (int32_t*)(scratch + longest) + longest + 1};
    uint32_t* words = (uint32_t*)ids[0];  // used up before ids are written
#pragma omp for schedule(static)
    for (int64_t clip = 0; clip < clips; ++clip) {
      const int64_t start = cu_tokens[clip], n = cu_tokens[clip + 1] - start;
      const int64_t wanted = cu_visible[clip + 1] - cu_visible[clip];
      if (!n) continue;
      philox_run(words, make_key(counter, shared ? 0 : clip_ids[clip], MASK, 0), 0, (n + 3) / 4);
      for (int64_t i = 0; i < n; ++i) keys[i] = words[i];
      if (class_bytes) {
        for (int64_t i = 0; i < n; ++i) keys[i] += class_of(classes, class_bytes, start + i) << 32;
      }
      int64_t last = -1, smaller = 0;
      if (wanted) last = key_of_rank(keys, n, wanted - 1, scratch, smaller);
      int64_t ties = wanted - smaller, counts[2] = {0, 0};
      for (int64_t i = 0; i < n; ++i) {
        const bool tie = keys[i] == last && ties > 0, chosen = keys[i] < last || tie;
        ties -= tie;
        ids[0][counts[0]] = ids[1][counts[1]] = (int32_t)(start + i);
        counts[0] += chosen;
        counts[1] += !chosen;
      }
      memcpy(visible + cu_visible[clip], ids[0], sizeof(int32_t) * (size_t)counts[0]);
      memcpy(masked + start - cu_visible[clip], ids[1], sizeof(int32_t) * (size_t)counts[1]);
    }
  }
}

void block_marks(uint8_t* marks, const int64_t* cu_tokens, const int64_t* n_marked, int64_t clips,
                 const int64_t* counter, const int64_t* clip_ids, int64_t freq, bool by_time, const int64_t* sides,
                 int64_t n_sides, bool clipped, bool only_first, bool spare_first, bool shared, int64_t* workspace,
                 int64_t room, int threads) {
  int64_t largest = 0;
  for (int64_t i = 0; i < n_sides; ++i) largest = sides[i] > largest ? sides[i] : largest;
#pragma omp parallel num_threads(threads) if (threads > 1 && cu_tokens[clips] > 32768)
  {
    int64_t* own = workspace + thread_number() * 4 * room;
#pragma omp for schedule(static)
    for (int64_t clip = 0; clip < clips; ++clip) {
      const int64_t n = cu_tokens[clip + 1] - cu_tokens[clip], columns = n / freq;
      if (!n) continue;
      const int64_t id = shared ? 0 : clip_ids[clip];
      alignas(64) uint32_t draw[4 * LANES];
      philox_run(draw, make_key(counter, id, MASK_SHAPE, SIDE_STREAM), 0, 1);
      const int64_t side = sides[(uint64_t)draw[0] * (uint64_t)n_sides >> 32];

      // Starts in a row of numbers; a block of the start s holds s + down * i + j, i, j < side.
      const int64_t width = freq + largest - 1;
      const int64_t starts = clipped ? (columns + largest - 1) * width : n;
      const int64_t down = clipped ? width : by_time ? freq : columns;
      const int64_t before = (side - 1) * (down + 1);
      uint32_t* words = (uint32_t*)(own + 3 * room);
      philox_run(words, make_key(counter, id, MASK_SHAPE, START_STREAM), 0, (starts + 3) / 4);
      int64_t* keys = own + before;
      for (int64_t i = -before; i < 0; ++i) keys[i] = LAST;
      for (int64_t i = 0; i < starts; ++i) keys[i] = ((int64_t)words[i] << 31) + i;
      // The smallest key of the starts whose blocks hold a number: first along j, then along i.
      int64_t* along = own + room + before;
      for (int64_t i = -before; i < 0; ++i) along[i] = LAST;
      sliding_minimum(along, keys, starts, side, 1);
      int64_t* covered = own + 2 * room;
      if (clipped) {
        int64_t* by_start = keys;  // the keys are no longer needed
        // Only the numbers of cells are read below; they have side - 1 rows and numbers before them.
        const int64_t begin = (largest - 1) * width;
        sliding_minimum(by_start + begin, along + begin, starts - begin, side, down);
        for (int64_t column = 0; column < columns; ++column) {
          const int64_t* from = by_start + begin + column * width + largest - 1;
          int64_t* to = covered + (by_time ? column * freq : column);
          for (int64_t row = 0; row < freq; ++row) to[by_time ? row : row * columns] = from[row];
        }
      } else {
        sliding_minimum(covered, along, n, side, down);
      }
      if (spare_first) covered[0] = LAST;

      const int64_t wanted = n_marked[clip];
      int64_t smaller;
      const int64_t last = key_of_rank(covered, n, wanted < n ? wanted : n - 1, own, smaller);
      uint8_t* to = marks + cu_tokens[clip];
      for (int64_t i = 0; i < n; ++i) to[i] = covered[i] <= last && covered[i] < LAST;
      if (only_first) {
        int64_t left = wanted;
        for (int64_t i = 0; i < n; ++i) {
          to[i] = to[i] && left > 0;
          left -= to[i];
        }
      }
    }
  }
}

}  // namespace MT_LEVEL
