// SPDX-License-Identifier: Apache-2.0
// The C functions: each hands its arguments to the build for the instruction set in use.
#include "kernels.h"
#include "masktrain_c.h"

MT_DECLARE_KERNELS(base)

#if defined(MT_X86)
MT_DECLARE_KERNELS(avx2)
MT_DECLARE_KERNELS(avx512)
#define MT_CALL(KERNEL, ...)                                        \
  switch (level()) {                                                \
    case 2: avx512::KERNEL(__VA_ARGS__); break;                     \
    case 1: avx2::KERNEL(__VA_ARGS__); break;                       \
    default: base::KERNEL(__VA_ARGS__);                             \
  }
#else
#define MT_CALL(KERNEL, ...) base::KERNEL(__VA_ARGS__)
#endif

namespace {

int best_level() {
#if defined(MT_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? 2 : avx2 ? 1 : 0;
#else
  return 0;
#endif
}

int highest_level = 2;

int level() {
  static const int best = best_level();
  return best < highest_level ? best : highest_level;
}

}  // namespace

int mt_abi_version(void) { return MT_ABI_VERSION; }

int mt_cpu_level(void) { return level(); }

int mt_set_cpu_level(int wanted) {
  highest_level = wanted < 0 ? 0 : wanted;
  return level();
}

int mt_has_openmp(void) {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

void mt_philox_words(int64_t* out, const int64_t* counter, const int64_t* ids, int64_t rows, int64_t n,
                     int64_t purpose, int64_t stream, int threads) {
  MT_CALL(philox_words, out, counter, ids, rows, n, purpose, stream, threads);
}

void mt_dropout_f32(float* out, const float* x, const int64_t* counter, const int64_t* row_ids, const int64_t* row_pos,
                    int64_t rows, int64_t width, int64_t site, int64_t threshold, float scale, int threads) {
  MT_CALL(dropout_f32, out, x, counter, row_ids, row_pos, rows, width, site, threshold, scale, threads);
}

void mt_dropout_f64(double* out, const double* x, const int64_t* counter, const int64_t* row_ids,
                    const int64_t* row_pos, int64_t rows, int64_t width, int64_t site, int64_t threshold, double scale,
                    int threads) {
  MT_CALL(dropout_f64, out, x, counter, row_ids, row_pos, rows, width, site, threshold, scale, threads);
}

void mt_attention_keep_f32(float* out, const int64_t* counter, const int64_t* clip_id, int64_t heads, int64_t n,
                           int64_t row_stride, int64_t head_stride, int64_t site, int64_t threshold, float scale,
                           int threads) {
  MT_CALL(attention_keep_f32, out, counter, clip_id, heads, n, row_stride, head_stride, site, threshold, scale,
          threads);
}

void mt_attention_keep_f64(double* out, const int64_t* counter, const int64_t* clip_id, int64_t heads, int64_t n,
                           int64_t row_stride, int64_t head_stride, int64_t site, int64_t threshold, double scale,
                           int threads) {
  MT_CALL(attention_keep_f64, out, counter, clip_id, heads, n, row_stride, head_stride, site, threshold, scale,
          threads);
}

void mt_log_mel_f32(float* out, const float* samples, const int64_t* cu_samples, const int64_t* cu_frames,
                    int64_t clips, const double* window, int64_t win_length, const double* roots, int64_t n_fft,
                    int64_t hop, int64_t lead, int remove_mean, int remove_dc, double wave_preemphasis,
                    double frame_preemphasis, int magnitude, const int64_t* first_bins, const int64_t* bins,
                    const double* weights, int64_t n_mels, int floor, double eps, double offset, double divisor,
                    double* workspace, int threads) {
  const LogMel spec = {window, win_length, roots, n_fft, hop, lead, remove_mean != 0, remove_dc != 0, magnitude != 0,
                       floor != 0, wave_preemphasis, frame_preemphasis, first_bins, bins, weights, n_mels, eps, offset,
                       divisor};
  MT_CALL(log_mel_f32, out, samples, cu_samples, cu_frames, clips, spec, workspace, threads);
}

void mt_log_mel_f64(float* out, const double* samples, const int64_t* cu_samples, const int64_t* cu_frames,
                    int64_t clips, const double* window, int64_t win_length, const double* roots, int64_t n_fft,
                    int64_t hop, int64_t lead, int remove_mean, int remove_dc, double wave_preemphasis,
                    double frame_preemphasis, int magnitude, const int64_t* first_bins, const int64_t* bins,
                    const double* weights, int64_t n_mels, int floor, double eps, double offset, double divisor,
                    double* workspace, int threads) {
  const LogMel spec = {window, win_length, roots, n_fft, hop, lead, remove_mean != 0, remove_dc != 0, magnitude != 0,
                       floor != 0, wave_preemphasis, frame_preemphasis, first_bins, bins, weights, n_mels, eps, offset,
                       divisor};
  MT_CALL(log_mel_f64, out, samples, cu_samples, cu_frames, clips, spec, workspace, threads);
}

void mt_resample_f32(float* out, const float* samples, const int64_t* clips, int64_t n_clips, const float* weights,
                     int64_t up, int64_t down, int64_t advance, int64_t outputs, int64_t reach, int64_t span,
                     float* workspace, int threads) {
  const Resampling<float> plan = {weights, up, down, advance, outputs, reach, span};
  MT_CALL(resample_f32, out, samples, clips, n_clips, plan, workspace, threads);
}

void mt_resample_f64(double* out, const double* samples, const int64_t* clips, int64_t n_clips, const double* weights,
                     int64_t up, int64_t down, int64_t advance, int64_t outputs, int64_t reach, int64_t span,
                     double* workspace, int threads) {
  const Resampling<double> plan = {weights, up, down, advance, outputs, reach, span};
  MT_CALL(resample_f64, out, samples, clips, n_clips, plan, workspace, threads);
}

void mt_mask_gather_f32(float* out, const float* frames, int64_t n_frames, int64_t bins, const int64_t* cu_frames,
                        const int32_t* cu_tokens, int64_t clips, const int32_t* index, int64_t count, const float* mean,
                        const float* scale, int64_t freq, int64_t patch_freq, int64_t patch_time, int by_time,
                        int threads) {
  const Patches<float> patches = {frames, n_frames, bins, cu_frames, cu_tokens, clips,
                                 mean, scale, freq, patch_freq, patch_time, by_time != 0};
  MT_CALL(mask_gather_f32, out, patches, index, count, threads);
}

void mt_mask_gather_f64(double* out, const double* frames, int64_t n_frames, int64_t bins, const int64_t* cu_frames,
                        const int32_t* cu_tokens, int64_t clips, const int32_t* index, int64_t count,
                        const double* mean, const double* scale, int64_t freq, int64_t patch_freq, int64_t patch_time,
                        int by_time, int threads) {
  const Patches<double> patches = {frames, n_frames, bins, cu_frames, cu_tokens, clips,
                                  mean, scale, freq, patch_freq, patch_time, by_time != 0};
  MT_CALL(mask_gather_f64, out, patches, index, count, threads);
}

void mt_patch_mad_f32(float* out, const float* frames, int64_t n_frames, int64_t bins, const int64_t* cu_frames,
                      const int32_t* cu_tokens, int64_t clips, const int32_t* index, int64_t count, const float* mean,
                      const float* scale, int64_t freq, int64_t patch_freq, int64_t patch_time, int by_time,
                      int threads) {
  const Patches<float> patches = {frames, n_frames, bins, cu_frames, cu_tokens, clips,
                                 mean, scale, freq, patch_freq, patch_time, by_time != 0};
  MT_CALL(patch_mad_f32, out, patches, index, count, threads);
}

void mt_patch_mad_f64(float* out, const double* frames, int64_t n_frames, int64_t bins, const int64_t* cu_frames,
                      const int32_t* cu_tokens, int64_t clips, const int32_t* index, int64_t count, const double* mean,
                      const double* scale, int64_t freq, int64_t patch_freq, int64_t patch_time, int by_time,
                      int threads) {
  const Patches<double> patches = {frames, n_frames, bins, cu_frames, cu_tokens, clips,
                                  mean, scale, freq, patch_freq, patch_time, by_time != 0};
  MT_CALL(patch_mad_f64, out, patches, index, count, threads);
}

void mt_mask_scatter(void* out, const void* x, const void* token, const int32_t* visible, int64_t n_visible,
                     const int32_t* masked, int64_t n_masked, int64_t row_bytes, int threads) {
  MT_CALL(mask_scatter, (char*)out, (const char*)x, (const char*)token, visible, n_visible, masked, n_masked, row_bytes,
          threads);
}

void mt_mask_scatter_grad_f32(float* grad_x, double* grad_token, const float* grad, const int32_t* visible,
                              int64_t n_visible, const int32_t* masked, int64_t n_masked, int64_t width,
                              double* partial, int threads) {
  MT_CALL(mask_scatter_grad_f32, grad_x, grad_token, grad, visible, n_visible, masked, n_masked, width, partial,
          threads);
}

void mt_mask_scatter_grad_f64(double* grad_x, double* grad_token, const double* grad, const int32_t* visible,
                              int64_t n_visible, const int32_t* masked, int64_t n_masked, int64_t width,
                              double* partial, int threads) {
  MT_CALL(mask_scatter_grad_f64, grad_x, grad_token, grad, visible, n_visible, masked, n_masked, width, partial,
          threads);
}

void mt_masked_patch_loss_f32(float* out, double* partial, const float* pred, const float* frames, int64_t n_frames,
                              int64_t bins, const int64_t* cu_frames, const int32_t* cu_tokens, int64_t clips,
                              const int32_t* index, int64_t count, const float* mean, const float* scale, int64_t freq,
                              int64_t patch_freq, int64_t patch_time, int by_time, int normalise, int threads) {
  const Patches<float> patches = {frames, n_frames, bins, cu_frames, cu_tokens, clips,
                                 mean, scale, freq, patch_freq, patch_time, by_time != 0};
  MT_CALL(masked_patch_loss_f32, out, partial, pred, patches, index, count, normalise != 0, threads);
}

void mt_masked_patch_loss_grad_f32(float* out, const float* grad, const float* pred, const float* frames,
                                   int64_t n_frames, int64_t bins, const int64_t* cu_frames, const int32_t* cu_tokens,
                                   int64_t clips, const int32_t* index, int64_t count, const float* mean,
                                   const float* scale, int64_t freq, int64_t patch_freq, int64_t patch_time,
                                   int by_time, int normalise, int threads) {
  const Patches<float> patches = {frames, n_frames, bins, cu_frames, cu_tokens, clips,
                                 mean, scale, freq, patch_freq, patch_time, by_time != 0};
  MT_CALL(masked_patch_loss_grad_f32, out, grad, pred, patches, index, count, normalise != 0, threads);
}

void mt_masked_patch_loss_f64(double* out, double* partial, const double* pred, const double* frames, int64_t n_frames,
                              int64_t bins, const int64_t* cu_frames, const int32_t* cu_tokens, int64_t clips,
                              const int32_t* index, int64_t count, const double* mean, const double* scale,
                              int64_t freq, int64_t patch_freq, int64_t patch_time, int by_time, int normalise,
                              int threads) {
  const Patches<double> patches = {frames, n_frames, bins, cu_frames, cu_tokens, clips,
                                  mean, scale, freq, patch_freq, patch_time, by_time != 0};
  MT_CALL(masked_patch_loss_f64, out, partial, pred, patches, index, count, normalise != 0, threads);
}

void mt_masked_patch_loss_grad_f64(double* out, const double* grad, const double* pred, const double* frames,
                                   int64_t n_frames, int64_t bins, const int64_t* cu_frames, const int32_t* cu_tokens,
                                   int64_t clips, const int32_t* index, int64_t count, const double* mean,
                                   const double* scale, int64_t freq, int64_t patch_freq, int64_t patch_time,
                                   int by_time, int normalise, int threads) {
  const Patches<double> patches = {frames, n_frames, bins, cu_frames, cu_tokens, clips,
                                  mean, scale, freq, patch_freq, patch_time, by_time != 0};
  MT_CALL(masked_patch_loss_grad_f64, out, grad, pred, patches, index, count, normalise != 0, threads);
}

void mt_select_tokens(int32_t* visible, int32_t* masked, const int64_t* cu_tokens, const int64_t* cu_visible,
                      int64_t clips, const int64_t* counter, const int64_t* clip_ids, const void* classes,
                      int64_t class_bytes, const float* scores, const int32_t* log2_table, int64_t stream, int shared,
                      int64_t* workspace, int64_t longest, int threads) {
  MT_CALL(select_tokens, visible, masked, cu_tokens, cu_visible, clips, counter, clip_ids, classes, class_bytes, scores,
          log2_table, stream, shared != 0, workspace, longest, threads);
}

void mt_block_marks(uint8_t* marks, const int64_t* cu_tokens, const int64_t* n_marked, int64_t clips,
                    const int64_t* counter, const int64_t* clip_ids, int64_t freq, int by_time, const int64_t* sides,
                    int64_t n_sides, int clipped, int only_first, int spare_first, int64_t stream, int shared,
                    int64_t* workspace, int64_t room, int threads) {
  MT_CALL(block_marks, marks, cu_tokens, n_marked, clips, counter, clip_ids, freq, by_time != 0, sides, n_sides,
          clipped != 0, only_first != 0, spare_first != 0, stream, shared != 0, workspace, room, threads);
}

void mt_clamped_blocks(uint8_t* marks, const int64_t* cu_tokens, const int64_t* blocks, int64_t clips,
                       const int64_t* counter, const int64_t* clip_ids, int64_t freq, int by_time, int64_t side,
                       int64_t stream, int shared, int threads) {
  MT_CALL(clamped_blocks, marks, cu_tokens, blocks, clips, counter, clip_ids, freq, by_time != 0, side, stream,
          shared != 0, threads);
}

void mt_ncut_scores(float* scores, uint8_t* foreground, const float* features, const int64_t* cu_tokens, int64_t clips,
                    int64_t width, int pca, int outliers, float* workspace, int64_t longest, int threads) {
  MT_CALL(ncut_scores, scores, foreground, features, cu_tokens, clips, width, pca != 0, outliers != 0, workspace, longest,
          threads);
}

void mt_window_attention_f32(float* out, const float* qkv, const float* tau, const float* bias, const int32_t* cu,
                             int64_t windows, int64_t rows, int64_t heads, int64_t width, int64_t most, int threads) {
  const WindowRows<float> x = {qkv, tau, bias, cu, windows, rows, heads, width, most};
  MT_CALL(window_attention_f32, out, x, threads);
}

void mt_window_attention_grad_f32(float* grad_qkv, float* grad_tau, float* grad_bias, double* partial, const float* grad,
                                  const float* qkv, const float* tau, const float* bias, const int32_t* cu, int64_t windows,
                                  int64_t rows, int64_t heads, int64_t width, int64_t most, int threads) {
  const WindowRows<float> x = {qkv, tau, bias, cu, windows, rows, heads, width, most};
  MT_CALL(window_attention_grad_f32, grad_qkv, grad_tau, grad_bias, partial, grad, x, threads);
}

void mt_window_attention_f64(double* out, const double* qkv, const double* tau, const double* bias, const int32_t* cu,
                             int64_t windows, int64_t rows, int64_t heads, int64_t width, int64_t most, int threads) {
  const WindowRows<double> x = {qkv, tau, bias, cu, windows, rows, heads, width, most};
  MT_CALL(window_attention_f64, out, x, threads);
}

void mt_window_attention_grad_f64(double* grad_qkv, double* grad_tau, double* grad_bias, double* partial, const double* grad,
                                  const double* qkv, const double* tau, const double* bias, const int32_t* cu, int64_t windows,
                                  int64_t rows, int64_t heads, int64_t width, int64_t most, int threads) {
  const WindowRows<double> x = {qkv, tau, bias, cu, windows, rows, heads, width, most};
  MT_CALL(window_attention_grad_f64, grad_qkv, grad_tau, grad_bias, partial, grad, x, threads);
}
