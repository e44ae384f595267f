// SPDX-License-Identifier: Apache-2.0
// Windowed-sinc resampling by a rational ratio. Compiled once for each instruction set; MT_LEVEL is the namespace.
//
// A row of a clip stands for `advance` of its samples and gives `outputs` outputs, GROUP of them at a time: GROUP outputs
// that follow each other read the same `span` samples with different weights. The weights of a group stay in the
// first-level cache while ROWS rows at a time pass. Each output is one sum over its samples in ascending order, whatever
// the instruction set and wherever its clip lies.
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "kernels.h"
#include "lanes.h"
#include "masktrain_c.h"

MT_DECLARE_KERNELS(MT_LEVEL)

namespace {

const int ROWS = WIDTH > 4 ? 8 : 4;  // whose sums and weights fit the registers
const int64_t SUMMED = 256;
const int64_t TASK_ROWS = MT_RESAMPLE_ROWS;  // rows that a thread takes at a time

template <typename T>
struct Lanes;
template <>
struct Lanes<double> {
  typedef Wide Vector;
};
template <>
struct Lanes<float> {
  typedef WideFloat Vector;
};

// out[r * GROUP + g] <- sum over i < span of x[r * advance + i] * weights[i * GROUP + g], for GROUP = 64 bytes of outputs
// of each of ROWS rows, COUNT vectors. Runs of SUMMED samples are added up apart: float sums of thousands stay accurate.
template <int COUNT, typename T>
inline void sums(T* __restrict out, const T* __restrict x, int64_t advance, const T* __restrict weights, int64_t span) {
  typedef typename Lanes<T>::Vector V;
  const int64_t group = 64 / sizeof(T), lanes = sizeof(V) / sizeof(T);
  for (int64_t first = 0; first < span; first += SUMMED) {
    const int64_t end = span - first < SUMMED ? span : first + SUMMED;
    V total[ROWS][COUNT] = {};
    for (int64_t i = first; i < end; ++i) {
      V w[COUNT];
      for (int k = 0; k < COUNT; ++k) w[k] = load<V>(weights + i * group + k * lanes);
      for (int r = 0; r < ROWS; ++r) {
        for (int k = 0; k < COUNT; ++k) total[r][k] += x[r * advance + i] * w[k];
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      for (int k = 0; k < COUNT; ++k) {
        T* to = out + r * group + k * lanes;
        store(to, first ? load<V>(to) + total[r][k] : total[r][k]);
      }
    }
  }
}

// Copy `count` samples from number `first` of a clip on; those outside of the clip are 0.
template <typename T>
inline void copy_part(T* to, const T* clip, int64_t samples, int64_t first, int64_t count) {
  const int64_t begin = first < 0 ? -first : 0, end = samples - first < count ? samples - first : count;
  int64_t i = 0;
  for (; i < count && i < begin; ++i) to[i] = 0;
  for (; i < end; ++i) to[i] = clip[first + i];
  for (; i < count; ++i) to[i] = 0;
}

template <typename T>
void resample(T* out, const T* samples, const int64_t* clips, int64_t n_clips, const Resampling<T>& plan, T* workspace,
              int threads) {
  const int64_t GROUP = 64 / sizeof(T);
  const int VECTORS = 64 / sizeof(Wide);
  const int64_t groups = (plan.outputs + GROUP - 1) / GROUP;
  const int64_t last_first = (groups - 1) * GROUP * plan.down / plan.up;
  const int64_t room = (TASK_ROWS - 1) * plan.advance + last_first + plan.span;
  int64_t tasks = 0;
  for (int64_t b = 0; b < n_clips; ++b) {
    tasks += (clips[4 * b + 3] + TASK_ROWS * plan.outputs - 1) / (TASK_ROWS * plan.outputs);
  }
#pragma omp parallel num_threads(threads) if (threads > 1 && tasks > 1)
  {
#if defined(_OPENMP)
    T* const part = workspace + omp_get_thread_num() * room;
#else
    T* const part = workspace;
#endif
    int64_t clip = 0, first_task = 0;  // the clip of the task before, and its first task
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t size = TASK_ROWS * plan.outputs;
      int64_t clip_tasks;
      while (task >= first_task + (clip_tasks = (clips[4 * clip + 3] + size - 1) / size)) {
        first_task += clip_tasks;
        ++clip;
      }
      const int64_t* place = clips + 4 * clip;  // first sample, samples, first output, outputs
      const int64_t row = (task - first_task) * TASK_ROWS, done = row * plan.outputs;
      const int64_t left = place[3] - done < size ? place[3] - done : size;
      const int64_t rows = ((left + plan.outputs - 1) / plan.outputs + ROWS - 1) / ROWS * ROWS;
      copy_part(part, samples + place[0], place[1], row * plan.advance - plan.reach,
                (rows - 1) * plan.advance + last_first + plan.span);
      T* to = out + place[2] + done;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t column = group * GROUP;
        const int64_t wide = plan.outputs - column < GROUP ? plan.outputs - column : GROUP;
        const T* from = part + column * plan.down / plan.up;
        for (int64_t r = 0; r < rows; r += ROWS) {
          alignas(64) T tile[ROWS * 64 / sizeof(T)];
          sums<VECTORS>(tile, from + r * plan.advance, plan.advance, plan.weights + group * plan.span * GROUP,
                        plan.span);
          for (int64_t i = 0; i < ROWS; ++i) {
            const int64_t at = (r + i) * plan.outputs + column;
            for (int64_t g = 0; g < wide && at + g < left; ++g) to[at + g] = tile[i * GROUP + g];
          }
        }
      }
    }
  }
}

}  // namespace

namespace MT_LEVEL {

void resample_f32(float* out, const float* samples, const int64_t* clips, int64_t n_clips,
                  const Resampling<float>& plan, float* workspace, int threads) {
  resample(out, samples, clips, n_clips, plan, workspace, threads);
}

void resample_f64(double* out, const double* samples, const int64_t* clips, int64_t n_clips,
                  const Resampling<double>& plan, double* workspace, int threads) {
  resample(out, samples, clips, n_clips, plan, workspace, threads);
}

}  // namespace MT_LEVEL
