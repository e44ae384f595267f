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

// How one ratio of rates is resampled, as the arguments of mt_resample_* in masktrain_c.h.
template <typename T>
struct Resampling {
  const T* weights;
  int64_t up, down, advance, outputs, reach, span;
};

// Rows cut into windows, as the arguments of mt_window_attention_* in masktrain_c.h.
template <typename T>
struct WindowRows {
  const T* qkv;
  const T* tau;
  const T* bias;
  const int32_t* cu;
  int64_t windows, rows, heads, width, most;
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
  void resample_f32(float* out, const float* samples, const int64_t* clips, int64_t n_clips,                          \
                    const Resampling<float>& plan, float* workspace, int threads);                                    \
  void resample_f64(double* out, const double* samples, const int64_t* clips, int64_t n_clips,                        \
                    const Resampling<double>& plan, double* workspace, int threads);                                  \
  void mask_gather_f32(float* out, const Patches<float>& p, const int32_t* index, int64_t count, int threads);        \
  void mask_scatter(char* out, const char* x, const char* token, const int32_t* visible, int64_t n_visible,           \
                    const int32_t* masked, int64_t n_masked, int64_t row_bytes, int threads);                         \
  void mask_scatter_grad_f32(float* grad_x, double* grad_token, const float* grad, const int32_t* visible,            \
                             int64_t n_visible, const int32_t* masked, int64_t n_masked, int64_t width,               \
                             double* partial, int threads);                                                           \
  void mask_scatter_grad_f64(double* grad_x, double* grad_token, const double* grad, const int32_t* visible,          \
                             int64_t n_visible, const int32_t* masked, int64_t n_masked, int64_t width,               \
                             double* partial, int threads);                                                           \
  void masked_patch_loss_f32(float* out, double* partial, const float* pred, const Patches<float>& p,                 \
                             const int32_t* index, int64_t count, bool normalise, int threads);                       \
  void masked_patch_loss_grad_f32(float* out, const float* grad, const float* pred, const Patches<float>& p,          \
                                  const int32_t* index, int64_t count, bool normalise, int threads);                  \
  void mask_gather_f64(double* out, const Patches<double>& p, const int32_t* index, int64_t count, int threads);      \
  void masked_patch_loss_f64(double* out, double* partial, const double* pred, const Patches<double>& p,              \
                             const int32_t* index, int64_t count, bool normalise, int threads);                       \
  void masked_patch_loss_grad_f64(double* out, const double* grad, const double* pred, const Patches<double>& p,      \
                                  const int32_t* index, int64_t count, bool normalise, int threads);                  \
  void patch_mad_f32(float* out, const Patches<float>& p, const int32_t* index, int64_t count, int threads);          \
  void patch_mad_f64(float* out, const Patches<double>& p, const int32_t* index, int64_t count, int threads);         \
  void select_tokens(int32_t* visible, int32_t* masked, const int64_t* cu_tokens, const int64_t* cu_visible,          \
                     int64_t clips, const int64_t* counter, const int64_t* clip_ids, const void* classes,             \
                     int64_t class_bytes, const float* scores, const int32_t* log2_table, int64_t stream,             \
                     bool shared, int64_t* workspace, int64_t longest, int threads);                                  \
  void block_marks(uint8_t* marks, const int64_t* cu_tokens, const int64_t* n_marked, int64_t clips,                  \
                   const int64_t* counter, const int64_t* clip_ids, int64_t freq, bool by_time,                       \
                   const int64_t* sides, int64_t n_sides, bool clipped, bool only_first, bool spare_first,            \
                   int64_t stream, bool shared, int64_t* workspace, int64_t room, int threads);                       \
  void clamped_blocks(uint8_t* marks, const int64_t* cu_tokens, const int64_t* blocks, int64_t clips,                 \
                      const int64_t* counter, const int64_t* clip_ids, int64_t freq, bool by_time, int64_t side,      \
                      int64_t stream, bool shared, int threads);                                                      \
  void ncut_scores(float* scores, uint8_t* foreground, const float* features, const int64_t* cu_tokens, int64_t clips,\
                   int64_t width, bool pca, bool outliers, float* workspace, int64_t longest, int threads);           \
  void window_attention_f32(float* out, const WindowRows<float>& x, int threads);                                     \
  void window_attention_f64(double* out, const WindowRows<double>& x, int threads);                                   \
  void window_attention_grad_f32(float* grad_qkv, float* grad_tau, float* grad_bias, double* partial,                 \
                                 const float* grad, const WindowRows<float>& x, int threads);                         \
  void window_attention_grad_f64(double* grad_qkv, double* grad_tau, double* grad_bias, double* partial,              \
                                 const double* grad, const WindowRows<double>& x, int threads);                       \
  }
