/* SPDX-License-Identifier: Apache-2.0
 * put_lengths.cuh - lengths that the host knows, to device memory. They travel inside the launch,
 * as its parameter: no copy that waits for the stream, no host memory that has to outlive the call,
 * and a captured CUDA graph carries them along.
 */
#include "cuda/args.h"
#include "cuda/ptx/ptx.cuh"

WAN_ATTN_KERNEL(KERNEL_NAME, NUM_THREADS, 1, wan_attn_cuda_put_lengths_args, args) {
    for (int i = thread_index(); i < args.count; i += NUM_THREADS)
        store_global_b32(args.to + i, (u32)args.lengths[i]);
}
