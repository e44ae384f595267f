// SPDX-License-Identifier: Apache-2.0
// Fill of random words. Compiled once for each instruction set; MT_LEVEL is the namespace.
#include "kernels.h"
#include "philox.h"

MT_DECLARE_KERNELS(MT_LEVEL)

namespace MT_LEVEL {

void philox_words(int64_t* out, const int64_t* counter, const int64_t* ids, int64_t rows, int64_t n, int64_t purpose,
                  int64_t stream, int threads) {
  const int64_t runs = (n + 4 * RUN_BLOCKS - 1) / (4 * RUN_BLOCKS);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * n > 8192)
  for (int64_t task = 0; task < rows * runs; ++task) {
    const int64_t row = task / runs, first = task % runs * RUN_BLOCKS;
    const int64_t left = n - 4 * first, count = left < 4 * RUN_BLOCKS ? left : 4 * RUN_BLOCKS;
    alignas(64) uint32_t words[4 * RUN_BLOCKS];
    philox_run(words, make_key(counter, ids[row], (uint32_t)purpose, (uint32_t)stream), (uint64_t)first,
               (count + 3) / 4);
    int64_t* to = out + row * n + 4 * first;
    for (int64_t i = 0; i < count; ++i) to[i] = words[i];
  }
}

}  // namespace MT_LEVEL
