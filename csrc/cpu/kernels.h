// SPDX-License-Identifier: Apache-2.0
// What every instruction-set build provides: one namespace each. Arguments are those of masktrain_c.h.
#pragma once
#include <stdint.h>

// The numbers of a front end, as the arguments of mt_log_mel_* in masktrain_c.h.
struct LogMel {
  const double* window;
  int64_t win_length;
  const double* roots;
  int64_t n_fft, hop, lead;
  bool remove_mean, remove_dc, magnitude, floor;
  double wave_preemphasis, frame_preemphasis;
  const int64_t* first_bins;
  const int64_t* bins;
  const double* weights;
  int64_t n_mels;
  double eps, offset, divisor;
};

// A packed spectrogram and its token grid, as the arguments of mt_mask_gather_* in masktrain_c.h.
template <typename T>
struct Patches {
  const T* frames;
  int64_t n_frames, bins;
  const int64_t* cu_frames;
  const int32_t* cu_tokens;
  int64_t clips;
  const T* mean;
  const T* scale;
  int64_t freq, patch_freq, patch_time;
  bool by_time;
};

#define MT_DECLARE_KERNELS(LEVEL)                                                                                     \
  namespace LEVEL {                                                                                                   \
  void philox_words(int64_t* out, const int64_t* counter, const int64_t* ids, int64_t rows, int64_t n,                \
                    int64_t purpose, int64_t stream, int threads);                                                    \
  void dropout_f32(float* out, const float* x, const int64_t* counter, const int64_t* row_ids,                        \
                   const int64_t* row_pos, int64_t rows, int64_t width, int64_t site, int64_t threshold, float scale, \
                   int threads);                                                                                      \
  void dropout_f64(double* out, const double* x, const int64_t* counter, const int64_t* row_ids,                      \
                   const int64_t* row_pos, int64_t rows, int64_t width, int64_t site, int64_t threshold,              \
                   double scale, int threads);                                                                        \
  void attention_keep_f32(float* out, const int64_t* counter, const int64_t* clip_id, int64_t heads, int64_t n,       \
                          int64_t row_stride, int64_t head_stride, int64_t site, int64_t threshold, float scale,      \
                          int threads);                                                                               \
  void attention_keep_f64(double* out, const int64_t* counter, const int64_t* clip_id, int64_t heads, int64_t n,      \
                          int64_t row_stride, int64_t head_stride, int64_t site, int64_t threshold, double scale,     \
                          int threads);                                                                               \
  void log_mel_f32(float* out, const float* samples, const int64_t* cu_samples, const int64_t* cu_frames,             \
                   int64_t clips, const LogMel& spec, double* workspace, int threads);                                \
  void log_mel_f64(float* out, const double* samples, const int64_t* cu_samples, const int64_t* cu_frames,            \
                   int64_t clips, const LogMel& spec, double* workspace, int threads);                                \
  void mask_gather_f32(float* out, const Patches<float>& p, const int32_t* index, int64_t count, int threads);        \
  void masked_patch_loss_f32(float* out, double* partial, const float* pred, const Patches<float>& p,                 \
                             const int32_t* index, int64_t count, bool normalise, int threads);                       \
  void masked_patch_loss_grad_f32(float* out, const float* grad, const float* pred, const Patches<float>& p,          \
                                  const int32_t* index, int64_t count, bool normalise, int threads);                  \
  void mask_gather_f64(double* out, const Patches<double>& p, const int32_t* index, int64_t count, int threads);      \
  void masked_patch_loss_f64(double* out, double* partial, const double* pred, const Patches<double>& p,              \
                             const int32_t* index, int64_t count, bool normalise, int threads);                       \
  void masked_patch_loss_grad_f64(double* out, const double* grad, const double* pred, const Patches<double>& p,      \
                                  const int32_t* index, int64_t count, bool normalise, int threads);                  \
  void select_tokens(int32_t* visible, int32_t* masked, const int64_t* cu_tokens, const int64_t* cu_visible,          \
                     int64_t clips, const int64_t* counter, const int64_t* clip_ids, const void* classes,             \
                     int64_t class_bytes, bool shared, int64_t* workspace, int64_t longest, int threads);             \
  void block_marks(uint8_t* marks, const int64_t* cu_tokens, const int64_t* n_marked, int64_t clips,                  \
                   const int64_t* counter, const int64_t* clip_ids, int64_t freq, bool by_time,                       \
                   const int64_t* sides, int64_t n_sides, bool clipped, bool only_first, bool spare_first,            \
                   bool shared, int64_t* workspace, int64_t room, int threads);                                       \
  }
