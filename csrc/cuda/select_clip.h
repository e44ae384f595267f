// SPDX-License-Identifier: Apache-2.0
// select_tokens for one clip by one thread block: the keys lie in shared memory, the last chosen one is found digit by
// digit from the top, eight bits at a time, and the ids are written in order after one count of what comes before.
#pragma once
#include <string.h>

#include "device.h"

const int32_t BINS = 256, GROUPS = 16;  // BINS: values of a digit, and parts in which ids are written
const int32_t KEY_BITS = 33;            // of what is below the class in a key
const uint32_t MASK = 4;                // Purpose in kernels/philox/reference.py

// What the keys are made of. The words are those of `stream` and the id; classes and scores (null: none) are this clip's.
struct Draw {
  const int64_t* counter;
  uint32_t stream, id;
  const void* classes;
  int64_t class_bytes;
  const float* scores;
  const int32_t* log2_table;
};

// The tokens start ... start + n - 1, of which the `wanted` with the smallest keys go to `chosen`, the rest to `other`.
struct Clip {
  int32_t start, n, wanted;
  int32_t* chosen;
  int32_t* other;
};

struct Selection {
  uint32_t counts[BINS], groups[GROUPS];
  uint32_t digit, left;
};

// 2^48 log2(1 + f / 2^32), interpolated in the table.
MT_DEVICE int64_t log2_of_fraction(uint32_t f, const int32_t* table) {
  const int64_t low = table[f >> 22], high = table[(f >> 22) + 1];
  return (low << 22) + (high - low) * (f & 0x3FFFFF);
}

// 2^48 log2(v), v >= 1.
MT_DEVICE int64_t log2_of(uint64_t v, const int32_t* table) {
#if defined(__CUDA_ARCH__)
  const int zeros = __clzll((long long)v);
#else
  const int zeros = __builtin_clzll(v);
#endif
  return ((int64_t)(63 - zeros) << 48) + log2_of_fraction((uint32_t)(v << zeros >> 31), table);
}

// In [0, 2^33), larger for what is rather masked: see kernels/select_tokens/reference.py. Without a table the word is
// left out.
MT_DEVICE int64_t key_of_score(float score, uint32_t word, const int32_t* table) {
  const int32_t infinity = 0x7F800000, lowest = (127 - 40) << 23, highest = (127 + 40) << 23;
  int32_t bits;
  memcpy(&bits, &score, sizeof bits);
  if (bits > infinity) bits = 0;  // NaN
  if (!table) return bits > 0 ? bits : 0;
  bits = bits < lowest ? lowest : bits > highest ? highest : bits;
  const int64_t weight = ((bits >> 23) - 127) * ((int64_t)1 << 48) + log2_of_fraction((uint32_t)bits << 9, table);
  const int64_t exponential = ((int64_t)33 << 48) - log2_of(2 * (uint64_t)word + 1, table);
  return (weight - log2_of((uint64_t)exponential, table) + ((int64_t)96 << 48)) >> 22;
}

MT_DEVICE uint64_t class_of(const void* classes, int64_t bytes, int32_t i) {
  return bytes == 1 ? ((const uint8_t*)classes)[i]
                    : bytes == 4 ? (uint64_t)((const int32_t*)classes)[i] : (uint64_t)((const int64_t*)classes)[i];
}

MT_DEVICE int32_t class_bits(const Draw& draw) { return draw.class_bytes == 0 ? 0 : draw.class_bytes == 1 ? 8 : 30; }

// The smallest are chosen: without scores to be visible, with scores to be masked.
MT_DEVICE uint64_t key_of(const Draw& draw, int32_t token, uint32_t word) {
  uint64_t group = draw.class_bytes ? class_of(draw.classes, draw.class_bytes, token) : 0, key = word;
  if (draw.scores) {
    key = ((uint64_t)1 << KEY_BITS) - 1 - (uint64_t)key_of_score(draw.scores[token], word, draw.log2_table);
    group = ((uint64_t)1 << class_bits(draw)) - 1 - group;
  }
  return group << KEY_BITS | key;
}

MT_DEVICE uint32_t sum(const uint32_t* values, int32_t n) {
  uint32_t total = 0;
  for (int32_t i = 0; i < n; ++i) total += values[i];
  return total;
}

template <class Block>
MT_DEVICE void sum_groups(const Block& block, Selection& s) {
  const int32_t size = BINS / GROUPS;
  block.each(GROUPS, [&](int32_t g) { s.groups[g] = sum(s.counts + g * size, size); });
}

// The sum of counts[0] ... counts[bin - 1], after sum_groups.
MT_DEVICE uint32_t sum_before(const Selection& s, int32_t bin) {
  const int32_t size = BINS / GROUPS, group = bin / size;
  return sum(s.groups, group) + sum(s.counts + group * size, bin - group * size);
}

// keys: room for clip.n.
template <class Block>
MT_DEVICE void select_clip(const Block& block, Selection& s, uint64_t* keys, const Clip& clip, const Draw& draw) {
  const int32_t n = clip.n;
  const uint64_t seed = (uint64_t)draw.counter[0];
  const uint32_t step = (uint32_t)draw.counter[1], k0 = (uint32_t)seed;
  const uint32_t k1 = MASK << 16 | (uint32_t)(seed >> 32 & 0xFFFF);
  block.each((n + 3) / 4, [&](int32_t b) {
    uint32_t words[4] = {(uint32_t)b, draw.stream, draw.id, step};
    philox_4x32(words, k0, k1);
    for (int32_t i = 0; i < 4; ++i) {
      const int32_t token = 4 * b + i;
      if (token < n) keys[token] = key_of(draw, token, words[i]);
    }
  });

  // The key of rank `left` (from 1) among those whose upper bits are `last`; it is one of the chosen ones.
  uint64_t last = 0;
  uint32_t left = (uint32_t)clip.wanted;
  const int32_t bits = draw.scores || draw.class_bytes ? KEY_BITS + class_bits(draw) : 32;
  for (int32_t shift = (bits - 1) / 8 * 8; shift >= 0 && clip.wanted; shift -= 8) {
    block.each(BINS, [&](int32_t bin) { s.counts[bin] = 0; });
    block.each(n, [&](int32_t i) {
      const uint64_t upper = keys[i] >> shift;
      if (upper >> 8 == last) block.add(s.counts + (upper & 255), 1);
    });
    sum_groups(block, s);
    block.each(BINS, [&](int32_t bin) {
      const uint32_t before = sum_before(s, bin);
      if (before < left && left <= before + s.counts[bin]) {
        s.digit = (uint32_t)bin;
        s.left = left - before;
      }
    });
    last = last << 8 | s.digit;
    left = s.left;
  }

  // Keys below `last` are chosen, and of those equal to it the first `left`. Each part of the tokens is counted, the
  // former in the lower and the latter in the upper 16 bits, and then written behind those before it.
  const int32_t size = (n + BINS - 1) / BINS;
  const auto end = [&](int32_t part) { return (part + 1) * size < n ? (part + 1) * size : n; };
  block.each(BINS, [&](int32_t part) {
    uint32_t count = 0;
    for (int32_t i = part * size; i < end(part); ++i) count += keys[i] < last ? 1 : keys[i] == last ? 1 << 16 : 0;
    s.counts[part] = count;
  });
  sum_groups(block, s);
  block.each(BINS, [&](int32_t part) {
    const uint32_t before = sum_before(s, part);
    uint32_t less = before & 0xFFFF, equal = before >> 16;
    for (int32_t i = part * size; i < end(part); ++i) {
      const uint32_t rank = less + (equal < left ? equal : left);
      const bool below = keys[i] < last, tie = keys[i] == last;
      if (below || (tie && equal < left)) {
        clip.chosen[rank] = clip.start + i;
      } else {
        clip.other[i - (int32_t)rank] = clip.start + i;
      }
      less += below;
      equal += tie;
    }
  });
}
