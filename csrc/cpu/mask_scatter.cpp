// SPDX-License-Identifier: Apache-2.0
// mask_scatter and its gradient. Compiled once for each instruction set; MT_LEVEL is the namespace.
#include <string.h>

#include "kernels.h"
#include "masktrain_c.h"

MT_DECLARE_KERNELS(MT_LEVEL)

namespace {

const int64_t PARALLEL_BYTES = 1 << 18;  // less is done before a second thread has started

inline bool exists(int64_t row, int64_t rows) { return row >= 0 && row < rows; }

template <typename T>
void gradient(T* grad_x, double* grad_token, const T* grad, const int32_t* visible, int64_t n_visible,
              const int32_t* masked, int64_t n_masked, int64_t width, double* partial, int threads) {
  const int64_t parts = (n_masked + MT_SUMMED_ROWS - 1) / MT_SUMMED_ROWS;
  const int64_t bytes = width * (int64_t)sizeof(T);
#pragma omp parallel num_threads(threads) if (threads > 1 && (n_visible + n_masked) * bytes > PARALLEL_BYTES)
  {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < n_visible; ++i) {
      if (exists(visible[i], n_visible + n_masked)) {
        memcpy(grad_x + i * width, grad + visible[i] * width, (size_t)bytes);
      } else {
        memset(grad_x + i * width, 0, (size_t)bytes);
      }
    }
#pragma omp for schedule(static)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = part * MT_SUMMED_ROWS, left = n_masked - first;
      const int64_t end = left < MT_SUMMED_ROWS ? n_masked : first + MT_SUMMED_ROWS;
      double* const sums = partial + part * width;
      for (int64_t k = 0; k < width; ++k) sums[k] = 0;
      for (int64_t i = first; i < end; ++i) {
        if (!exists(masked[i], n_visible + n_masked)) continue;
        const T* row = grad + masked[i] * width;
        for (int64_t k = 0; k < width; ++k) sums[k] += (double)row[k];
      }
    }
  }
  for (int64_t k = 0; k < width; ++k) grad_token[k] = 0;
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t k = 0; k < width; ++k) grad_token[k] += partial[part * width + k];
  }
}

}  // namespace

namespace MT_LEVEL {

void mask_scatter(char* out, const char* x, const char* token, const int32_t* visible, int64_t n_visible,
                  const int32_t* masked, int64_t n_masked, int64_t row_bytes, int threads) {
  const int64_t rows = n_visible + n_masked;
#pragma omp parallel num_threads(threads) if (threads > 1 && rows * row_bytes > PARALLEL_BYTES)
  {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < n_visible; ++i) {
      if (exists(visible[i], rows)) memcpy(out + visible[i] * row_bytes, x + i * row_bytes, (size_t)row_bytes);
    }
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < n_masked; ++i) {
      if (exists(masked[i], rows)) memcpy(out + masked[i] * row_bytes, token, (size_t)row_bytes);
    }
  }
}

void mask_scatter_grad_f32(float* grad_x, double* grad_token, const float* grad, const int32_t* visible,
                           int64_t n_visible, const int32_t* masked, int64_t n_masked, int64_t width, double* partial,
                           int threads) {
  gradient(grad_x, grad_token, grad, visible, n_visible, masked, n_masked, width, partial, threads);
}

void mask_scatter_grad_f64(double* grad_x, double* grad_token, const double* grad, const int32_t* visible,
                           int64_t n_visible, const int32_t* masked, int64_t n_masked, int64_t width, double* partial,
                           int threads) {
  gradient(grad_x, grad_token, grad, visible, n_visible, masked, n_masked, width, partial, threads);
}

}  // namespace MT_LEVEL
