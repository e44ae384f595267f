// SPDX-License-Identifier: Apache-2.0
// The C interface of the native library. It knows nothing of Python or torch: arrays are pointers, sizes are counts of
// elements, and every array is dense in memory unless a stride is named.
//
// Raise MT_ABI_VERSION, and ABI in kernels/_native.py, with every change to a signature below.
#pragma once
#include <stdint.h>

#define MT_ABI_VERSION 3

#if defined(__cplusplus)
#define MT_API extern "C" __attribute__((visibility("default")))
#else
#define MT_API __attribute__((visibility("default")))
#endif

// The version that the library was built with.
MT_API int mt_abi_version(void);

// The instruction set in use: 0 base, 1 AVX2, 2 AVX-512.
MT_API int mt_cpu_level(void);

// Use `level`, or the best below it that this CPU has; return the one in use. All give the same bits.
MT_API int mt_set_cpu_level(int level);

// 1 if built with OpenMP; otherwise `threads` below has no effect.
MT_API int mt_has_openmp(void);

// The key of a draw. counter: two words [seed, step]. Key words are [seed, purpose << 16 | seed >> 32], counter words
// [block, stream, id, step], each to 32 bits.

// out[r * n + p] = word p of the stream of ids[r]: rows x n words, each in [0, 2^32).
MT_API void mt_philox_words(int64_t* out, const int64_t* counter, const int64_t* ids, int64_t rows, int64_t n,
                            int64_t purpose, int64_t stream, int threads);

// out = x * scale where the value is kept, else 0: rows x width values. Value d of row r is kept iff its 16-bit half is
// at least `threshold` (0 ... 65535): half d % 8 of block row_pos[r] * ceil(width / 8) + d / 8, id row_ids[r], purpose
// DROPOUT, stream `site`. Half h of a block is word h / 2, low 16 bits first.
MT_API void mt_dropout_f32(float* out, const float* x, const int64_t* counter, const int64_t* row_ids,
                           const int64_t* row_pos, int64_t rows, int64_t width, int64_t site, int64_t threshold,
                           float scale, int threads);
MT_API void mt_dropout_f64(double* out, const double* x, const int64_t* counter, const int64_t* row_ids,
                           const int64_t* row_pos, int64_t rows, int64_t width, int64_t site, int64_t threshold,
                           double scale, int threads);

// The multipliers of one clip's attention weights: out[h * head_stride + i * row_stride + j] = `scale` if the weight of
// head h, query i, key j (i, j < n) is kept, else 0. It uses half j % 8 of block i * ceil(n / 8) + j / 8, id *clip_id,
// purpose ATTENTION_DROPOUT, stream site * 65536 + h. Nothing else is written.
MT_API void mt_attention_keep_f32(float* out, const int64_t* counter, const int64_t* clip_id, int64_t heads, int64_t n,
                                  int64_t row_stride, int64_t head_stride, int64_t site, int64_t threshold, float scale,
                                  int threads);
MT_API void mt_attention_keep_f64(double* out, const int64_t* counter, const int64_t* clip_id, int64_t heads, int64_t n,
                                  int64_t row_stride, int64_t head_stride, int64_t site, int64_t threshold,
                                  double scale, int threads);

// Log-mel frames of `clips` waveforms: out has cu_frames[clips] rows of n_mels values. Clip b is samples[cu_samples[b]]
// ... and gives frames cu_frames[b] ... ; both have clips + 1 numbers.
//
// Frame t begins `lead` samples before sample t * hop of its clip, which is reflected at its ends. In this order: the
// clip's mean is subtracted (remove_mean, without effect with remove_dc), y[i] = x[i + 1] - wave_preemphasis * x[i]
// makes the clip one sample shorter (unless 0), the frame's mean is subtracted (remove_dc), y[i] = x[i] -
// frame_preemphasis * x[i - 1] with x[-1] = x[0] (unless 0), window (win_length), zeros up to n_fft, the power spectrum
// (its root if `magnitude`), mel sum m = sum of bins[m] weights on the spectrum from first_bins[m] on, weights of one
// sum after the other, ln(max(sum, eps)) if `floor`, else ln(sum + eps), (x + offset) / divisor.
//
// n_fft: even, 2 * 2^a 3^b 5^c. roots: exp(-2 pi i t / n_fft) for t < n_fft, real and imaginary parts in turn. eps: at
// least the smallest normal float. workspace: clips + threads * (17 * n_fft + 4 * n_mels + 128) values.
MT_API void mt_log_mel_f32(float* out, const float* samples, const int64_t* cu_samples, const int64_t* cu_frames,
                           int64_t clips, const double* window, int64_t win_length, const double* roots, int64_t n_fft,
                           int64_t hop, int64_t lead, int remove_mean, int remove_dc, double wave_preemphasis,
                           double frame_preemphasis, int magnitude, const int64_t* first_bins, const int64_t* bins,
                           const double* weights, int64_t n_mels, int floor, double eps, double offset, double divisor,
                           double* workspace, int threads);
MT_API void mt_log_mel_f64(float* out, const double* samples, const int64_t* cu_samples, const int64_t* cu_frames,
                           int64_t clips, const double* window, int64_t win_length, const double* roots, int64_t n_fft,
                           int64_t hop, int64_t lead, int remove_mean, int remove_dc, double wave_preemphasis,
                           double frame_preemphasis, int magnitude, const int64_t* first_bins, const int64_t* bins,
                           const double* weights, int64_t n_mels, int floor, double eps, double offset, double divisor,
                           double* workspace, int threads);

// Clips at the rate up / down times their own (lowest terms); out and samples hold clips anywhere. clips: for each of
// n_clips its first sample, its samples, its first output, its outputs. Row r of a clip gives outputs r * outputs ...
// r * outputs + outputs - 1 from the samples around r * advance, silence outside of the clip; outputs / advance = up /
// down. Output m = r * outputs + MT_RESAMPLE_GROUP(size of a value) * q + g is the sum over i < span, in runs of 256, of
// weights[q][i][g] * sample[r * advance + floor(GROUP * q * down / up) - reach + i]: as many q as `outputs` needs.
// workspace: threads * ((MT_RESAMPLE_ROWS + 1) * advance + span) values.
#define MT_RESAMPLE_GROUP(BYTES) (64 / (BYTES))
#define MT_RESAMPLE_ROWS 64
MT_API void mt_resample_f32(float* out, const float* samples, const int64_t* clips, int64_t n_clips,
                            const float* weights, int64_t up, int64_t down, int64_t advance, int64_t outputs,
                            int64_t reach, int64_t span, float* workspace, int threads);
MT_API void mt_resample_f64(double* out, const double* samples, const int64_t* clips, int64_t n_clips,
                            const double* weights, int64_t up, int64_t down, int64_t advance, int64_t outputs,
                            int64_t reach, int64_t span, double* workspace, int threads);

// The normalised patches of `count` tokens: out has count rows of patch_freq * patch_time values (x - mean) * scale, or
// 0 past the end of a clip. frames: n_frames x bins; clip b has frames cu_frames[b] ... and tokens cu_tokens[b] ... ;
// index: token ids through the batch. mean, scale: `bins` values each. Token t of a clip is row t % freq of column t /
// freq if by_time, else column t % columns of row t / columns; it covers patch_freq bins and patch_time frames,
// flattened with time outer if by_time, else inner. A token that does not exist gives 0.
MT_API void mt_mask_gather_f32(float* out, const float* frames, int64_t n_frames, int64_t bins,
                               const int64_t* cu_frames, const int32_t* cu_tokens, int64_t clips, const int32_t* index,
                               int64_t count, const float* mean, const float* scale, int64_t freq, int64_t patch_freq,
                               int64_t patch_time, int by_time, int threads);
MT_API void mt_mask_gather_f64(double* out, const double* frames, int64_t n_frames, int64_t bins,
                               const int64_t* cu_frames, const int32_t* cu_tokens, int64_t clips, const int32_t* index,
                               int64_t count, const double* mean, const double* scale, int64_t freq, int64_t patch_freq,
                               int64_t patch_time, int by_time, int threads);

// The score of patch_mad of `count` tokens: out has count values. The other arguments are those of mt_mask_gather_*. A
// patch has at most MT_LARGEST_PATCH values.
MT_API void mt_patch_mad_f32(float* out, const float* frames, int64_t n_frames, int64_t bins, const int64_t* cu_frames,
                             const int32_t* cu_tokens, int64_t clips, const int32_t* index, int64_t count,
                             const float* mean, const float* scale, int64_t freq, int64_t patch_freq,
                             int64_t patch_time, int by_time, int threads);
MT_API void mt_patch_mad_f64(float* out, const double* frames, int64_t n_frames, int64_t bins,
                             const int64_t* cu_frames, const int32_t* cu_tokens, int64_t clips, const int32_t* index,
                             int64_t count, const double* mean, const double* scale, int64_t freq, int64_t patch_freq,
                             int64_t patch_time, int by_time, int threads);

// Row visible[v] of out is row v of x, every row of `masked` is the one row `token`: rows of row_bytes bytes.
// Ids outside of 0 ... n_visible + n_masked - 1 write nothing; below they read 0.
MT_API void mt_mask_scatter(void* out, const void* x, const void* token, const int32_t* visible, int64_t n_visible,
                            const int32_t* masked, int64_t n_masked, int64_t row_bytes, int threads);

// Its gradients: row v of grad_x is row visible[v] of grad, grad_token (`width` values) the sum of the rows of `masked`,
// runs of MT_SUMMED_ROWS apart. partial: workspace of ceil(n_masked / MT_SUMMED_ROWS) * width values.
#define MT_SUMMED_ROWS 256
MT_API void mt_mask_scatter_grad_f32(float* grad_x, double* grad_token, const float* grad, const int32_t* visible,
                                     int64_t n_visible, const int32_t* masked, int64_t n_masked, int64_t width,
                                     double* partial, int threads);
MT_API void mt_mask_scatter_grad_f64(double* grad_x, double* grad_token, const double* grad, const int32_t* visible,
                                     int64_t n_visible, const int32_t* masked, int64_t n_masked, int64_t width,
                                     double* partial, int threads);

// *out = the sum of (pred - target)^2 over count rows of pred; the target is what mt_mask_gather_f32 gives,
// standardised row by row with the unbiased variance + 1e-6 if `normalise`. A row has at most MT_LARGEST_PATCH values.
// partial: workspace of `count` values. The functions named grad: out = 2 * *grad * (pred - target), the gradient in
// pred.
#define MT_LARGEST_PATCH 4096
MT_API void mt_masked_patch_loss_f32(float* out, double* partial, const float* pred, const float* frames,
                                     int64_t n_frames, int64_t bins, const int64_t* cu_frames, const int32_t* cu_tokens,
                                     int64_t clips, const int32_t* index, int64_t count, const float* mean,
                                     const float* scale, int64_t freq, int64_t patch_freq, int64_t patch_time,
                                     int by_time, int normalise, int threads);
MT_API void mt_masked_patch_loss_grad_f32(float* out, const float* grad, const float* pred, const float* frames,
                                          int64_t n_frames, int64_t bins, const int64_t* cu_frames,
                                          const int32_t* cu_tokens, int64_t clips, const int32_t* index, int64_t count,
                                          const float* mean, const float* scale, int64_t freq, int64_t patch_freq,
                                          int64_t patch_time, int by_time, int normalise, int threads);
MT_API void mt_masked_patch_loss_f64(double* out, double* partial, const double* pred, const double* frames,
                                     int64_t n_frames, int64_t bins, const int64_t* cu_frames, const int32_t* cu_tokens,
                                     int64_t clips, const int32_t* index, int64_t count, const double* mean,
                                     const double* scale, int64_t freq, int64_t patch_freq, int64_t patch_time,
                                     int by_time, int normalise, int threads);
MT_API void mt_masked_patch_loss_grad_f64(double* out, const double* grad, const double* pred, const double* frames,
                                          int64_t n_frames, int64_t bins, const int64_t* cu_frames,
                                          const int32_t* cu_tokens, int64_t clips, const int32_t* index, int64_t count,
                                          const double* mean, const double* scale, int64_t freq, int64_t patch_freq,
                                          int64_t patch_time, int by_time, int normalise, int threads);

// The tokens of each clip: cu_visible[b + 1] - cu_visible[b] ids of clip b go to `visible`, the others to `masked`, both
// ascending. cu_tokens, cu_visible: clips + 1 numbers. classes: one integer in [0, 2^30) of class_bytes (1, 4 or 8) for
// each token, or none if class_bytes is 0. Without scores (null), those of the smallest (class, word) are visible, the
// word being word t of the stream of purpose MASK. With scores, one for each token, those of the largest (class, key)
// are masked; key: see kernels/select_tokens/reference.py, of score and word, or of the score alone if log2_table is
// null. Ties are chosen by the lower token. log2_table: round(2^26 log2(1 + i / 1024)), i = 0 ... 1024. shared: words of
// id 0 for all clips. longest: tokens of the longest clip. workspace: threads * (4 * longest + 32) values.
MT_API void mt_select_tokens(int32_t* visible, int32_t* masked, const int64_t* cu_tokens, const int64_t* cu_visible,
                             int64_t clips, const int64_t* counter, const int64_t* clip_ids, const void* classes,
                             int64_t class_bytes, const float* scores, const int32_t* log2_table, int64_t stream,
                             int shared, int64_t* workspace, int64_t longest, int threads);

// marks[t] = 1 where a block covers token t, else 0: see kernels/block_marks. A clip of n tokens has freq rows. Its
// side is sides[word 0 of stream 2 s * n_sides / 2^32]; starts are taken by ascending word of stream 2 s + 1, purpose
// MASK_SHAPE, s being `stream`, until more than n_marked[b] tokens are covered; only_first leaves the first n_marked[b]
// of them. clipped: blocks are cut at the grid's edges; otherwise they run on in token numbers. spare_first: token 0 is
// never marked. shared: words of id 0. workspace: threads * 3 * room values, room at least 32 + the starts of a clip.
MT_API void mt_block_marks(uint8_t* marks, const int64_t* cu_tokens, const int64_t* n_marked, int64_t clips,
                           const int64_t* counter, const int64_t* clip_ids, int64_t freq, int by_time,
                           const int64_t* sides, int64_t n_sides, int clipped, int only_first, int spare_first,
                           int64_t stream, int shared, int64_t* workspace, int64_t room, int threads);

// As mt_block_marks, of blocks[b] blocks of one side for clip b, however many tokens they cover. Centre k of a clip of n
// tokens is word k * n / 2^32 of stream 2 s + 1, counted time outer; its block begins side / 2 cells before it and is cut
// at the grid's edges.
MT_API void mt_clamped_blocks(uint8_t* marks, const int64_t* cu_tokens, const int64_t* blocks, int64_t clips,
                              const int64_t* counter, const int64_t* clip_ids, int64_t freq, int by_time, int64_t side,
                              int64_t stream, int shared, int threads);

// Scores and foreground (1 or 0) of each token for self-guided masking: see kernels/ncut_scores. features: width values
// for each token. pca: the partition by the principal direction, otherwise by normalised cut. outliers: the rule
// "s1_code", otherwise "paper". longest: tokens of the longest clip. workspace: threads * (longest * (stride + 22) + 4 *
// stride) values, stride being the first multiple of 16 above width.
MT_API void mt_ncut_scores(float* scores, uint8_t* foreground, const float* features, const int64_t* cu_tokens,
                           int64_t clips, int64_t width, int pca, int outliers, float* workspace, int64_t longest,
                           int threads);

// Attention inside windows of consecutive rows: window w is rows cu[w] ... cu[w + 1] - 1, at most `most`, of `rows` in
// all; most is at most MT_LARGEST_WINDOW, width at most MT_LARGEST_HEAD. qkv: rows x 3 x heads x width. Row i of a
// window weighs its values by softmax over j of q_i k_j / max(|q_i| |k_j|, 1e-6) / max(tau, 0.01) + bias[head][i][j],
// bias having most x most values for each head. out: rows x heads x width. The functions named grad: the gradients in
// qkv, tau and bias of what has the gradient `grad` in out. partial: workspace of threads * heads * 257 values.
#define MT_LARGEST_WINDOW 16
#define MT_LARGEST_HEAD 128
MT_API void mt_window_attention_f32(float* out, const float* qkv, const float* tau, const float* bias, const int32_t* cu,
                                    int64_t windows, int64_t rows, int64_t heads, int64_t width, int64_t most,
                                    int threads);
MT_API void mt_window_attention_grad_f32(float* grad_qkv, float* grad_tau, float* grad_bias, double* partial,
                                         const float* grad, const float* qkv, const float* tau, const float* bias,
                                         const int32_t* cu, int64_t windows, int64_t rows, int64_t heads,
                                         int64_t width, int64_t most, int threads);
MT_API void mt_window_attention_f64(double* out, const double* qkv, const double* tau, const double* bias, const int32_t* cu,
                                    int64_t windows, int64_t rows, int64_t heads, int64_t width, int64_t most,
                                    int threads);
MT_API void mt_window_attention_grad_f64(double* grad_qkv, double* grad_tau, double* grad_bias, double* partial,
                                         const double* grad, const double* qkv, const double* tau, const double* bias,
                                         const int32_t* cu, int64_t windows, int64_t rows, int64_t heads,
                                         int64_t width, int64_t most, int threads);
