/* SPDX-License-Identifier: Apache-2.0
 * random_lists.h - lists of blocks for a random call, and what goes with them.
 */
#ifndef WAN_ATTN_TESTS_RANDOM_LISTS_H
#define WAN_ATTN_TESTS_RANDOM_LISTS_H

#include "random_call.h"

/* No two elements of a list in one place, as they are written one by one. */
static buffer *give_list(wan_attn_tensor *t, int32_t ndim, const int64_t shape[4]) {
    *t = describe(WAN_ATTN_I32, ndim, shape[0], shape[1], shape[2], ndim == 4 ? shape[3] : 0);
    choose_strides_of(t, ndim, 1);
    return give_memory(t, POISON);
}

static void choose_lists(wan_attn_params *p) {
    int64_t blocks = (p->k.shape[1] + WAN_ATTN_BLOCK - 1) / WAN_ATTN_BLOCK;
    int64_t shape[4] = {p->q.shape[0], p->q.shape[2],
                        (p->q.shape[1] + WAN_ATTN_BLOCK - 1) / WAN_ATTN_BLOCK, pick(blocks + 3)};
    buffer *counts = give_list(&p->block_counts, 3, shape);
    buffer *indices = give_list(&p->block_indices, 4, shape);
    for (int64_t b = 0; b < shape[0]; b++)
        for (int64_t h = 0; h < shape[1]; h++)
            for (int64_t m = 0; m < shape[2]; m++) {
                int64_t count = 0, most = one_in(3) ? shape[3] : pick(shape[3] + 1);
                for (int64_t n = 0; n < blocks && count < most; n++)
                    if (!one_in(3))
                        write_element(element(&p->block_indices, b, h, m, count++), WAN_ATTN_I32,
                                      (double)n);
                write_element(element(&p->block_counts, b, h, m, 0), WAN_ATTN_I32, (double)count);
            }
    make_read_only(counts);
    make_read_only(indices);
    p->pools_others = one_in(4);
}

#endif /* WAN_ATTN_TESTS_RANDOM_LISTS_H */
