// SPDX-License-Identifier: Apache-2.0
// The C interface of the CUDA library. It knows nothing of Python or torch: arrays are pointers to memory of the current
// device, dense, sizes are counts of elements, and `stream` is a cudaStream_t.
//
// Functions that return int start their work on the stream and answer a cudaError_t, 0 if it was started.
//
// Raise MT_CUDA_ABI_VERSION, and ABI in kernels/_cuda_native.py, with every change to a signature below.
#pragma once
#include <stdint.h>

#define MT_CUDA_ABI_VERSION 1

#if defined(__cplusplus)
#define MT_API extern "C" __attribute__((visibility("default")))
#else
#define MT_API __attribute__((visibility("default")))
#endif

// The version that the library was built with.
MT_API int mt_cuda_abi_version(void);

// What a cudaError_t says.
MT_API const char* mt_cuda_error(int error);

// The tokens of each clip: n_visible ids of clip b, or cu_visible[b + 1] - cu_visible[b] unless that is null, go to
// `visible`, the others to `masked`, both ascending. cu_tokens, cu_visible: clips + 1 numbers. counter: two words [seed,
// step]. classes: one integer in [0, 2^30) of class_bytes (1, 4 or 8) for each token, or none if class_bytes is 0.
// Without scores (null), those of the smallest (class, word) are visible, the word being word t of stream `draw` of
// purpose MASK. With scores, one for each token, those of the largest (class, key) are masked; key: see
// kernels/select_tokens/reference.py, of score and word, or of the score alone if log2_table is null. Ties are chosen by
// the lower token. log2_table: round(2^26 log2(1 + i / 1024)), i = 0 ... 1024. shared: words of id 0 for all clips.
// longest: at least the tokens of the longest clip, at most MT_CUDA_SELECT_MOST_TOKENS.
#define MT_CUDA_SELECT_MOST_TOKENS 7936
MT_API int mt_cuda_select_tokens(int32_t* visible, int32_t* masked, const int32_t* cu_tokens, const int32_t* cu_visible,
                                 int64_t n_visible, int64_t clips, const int64_t* counter, const int64_t* clip_ids,
                                 const void* classes, int64_t class_bytes, const float* scores,
                                 const int32_t* log2_table, int64_t draw, int shared, int64_t longest, void* stream);
