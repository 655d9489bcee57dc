/* SPDX-License-Identifier: Apache-2.0
 * ptx.cuh - the one door from a kernel to the hardware. Behind it lie either the PTX instructions
 * or, under WAN_ATTN_EMULATE, functions of the same names that do on the CPU what the PTX manual
 * says (tests/emu/). A kernel that uses nothing else runs on both.
 */
#ifndef WAN_ATTN_CUDA_PTX_H
#define WAN_ATTN_CUDA_PTX_H

typedef unsigned int u32;
typedef long long i64;

/* Turing's tensor cores and conversions know no bf16. */
#if __CUDA_ARCH__ >= 800 || EMULATED_ARCH >= 80
#define HAS_BF16 1
#else
#define HAS_BF16 0
#endif

#if defined(WAN_ATTN_EMULATE)
#include "emu/ptx_host.h"
#else
#include "cuda/ptx/thread.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/math.cuh"
#endif
#include "cuda/ptx/bf16.cuh"

#endif /* WAN_ATTN_CUDA_PTX_H */
