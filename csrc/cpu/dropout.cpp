// SPDX-License-Identifier: Apache-2.0
// Dropout and the multipliers of attention dropout. Compiled once for each instruction set; MT_LEVEL is the namespace.
#include "kernels.h"
#include "philox.h"

MT_DECLARE_KERNELS(MT_LEVEL)

namespace {

const uint32_t DROPOUT = 6, ATTENTION_DROPOUT = 7;  // Purpose in kernels/philox/reference.py
const int64_t RUN = 8 * RUN_BLOCKS;                 // decisions of one run of blocks

template <typename T>
inline void dropout(T* out, const T* x, const int64_t* counter, const int64_t* row_ids, const int64_t* row_pos,
                    int64_t rows, int64_t width, int64_t site, int64_t threshold, T scale, int threads) {
  const int64_t row_blocks = (width + 7) / 8;
  const uint16_t limit = (uint16_t)threshold;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * width > 16384)
  for (int64_t row = 0; row < rows; ++row) {
    const Key key = make_key(counter, row_ids[row], DROPOUT, (uint32_t)site);
    const uint64_t row_block = (uint64_t)row_pos[row] * (uint64_t)row_blocks;
    for (int64_t d = 0; d < width; d += RUN) {
      const int64_t count = width - d < RUN ? width - d : RUN;
      alignas(64) uint16_t halves[RUN];
      philox_run(halves, key, row_block + (uint64_t)d / 8, (count + 7) / 8);
      const T* from = x + row * width + d;
      T* to = out + row * width + d;
      for (int64_t i = 0; i < count; ++i) {
        const T kept = from[i] * scale;
        to[i] = halves[i] >= limit ? kept : (T)0;
      }
    }
  }
}

template <typename T>
inline void attention_keep(T* out, const int64_t* counter, const int64_t* clip_id, int64_t heads, int64_t n,
                           int64_t row_stride, int64_t head_stride, int64_t site, int64_t threshold, T scale,
                           int threads) {
  const int64_t row_blocks = (n + 7) / 8;
  const uint16_t limit = (uint16_t)threshold;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && heads * n * n > 16384)
  for (int64_t task = 0; task < heads * n; ++task) {
    const int64_t head = task / n, query = task % n;
    const Key key = make_key(counter, *clip_id, ATTENTION_DROPOUT, (uint32_t)(site << 16) + (uint32_t)head);
    for (int64_t j = 0; j < n; j += RUN) {
      const int64_t count = n - j < RUN ? n - j : RUN;
      alignas(64) uint16_t halves[RUN];
      philox_run(halves, key, (uint64_t)(query * row_blocks + j / 8), (count + 7) / 8);
      T* to = out + head * head_stride + query * row_stride + j;
      for (int64_t i = 0; i < count; ++i) to[i] = halves[i] >= limit ? scale : (T)0;
    }
  }
}

}  // namespace

namespace MT_LEVEL {

void dropout_f32(float* out, const float* x, const int64_t* counter, const int64_t* row_ids, const int64_t* row_pos,
                 int64_t rows, int64_t width, int64_t site, int64_t threshold, float scale, int threads) {
  dropout(out, x, counter, row_ids, row_pos, rows, width, site, threshold, scale, threads);
}

void dropout_f64(double* out, const double* x, const int64_t* counter, const int64_t* row_ids, const int64_t* row_pos,
                 int64_t rows, int64_t width, int64_t site, int64_t threshold, double scale, int threads) {
  dropout(out, x, counter, row_ids, row_pos, rows, width, site, threshold, scale, threads);
}

void attention_keep_f32(float* out, const int64_t* counter, const int64_t* clip_id, int64_t heads, int64_t n,
                        int64_t row_stride, int64_t head_stride, int64_t site, int64_t threshold, float scale,
                        int threads) {
  attention_keep(out, counter, clip_id, heads, n, row_stride, head_stride, site, threshold, scale, threads);
}

void attention_keep_f64(double* out, const int64_t* counter, const int64_t* clip_id, int64_t heads, int64_t n,
                        int64_t row_stride, int64_t head_stride, int64_t site, int64_t threshold, double scale,
                        int threads) {
  attention_keep(out, counter, clip_id, heads, n, row_stride, head_stride, site, threshold, scale, threads);
}

}  // namespace MT_LEVEL
