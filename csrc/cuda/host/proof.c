/* SPDX-License-Identifier: Apache-2.0
 * proof.c - keeps what the caller of the library has said of each row on each card.
 */
#include "cuda/host/proof.h"

#include "core/atomic.h"
#include "cuda/host/device.h"

/* A row behind these is asked for at each call. DTYPES: f32, f16, bf16. */
enum { MOST_ROWS = 80, DTYPES = 3 };

/* wan_attn_proof of each. Two threads that ask at once get the same answer. */
static wan_attn_flags answers[WAN_ATTN_CUDA_MAX_DEVICES][MOST_ROWS][DTYPES];

static wan_attn_proof ask(int32_t device_index, const char *row_name, wan_attn_dtype dtype) {
    wan_attn_proof_fn find = wan_attn_cuda_find_proof();
    if (!find)
        return WAN_ATTN_PROOF_PASSED;
    int32_t answer = find(device_index, row_name, (int32_t)dtype);
    return answer == WAN_ATTN_PROOF_PASSED || answer == WAN_ATTN_PROOF_FAILED
               ? (wan_attn_proof)answer
               : WAN_ATTN_PROOF_MISSING;
}

const char *wan_attn_cuda_refuse_unproven(int32_t device_index, int32_t row, const char *row_name,
                                          wan_attn_dtype dtype) {
    wan_attn_flags *place = NULL;
    if (row < MOST_ROWS)
        place = &answers[device_index][row][dtype];
    wan_attn_proof answer = place ? (wan_attn_proof)wan_attn_load(place) : WAN_ATTN_PROOF_MISSING;
    if (answer == WAN_ATTN_PROOF_MISSING) {
        answer = ask(device_index, row_name, dtype);
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
