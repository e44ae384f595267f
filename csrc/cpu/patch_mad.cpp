// SPDX-License-Identifier: Apache-2.0
// patch_mad. Compiled once for each instruction set; MT_LEVEL is the namespace.
#include "masktrain_c.h"
#include "patches.h"

MT_DECLARE_KERNELS(MT_LEVEL)

namespace {

// Where adding it rounds away what is below 1, half to even.
template <typename T>
struct Rounding;
template <>
struct Rounding<float> {
  static constexpr float shift = 12582912.0f;  // 1.5 * 2^23
};
template <>
struct Rounding<double> {
  static constexpr double shift = 6755399441055744.0;  // 1.5 * 2^52
};

// Write the values of a patch in 1 / 1024, `height` to a frame, and return their sum. COUNT: height where it is known,
// else 0.
template <int COUNT, typename T>
inline int32_t read_rounded(int32_t* __restrict out, const Patches<T>& p, const Place<T>& place) {
  const int64_t height = COUNT ? COUNT : p.patch_freq;
  const T* __restrict x = place.first;
  const T* __restrict mean = p.mean + place.bin;
  const T* __restrict scale = p.scale + place.bin;
  int32_t sum = 0;
  for (int64_t t = 0; t < place.frames; ++t, x += p.bins, out += height) {
    for (int64_t f = 0; f < height; ++f) {
      T value = (x[f] - mean[f]) * scale[f];
      value = value == value ? value : 0;
      value = value < -16 ? -16 : value;
      value = value > 16 ? 16 : value;
      out[f] = (int32_t)(value * 1024 + Rounding<T>::shift - Rounding<T>::shift);
      sum += out[f];
    }
  }
  return sum;
}

// The sum of |size * value - sum| over the patch; what lies past the clip's end is 0.
inline int64_t deviation(const int32_t* values, int64_t present, int64_t size, int32_t sum) {
  int64_t total = (size - present) * (sum < 0 ? -(int64_t)sum : (int64_t)sum);
  // A term is less than size * 2^15: so many of them fit 32 bits.
  const int64_t most = (1 << 17) / size;
  for (int64_t i = 0; i < present; i += most) {
    const int64_t end = present - i < most ? present : i + most;
    uint32_t part = 0;
    for (int64_t k = i; k < end; ++k) {
      const int32_t d = (int32_t)size * values[k] - sum;
      part += (uint32_t)(d < 0 ? -d : d);
    }
    total += part;
  }
  return total;
}

// Tokens of a thread at a time.
const int64_t RUN = 256;

template <typename T>
void mad(float* out, const Patches<T>& p, const int32_t* index, int64_t count, int threads) {
  const int64_t size = p.patch_time * p.patch_freq, runs = (count + RUN - 1) / RUN;
  const float factor = (float)(1.0 / (1024.0 * (double)size * (double)size));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && runs > 1)
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t first = run * RUN, last = count - first < RUN ? count : first + RUN;
    alignas(64) int32_t values[MT_LARGEST_PATCH];
    Places<T> places(p, index, first, last);
    for (int64_t k = first; k < last; ++k) {
      const Place<T> place = places.next();
      const int32_t sum = p.patch_freq == 16 ? read_rounded<16>(values, p, place) : read_rounded<0>(values, p, place);
      out[k] = (float)deviation(values, place.frames * p.patch_freq, size, sum) * factor;
    }
  }
}

}  // namespace

namespace MT_LEVEL {

void patch_mad_f32(float* out, const Patches<float>& p, const int32_t* index, int64_t count, int threads) {
  mad(out, p, index, count, threads);
}

void patch_mad_f64(float* out, const Patches<double>& p, const int32_t* index, int64_t count, int threads) {
  mad(out, p, index, count, threads);
}

}  // namespace MT_LEVEL
