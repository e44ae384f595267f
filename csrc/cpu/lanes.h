// SPDX-License-Identifier: Apache-2.0
// Vectors as wide as the instruction set, by the compiler's vector types: the same operators for each, and, since every
// lane goes through the same operations whatever the width, the same bits.
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

#if defined(__AVX512F__)
const int WIDTH = 8;  // doubles of a vector
#elif defined(__AVX2__)
const int WIDTH = 4;
#else
const int WIDTH = 2;
#endif

typedef double Wide __attribute__((vector_size(8 * WIDTH)));
typedef float WideFloat __attribute__((vector_size(8 * WIDTH)));  // 2 * WIDTH lanes
typedef int32_t WideInt __attribute__((vector_size(8 * WIDTH)));

template <typename V, typename T>
inline V load(const T* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <typename V, typename T>
inline void store(T* to, V v) {
  memcpy(to, &v, sizeof v);
}

inline Wide wide(double x) { return x - Wide{}; }
inline WideFloat wide_float(float x) { return x - WideFloat{}; }

// a0 b0 a1 b1 ... of the lower and of the upper halves.
#if defined(__AVX512F__)
inline Wide interleave_low(Wide a, Wide b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline Wide interleave_high(Wide a, Wide b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#elif defined(__AVX2__)
inline Wide interleave_low(Wide a, Wide b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline Wide interleave_high(Wide a, Wide b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#else
inline Wide interleave_low(Wide a, Wide b) { return __builtin_shufflevector(a, b, 0, 2); }
inline Wide interleave_high(Wide a, Wide b) { return __builtin_shufflevector(a, b, 1, 3); }
#endif

// Transpose WIDTH x WIDTH. Each round rotates the bits of the address (vector, lane) by one.
inline void transpose(Wide (&v)[WIDTH]) {
  for (int round = 1; round < WIDTH; round *= 2) {
    Wide next[WIDTH];
    for (int i = 0; i < WIDTH / 2; ++i) {
      next[2 * i] = interleave_low(v[i], v[i + WIDTH / 2]);
      next[2 * i + 1] = interleave_high(v[i], v[i + WIDTH / 2]);
    }
    for (int i = 0; i < WIDTH; ++i) v[i] = next[i];
  }
}

}  // namespace
