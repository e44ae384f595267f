// SPDX-License-Identifier: Apache-2.0
// ncut_scores of "ncut" and "pca", without a matrix of products: kernels/ncut_scores/reference.py says what is computed.
// A clip's rows off their total stay in the second-level cache, and every product reads them twice, for four vectors at
// a time. Compiled once for each instruction set; MT_LEVEL is the namespace.
#include <math.h>
#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "kernels.h"

MT_DECLARE_KERNELS(MT_LEVEL)

namespace {

const int LANES = 16;  // values of a vector, whatever the instruction set
typedef float Vector __attribute__((vector_size(LANES * 4)));

// As in reference.py.
const int BLOCK = 4, DEGREE = 6, ROUNDS = 6, SQUARINGS = 16;
const float TOLERANCE = 1e-5f, LEAST_BOUND = 0.05f, LEAD = 1e-3f, ON_THRESHOLD = 1e-5f, NOISE = 32 * 1.1920929e-7f;
const float TINY = 1.17549435e-38f, LARGEST = 3.4028235e38f;

// Anywhere in memory. A reference, since a vector that a function returns has another ABI on each instruction set.
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline const Unaligned& load(const float* from) { return *(const Unaligned*)from; }

inline void store(float* to, const Vector& v) { *(Unaligned*)to = v; }

inline float sum(const Vector& v) {
  float total = 0;
  for (int l = 0; l < LANES; ++l) total += v[l];
  return total;
}

// Of `n` values that need not be a multiple of LANES.
inline float dot(const float* a, const float* b, int64_t n) {
  Vector x = {}, y = {};
  int64_t j = 0;
  for (; j + 2 * LANES <= n; j += 2 * LANES) {
    x += load(a + j) * load(b + j);
    y += load(a + j + LANES) * load(b + j + LANES);
  }
  float total = sum(x + y);
  for (; j < n; ++j) total += a[j] * b[j];
  return total;
}

inline void add(float* to, const float* x, float factor, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] += factor * x[j];
}

// One clip: n rows of `width` values, of which the directions count.
struct Clip {
  const float* x;
  int64_t n, width, stride;  // stride: width, and one more, as a multiple of LANES
  float *z, *mixed;          // n x stride; BLOCK x stride
  float *scale, *weight;     // n: 1 / the length of a row, or 0; that of a row of z
  float *v, *image, *now, *before, *next;  // n x BLOCK
};

// mixed = z^T v, for rows in fours.
template <int COUNT>
inline void gather_rows(float* __restrict mixed, const float* __restrict z, const float* __restrict v, int64_t stride) {
  for (int64_t j = 0; j < stride; j += LANES) {
    Vector row[COUNT];
    for (int r = 0; r < COUNT; ++r) row[r] = load(z + r * stride + j);
    for (int k = 0; k < BLOCK; ++k) {
      Vector m = load(mixed + k * stride + j);
      for (int r = 0; r < COUNT; ++r) m += row[r] * v[r * BLOCK + k];
      store(mixed + k * stride + j, m);
    }
  }
}

// out = z mixed, for rows in pairs.
template <int COUNT>
inline void spread_rows(float* __restrict out, const float* __restrict z, const float* __restrict mixed, int64_t stride) {
  Vector total[COUNT][BLOCK] = {};
  for (int64_t j = 0; j < stride; j += LANES) {
    for (int k = 0; k < BLOCK; ++k) {
      const Vector m = load(mixed + k * stride + j);
      for (int r = 0; r < COUNT; ++r) total[r][k] += load(z + r * stride + j) * m;
    }
  }
  for (int r = 0; r < COUNT; ++r)
    for (int k = 0; k < BLOCK; ++k) out[r * BLOCK + k] = sum(total[r][k]);
}

// out = z z^T v
void times(float* out, const Clip& c, const float* v) {
  memset(c.mixed, 0, sizeof(float) * (size_t)(BLOCK * c.stride));
  int64_t i = 0;
  for (; i + 4 <= c.n; i += 4) gather_rows<4>(c.mixed, c.z + i * c.stride, v + i * BLOCK, c.stride);
  for (; i < c.n; ++i) gather_rows<1>(c.mixed, c.z + i * c.stride, v + i * BLOCK, c.stride);
  for (i = 0; i + 2 <= c.n; i += 2) spread_rows<2>(out + i * BLOCK, c.z + i * c.stride, c.mixed, c.stride);
  for (; i < c.n; ++i) spread_rows<1>(out + i * BLOCK, c.z + i * c.stride, c.mixed, c.stride);
}

inline double column_dot(const float* a, int p, const float* b, int q, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += (double)a[i * BLOCK + p] * b[i * BLOCK + q];
  return total;
}

// Orthonormal columns of the same span, by Gram and Schmidt, twice; what lies in that of the columns before becomes 0.
void orthonormal(float* v, int64_t n) {
  for (int k = 0; k < BLOCK; ++k) {
    const double size = sqrt(column_dot(v, k, v, k, n));
    for (int pass = 0; pass < 2; ++pass) {
      for (int p = 0; p < k; ++p) {
        const float along = (float)column_dot(v, p, v, k, n);
        for (int64_t i = 0; i < n; ++i) v[i * BLOCK + k] -= along * v[i * BLOCK + p];
      }
    }
    const double left = sqrt(column_dot(v, k, v, k, n));
    const float factor = left > 16 * 1.1920929e-7 * size ? (float)(1 / left) : 0.0f;
    for (int64_t i = 0; i < n; ++i) v[i * BLOCK + k] *= factor;
  }
}

// The eigenvector of the largest eigenvalue of a positive matrix, by squaring; 0 for a matrix of 0.
void leading(double* mix, const double (&h)[BLOCK][BLOCK]) {
  double a[BLOCK][BLOCK], b[BLOCK][BLOCK];
  for (int p = 0; p < BLOCK; ++p)
    for (int q = 0; q < BLOCK; ++q) a[p][q] = (h[p][q] + h[q][p]) / 2;
  for (int s = 0; s < SQUARINGS; ++s) {
    double trace = 0;
    for (int p = 0; p < BLOCK; ++p) trace += a[p][p];
    trace = trace > TINY ? trace : TINY;
    for (int p = 0; p < BLOCK; ++p)
      for (int q = 0; q < BLOCK; ++q) a[p][q] /= trace;
    for (int p = 0; p < BLOCK; ++p) {
      for (int q = 0; q < BLOCK; ++q) {
        b[p][q] = 0;
        for (int r = 0; r < BLOCK; ++r) b[p][q] += a[p][r] * a[r][q];
      }
    }
    memcpy(a, b, sizeof a);
  }
  int best = 0;
  for (int p = 1; p < BLOCK; ++p) best = a[p][p] > a[best][best] ? p : best;
  double length = 0;
  for (int p = 0; p < BLOCK; ++p) length += a[p][best] * a[p][best];
  length = sqrt(length);
  for (int p = 0; p < BLOCK; ++p) mix[p] = length > 0 ? a[p][best] / length : 0;
}

// The left singular vector of the largest singular value of z, in the first n values of c.next; returns its square.
float leading_left_singular_vector(const Clip& c) {
  const int64_t n = c.n, size = n * BLOCK;
  for (int64_t i = 0; i < size; ++i) {
    uint64_t word = (uint64_t)i + 1;
    word = ((word ^ (word >> 15)) * 0x85EBCA6Bu) & 0x7FFFFFFF;
    word = ((word ^ (word >> 15)) * 0xC2B2AE35u) & 0x7FFFFFFF;
    word ^= word >> 16;
    c.now[i] = (float)word / 1073741824.0f - 1.0f;
  }
  times(c.v, c, c.now);
  orthonormal(c.v, n);
  float theta = 0;
  for (int left = ROUNDS;; --left) {
    times(c.image, c, c.v);
    double h[BLOCK][BLOCK], mix[BLOCK];
    for (int p = 0; p < BLOCK; ++p)
      for (int q = 0; q < BLOCK; ++q) h[p][q] = column_dot(c.v, p, c.image, q, n);
    leading(mix, h);
    double top = 0, residual = 0;
    for (int p = 0; p < BLOCK; ++p)
      for (int q = 0; q < BLOCK; ++q) top += mix[p] * h[p][q] * mix[q];
    for (int64_t i = 0; i < n; ++i) {
      double best = 0, image = 0;
      for (int k = 0; k < BLOCK; ++k) {
        best += mix[k] * c.v[i * BLOCK + k];
        image += mix[k] * c.image[i * BLOCK + k];
      }
      c.next[i] = (float)best;
      residual += (image - top * best) * (image - top * best);
    }
    theta = (float)top;
    if (left == 0 || sqrt(residual) <= TOLERANCE * top) return theta;
    double bound = h[0][0];
    for (int p = 1; p < BLOCK; ++p) bound = h[p][p] < bound ? h[p][p] : bound;
    bound = bound > LEAST_BOUND * top ? bound : LEAST_BOUND * top;
    const float slope = (float)(2 / (bound > TINY ? bound : TINY));
    // The Chebyshev polynomial of DEGREE, 1 at most on [0, bound].
    memcpy(c.before, c.v, sizeof(float) * (size_t)size);
    for (int64_t i = 0; i < size; ++i) c.now[i] = slope * c.image[i] - c.v[i];
    for (int d = 1; d < DEGREE; ++d) {
      times(c.image, c, c.now);
      for (int64_t i = 0; i < size; ++i) {
        const float value = 2 * (slope * c.image[i] - c.now[i]) - c.before[i];
        c.before[i] = c.now[i];
        c.now[i] = value;
      }
    }
    memcpy(c.v, c.now, sizeof(float) * (size_t)size);
    orthonormal(c.v, n);
  }
}

// Rows off their total (ncut) or mean (pca), in z; returns the square of what their lengths would be without.
double make_rows(const Clip& c, bool pca) {
  float* total = c.mixed;
  memset(total, 0, sizeof(float) * (size_t)c.stride);
  for (int64_t i = 0; i < c.n; ++i) {
    const float* x = c.x + i * c.width;
    const float length = sqrtf(dot(x, x, c.width));
    // NaN is in neither range.
    c.scale[i] = length > 0 && length <= LARGEST ? 1 / length : 0;
    if (c.scale[i] > 0) add(total, x, c.scale[i], c.width);
  }
  // The value beside the features is 1 for ncut, 0 for pca.
  const double own = pca ? 0 : 1, n = (double)c.n;
  double square = own * n * n, size = 0;
  for (int64_t j = 0; j < c.width; ++j) square += (double)total[j] * total[j];
  square = square > 1 ? square : 1;
  for (int64_t i = 0; i < c.n; ++i) {
    const float* __restrict x = c.x + i * c.width;
    float* __restrict z = c.z + i * c.stride;
    const bool good = c.scale[i] > 0;
    const double degree = pca ? 0 : n + (good ? (double)c.scale[i] * dot(x, total, c.width) : 0);
    const float weight = pca ? 1 : (float)(1 / sqrt(degree > 1 ? degree : 1));
    const float off = (float)(pca ? 1 / n : degree / square) * weight, factor = good ? c.scale[i] * weight : 0;
    if (good) {
      for (int64_t j = 0; j < c.width; ++j) z[j] = factor * x[j] - off * total[j];
    } else {
      for (int64_t j = 0; j < c.width; ++j) z[j] = -off * total[j];
    }
    z[c.width] = (float)(own * (weight - off * n));
    for (int64_t j = c.width + 1; j < c.stride; ++j) z[j] = 0;
    c.weight[i] = weight;
    size += (double)weight * weight;
  }
  return size;
}

// As foreground_of in reference.py; y: n values.
void choose_side(uint8_t* foreground, const float* y, float threshold, int64_t n) {
  float size = 0, high = 0, low = 0;
  for (int64_t i = 0; i < n; ++i) size = fabsf(y[i]) > size ? fabsf(y[i]) : size;
  const float margin = ON_THRESHOLD * size;
  int64_t n_above = 0, n_below = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float a = fabsf(y[i]);
    if (y[i] > threshold + margin) {
      ++n_above;
      high = a > high ? a : high;
    } else if (y[i] < threshold - margin) {
      ++n_below;
      low = a > low ? a : low;
    }
  }
  const bool smaller = n_above < n_below || (n_above == n_below && y[0] < threshold - margin);
  const bool positive = fabsf(high - low) > LEAD * size ? high > low : smaller;
  const bool two = n_above && n_below;
  for (int64_t i = 0; i < n; ++i)
    foreground[i] = !two || (positive ? y[i] > threshold + margin : y[i] < threshold - margin);
}

void score(float* scores, uint8_t* foreground, const Clip& c, bool pca, bool outliers) {
  const double size = make_rows(c, pca);
  const float largest = leading_left_singular_vector(c);
  double mean = 0;
  float* y = c.next;
  for (int64_t i = 0; i < c.n; ++i) {
    y[i] = largest > NOISE * NOISE * size ? y[i] * c.weight[i] : 0;
    mean += y[i];
  }
  choose_side(foreground, y, pca ? 0 : (float)(mean / (double)c.n), c.n);
  float* centroid[2] = {c.mixed, c.mixed + c.stride};
  memset(c.mixed, 0, sizeof(float) * (size_t)(2 * c.stride));
  bool any[2] = {false, false};
  for (int64_t i = 0; i < c.n; ++i) {
    any[!foreground[i]] = true;
    if (c.scale[i] > 0) add(centroid[!foreground[i]], c.x + i * c.width, c.scale[i], c.width);
  }
  float factor[2];
  for (int s = 0; s < 2; ++s) {
    const float length = sqrtf(dot(centroid[s], centroid[s], c.width));
    factor[s] = length > 0 ? 1 / length : 0;
  }
  for (int64_t i = 0; i < c.n; ++i) {
    float cosine[2] = {0, 0};
    for (int s = 0; s < (outliers ? 2 : 1); ++s) {
      if (c.scale[i] > 0) cosine[s] = c.scale[i] * dot(c.x + i * c.width, centroid[s], c.width) * factor[s];
      cosine[s] = cosine[s] < -1 || (s && !any[s]) ? -1 : cosine[s] > 1 ? 1 : cosine[s];
    }
    scores[i] = outliers ? (1 - (cosine[0] > cosine[1] ? cosine[0] : cosine[1])) / 2 : (1 + cosine[0]) / 2;
  }
}

}  // namespace

namespace MT_LEVEL {

void ncut_scores(float* scores, uint8_t* foreground, const float* features, const int64_t* cu_tokens, int64_t clips,
                 int64_t width, bool pca, bool outliers, float* workspace, int64_t longest, int threads) {
  const int64_t stride = (width + LANES) / LANES * LANES;
  const int64_t room = longest * stride + BLOCK * stride + longest * (2 + 5 * BLOCK);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && clips > 1)
  for (int64_t b = 0; b < clips; ++b) {
#if defined(_OPENMP)
    float* at = workspace + omp_get_thread_num() * room;
#else
    float* at = workspace;
#endif
    const int64_t first = cu_tokens[b], n = cu_tokens[b + 1] - first;
    if (n == 0) continue;
    Clip c;
    c.x = features + first * width;
    c.n = n, c.width = width, c.stride = stride;
    c.z = at, c.mixed = c.z + n * stride;
    c.scale = c.mixed + BLOCK * stride, c.weight = c.scale + n;
    c.v = c.weight + n, c.image = c.v + n * BLOCK, c.now = c.image + n * BLOCK;
    c.before = c.now + n * BLOCK, c.next = c.before + n * BLOCK;
    score(scores + first, foreground + first, c, pca, outliers);
  }
}

}  // namespace MT_LEVEL
