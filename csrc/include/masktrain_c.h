// SPDX-License-Identifier: Apache-2.0
// The C interface of the native library. It knows nothing of Python or torch: arrays are pointers, sizes are counts of
// elements, and every array is dense in memory unless a stride is named.
//
// Raise MT_ABI_VERSION, and ABI in kernels/_native.py, with every change to a signature below.
#pragma once
#include <stdint.h>

#define MT_ABI_VERSION 1

#if defined(__cplusplus)
#define MT_API extern "C" __attribute__((visibility("default")))
#else
#define MT_API __attribute__((visibility("default")))
#endif

// The version that the library was built with.
MT_API int mt_abi_version(void);

// The instruction set in use: 0 base, 1 AVX2, 2 AVX-512.
MT_API int mt_cpu_level(void);

// Use `level`, or the best below it that this CPU has; return the one in use. All give the same bits.
MT_API int mt_set_cpu_level(int level);

// 1 if built with OpenMP; otherwise `threads` below has no effect.
MT_API int mt_has_openmp(void);

// The key of a draw. counter: two words [seed, step]. Key words are [seed, purpose << 16 | seed >> 32], counter words
// [block, stream, id, step], each to 32 bits.

// out[r * n + p] = word p of the stream of ids[r]: rows x n words, each in [0, 2^32).
MT_API void mt_philox_words(int64_t* out, const int64_t* counter, const int64_t* ids, int64_t rows, int64_t n,
                            int64_t purpose, int64_t stream, int threads);

// out = x * scale where the value is kept, else 0: rows x width values. Value d of row r is kept iff its 16-bit half is
// at least `threshold` (0 ... 65535): half d % 8 of block row_pos[r] * ceil(width / 8) + d / 8, id row_ids[r], purpose
// DROPOUT, stream `site`. Half h of a block is word h / 2, low 16 bits first.
MT_API void mt_dropout_f32(float* out, const float* x, const int64_t* counter, const int64_t* row_ids,
                           const int64_t* row_pos, int64_t rows, int64_t width, int64_t site, int64_t threshold,
                           float scale, int threads);
MT_API void mt_dropout_f64(double* out, const double* x, const int64_t* counter, const int64_t* row_ids,
                           const int64_t* row_pos, int64_t rows, int64_t width, int64_t site, int64_t threshold,
                           double scale, int threads);

// The multipliers of one clip's attention weights: out[h * head_stride + i * row_stride + j] = `scale` if the weight of
// head h, query i, key j (i, j < n) is kept, else 0. It uses half j % 8 of block i * ceil(n / 8) + j / 8, id *clip_id,
// purpose ATTENTION_DROPOUT, stream site * 65536 + h. Nothing else is written.
MT_API void mt_attention_keep_f32(float* out, const int64_t* counter, const int64_t* clip_id, int64_t heads, int64_t n,
                                  int64_t row_stride, int64_t head_stride, int64_t site, int64_t threshold, float scale,
                                  int threads);
MT_API void mt_attention_keep_f64(double* out, const int64_t* counter, const int64_t* clip_id, int64_t heads, int64_t n,
                                  int64_t row_stride, int64_t head_stride, int64_t site, int64_t threshold,
                                  double scale, int threads);
