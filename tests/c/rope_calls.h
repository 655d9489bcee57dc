/* SPDX-License-Identifier: Apache-2.0
 * rope_calls.h - random calls of wan_attn_rms_norm_rope on every CPU row against rope_reference.h:
 * strided operands, any threads, in place, several calls at once.
 */
#ifndef WAN_ATTN_TESTS_ROPE_CALLS_H
#define WAN_ATTN_TESTS_ROPE_CALLS_H

#include "loops.h"
#include "random.h"
#include "rope_reference.h"

static void free_rope_call(wan_attn_rope_params *p) {
    free(p->x.data);
    free(p->out.data);
    free(p->weight.data);
    free(p->table.data);
    free(p->grid_sizes.data);
}

static double random_angle(void) { return cos((double)pick(1 << 20) * 0x1p-12); }

/* [rows, columns] of what `number` gives, with a gap behind each row; columns 0: [rows]. */
static wan_attn_tensor filled(int32_t dtype, int64_t rows, int64_t columns, int64_t gap,
                              double (*number)(void)) {
    wan_attn_tensor t = {NULL, dtype, WAN_ATTN_CPU, 0, columns ? 2 : 1, {rows, columns}, {0}};
    t.stride[0] = columns ? columns + gap : 1;
    t.stride[1] = columns ? 1 : 0;
    allocate(&t, POISON);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < (columns ? columns : 1); c++)
            write_element(element(&t, r, c, 0, 0), dtype, number());
    return t;
}

static void turn_rope_call(wan_attn_rope_params *p, const int64_t shape[4]) {
    int32_t dtype = pick(2) ? WAN_ATTN_F64 : WAN_ATTN_F32;
    int64_t positions = 4 + pick(8);
    if (pick(3) == 0) {
        p->table = operand(dtype, shape, (int)pick(LAYOUTS));
        allocate(&p->table, POISON);
        for (int64_t b = 0; b < shape[0]; b++)
            for (int64_t s = 0; s < shape[1]; s++)
                for (int64_t h = 0; h < shape[2]; h++)
                    for (int64_t d = 0; d < shape[3]; d++)
                        write_element(element(&p->table, b, s, h, d), dtype, random_angle());
        return;
    }
    p->table = filled(dtype, positions, shape[3], pick(2) * GAP, random_angle);
    p->grid_sizes =
        filled(pick(2) ? WAN_ATTN_I32 : WAN_ATTN_I64, shape[0], 3, pick(2), random_angle);
    for (int64_t b = 0; b < shape[0]; b++)
        for (int64_t axis = 0; axis < 3; axis++)
            write_element(element(&p->grid_sizes, b, axis, 0, 0), p->grid_sizes.dtype,
                          (double)(pick(12) ? 1 + pick(positions) : 0));
    p->seqlen_offset = pick(3) ? 0 : pick(40);
}

static wan_attn_rope_params random_rope_call(void) {
    static const int64_t LENGTHS[] = {1, 2, 15, 16, 17, 33, 50};
    static const int64_t HEADS[] = {1, 2, 3, 5, 12};
    static const int64_t HEAD_DIMS[] = {2, 4, 10, 16, 20, 36, 64, 84, 128, 256};
    static const int32_t DTYPES[] = {WAN_ATTN_F32, WAN_ATTN_F16, WAN_ATTN_BF16};
    wan_attn_rope_params p;
    memset(&p, 0, sizeof(p));
    p.struct_size = sizeof(p);
    p.kernel = -1;
    int64_t shape[4] = {pick(20) ? 1 + pick(2) : 0, pick(20) ? PICK(LENGTHS) : 0, PICK(HEADS),
                        PICK(HEAD_DIMS)};
    wan_attn_tensor all_of_it = {0};
    p.x = input(PICK(DTYPES), shape, &all_of_it);
    p.out = operand(pick(2) ? p.x.dtype : PICK(DTYPES), shape, (int)pick(EXPANDED));
    allocate(&p.out, UNTOUCHED);
    p.has_norm = pick(4) != 0;
    p.is_per_head = (int32_t)pick(2);
    p.rounds_norm = (int32_t)pick(2);
    p.eps = p.has_norm ? 1e-6 : NAN;
    if (p.has_norm && pick(4))
        p.weight =
            filled(PICK(DTYPES), shape[3] * (p.is_per_head ? 1 : shape[2]), 0, 0, random_value);
    if (pick(5))
        turn_rope_call(&p, shape);
    p.num_threads = (int32_t)pick(5);
    return p;
}

static int compare_rope(const wan_attn_rope_params *p) {
    interval expected[256], scale = {1.0, 1.0, REAL};
    for (int64_t b = 0; b < p->x.shape[0]; b++)
        for (int64_t s = 0; s < p->x.shape[1]; s++)
            for (int64_t h = 0; h < p->x.shape[2]; h++) {
                if (p->has_norm && (p->is_per_head || h == 0))
                    scale = scale_of(p, b, s, h, p->is_per_head ? 1 : p->x.shape[2]);
                expect_head(p, scale, b, s, h, expected);
                for (int64_t d = 0; d < p->x.shape[3]; d++) {
                    double got = value_at(&p->out, b, s, h, d);
                    if (!(expected[d].low <= got && got <= expected[d].high))
                        FAIL("out[%lld, %lld, %lld, %lld] is %.9g, not %.9g to %.9g", (long long)b,
                             (long long)s, (long long)h, (long long)d, got, expected[d].low,
                             expected[d].high);
                }
            }
    return 0;
}

/* Runs one row again on other threads, and in place: the bits must not depend on them. */
static int same_bits_of_rope(const wan_attn_rope_params *p) {
    static const wan_attn_parallel_fn LOOPS[] = {NULL, on_threads, broken_loop};
    size_t size = buffer_size(&p->out);
    int different = 0;
    for (size_t n = 0; n < sizeof(LOOPS) / sizeof(LOOPS[0]); n++) {
        wan_attn_rope_params again = *p;
        allocate(&again.out, UNTOUCHED);
        if (n == 2 && p->x.dtype == p->out.dtype) {
            for (int64_t b = 0; b < p->x.shape[0]; b++)
                for (int64_t s = 0; s < p->x.shape[1]; s++)
                    for (int64_t h = 0; h < p->x.shape[2]; h++)
                        memcpy(element(&again.out, b, s, h, 0), element(&p->x, b, s, h, 0),
                               (size_t)p->x.shape[3] * element_size(p->x.dtype));
            again.x = again.out;
        }
        again.num_threads = (int32_t)(3 * n + 1);
        again.parallel = LOOPS[n];
        different |= wan_attn_rms_norm_rope(&again, NULL, NULL) != WAN_ATTN_OK ||
                     memcmp(again.out.data, p->out.data, size) != 0;
        free(again.out.data);
    }
    return different;
}

static int run_rope_row(wan_attn_rope_params *p, int32_t row, int *runs) {
    wan_attn_error err;
    int32_t ran = -1;
    p->kernel = row;
    wan_attn_status status = wan_attn_rope_select(p, &ran, &err);
    if (status == WAN_ATTN_UNSUPPORTED)
        return err.message[0] == '\0'; /* a refusal has a reason */
    memset(p->out.data, UNTOUCHED, buffer_size(&p->out));
    if (status != WAN_ATTN_OK || wan_attn_rms_norm_rope(p, &ran, &err) != WAN_ATTN_OK || ran != row)
        FAIL("failed: %s", err.message);
    if (compare_rope(p))
        return 1;
    if (wrote_between_elements(&p->out))
        FAIL("wrote outside of the output");
    if (same_bits_of_rope(p))
        FAIL("other threads or in place, other bits");
    ++*runs;
    return 0;
}

static void *run_rope_many_times(void *argument) {
    wan_attn_rope_params p = *(const wan_attn_rope_params *)argument;
    allocate(&p.out, UNTOUCHED);
    for (int n = 0; n < 4; n++)
        if (wan_attn_rms_norm_rope(&p, NULL, NULL) != WAN_ATTN_OK || compare_rope(&p))
            abort();
    free(p.out.data);
    return NULL;
}

/* The same inputs from several threads, each with threads of its own. */
static int run_rope_at_once(void) {
    pthread_t threads[4];
    wan_attn_rope_params p = random_rope_call();
    while (p.x.shape[0] < 1 || p.x.shape[1] < 33 || !p.grid_sizes.data) {
        free_rope_call(&p);
        p = random_rope_call();
    }
    p.num_threads = 3;
    for (int n = 0; n < 4; n++)
        if (pthread_create(&threads[n], NULL, run_rope_many_times, &p))
            FAIL("no thread");
    for (int n = 0; n < 4; n++)
        pthread_join(threads[n], NULL);
    free_rope_call(&p);
    return 0;
}

static int test_rope_calls(int calls) {
    int runs = 0;
    for (int n = 0; n < calls; n++) {
        wan_attn_rope_params p = random_rope_call();
        int wrong = 0;
        for (int32_t row = 0; row < wan_attn_rope_kernel_count() && !wrong; row++)
            wrong = run_rope_row(&p, row, &runs);
        if (wrong) {
            wan_attn_kernel_info info = {.struct_size = sizeof(info)};
            wan_attn_rope_kernel_at(p.kernel, &info);
            fprintf(
                stderr,
                "%s: x %lldx%lldx%lldx%lld dtype %d, out dtype %d, norm %d, weight dtype %d, per "
                "head %d, rounds %d, table %dd dtype %d, offset %lld, threads %d\n",
                info.name, (long long)p.x.shape[0], (long long)p.x.shape[1],
                (long long)p.x.shape[2], (long long)p.x.shape[3], p.x.dtype, p.out.dtype,
                p.has_norm, p.weight.ndim ? p.weight.dtype : -1, p.is_per_head, p.rounds_norm,
                p.table.ndim, p.table.dtype, (long long)p.seqlen_offset, p.num_threads);
        }
        free_rope_call(&p);
        if (wrong)
            return 1;
    }
    if (runs < calls)
        FAIL("only %d of %d calls of rms_norm_rope ran", runs, calls);
    return run_rope_at_once();
}

#endif /* WAN_ATTN_TESTS_ROPE_CALLS_H */
