// SPDX-License-Identifier: Apache-2.0
// The C functions: each hands its arguments to the build for the instruction set in use.
#include "kernels.h"
#include "masktrain_c.h"

MT_DECLARE_KERNELS(base)

#if defined(MT_X86)
MT_DECLARE_KERNELS(avx2)
MT_DECLARE_KERNELS(avx512)
#define MT_CALL(KERNEL, ...)                                        \
  switch (level()) {                                                \
    case 2: avx512::KERNEL(__VA_ARGS__); break;                     \
    case 1: avx2::KERNEL(__VA_ARGS__); break;                       \
    default: base::KERNEL(__VA_ARGS__);                             \
  }
#else
#define MT_CALL(KERNEL, ...) base::KERNEL(__VA_ARGS__)
#endif

namespace {

int best_level() {
#if defined(MT_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? 2 : avx2 ? 1 : 0;
#else
  return 0;
#endif
}

int highest_level = 2;

int level() {
  static const int best = best_level();
  return best < highest_level ? best : highest_level;
}

}  // namespace

int mt_abi_version(void) { return MT_ABI_VERSION; }

int mt_cpu_level(void) { return level(); }

int mt_set_cpu_level(int wanted) {
  highest_level = wanted < 0 ? 0 : wanted;
  return level();
}

int mt_has_openmp(void) {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

void mt_philox_words(int64_t* out, const int64_t* counter, const int64_t* ids, int64_t rows, int64_t n,
                     int64_t purpose, int64_t stream, int threads) {
  MT_CALL(philox_words, out, counter, ids, rows, n, purpose, stream, threads);
}

void mt_dropout_f32(float* out, const float* x, const int64_t* counter, const int64_t* row_ids, const int64_t* row_pos,
                    int64_t rows, int64_t width, int64_t site, int64_t threshold, float scale, int threads) {
  MT_CALL(dropout_f32, out, x, counter, row_ids, row_pos, rows, width, site, threshold, scale, threads);
}

void mt_dropout_f64(double* out, const double* x, const int64_t* counter, const int64_t* row_ids,
                    const int64_t* row_pos, int64_t rows, int64_t width, int64_t site, int64_t threshold, double scale,
                    int threads) {
  MT_CALL(dropout_f64, out, x, counter, row_ids, row_pos, rows, width, site, threshold, scale, threads);
}

void mt_attention_keep_f32(float* out, const int64_t* counter, const int64_t* clip_id, int64_t heads, int64_t n,
                           int64_t row_stride, int64_t head_stride, int64_t site, int64_t threshold, float scale,
                           int threads) {
  MT_CALL(attention_keep_f32, out, counter, clip_id, heads, n, row_stride, head_stride, site, threshold, scale,
          threads);
}

void mt_attention_keep_f64(double* out, const int64_t* counter, const int64_t* clip_id, int64_t heads, int64_t n,
                           int64_t row_stride, int64_t head_stride, int64_t site, int64_t threshold, double scale,
                           int threads) {
  MT_CALL(attention_keep_f64, out, counter, clip_id, heads, n, row_stride, head_stride, site, threshold, scale,
          threads);
}
