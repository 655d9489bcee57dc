/* SPDX-License-Identifier: Apache-2.0
 * proof.c - keeps what the caller of the library has said of each row on each card.
 */
#include "cuda/host/proof.h"

#include "core/atomic.h"
#include "cuda/host/device.h"

/* A row behind these is asked for at each call. DTYPES of v: f16, bf16. */
enum { MOST_ROWS = 64, DTYPES = 2 };

/* wan_attn_proof of each. Two threads that ask at once get the same answer. */
static wan_attn_flags answers[WAN_ATTN_CUDA_MAX_DEVICES][MOST_ROWS][DTYPES];

static wan_attn_proof ask(const wan_attn_problem *p) {
    wan_attn_proof_fn find = wan_attn_cuda_find_proof();
    if (!find)
        return WAN_ATTN_PROOF_PASSED;
    int32_t answer = find(p->params->q.device_index, p->kernel_name, (int32_t)p->dtype);
    return answer == WAN_ATTN_PROOF_PASSED || answer == WAN_ATTN_PROOF_FAILED
               ? (wan_attn_proof)answer
               : WAN_ATTN_PROOF_MISSING;
}

const char *wan_attn_cuda_refuse_unproven(const wan_attn_problem *p) {
    wan_attn_flags *place = NULL;
    if (p->kernel < MOST_ROWS)
        place = &answers[p->params->q.device_index][p->kernel][p->dtype == WAN_ATTN_BF16];
    wan_attn_proof answer = place ? (wan_attn_proof)wan_attn_load(place) : WAN_ATTN_PROOF_MISSING;
    if (answer == WAN_ATTN_PROOF_MISSING) {
        answer = ask(p);
        if (place && answer != WAN_ATTN_PROOF_MISSING)
            wan_attn_store(place, (uint32_t)answer);
    }
    return answer == WAN_ATTN_PROOF_PASSED ? NULL
           : answer == WAN_ATTN_PROOF_FAILED
               ? "has not passed its proof on this card: `python -m wan_attn doctor` says why"
               : "has no proof on this card yet: `python -m wan_attn prove` makes it";
}

void wan_attn_cuda_forget_proofs(void) {
    for (int device = 0; device < WAN_ATTN_CUDA_MAX_DEVICES; device++)
        for (int row = 0; row < MOST_ROWS; row++)
            for (int dtype = 0; dtype < DTYPES; dtype++)
                wan_attn_store(&answers[device][row][dtype], WAN_ATTN_PROOF_MISSING);
}
