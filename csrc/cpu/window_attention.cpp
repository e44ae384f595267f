// SPDX-License-Identifier: Apache-2.0
// Cosine attention inside windows of up to 16 rows, forward and backward. Compiled once for each instruction set;
// MT_LEVEL is the namespace. A window of one head fits into the first-level cache: it is copied there, rows and heads
// filled up with zeros, and all of its products are done there.
#include <math.h>
#include <string.h>

#include "kernels.h"

MT_DECLARE_KERNELS(MT_LEVEL)

namespace {

const int ROWS = 16;   // MT_LARGEST_WINDOW
const int LANES = 16;  // values of a vector, whatever the instruction set
const int BLOCK = 4;   // rows of a product that are held in registers
const float ABSENT = -1e30f;  // score of a key that does not exist: finite, so that x - x tells NaN from it

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(LANES * 4)));
  typedef int32_t bits __attribute__((vector_size(LANES * 4)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(LANES * 8)));
  typedef int64_t bits __attribute__((vector_size(LANES * 8)));
};

// WIDTH: vectors of a row.
template <typename T, int WIDTH>
struct Tile {
  typename VectorOf<T>::type row[ROWS][WIDTH];
};

template <typename T>
struct Square {
  typename VectorOf<T>::type row[ROWS];
};

template <typename T, int WIDTH>
inline void load_tile(Tile<T, WIDTH>& tile, const T* from, int64_t stride, int n, int64_t width) {
  for (int i = 0; i < n; ++i) {
    T* to = (T*)tile.row[i];
    const T* x = from + i * stride;
    if (width == WIDTH * LANES) {
      memcpy(to, x, sizeof tile.row[i]);
      continue;
    }
    for (int64_t d = 0; d < width; ++d) to[d] = x[d];
    for (int64_t d = width; d < WIDTH * LANES; ++d) to[d] = 0;
  }
  if (n < ROWS) memset((void*)tile.row[n], 0, sizeof tile.row[0] * (size_t)(ROWS - n));
}

template <typename T, int WIDTH>
inline void store_tile(T* to, const Tile<T, WIDTH>& tile, int64_t stride, int n, int64_t width) {
  for (int i = 0; i < n; ++i) memcpy(to + i * stride, tile.row[i], (size_t)width * sizeof(T));
}

// out[i][j] = a[i] b[j]
template <typename T, int WIDTH>
inline void products(Square<T>& out, const Tile<T, WIDTH>& a, const Tile<T, WIDTH>& b, int n) {
  typedef typename VectorOf<T>::type V;
  V turned[WIDTH * LANES];
  for (int j = 0; j < ROWS; ++j) {
    const T* x = (const T*)b.row[j];
    for (int d = 0; d < WIDTH * LANES; ++d) ((T*)&turned[d])[j] = x[d];
  }
  for (int i = 0; i < n; i += BLOCK) {
    V sum[BLOCK] = {};
    for (int d = 0; d < WIDTH * LANES; ++d) {
      for (int r = 0; r < BLOCK; ++r) sum[r] += ((const T*)a.row[i + r])[d] * turned[d];
    }
    for (int r = 0; r < BLOCK; ++r) out.row[i + r] = sum[r];
  }
}

// out[i] = sum over j of w[i][j] x[j], or of w[j][i] x[j] if TURNED.
template <bool TURNED, typename T, int WIDTH>
inline void weighted(Tile<T, WIDTH>& out, const Square<T>& w, const Tile<T, WIDTH>& x, int n) {
  typedef typename VectorOf<T>::type V;
  const T* weight = (const T*)w.row;
  for (int i = 0; i < n; i += BLOCK) {
    V sum[BLOCK][WIDTH] = {};
    for (int j = 0; j < n; ++j) {
      for (int r = 0; r < BLOCK; ++r) {
        const T factor = TURNED ? weight[j * ROWS + i + r] : weight[(i + r) * ROWS + j];
        for (int d = 0; d < WIDTH; ++d) sum[r][d] += factor * x.row[j][d];
      }
    }
    for (int r = 0; r < BLOCK; ++r) {
      for (int d = 0; d < WIDTH; ++d) out.row[i + r][d] = sum[r][d];
    }
  }
}

template <typename T>
inline T total(const typename VectorOf<T>::type& v) {
  T lane[LANES];
  memcpy(lane, &v, sizeof v);
  for (int step = LANES / 2; step; step /= 2) {
    for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
  }
  return lane[0];
}

template <typename T>
inline T largest(const typename VectorOf<T>::type& v) {
  T lane[LANES];
  memcpy(lane, &v, sizeof v);
  for (int step = LANES / 2; step; step /= 2) {
    for (int i = 0; i < step; ++i) lane[i] = lane[i] > lane[i + step] ? lane[i] : lane[i + step];
  }
  return lane[0];
}

template <typename T, int WIDTH>
inline void norms(T* out, const Tile<T, WIDTH>& x) {
  for (int i = 0; i < ROWS; ++i) {
    typename VectorOf<T>::type sum = {};
    for (int d = 0; d < WIDTH; ++d) sum += x.row[i][d] * x.row[i][d];
    out[i] = sqrt(total<T>(sum));
  }
}

// exp of x <= 0 to 1 ulp or so; 0 below -87, NaN of NaN.
inline void exponential(VectorOf<float>::type& out, const VectorOf<float>::type& x) {
  typedef VectorOf<float>::type V;
  typedef VectorOf<float>::bits B;
  const B inside = x > -87.0f;
  const V shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the nearest integer is in the low bits
  const V n = shifted - 12582912.0f;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const B scaled = ((B)shifted << 23) + (B)p;
  out = (V)(scaled & inside) + (x - x);
}

inline void exponential(VectorOf<double>::type& out, const VectorOf<double>::type& x) {
  for (int i = 0; i < LANES; ++i) out[i] = exp(x[i]);
}

// One window of one head: cosines, what their products are divided by, and the weights.
template <typename T>
struct Weights {
  Square<T> cosine, divisor, weight;
  T q_norm[ROWS], k_norm[ROWS];

  template <int WIDTH>
  inline void compute(const Tile<T, WIDTH>& q, const Tile<T, WIDTH>& k, const T* bias, int64_t most, T tau, int n) {
    typedef typename VectorOf<T>::type V;
    products(cosine, q, k, n);
    norms(q_norm, q);
    norms(k_norm, k);
    const V least = (T)1e-6 - V{};
    V keys;
    memcpy(&keys, k_norm, sizeof keys);
    for (int i = 0; i < n; ++i) {
      const V both = q_norm[i] * keys;
      divisor.row[i] = both > least ? both : least;
      cosine.row[i] /= divisor.row[i];
      V b = ABSENT - V{};
      memcpy(&b, bias + i * most, (size_t)n * sizeof(T));
      V score = cosine.row[i] / tau + b;
      score -= largest<T>(score);
      V e;
      exponential(e, score);
      weight.row[i] = e / total<T>(e);
    }
    for (int i = n; i < ROWS; ++i) weight.row[i] = V{};
  }
};

template <typename T>
inline T at_least_tau(T tau) {
  return tau > (T)0.01 ? tau : (T)0.01;
}

template <int WIDTH, typename T>
inline void forward(T* out, const WindowRows<T>& x, int threads) {
  const int64_t row = x.heads * x.width;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && x.rows * row > 16384)
  for (int64_t window = 0; window < x.windows; ++window) {
    const int64_t first = x.cu[window];
    const int n = (int)(x.cu[window + 1] - first);
    for (int64_t head = 0; head < x.heads; ++head) {
      const T* from = x.qkv + first * 3 * row + head * x.width;
      Tile<T, WIDTH> q, k, v;
      Weights<T> w;
      load_tile(q, from, 3 * row, n, x.width);
      load_tile(k, from + row, 3 * row, n, x.width);
      w.compute(q, k, x.bias + head * x.most * x.most, x.most, at_least_tau(x.tau[head]), n);
      load_tile(v, from + 2 * row, 3 * row, n, x.width);
      weighted<false>(q, w.weight, v, n);
      store_tile(out + first * row + head * x.width, q, row, n, x.width);
    }
  }
}

template <int WIDTH, typename T>
inline void backward(T* grad_qkv, T* grad_tau, T* grad_bias, double* partial, const T* grad, const WindowRows<T>& x,
                     int threads) {
  typedef typename VectorOf<T>::type V;
  typedef VectorOf<double>::type W;
  const V least = (T)1e-6 - V{};
  const int64_t row = x.heads * x.width, square = ROWS * ROWS + 1, share = x.heads * square;
  const int64_t shares = x.windows < threads ? (x.windows > 0 ? x.windows : 1) : threads;
  // Each share is a run of windows with sums of its own, so that the result depends on the number of threads alone.
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1 && x.rows * row > 16384)
  for (int64_t part = 0; part < shares; ++part) {
    double* sums = partial + part * share;
    for (int64_t i = 0; i < share; ++i) sums[i] = 0;
    for (int64_t window = x.windows * part / shares; window < x.windows * (part + 1) / shares; ++window) {
      const int64_t first = x.cu[window];
      const int n = (int)(x.cu[window + 1] - first);
      for (int64_t head = 0; head < x.heads; ++head) {
        const T* from = x.qkv + first * 3 * row + head * x.width;
        T* to = grad_qkv + first * 3 * row + head * x.width;
        Tile<T, WIDTH> q, k, v, g, result;
        Weights<T> w;
        const T tau = at_least_tau(x.tau[head]);
        load_tile(q, from, 3 * row, n, x.width);
        load_tile(k, from + row, 3 * row, n, x.width);
        load_tile(v, from + 2 * row, 3 * row, n, x.width);
        load_tile(g, grad + first * row + head * x.width, row, n, x.width);
        w.compute(q, k, x.bias + head * x.most * x.most, x.most, tau, n);
        weighted<true>(result, w.weight, g, n);
        store_tile(to + 2 * row, result, 3 * row, n, x.width);

        // slope: of the loss along scores, then along the product of query and key
        Square<T> slope;
        products(slope, g, v, n);
        double* head_sums = sums + head * square;
        T q_share[ROWS];
        V k_share = {}, keys;
        W tau_sum = {};
        memcpy(&keys, w.k_norm, sizeof keys);
        for (int i = 0; i < n; ++i) {
          const V weight = w.weight.row[i];
          V s = weight * (slope.row[i] - total<T>(V(weight * slope.row[i])));
          const W wide = __builtin_convertvector(s, W);
          W sum;
          memcpy(&sum, head_sums + i * ROWS, sizeof sum);
          sum += wide;
          memcpy(head_sums + i * ROWS, &sum, sizeof sum);
          tau_sum += wide * __builtin_convertvector(w.cosine.row[i], W);
          s /= tau;
          // where the norms' product is below its least value it has no slope
          const V turning = w.q_norm[i] * keys > least ? s * w.cosine.row[i] : V{};
          q_share[i] = total<T>(turning);
          k_share += turning;
          slope.row[i] = s / w.divisor.row[i];
        }
        for (int i = n; i < ROWS; ++i) slope.row[i] = V{};
        head_sums[ROWS * ROWS] += total<double>(tau_sum);
        weighted<false>(result, slope, k, n);
        for (int i = 0; i < n; ++i) {
          const T norm = w.q_norm[i], factor = norm > 0 ? q_share[i] / norm / norm : 0;
          for (int d = 0; d < WIDTH; ++d) result.row[i][d] -= factor * q.row[i][d];
        }
        store_tile(to, result, 3 * row, n, x.width);
        weighted<true>(result, slope, q, n);
        for (int i = 0; i < n; ++i) {
          const T norm = w.k_norm[i], factor = norm > 0 ? k_share[i] / norm / norm : 0;
          for (int d = 0; d < WIDTH; ++d) result.row[i][d] -= factor * k.row[i][d];
        }
        store_tile(to + row, result, 3 * row, n, x.width);
      }
    }
  }
  for (int64_t head = 0; head < x.heads; ++head) {
    double* sums = partial + head * square;
    for (int64_t part = 1; part < shares; ++part) {
      for (int64_t i = 0; i < square; ++i) sums[i] += sums[part * share + i];
    }
    for (int64_t i = 0; i < x.most; ++i) {
      for (int64_t j = 0; j < x.most; ++j) grad_bias[(head * x.most + i) * x.most + j] = (T)sums[i * ROWS + j];
    }
    const double tau = (double)x.tau[head];
    grad_tau[head] = tau >= (double)(T)0.01 ? (T)(-sums[ROWS * ROWS] / (tau * tau)) : (T)0;
  }
}

template <typename T>
inline void forward_of_width(T* out, const WindowRows<T>& x, int threads) {
  if (x.width <= 1 * LANES) return forward<1>(out, x, threads);
  if (x.width <= 2 * LANES) return forward<2>(out, x, threads);
  if (x.width <= 4 * LANES) return forward<4>(out, x, threads);
  forward<8>(out, x, threads);
}

template <typename T>
inline void backward_of_width(T* grad_qkv, T* grad_tau, T* grad_bias, double* partial, const T* grad,
                              const WindowRows<T>& x, int threads) {
  if (x.width <= 1 * LANES) return backward<1>(grad_qkv, grad_tau, grad_bias, partial, grad, x, threads);
  if (x.width <= 2 * LANES) return backward<2>(grad_qkv, grad_tau, grad_bias, partial, grad, x, threads);
  if (x.width <= 4 * LANES) return backward<4>(grad_qkv, grad_tau, grad_bias, partial, grad, x, threads);
  backward<8>(grad_qkv, grad_tau, grad_bias, partial, grad, x, threads);
}

}  // namespace

namespace MT_LEVEL {

void window_attention_f32(float* out, const WindowRows<float>& x, int threads) { forward_of_width(out, x, threads); }

void window_attention_f64(double* out, const WindowRows<double>& x, int threads) { forward_of_width(out, x, threads); }

void window_attention_grad_f32(float* grad_qkv, float* grad_tau, float* grad_bias, double* partial, const float* grad,
                               const WindowRows<float>& x, int threads) {
  backward_of_width(grad_qkv, grad_tau, grad_bias, partial, grad, x, threads);
}

void window_attention_grad_f64(double* grad_qkv, double* grad_tau, double* grad_bias, double* partial,
                               const double* grad, const WindowRows<double>& x, int threads) {
  backward_of_width(grad_qkv, grad_tau, grad_bias, partial, grad, x, threads);
}

}  // namespace MT_LEVEL
