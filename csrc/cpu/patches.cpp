// SPDX-License-Identifier: Apache-2.0
// mask_gather and masked_patch_loss. Compiled once for each instruction set; MT_LEVEL is the namespace.
#include "masktrain_c.h"
#include "patches.h"

MT_DECLARE_KERNELS(MT_LEVEL)

namespace {

const int64_t LANES = 16;  // partial sums, whatever the instruction set: all give the same bits

// target <- (target - mean) / sqrt(variance + 1e-6), with the unbiased variance.
inline void standardise(float* target, int64_t size) {
  double sums[LANES] = {}, squares[LANES] = {}, mean = 0, variance = 0;
  const int64_t whole = size / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
    for (int64_t k = 0; k < LANES; ++k) sums[k] += (double)target[i + k];
  }
  for (int64_t i = whole; i < size; ++i) sums[0] += (double)target[i];
  for (double sum : sums) mean += sum;
  mean /= (double)size;
  for (int64_t i = 0; i < whole; i += LANES) {
    for (int64_t k = 0; k < LANES; ++k) {
      const double d = (double)target[i + k] - mean;
      squares[k] += d * d;
    }
  }
  for (int64_t i = whole; i < size; ++i) {
    const double d = (double)target[i] - mean;
    squares[0] += d * d;
  }
  for (double square : squares) variance += square;
  const double factor = 1.0 / __builtin_sqrt(variance / (double)(size - 1) + 1e-6);
  for (int64_t i = 0; i < size; ++i) target[i] = (float)(((double)target[i] - mean) * factor);
}

inline double squared_distance(const float* a, const float* b, int64_t size) {
  float sums[LANES] = {};
  double total = 0;
  const int64_t whole = size / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
    for (int64_t k = 0; k < LANES; ++k) {
      const float d = a[i + k] - b[i + k];
      sums[k] += d * d;
    }
  }
  for (int64_t i = whole; i < size; ++i) {
    const float d = a[i] - b[i];
    sums[0] += d * d;
  }
  for (float sum : sums) total += (double)sum;
  return total;
}

inline void read_target(float* target, const Patches& p, int64_t token, int64_t& clip, bool normalise) {
  read_any_patch(target, p, place_of(p, token, clip));
  if (normalise) standardise(target, p.patch_time * p.patch_freq);
}

}  // namespace

namespace MT_LEVEL {

void mask_gather_f32(float* out, const Patches& p, const int32_t* index, int64_t count, int threads) {
  const int64_t size = p.patch_time * p.patch_freq;
#pragma omp parallel num_threads(threads) if (threads > 1 && count * size > 16384)
  {
    int64_t clip = 0;
#pragma omp for schedule(static)
    for (int64_t k = 0; k < count; ++k) read_any_patch(out + k * size, p, place_of(p, index[k], clip));
  }
}

void masked_patch_loss_f32(float* out, double* partial, const float* pred, const Patches& p, const int32_t* index,
                           int64_t count, bool normalise, int threads) {
  const int64_t size = p.patch_time * p.patch_freq;
#pragma omp parallel num_threads(threads) if (threads > 1 && count * size > 16384)
  {
    int64_t clip = 0;
    float target[MT_LARGEST_PATCH];
#pragma omp for schedule(static)
    for (int64_t k = 0; k < count; ++k) {
      read_target(target, p, index[k], clip, normalise);
      partial[k] = squared_distance(pred + k * size, target, size);
    }
  }
  double total = 0;
  for (int64_t k = 0; k < count; ++k) total += partial[k];
  *out = (float)total;
}

void masked_patch_loss_grad_f32(float* out, const float* grad, const float* pred, const Patches& p,
                                const int32_t* index, int64_t count, bool normalise, int threads) {
  const int64_t size = p.patch_time * p.patch_freq;
  const float factor = 2.0f * *grad;
#pragma omp parallel num_threads(threads) if (threads > 1 && count * size > 16384)
  {
    int64_t clip = 0;
    float target[MT_LARGEST_PATCH];
#pragma omp for schedule(static)
    for (int64_t k = 0; k < count; ++k) {
      read_target(target, p, index[k], clip, normalise);
      const float* from = pred + k * size;
      float* to = out + k * size;
      for (int64_t i = 0; i < size; ++i) to[i] = factor * (from[i] - target[i]);
    }
  }
}

}  // namespace MT_LEVEL
