// SPDX-License-Identifier: Apache-2.0
// Algorithms of one thread block are written against a Block, so that a C++ compiler can compile and a test can run them
// without a GPU. A Block has
//   each(n, f): f(i) for every i < n in any order, all done when it returns (on a GPU, a barrier),
//   add(to, x): *to += x as one operation.
// What lies between two calls is done by every thread alike.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#define MT_DEVICE __device__ __forceinline__

struct CudaBlock {
  template <class F>
  MT_DEVICE void each(int32_t n, F f) const {
    for (int32_t i = (int32_t)threadIdx.x; i < n; i += (int32_t)blockDim.x) f(i);
    __syncthreads();
  }
  MT_DEVICE void add(uint32_t* to, uint32_t x) const { atomicAdd(to, x); }
};
#else
#define MT_DEVICE inline
#endif

// One block of Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011): `words` holds the counter, then the random words.
MT_DEVICE void philox_4x32(uint32_t words[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = (uint64_t)words[0] * 0xD2511F53u, p1 = (uint64_t)words[2] * 0xCD9E8D57u;
    words[0] = (uint32_t)(p1 >> 32) ^ words[1] ^ k0;
    words[2] = (uint32_t)(p0 >> 32) ^ words[3] ^ k1;
    words[1] = (uint32_t)p1;
    words[3] = (uint32_t)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}
