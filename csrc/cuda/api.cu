// SPDX-License-Identifier: Apache-2.0
// What the CUDA library says of itself.
#include <cuda_runtime_api.h>

#include "masktrain_cuda.h"

int mt_cuda_abi_version(void) { return MT_CUDA_ABI_VERSION; }

const char* mt_cuda_error(int error) { return cudaGetErrorString((cudaError_t)error); }
