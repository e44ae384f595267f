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
const int64_t LAST = INT64_MAX;
const int64_t FEW = 24;  // keys that are ranked by comparing each with each
const int64_t KEY_BITS = 33;  // of what is below the class in a key

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

// 2^48 log2(1 + f / 2^32), interpolated in the table.
inline int64_t log2_of_fraction(uint32_t f, const int32_t* table) {
  const int64_t low = table[f >> 22], high = table[(f >> 22) + 1];
  return (low << 22) + (high - low) * (f & 0x3FFFFF);
}

// 2^48 log2(v), v >= 1.
inline int64_t log2_of(uint64_t v, const int32_t* table) {
  const int zeros = __builtin_clzll(v);
  return ((int64_t)(63 - zeros) << 48) + log2_of_fraction((uint32_t)(v << zeros >> 31), table);
}

// In [0, 2^33), larger for what is rather masked: see kernels/select_tokens/reference.py. bits: of the score; table:
// null to leave the word out.
inline int64_t key_of_score(int32_t bits, uint32_t word, const int32_t* table) {
  const int32_t infinity = 0x7F800000, lowest = (127 - 40) << 23, highest = (127 + 40) << 23;
  if (bits > infinity) bits = 0;  // NaN
  if (!table) return bits > 0 ? bits : 0;
  bits = bits < lowest ? lowest : bits > highest ? highest : bits;
  const int64_t weight = (int64_t)((int64_t)(bits >> 23) - 127) * ((int64_t)1 << 48) + log2_of_fraction((uint32_t)bits << 9, table);
  const int64_t exponential = ((int64_t)33 << 48) - log2_of(2 * (uint64_t)word + 1, table);
  return (weight - log2_of((uint64_t)exponential, table) + ((int64_t)96 << 48)) >> 22;
}

inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Write the keys words[i] * 2^31 + i of the words in [low, low + width), by ascending i; return how many there are.
inline int64_t keys_within(int64_t* keys, const uint32_t* words, int64_t count, uint64_t low, uint64_t width) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    keys[kept] = ((int64_t)words[i] << 31) + i;
    kept += words[i] - low < width;
  }
  return kept;
}

// Write `keys`, all different, in ascending order: each goes where as many stand before it as are smaller.
inline void sort_few(int64_t* __restrict sorted, const int64_t* __restrict keys, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    int64_t smaller = 0;
    for (int64_t j = 0; j < count; ++j) smaller += keys[j] < keys[i];
    sorted[smaller] = keys[i];
  }
}

// The marks of one clip, and the block that a start stands for.
struct Blocks {
  uint8_t* marks;
  int64_t n, columns, freq, side, largest;
  bool by_time, clipped;

  // Starts are the tokens themselves, or also the cells up to largest - 1 before the grid, time outer.
  int64_t width() const { return freq + largest - 1; }
  int64_t starts() const { return clipped ? (columns + largest - 1) * width() : n; }

  // Mark the cells of the block of `start`; return how many were not.
  int64_t mark(int64_t start) const {
    int64_t added = 0;
    if (clipped) {
      const uint32_t number = (uint32_t)start, wide = (uint32_t)width();
      const int64_t column = (int64_t)(number / wide) - (largest - 1), row = (int64_t)(number % wide) - (largest - 1);
      const int64_t end = column + side < columns ? column + side : columns;
      const int64_t first_row = row < 0 ? 0 : row, end_row = row + side < freq ? row + side : freq;
      const int64_t down = by_time ? 1 : columns;
      for (int64_t c = column < 0 ? 0 : column; c < end; ++c) {
        uint8_t* const to = marks + (by_time ? c * freq : c);
        for (int64_t r = first_row; r < end_row; ++r) {
          added += !to[r * down];
          to[r * down] = 1;
        }
      }
    } else {
      const int64_t down = by_time ? freq : columns;
      for (int64_t i = 0; i < side; ++i) {
        const int64_t first = start + down * i, end = first + side < n ? first + side : n;
        for (int64_t t = first; t < end; ++t) {
          added += !marks[t];
          marks[t] = 1;
        }
      }
    }
    return added;
  }
};

}  // namespace

namespace MT_LEVEL {

void select_tokens(int32_t* visible, int32_t* masked, const int64_t* cu_tokens, const int64_t* cu_visible,
                   int64_t clips, const int64_t* counter, const int64_t* clip_ids, const void* classes,
                   int64_t class_bytes, const float* scores, const int32_t* log2_table, int64_t stream, bool shared,
                   int64_t* workspace, int64_t longest, int threads) {
  int32_t* const chosen_ids = scores ? masked : visible;
  int32_t* const other_ids = scores ? visible : masked;
#pragma omp parallel num_threads(threads) if (threads > 1 && cu_tokens[clips] > 65536)
  {
    int64_t* keys = workspace + thread_number() * (4 * longest + 32);
    int64_t* scratch = keys + longest;
    int32_t* ids[2] = {(int32_t*)(scratch + longest), (int32_t*)(scratch + longest) + longest + 1};
    uint32_t* words = (uint32_t*)ids[0];  // used up before ids are written
#pragma omp for schedule(static)
    for (int64_t clip = 0; clip < clips; ++clip) {
      const int64_t start = cu_tokens[clip], n = cu_tokens[clip + 1] - start;
      const int64_t n_visible = cu_visible[clip + 1] - cu_visible[clip], wanted = scores ? n - n_visible : n_visible;
      if (!n) continue;
      if (!scores || log2_table) {
        const Key key = make_key(counter, shared ? 0 : clip_ids[clip], MASK, (uint32_t)stream);
        philox_run(words, key, 0, (n + 3) / 4);
      }
      if (scores) {
        const int64_t largest = ((int64_t)1 << KEY_BITS) - 1;
        for (int64_t i = 0; i < n; ++i) {
          int32_t bits;
          memcpy(&bits, scores + start + i, sizeof bits);
          keys[i] = largest - key_of_score(bits, log2_table ? words[i] : 0, log2_table);
        }
      } else {
        for (int64_t i = 0; i < n; ++i) keys[i] = words[i];
      }
      if (class_bytes && scores) {
        const int64_t largest = ((int64_t)1 << 30) - 1;
        for (int64_t i = 0; i < n; ++i) {
          keys[i] += (largest - class_of(classes, class_bytes, start + i)) << KEY_BITS;
        }
      } else if (class_bytes) {
        for (int64_t i = 0; i < n; ++i) keys[i] += class_of(classes, class_bytes, start + i) << KEY_BITS;
      }
      // The `wanted` smallest are chosen.
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
      const int64_t first = scores ? start - cu_visible[clip] : cu_visible[clip];
      memcpy(chosen_ids + first, ids[0], sizeof(int32_t) * (size_t)counts[0]);
      memcpy(other_ids + start - first, ids[1], sizeof(int32_t) * (size_t)counts[1]);
    }
  }
}

void block_marks(uint8_t* marks, const int64_t* cu_tokens, const int64_t* n_marked, int64_t clips,
                 const int64_t* counter, const int64_t* clip_ids, int64_t freq, bool by_time, const int64_t* sides,
                 int64_t n_sides, bool clipped, bool only_first, bool spare_first, int64_t stream, bool shared,
                 int64_t* workspace, int64_t room, int threads) {
  const uint32_t side_stream = 2 * (uint32_t)stream, start_stream = side_stream + 1;
  int64_t largest = 0;
  for (int64_t i = 0; i < n_sides; ++i) largest = sides[i] > largest ? sides[i] : largest;
#pragma omp parallel num_threads(threads) if (threads > 1 && cu_tokens[clips] > 32768)
  {
    int64_t* own = workspace + thread_number() * 3 * room;
#pragma omp for schedule(static)
    for (int64_t clip = 0; clip < clips; ++clip) {
      const int64_t n = cu_tokens[clip + 1] - cu_tokens[clip], columns = n / freq;
      if (!n) continue;
      const int64_t id = shared ? 0 : clip_ids[clip];
      alignas(64) uint32_t draw[4 * LANES];
      philox_run(draw, make_key(counter, id, MASK_SHAPE, side_stream), 0, 1);
      const int64_t side = sides[(uint64_t)draw[0] * (uint64_t)n_sides >> 32];

      const Blocks blocks = {marks + cu_tokens[clip], n, columns, freq, side, largest, by_time, clipped};
      const int64_t starts = blocks.starts();
      uint32_t* words = (uint32_t*)(own + 2 * room);
      philox_run(words, make_key(counter, id, MASK_SHAPE, start_stream), 0, (starts + 3) / 4);

      // Starts are taken in ascending order, sorted as they are needed: a few more than are expected to be, at a time.
      const int64_t wanted = n_marked[clip], at_a_time = smaller_of(128 + starts / 64, 16 + 2 * wanted / (side * side));
      const uint64_t width = ((uint64_t)1 << 32) * (uint64_t)at_a_time / (uint64_t)starts + 1;
      uint8_t* to = blocks.marks;
      memset(to, 0, (size_t)n);
      to[0] = spare_first;  // counts as marked until the end
      int64_t marked = 0;
      for (uint64_t low = 0; low < (uint64_t)1 << 32 && marked <= wanted; low += width) {
        const int64_t count = keys_within(own + room, words, starts, low, width);
        sort_few(own, own + room, count);
        for (int64_t i = 0; i < count && marked <= wanted; ++i) marked += blocks.mark(own[i] & 0x7FFFFFFF);
      }
      if (spare_first) to[0] = 0;
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

void clamped_blocks(uint8_t* marks, const int64_t* cu_tokens, const int64_t* blocks, int64_t clips,
                    const int64_t* counter, const int64_t* clip_ids, int64_t freq, bool by_time, int64_t side,
                    int64_t stream, bool shared, int threads) {
  const uint32_t start_stream = 2 * (uint32_t)stream + 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && cu_tokens[clips] > 65536)
  for (int64_t clip = 0; clip < clips; ++clip) {
    const int64_t n = cu_tokens[clip + 1] - cu_tokens[clip], columns = n / freq;
    uint8_t* const to = marks + cu_tokens[clip];
    if (!n) continue;
    memset(to, 0, (size_t)n);
    const Key key = make_key(counter, shared ? 0 : clip_ids[clip], MASK_SHAPE, start_stream);
    // Rows of the numbering: where they begin and how many cells they have, in the block and in the grid.
    const int64_t inner = by_time ? freq : columns, outer = by_time ? columns : freq;
    for (int64_t first = 0; first < blocks[clip]; first += 4 * RUN_BLOCKS) {
      alignas(64) uint32_t words[4 * RUN_BLOCKS];
      const int64_t count = smaller_of(blocks[clip] - first, 4 * RUN_BLOCKS);
      philox_run(words, key, (uint64_t)first / 4, (count + 3) / 4);
      for (int64_t k = 0; k < count; ++k) {
        const int64_t centre = (int64_t)((uint64_t)words[k] * (uint64_t)n >> 32);
        const int64_t column = centre / freq - side / 2, row = centre % freq - side / 2;
        const int64_t low = by_time ? column : row, left = by_time ? row : column;
        const int64_t begin = left < 0 ? 0 : left, end = smaller_of(left + side, inner);
        for (int64_t i = low < 0 ? 0 : low; i < smaller_of(low + side, outer); ++i) {
          memset(to + i * inner + begin, 1, (size_t)(end - begin));
        }
      }
    }
  }
}

}  // namespace MT_LEVEL
