/* SPDX-License-Identifier: Apache-2.0
 * proof.h - whether a row has shown on this very card that it is right: the caller of the library
 * knows, and is asked once for each device, row and dtype. Makes no proof itself.
 */
#ifndef WAN_ATTN_CUDA_HOST_PROOF_H
#define WAN_ATTN_CUDA_HOST_PROOF_H

#include "core/kernel.h"

/* Why the row of this call, whose device has been found, must not run there yet; or NULL. */
const char *wan_attn_cuda_refuse_unproven(const wan_attn_problem *problem);

/* Ask again: there is another configuration. */
void wan_attn_cuda_forget_proofs(void);

/* driver.c: whom to ask; NULL: every row counts as proven. */
wan_attn_proof_fn wan_attn_cuda_find_proof(void);

#endif /* WAN_ATTN_CUDA_HOST_PROOF_H */
