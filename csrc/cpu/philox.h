// SPDX-License-Identifier: Apache-2.0
// Philox 4x32-10 on runs of consecutive blocks (Salmon, Moraes, Dror, Shaw, SC 2011).
//
// Each 32-bit word of the state has a 64-bit lane, of which the upper half may hold anything: the 32 x 32 -> 64 bit
// multiply reads the lower half only, its product needs no shuffle, and the upper halves are cut off at the end.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words and their halves are taken from memory, low ones first"
#endif

// Internal linkage: the three builds of this file must not be mixed at link time.
namespace {

#if defined(__AVX512F__)
typedef __m512i Lanes;
inline Lanes all(uint32_t x) { return _mm512_set1_epi64(x); }
inline Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
inline Lanes upper(Lanes a) { return _mm512_srli_epi64(a, 32); }
inline Lanes mix(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_epi64(a, b); }
// Two words in one lane: `low` and, above it, `high`.
inline Lanes join(Lanes low, Lanes high) { return _mm512_mask_mov_epi32(low, 0xAAAA, _mm512_slli_epi64(high, 32)); }
// Even lanes hold the first half of the blocks: the unpacks below then store all blocks in order.
inline Lanes block_offsets() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
inline void store(char* out, Lanes first, Lanes second) {
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(first, second));
  _mm512_storeu_si512(out + 64, _mm512_unpackhi_epi64(first, second));
}
#elif defined(__AVX2__)
typedef __m256i Lanes;
inline Lanes all(uint32_t x) { return _mm256_set1_epi64x(x); }
inline Lanes multiply(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
inline Lanes upper(Lanes a) { return _mm256_srli_epi64(a, 32); }
inline Lanes mix(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline Lanes add(Lanes a, Lanes b) { return _mm256_add_epi64(a, b); }
inline Lanes join(Lanes low, Lanes high) { return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA); }
inline Lanes block_offsets() { return _mm256_setr_epi64x(0, 2, 1, 3); }
inline void store(char* out, Lanes first, Lanes second) {
  _mm256_storeu_si256((__m256i*)out, _mm256_unpacklo_epi64(first, second));
  _mm256_storeu_si256((__m256i*)(out + 32), _mm256_unpackhi_epi64(first, second));
}
#else
typedef uint64_t Lanes;
inline Lanes all(uint32_t x) { return x; }
inline Lanes multiply(Lanes a, Lanes b) { return (uint64_t)(uint32_t)a * (uint32_t)b; }
inline Lanes upper(Lanes a) { return a >> 32; }
inline Lanes mix(Lanes a, Lanes b, Lanes c) { return a ^ b ^ c; }
inline Lanes add(Lanes a, Lanes b) { return a + b; }
inline Lanes join(Lanes low, Lanes high) { return (uint32_t)low | high << 32; }
inline Lanes block_offsets() { return 0; }
inline void store(char* out, Lanes first, Lanes second) {
  memcpy(out, &first, 8);
  memcpy(out + 8, &second, 8);
}
#endif

const int64_t LANES = sizeof(Lanes) / 8;

// Blocks that are made at a time: 2 KiB of words, which stay in the first-level cache until they are used.
const int64_t RUN_BLOCKS = 128;

struct Key {
  uint32_t k0, k1, stream, id, step;
};

inline Key make_key(const int64_t* counter, int64_t id, uint32_t purpose, uint32_t stream) {
  const uint64_t seed = (uint64_t)counter[0];
  return {(uint32_t)seed, purpose << 16 | (uint32_t)(seed >> 32 & 0xFFFF), stream, (uint32_t)id, (uint32_t)counter[1]};
}

// Write the words of blocks first, first + 1, ... (to 32 bits) in order, 16 bytes each, `blocks` of them rounded up to a
// multiple of LANES. `out` may be read as 32-bit words or as 16-bit halves.
inline void philox_run(void* out, const Key& key, uint64_t first, int64_t blocks) {
  const Lanes m0 = all(0xD2511F53u), m1 = all(0xCD9E8D57u);
  for (int64_t b = 0; b < blocks; b += LANES) {
    Lanes c0 = add(all((uint32_t)(first + b)), block_offsets());
    Lanes c1 = all(key.stream), c2 = all(key.id), c3 = all(key.step);
    uint32_t k0 = key.k0, k1 = key.k1;
    for (int round = 0; round < 10; ++round) {
      const Lanes p0 = multiply(c0, m0), p1 = multiply(c2, m1);
      c0 = mix(upper(p1), c1, all(k0));
      c2 = mix(upper(p0), c3, all(k1));
      c1 = p1;
      c3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    store((char*)out + 16 * b, join(c0, c1), join(c2, c3));
  }
}

}  // namespace
