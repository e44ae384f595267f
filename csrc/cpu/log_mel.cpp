// SPDX-License-Identifier: Apache-2.0
// Log-mel frames. Compiled once for each instruction set; MT_LEVEL is the namespace.
//
// WIDTH frames go side by side, one in each lane of a vector: every step is the scalar algorithm on vectors, and a
// frame depends on nothing but itself. In double up to the mel sums: float FFTs miss quiet bins beside loud ones by
// over 1e-3.
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "kernels.h"
#include "lanes.h"

MT_DECLARE_KERNELS(MT_LEVEL)

namespace {

struct Complex {
  Wide re, im;
};

inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
inline Complex operator*(double s, Complex a) { return {s * a.re, s * a.im}; }
inline Complex minus_i(Complex a) { return {a.im, -a.re}; }  // -i a
inline Complex turn(Complex a, double re, double im) { return {a.re * re - a.im * im, a.re * im + a.im * re}; }

// z[k] <- sum over j of z[j] exp(-2 pi i j k / R), for R = 2, 3, 4, 5, 8.
inline void transform(Complex (&z)[2]) {
  const Complex a = z[0], b = z[1];
  z[0] = a + b;
  z[1] = a - b;
}

inline void transform(Complex (&z)[3]) {
  const Complex sum = z[1] + z[2], turned = minus_i(0.86602540378443864676 * (z[1] - z[2]));  // sin(pi / 3)
  const Complex rest = z[0] - 0.5 * sum;
  z[0] = z[0] + sum;
  z[1] = rest + turned;
  z[2] = rest - turned;
}

inline void transform(Complex (&z)[4]) {
  const Complex a = z[0] + z[2], b = z[0] - z[2], c = z[1] + z[3], d = minus_i(z[1] - z[3]);
  z[0] = a + c;
  z[1] = b + d;
  z[2] = a - c;
  z[3] = b - d;
}

inline void transform(Complex (&z)[5]) {
  const double c1 = 0.30901699437494742410, c2 = -0.80901699437494742410;  // cos(2 pi / 5), cos(4 pi / 5)
  const double s1 = 0.95105651629515357212, s2 = 0.58778525229247312917;   // sin(2 pi / 5), sin(4 pi / 5)
  const Complex a = z[1] + z[4], b = z[2] + z[3], c = z[1] - z[4], d = z[2] - z[3];
  const Complex p = z[0] + c1 * a + c2 * b, q = z[0] + c2 * a + c1 * b;
  const Complex r = minus_i(s1 * c + s2 * d), s = minus_i(s2 * c - s1 * d);
  z[0] = z[0] + a + b;
  z[1] = p + r;
  z[2] = q + s;
  z[3] = q - s;
  z[4] = p - r;
}

inline void transform(Complex (&z)[8]) {
  const double half = 0.70710678118654752440;
  Complex even[4] = {z[0], z[2], z[4], z[6]}, odd[4] = {z[1], z[3], z[5], z[7]};
  transform(even);
  transform(odd);
  odd[1] = half * (odd[1] + minus_i(odd[1]));
  odd[2] = minus_i(odd[2]);
  odd[3] = half * (minus_i(odd[3]) - odd[3]);
  for (int k = 0; k < 4; ++k) {
    z[k] = even[k] + odd[k];
    z[k + 4] = even[k] - odd[k];
  }
}

// One stage of the FFT of n complex numbers in place, decimation in frequency: each block of `length` becomes R blocks.
// data: real and imaginary parts in turn. roots: exp(-2 pi i t / count) for t < count, parts in turn.
template <int R>
void stage(Wide* data, int64_t n, int64_t length, const double* roots, int64_t count) {
  const int64_t m = length / R, step = 2 * (count / length);
  for (int64_t j = 0; j < m; ++j) {
    for (Wide* block = data + 2 * j; block < data + 2 * n; block += 2 * length) {
      Complex z[R];
      for (int k = 0; k < R; ++k) z[k] = {block[2 * k * m], block[2 * k * m + 1]};
      transform(z);
      if (j) {
        for (int k = 1; k < R; ++k) z[k] = turn(z[k], roots[j * k * step], roots[j * k * step + 1]);
      }
      for (int k = 0; k < R; ++k) {
        block[2 * k * m] = z[k].re;
        block[2 * k * m + 1] = z[k].im;
      }
    }
  }
}

const int RADICES[] = {8, 5, 4, 3, 2};

inline int radix_of(int64_t length) {
  for (int r : RADICES) {
    if (length % r == 0) return r;
  }
  return 0;
}

inline void any_stage(Wide* data, int64_t n, int64_t length, const double* roots, int64_t count) {
  switch (radix_of(length)) {
    case 8: return stage<8>(data, n, length, roots, count);
    case 5: return stage<5>(data, n, length, roots, count);
    case 4: return stage<4>(data, n, length, roots, count);
    case 3: return stage<3>(data, n, length, roots, count);
    case 2: return stage<2>(data, n, length, roots, count);
  }
}

// The FFT of n = 2^a 3^b 5^c numbers in place. Frequency f ends at place_of(f, n). After the first stage it goes block
// by block: a block stays in the first-level cache.
void transform_all(Wide* data, int64_t n, const double* roots, int64_t count) {
  if (n == 1) return;
  any_stage(data, n, n, roots, count);
  const int64_t block = n / radix_of(n);
  for (Wide* part = data; part < data + 2 * n; part += 2 * block) {
    for (int64_t length = block; length > 1; length /= radix_of(length)) any_stage(part, block, length, roots, count);
  }
}

int64_t place_of(int64_t frequency, int64_t n) {
  int64_t place = 0;
  for (int64_t length = n; length > 1;) {
    const int r = radix_of(length);
    length /= r;
    place += frequency % r * length;
    frequency /= r;
  }
  return place;
}

// ln(x) for normal x > 0 to about one unit in the last place; infinity and NaN stay. x = 2^e (1 + f) with 1 + f in
// [sqrt(1/2), sqrt(2)); the polynomial is the minimax fit of (ln(1 + f) - f + f^2 / 2) / f^3 there.
inline WideFloat logarithm(WideFloat x) {
  const WideInt bits = (WideInt)x, e = (bits - 0x3F3504F3) >> 23;
  const WideFloat f = (WideFloat)(bits - (e << 23)) - 1.0f, scale = __builtin_convertvector(e, WideFloat);
  WideFloat p = wide_float(0.0674671993f);
  p = p * f - 0.116758085f;
  p = p * f + 0.118882127f;
  p = p * f - 0.124055688f;
  p = p * f + 0.142195435f;
  p = p * f - 0.166679966f;
  p = p * f + 0.200021191f;
  p = p * f - 0.250000096f;
  p = p * f + 0.333333126f;
  const WideFloat square = f * f;
  // ln(2) in two parts, the first exact in 9 bits.
  const WideFloat small = square * f * p + scale * -2.12194440e-4f - 0.5f * square;
  const WideFloat result = small + f + scale * 0.693359375f;
  return x <= 3.402823466e38f ? result : x;
}

// Write samples first ... first + count - 1 of a clip, reflected at its ends, less `mean` and emphasised.
template <typename T>
void lay_out(double* row, const T* clip, int64_t size, int64_t first, int64_t count, double mean, double emphasis) {
  const int64_t length = size - (emphasis != 0);
  if (first >= 0 && first + count <= length) {
    const T* x = clip + first;
    if (emphasis != 0) {
      for (int64_t i = 0; i < count; ++i) row[i] = ((double)x[i + 1] - mean) - emphasis * ((double)x[i] - mean);
    } else {
      for (int64_t i = 0; i < count; ++i) row[i] = (double)x[i] - mean;
    }
    return;
  }
  const int64_t period = length > 1 ? 2 * (length - 1) : 1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = first + i, there = (position < 0 ? -position : position) % period;
    const T* x = clip + (there < period - there ? there : period - there);
    row[i] = emphasis != 0 ? ((double)x[1] - mean) - emphasis * ((double)x[0] - mean) : (double)x[0] - mean;
  }
}

// data[i] <- sample i of WIDTH rows of `count` samples.
inline void side_by_side(Wide* data, const double* rows, int64_t count) {
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) {
    Wide tile[WIDTH];
    for (int lane = 0; lane < WIDTH; ++lane) tile[lane] = load<Wide>(rows + lane * count + i);
    transpose(tile);
    for (int k = 0; k < WIDTH; ++k) data[i + k] = tile[k];
  }
  for (; i < count; ++i) {
    for (int lane = 0; lane < WIDTH; ++lane) data[i][lane] = rows[lane * count + i];
  }
}

// The frames in data, tapered and prepared for the FFT, with zeros up to n_fft. Halved: `spectrum` sums two halves.
inline void taper(Wide* data, const LogMel& spec) {
  const int64_t count = spec.win_length;
  const double a = spec.frame_preemphasis;
  Wide mean{};
  if (spec.remove_dc) {
    Wide sums[4] = {};
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
      for (int k = 0; k < 4; ++k) sums[k] += data[i + k];
    }
    for (; i < count; ++i) sums[0] += data[i];
    mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])) / (double)count;
  }
  if (a != 0) {
    Wide before = data[0] - mean;
    for (int64_t i = 0; i < count; ++i) {
      const Wide x = data[i] - mean;
      data[i] = (x - a * before) * (0.5 * spec.window[i]);
      before = x;
    }
  } else {
    for (int64_t i = 0; i < count; ++i) data[i] = (data[i] - mean) * (0.5 * spec.window[i]);
  }
  for (int64_t i = count; i < spec.n_fft; ++i) data[i] = Wide{};
}

inline Wide square_root(Wide x) {
  for (int lane = 0; lane < WIDTH; ++lane) x[lane] = __builtin_sqrt(x[lane]);
  return x;
}

// power[k] <- |X[k]|^2 or |X[k]| of the real signal of n_fft numbers whose even and odd ones are the real and imaginary
// parts that were transformed into data: with Z = data, E = (Z[k] + conj Z[-k]) / 2, O = -i (Z[k] - conj Z[-k]) / 2 and
// the k-th root w, X[k] = E + w O and conj X[n - k] = E - w O.
inline void spectrum(Wide* power, const Wide* data, const int32_t* places, const LogMel& spec) {
  const int64_t n = spec.n_fft / 2;
  const Wide first = 2.0 * (data[0] + data[1]), last = 2.0 * (data[0] - data[1]);
  power[0] = first * first;
  power[n] = last * last;
  for (int64_t k = 1; 2 * k <= n; ++k) {
    const Wide* z = data + 2 * places[k];
    const Wide* y = data + 2 * places[n - k];
    const Complex a = {z[0], z[1]}, b = {y[0], -y[1]};
    const Complex even = a + b, odd = turn(minus_i(a - b), spec.roots[2 * k], spec.roots[2 * k + 1]);
    const Complex x = even + odd, mirror = even - odd;
    power[k] = x.re * x.re + x.im * x.im;
    power[n - k] = mirror.re * mirror.re + mirror.im * mirror.im;
  }
  if (spec.magnitude) {
    for (int64_t k = 0; k <= n; ++k) power[k] = square_root(power[k]);
  }
}

// rows[lane * stride + m] <- mel sum m of a lane, with the floor `eps`. WIDTH divides stride.
inline void mel_sums(float* rows, int64_t stride, const Wide* power, const LogMel& spec) {
  const double* weights = spec.weights;
  for (int64_t m = 0; m < stride; m += WIDTH) {
    Wide tile[WIDTH];
    for (int k = 0; k < WIDTH; ++k) {
      Wide sum{};
      if (m + k < spec.n_mels) {
        const Wide* from = power + spec.first_bins[m + k];
        const int64_t bins = spec.bins[m + k];
        for (int64_t i = 0; i < bins; ++i) sum += weights[i] * from[i];
        weights += bins;
      }
      tile[k] = !spec.floor ? sum + spec.eps : sum < spec.eps ? wide(spec.eps) : sum;
    }
    transpose(tile);
    for (int lane = 0; lane < WIDTH; ++lane) {
      for (int k = 0; k < WIDTH; ++k) rows[lane * stride + m + k] = (float)tile[lane][k];
    }
  }
}

inline void logarithms(float* rows, int64_t count, const LogMel& spec) {
  const float offset = (float)spec.offset, divisor = (float)spec.divisor;
  for (int64_t i = 0; i < count; i += 2 * WIDTH) {
    WideFloat v = logarithm(load<WideFloat>(rows + i)) + offset;
    if (divisor != 1.0f) v /= divisor;
    store(rows + i, v);
  }
}

template <typename T>
double mean_of(const T* x, int64_t count) {
  double sums[8] = {}, total = 0;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int k = 0; k < 8; ++k) sums[k] += (double)x[i + k];
  }
  for (; i < count; ++i) total += (double)x[i];
  for (double sum : sums) total += sum;
  return total / (double)count;
}

template <typename T>
void log_mel(float* out, const T* samples, const int64_t* cu_samples, const int64_t* cu_frames, int64_t clips,
             const LogMel& spec, double* workspace, int threads) {
  const int64_t total = cu_frames[clips], groups = (total + WIDTH - 1) / WIDTH;
  const int64_t stride = (spec.n_mels + 15) / 16 * 16, n = spec.n_fft / 2;
  double* means = workspace;
  const bool remove_mean = spec.remove_mean && !spec.remove_dc;
#pragma omp parallel num_threads(threads) if (threads > 1 && groups > 1)
  {
#if defined(_OPENMP)
    const int64_t thread = omp_get_thread_num();
#else
    const int64_t thread = 0;
#endif
    // 64-byte aligned, as vectors in memory are.
    char* own = (char*)(workspace + clips + thread * (17 * spec.n_fft + 4 * spec.n_mels + 128));
    Wide* data = (Wide*)(own + (64 - (uintptr_t)own % 64) % 64);
    Wide* power = data + spec.n_fft;
    double* rows = (double*)power;  // they are laid out before there is a spectrum
    float* mels = (float*)(power + spec.n_fft + 1);
    int32_t* places = (int32_t*)(mels + WIDTH * stride);
    for (int64_t k = 0; k < n; ++k) places[k] = (int32_t)place_of(k, n);
    if (remove_mean) {
#pragma omp for schedule(static)
      for (int64_t clip = 0; clip < clips; ++clip) {
        means[clip] = mean_of(samples + cu_samples[clip], cu_samples[clip + 1] - cu_samples[clip]);
      }
    }
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = group * WIDTH, count = total - first < WIDTH ? total - first : WIDTH;
      int64_t clip = 0, above = clips;  // the last clip that begins at or before `first` and has frames
      while (above - clip > 1) {
        const int64_t middle = (clip + above) / 2;
        if (cu_frames[middle] <= first) {
          clip = middle;
        } else {
          above = middle;
        }
      }
      for (int64_t lane = 0; lane < WIDTH; ++lane) {
        const int64_t frame = first + (lane < count ? lane : 0);
        if (lane == count) clip = 0;
        while (cu_frames[clip + 1] <= frame) ++clip;
        lay_out(rows + lane * spec.win_length, samples + cu_samples[clip], cu_samples[clip + 1] - cu_samples[clip],
                (frame - cu_frames[clip]) * spec.hop - spec.lead, spec.win_length, remove_mean ? means[clip] : 0.0,
                spec.wave_preemphasis);
      }
      side_by_side(data, rows, spec.win_length);
      taper(data, spec);
      transform_all(data, n, spec.roots, spec.n_fft);
      spectrum(power, data, places, spec);
      mel_sums(mels, stride, power, spec);
      logarithms(mels, count * stride, spec);
      for (int64_t lane = 0; lane < count; ++lane) {
        memcpy(out + (first + lane) * spec.n_mels, mels + lane * stride, sizeof(float) * (size_t)spec.n_mels);
      }
    }
  }
}

}  // namespace

namespace MT_LEVEL {

void log_mel_f32(float* out, const float* samples, const int64_t* cu_samples, const int64_t* cu_frames, int64_t clips,
                 const LogMel& spec, double* workspace, int threads) {
  log_mel(out, samples, cu_samples, cu_frames, clips, spec, workspace, threads);
}

void log_mel_f64(float* out, const double* samples, const int64_t* cu_samples, const int64_t* cu_frames, int64_t clips,
                 const LogMel& spec, double* workspace, int threads) {
  log_mel(out, samples, cu_samples, cu_frames, clips, spec, workspace, threads);
}

}  // namespace MT_LEVEL
