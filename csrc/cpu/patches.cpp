// SPDX-License-Identifier: Apache-2.0
// mask_gather and masked_patch_loss. Compiled once for each instruction set; MT_LEVEL is the namespace.
#include "masktrain_c.h"
#include "patches.h"

MT_DECLARE_KERNELS(MT_LEVEL)

namespace {

const int64_t LANES = 16;  // partial sums, whatever the instruction set: all give the same bits

// target <- (target - mean) / sqrt(variance + 1e-6), with the unbiased variance.
template <typename T>
inline void standardise(T* target, int64_t size) {
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
  for (int64_t i = 0; i < size; ++i) target[i] = (T)(((double)target[i] - mean) * factor);
}

template <typename T>
inline double squared_distance(const T* a, const T* b, int64_t size) {
  T sums[LANES] = {};
  double total = 0;
  const int64_t whole = size / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
    for (int64_t k = 0; k < LANES; ++k) {
      const T d = a[i + k] - b[i + k];
      sums[k] += d * d;
    }
  }
  for (int64_t i = whole; i < size; ++i) {
    const T d = a[i] - b[i];
    sums[0] += d * d;
  }
  for (T sum : sums) total += (double)sum;
  return total;
}

template <typename T>
inline void read_target(T* target, const Patches<T>& p, const Place<T>& place, bool normalise) {
  read_any_patch(target, p, place);
  if (normalise) standardise(target, p.patch_time * p.patch_freq);
}

// Tokens of a thread at a time.
const int64_t RUN = 256;

// Call use(k, place) for each of `count` tokens.
template <typename T, typename Use>
inline void for_each_place(const Patches<T>& p, const int32_t* index, int64_t count, int threads, Use use) {
  const int64_t runs = (count + RUN - 1) / RUN;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && runs > 1)
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t first = run * RUN, last = count - first < RUN ? count : first + RUN;
    Places<T> places(p, index, first, last);
    for (int64_t k = first; k < last; ++k) use(k, places.next());
  }
}

template <typename T>
void gather(T* out, const Patches<T>& p, const int32_t* index, int64_t count, int threads) {
  const int64_t size = p.patch_time * p.patch_freq;
  for_each_place(p, index, count, threads,
                 [&](int64_t k, const Place<T>& place) { read_any_patch(out + k * size, p, place); });
}

template <typename T>
void loss(T* out, double* partial, const T* pred, const Patches<T>& p, const int32_t* index, int64_t count,
          bool normalise, int threads) {
  const int64_t size = p.patch_time * p.patch_freq;
  for_each_place(p, index, count, threads, [&](int64_t k, const Place<T>& place) {
    alignas(64) T target[MT_LARGEST_PATCH];
    read_target(target, p, place, normalise);
    partial[k] = squared_distance(pred + k * size, target, size);
  });
  double total = 0;
  for (int64_t k = 0; k < count; ++k) total += partial[k];
  *out = (T)total;
}

template <typename T>
void loss_gradient(T* out, const T* grad, const T* pred, const Patches<T>& p, const int32_t* index, int64_t count,
                   bool normalise, int threads) {
  const int64_t size = p.patch_time * p.patch_freq;
  const T factor = 2 * *grad;
  for_each_place(p, index, count, threads, [&](int64_t k, const Place<T>& place) {
    alignas(64) T target[MT_LARGEST_PATCH];
    read_target(target, p, place, normalise);
    const T* from = pred + k * size;
    T* to = out + k * size;
    for (int64_t i = 0; i < size; ++i) to[i] = factor * (from[i] - target[i]);
  });
}

}  // namespace

namespace MT_LEVEL {

void mask_gather_f32(float* out, const Patches<float>& p, const int32_t* index, int64_t count, int threads) {
  gather(out, p, index, count, threads);
}

void masked_patch_loss_f32(float* out, double* partial, const float* pred, const Patches<float>& p,
                           const int32_t* index, int64_t count, bool normalise, int threads) {
  loss(out, partial, pred, p, index, count, normalise, threads);
}

void masked_patch_loss_grad_f32(float* out, const float* grad, const float* pred, const Patches<float>& p,
                                const int32_t* index, int64_t count, bool normalise, int threads) {
  loss_gradient(out, grad, pred, p, index, count, normalise, threads);
}

void mask_gather_f64(double* out, const Patches<double>& p, const int32_t* index, int64_t count, int threads) {
  gather(out, p, index, count, threads);
}

void masked_patch_loss_f64(double* out, double* partial, const double* pred, const Patches<double>& p,
                           const int32_t* index, int64_t count, bool normalise, int threads) {
  loss(out, partial, pred, p, index, count, normalise, threads);
}

void masked_patch_loss_grad_f64(double* out, const double* grad, const double* pred, const Patches<double>& p,
                                const int32_t* index, int64_t count, bool normalise, int threads) {
  loss_gradient(out, grad, pred, p, index, count, normalise, threads);
}

}  // namespace MT_LEVEL
