// SPDX-License-Identifier: Apache-2.0
// select_tokens: one thread block selects the tokens of a clip.
#include <cuda_runtime_api.h>

#include "masktrain_cuda.h"
#include "select_clip.h"

namespace masktrain_cuda {

const int THREADS = 256;

__global__ void __launch_bounds__(THREADS)
    select_tokens_kernel(int32_t* visible, int32_t* masked, const int32_t* cu_tokens, const int32_t* cu_visible,
                         int64_t n_visible, const int64_t* counter, const int64_t* clip_ids, const void* classes,
                         int64_t class_bytes, const float* scores, const int32_t* log2_table, uint32_t stream,
                         bool shared) {
  extern __shared__ uint64_t keys[];
  __shared__ Selection selection;
  const int64_t b = blockIdx.x;
  const int32_t start = cu_tokens[b], n = cu_tokens[b + 1] - start;
  const int64_t first = cu_visible ? cu_visible[b] : b * n_visible;
  const int32_t own = (int32_t)(cu_visible ? cu_visible[b + 1] - first : n_visible);
  const Draw draw = {counter,
                     stream,
                     shared ? 0 : (uint32_t)clip_ids[b],
                     (const char*)classes + start * class_bytes,
                     class_bytes,
                     scores ? scores + start : nullptr,
                     log2_table};
  visible += first;
  masked += start - first;
  const Clip clip = {start, n, scores ? n - own : own, scores ? masked : visible, scores ? visible : masked};
  select_clip(CudaBlock(), selection, keys, clip, draw);
}

}  // namespace masktrain_cuda

int mt_cuda_select_tokens(int32_t* visible, int32_t* masked, const int32_t* cu_tokens, const int32_t* cu_visible,
                          int64_t n_visible, int64_t clips, const int64_t* counter, const int64_t* clip_ids,
                          const void* classes, int64_t class_bytes, const float* scores, const int32_t* log2_table,
                          int64_t draw, int shared, int64_t longest, void* stream) {
  if (longest > MT_CUDA_SELECT_MOST_TOKENS) return cudaErrorInvalidValue;
  if (!clips) return cudaSuccess;
  const int bytes = (int)(longest * (int64_t)sizeof(uint64_t));
  // More than 48 KiB have to be asked for.
  const auto kernel = masktrain_cuda::select_tokens_kernel;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<(unsigned)clips, masktrain_cuda::THREADS, bytes, (cudaStream_t)stream>>>(
      visible, masked, cu_tokens, cu_visible, n_visible, counter, clip_ids, classes, class_bytes, scores, log2_table,
      (uint32_t)draw, shared != 0);
  return cudaGetLastError();
}
