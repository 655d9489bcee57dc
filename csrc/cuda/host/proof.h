/* SPDX-License-Identifier: Apache-2.0
 * proof.h - whether a row has shown on this very card that it is right: the caller of the library
 * knows, and is asked once for each device, row and dtype. Makes no proof itself.
 */
#ifndef WAN_ATTN_CUDA_HOST_PROOF_H
#define WAN_ATTN_CUDA_HOST_PROOF_H

#include "core/kernel.h"

/* Rows of rms_norm_rope, and of gradients, are counted from here on, behind those of attention. */
enum { WAN_ATTN_CUDA_FIRST_ROPE_ROW = 48, WAN_ATTN_CUDA_FIRST_BACKWARD_ROW = 64 };

/* Why this row must not run yet on this device, which has been found, for calls of this dtype of v
 * or x; or NULL. `row` counts in its table. */
const char *wan_attn_cuda_refuse_unproven(int32_t device_index, int32_t row, const char *row_name,
                                          wan_attn_dtype dtype);

/* Ask again: there is another configuration. */
void wan_attn_cuda_forget_proofs(void);

/* driver.c: whom to ask; NULL: every row counts as proven. */
wan_attn_proof_fn wan_attn_cuda_find_proof(void);

#endif /* WAN_ATTN_CUDA_HOST_PROOF_H */
