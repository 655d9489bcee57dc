/* SPDX-License-Identifier: Apache-2.0
 * ptx_sm90.cuh - the door for kernels of sm_90a: what ptx.cuh offers, and Hopper's own
 * instructions.
 */
#ifndef WAN_ATTN_CUDA_PTX_SM90_H
#define WAN_ATTN_CUDA_PTX_SM90_H

#include "cuda/ptx/ptx.cuh"

typedef unsigned long long u64;

#if defined(WAN_ATTN_EMULATE)
#include "emu/ptx_sm90_host.h"
#else
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#endif

#endif /* WAN_ATTN_CUDA_PTX_SM90_H */
