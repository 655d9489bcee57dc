/* SPDX-License-Identifier: Apache-2.0
 * broken.c - calls that the contract forbids, one fault at a time and two at once: each must be
 * refused with words that name the argument, and nothing may be written.
 *
 *     broken SEED FIRST COUNT [SECONDS]     prints every case that was not refused as it should be
 */
#include "broken_call.h"

static int names(const char *message, const fault *f) {
    return strstr(message, f->argument) != NULL ||
           (f->is_misfit && (strstr(message, "query") || strstr(message, "key") ||
                             strstr(message, "_lens") || strstr(message, "block_")));
}

/* Questions may refuse or answer; they must come back, and have words for a refusal. */
static outcome ask_everything(const wan_attn_params *p) {
    int32_t row = -1;
    size_t size = 0;
    for (int32_t r = -2; r <= wan_attn_kernel_count(); r++) {
        wan_attn_error err;
        memset(&err, '?', sizeof(err));
        wan_attn_status status = r == -2   ? wan_attn_select(p, &row, &err)
                                 : r == -1 ? wan_attn_workspace_size(p, &size, &err)
                                           : wan_attn_why_not(p, r, &err);
        if (!is_answer(status, &err))
            return WORDS;
    }
    return wan_attn_select(p, &row, NULL) == WAN_ATTN_INTERNAL ? WORDS : REFUSED;
}

static void run_child(uint64_t number) {
    good_call c = make_good_call();
    fault faults[2];
    wan_attn_error err;
    int count = number < FAULTS ? 1 : 2;
    int numbers[2] = {(int)number, 0};
    if (count > 1) {
        numbers[0] = (int)pick(FAULTS);
        do
            numbers[1] = (int)pick(FAULTS);
        while (may_undo(numbers[0], numbers[1]));
    }
    for (int n = 0; n < count; n++)
        if (!break_call(&c.p, numbers[n], pick(4), &faults[n])) {
            told->found = REFUSED; /* there is no such fault */
            return;
        }
    tell(faults, count, "");
    outcome found = ask_everything(&c.p);
    memset(&err, '?', sizeof(err));
    wan_attn_status status = wan_attn_forward(&c.p, &err);
    err.message[sizeof(err.message) - 1] = 0;
    tell(faults, count, status == WAN_ATTN_OK ? "" : err.message);
    if (found == REFUSED)
        found = judge(status, &err, faults, count, names);
    told->found = found == REFUSED && is_written(c.outputs, OUTPUTS) ? WROTE : found;
}

/* Pointers and numbers beside wan_attn_params. */
static int check_functions(void) {
    wan_attn_error err = {0, ""};
    good_call c = make_good_call();
    int32_t count = wan_attn_kernel_count();
    int wrong = check_descriptions(wan_attn_kernel_at, count);
    EXPECT(wan_attn_forward(NULL, NULL) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(wan_attn_forward(NULL, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "params"));
    EXPECT(wan_attn_select(&c.p, NULL, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "row"));
    EXPECT(wan_attn_workspace_size(&c.p, NULL, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "size"));
    EXPECT(wan_attn_why_not(&c.p, -1, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "row"));
    EXPECT(wan_attn_why_not(&c.p, count, &err) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(wan_attn_cuda_configure(NULL, &err) == WAN_ATTN_INVALID_ARGUMENT);
    wan_attn_cuda_config config = {sizeof(config) - 1, NULL, NULL, NULL};
    EXPECT(wan_attn_cuda_configure(&config, NULL) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(wan_attn_cuda_device_at(0, NULL, &err) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(strcmp(wan_attn_status_name(INT32_MIN), "UNKNOWN") == 0);
    release_buffers_from(0);
    return wrong;
}

/* A wan_attn_call that does not belong to these parameters, or to any. */
static int check_calls(void) {
    good_call c = make_good_call();
    wan_attn_call call;
    wan_attn_error err = {0, ""};
    int wrong = 0;
    memset(&call, 0, sizeof(call));
    EXPECT(wan_attn_prepare(&c.p, NULL, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "call"));
    EXPECT(wan_attn_prepare(&c.p, &call, &err) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(wan_attn_run(&c.p, NULL, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "call"));
    EXPECT(wan_attn_run(&c.p, &call, &err) == WAN_ATTN_INVALID_ARGUMENT);
    call.struct_size = sizeof(call);
    EXPECT(wan_attn_run(&c.p, &call, &err) == WAN_ATTN_INVALID_ARGUMENT);
    memset((char *)&call + sizeof(uint32_t), UNTOUCHED, sizeof(call) - sizeof(uint32_t));
    EXPECT(wan_attn_run(&c.p, &call, &err) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(wan_attn_prepare(NULL, &call, &err) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(wan_attn_prepare(&c.p, &call, &err) == WAN_ATTN_OK);
    EXPECT(wan_attn_run(NULL, &call, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "params"));
    wan_attn_params other = c.p;
    other.q.shape[1] -= 1; /* as many blocks */
    other.out.shape[1] -= 1;
    EXPECT(wan_attn_run(&other, &call, &err) == WAN_ATTN_INVALID_ARGUMENT &&
           strstr(err.message, "params"));
    other = c.p;
    other.num_threads += 7;
    EXPECT(wan_attn_run(&other, &call, &err) != WAN_ATTN_OK);
    other = c.p;
    other.k.shape[1] = 3; /* a prepare that fails makes the call useless */
    EXPECT(wan_attn_prepare(&other, &call, &err) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(wan_attn_run(&c.p, &call, &err) == WAN_ATTN_INVALID_ARGUMENT);
    EXPECT(!is_written(c.outputs, OUTPUTS));
    release_buffers_from(0);
    return wrong;
}

static int check_rest(void) { return check_functions() + check_calls(); }

int main(int argc, char **argv) {
    refusals all = {"broken", "the C ABI", FAULTS, run_child, check_rest};
    return refuse_all(&all, argc, argv);
}
