// SPDX-License-Identifier: Apache-2.0
// What every instruction-set build provides: one namespace each. Arguments are those of masktrain_c.h.
#pragma once
#include <stdint.h>

#define MT_DECLARE_KERNELS(LEVEL)                                                                                     \
  namespace LEVEL {                                                                                                   \
  void philox_words(int64_t* out, const int64_t* counter, const int64_t* ids, int64_t rows, int64_t n,               \
                    int64_t purpose, int64_t stream, int threads);                                                    \
  void dropout_f32(float* out, const float* x, const int64_t* counter, const int64_t* row_ids,                       \
                   const int64_t* row_pos, int64_t rows, int64_t width, int64_t site, int64_t threshold, float scale, \
                   int threads);                                                                                      \
  void dropout_f64(double* out, const double* x, const int64_t* counter, const int64_t* row_ids,                     \
                   const int64_t* row_pos, int64_t rows, int64_t width, int64_t site, int64_t threshold,              \
                   double scale, int threads);                                                                        \
  void attention_keep_f32(float* out, const int64_t* counter, const int64_t* clip_id, int64_t heads, int64_t n,      \
                          int64_t row_stride, int64_t head_stride, int64_t site, int64_t threshold, float scale,      \
                          int threads);                                                                               \
  void attention_keep_f64(double* out, const int64_t* counter, const int64_t* clip_id, int64_t heads, int64_t n,     \
                          int64_t row_stride, int64_t head_stride, int64_t site, int64_t threshold, double scale,     \
                          int threads);                                                                               \
  }
