/* SPDX-License-Identifier: Apache-2.0
 * mbarrier.cuh - barriers in shared memory that also count bytes of bulk copies.
 *
 * A phase ends when `count` arrivals have been made and all announced bytes have come; the next one
 * begins at once. Waiting for parity p passes when the phase of that parity is over: waiters keep
 * the parity, which is 0 for the first phase, and turn it with each round.
 */
#ifndef WAN_ATTN_CUDA_PTX_MBARRIER_H
#define WAN_ATTN_CUDA_PTX_MBARRIER_H

DEVICE void mbarrier_init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

/* By the thread that has initialised barriers, before others, TMA or other blocks use them; a
 * barrier of block or cluster must follow. */
DEVICE void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/* One arrival that also announces bytes to come. */
DEVICE void mbarrier_arrive_and_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

DEVICE void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* At the same place in the shared memory of another block of the cluster. Says that this warp has
 * done reading, which is over when wgmma_wait returns: no store has to be made visible, and
 * .release.cluster would cost a memory barrier of the whole GPU (MEMBAR.ALL.GPU) each time. */
DEVICE void mbarrier_arrive_at(u32 barrier, u32 rank) {
    asm volatile("{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
                 "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
                 "r"(rank)
                 : "memory");
}

DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
    asm volatile("{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], "
                 "%1; @done bra.uni over; bra.uni again; over: }" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

#endif /* WAN_ATTN_CUDA_PTX_MBARRIER_H */
