/* SPDX-License-Identifier: Apache-2.0
 * rope.c - random calls of wan_attn_rms_norm_rope that the contract allows, on every CPU row and on
 * the row that is chosen: results within their intervals, the same bits with any threads and in
 * place, and not one byte read or written beyond the operands.
 *
 *     rope SEED FIRST COUNT [SECONDS]      prints a line; 1 and how to repeat the case that failed
 */
#include "c/rope_reference.h"

#include "rope_call.h"
#include "running.h"

static long long runs, checked_heads, points, elements;

/* Runs the call as it is in p; out gets memory of its own, full of `fill`. *out: what is in it. */
static int run(const wan_attn_rope_params *params, int fill, int32_t row, unsigned char **out) {
    int before = buffer_count;
    wan_attn_rope_params p = *params;
    wan_attn_error err = {0, ""};
    int32_t ran = -1;
    *out = NULL;
    buffer *memory = give_memory(&p.out, fill);
    wan_attn_status status = wan_attn_rms_norm_rope(&p, one_in(8) ? NULL : &ran, &err);
    if (status != WAN_ATTN_OK) {
        fprintf(stderr, "%s: %s\n", wan_attn_status_name((int32_t)status), err.message);
        return failed("a legal call is refused");
    }
    if (ran != -1 && ran != row)
        return failed("another row ran");
    take(&p.out, memory, out);
    if (!all_is(memory))
        return failed("it writes between or beside the elements of out");
    release_buffers_from(before);
    runs++;
    return 0;
}

/* The same call with out where x is; *out: what is there then. */
static int run_in_place(const wan_attn_rope_params *params, unsigned char **out) {
    int before = buffer_count;
    wan_attn_rope_params p = *params;
    wan_attn_error err = {0, ""};
    *out = NULL;
    choose_strides(&p.x, 1);
    buffer *memory = give_memory(&p.x, UNTOUCHED);
    for (int64_t b = 0; b < p.x.shape[0]; b++)
        for (int64_t s = 0; s < p.x.shape[1]; s++)
            for (int64_t h = 0; h < p.x.shape[2]; h++)
                for (int64_t d = 0; d < p.x.shape[3]; d++)
                    memcpy(element(&p.x, b, s, h, d), element(&params->x, b, s, h, d),
                           element_size(p.x.dtype));
    p.out = p.x;
    if (wan_attn_rms_norm_rope(&p, NULL, &err) != WAN_ATTN_OK) {
        fprintf(stderr, "%s\n", err.message);
        return failed("a legal call in place is refused");
    }
    take(&p.out, memory, out);
    if (!all_is(memory))
        return failed("it writes between or beside the elements of x");
    release_buffers_from(before);
    runs++;
    return 0;
}

static int is_within(double got, const interval *expected) {
    return expected->numbers == IS_ANYTHING || (expected->numbers == IS_NAN && got != got) ||
           (expected->numbers == REAL && expected->low <= got && got <= expected->high);
}

static int compare(const wan_attn_rope_params *p, const unsigned char *out) {
    interval expected[256], scale = {1.0, 1.0, REAL};
    const unsigned char *at = out;
    for (int64_t b = 0; b < p->x.shape[0]; b++)
        for (int64_t s = 0; s < p->x.shape[1]; s++)
            for (int64_t h = 0; h < p->x.shape[2]; h++, checked_heads++) {
                if (p->has_norm && (p->is_per_head || h == 0))
                    scale = scale_of(p, b, s, h, p->is_per_head ? 1 : p->x.shape[2]);
                expect_head(p, scale, b, s, h, expected);
                for (int64_t d = 0; d < p->x.shape[3]; d++, at += element_size(p->out.dtype)) {
                    double got = read_element(at, p->out.dtype);
                    const interval *e = &expected[d];
                    elements++;
                    points += e->numbers == IS_NAN || (e->numbers == REAL && e->low == e->high);
                    if (is_within(got, e))
                        continue;
                    fprintf(stderr, "out[%lld, %lld, %lld, %lld] is %.9g, not %.9g to %.9g (%d)\n",
                            (long long)b, (long long)s, (long long)h, (long long)d, got, e->low,
                            e->high, (int)e->numbers);
                    return failed("a wrong result");
                }
            }
    return 0;
}

/* The bits of two results, but for the bits of NaN. */
static int differ(const wan_attn_tensor *t, const unsigned char *one, const unsigned char *other) {
    size_t width = element_size(t->dtype);
    for (size_t n = 0; n < (size_t)count_of(t); n++) {
        double a = read_element(one + n * width, t->dtype);
        if (memcmp(one + n * width, other + n * width, width) != 0 &&
            (a == a || !isnan(read_element(other + n * width, t->dtype))))
            return 1;
    }
    return 0;
}

/* The row against the truth, then again on other threads and in other memory: the same bits. */
static int check_row(wan_attn_rope_params *p, int32_t row) {
    static const wan_attn_parallel_fn LOOPS[] = {NULL, on_threads, backwards, broken_loop};
    wan_attn_kernel_info info = {.struct_size = sizeof(info)};
    unsigned char *first = NULL, *again = NULL;
    if (wan_attn_rope_kernel_at(row, &info) != WAN_ATTN_OK)
        return failed("a row of the table is not there");
    p->num_threads = (int32_t)pick(5);
    p->parallel = PICK(LOOPS);
    int wrong = run(p, UNTOUCHED, row, &first) || compare(p, first);
    for (int n = 0; n < 2 && !wrong; n++) {
        p->num_threads = 1 + (p->num_threads + (int32_t)pick(3)) % 4;
        p->parallel = PICK(LOOPS);
        int is_in_place = n == 0 && p->out.dtype == p->x.dtype;
        wrong = is_in_place ? run_in_place(p, &again) : run(p, POISON, row, &again);
        if (!wrong && differ(&p->out, first, again))
            wrong = failed(is_in_place ? "in place, other bits"
                                       : "other threads or other memory, other bits");
        free(again);
    }
    if (wrong)
        fprintf(stderr, "in row %s\n", info.name);
    free(first);
    return wrong;
}

/* The chosen row, under features masked at random, gives what it gives when it is forced. */
static int check_choice(wan_attn_rope_params *p) {
    int32_t row = -1;
    unsigned char *chosen = NULL, *forced = NULL;
    p->kernel = -1;
    p->cpu_features = one_in(2) ? 0 : WAN_ATTN_CPU_KNOWN | (uint32_t)pick(32);
    if (wan_attn_rope_select(p, &row, NULL) != WAN_ATTN_OK)
        return failed("no row is chosen");
    if (needs_others(wan_attn_rope_kernel_at, row, p->cpu_features))
        return failed("the chosen row needs features that may not be used");
    int wrong = run(p, UNTOUCHED, row, &chosen);
    p->kernel = row;
    wrong = wrong || run(p, POISON, row, &forced);
    if (!wrong && differ(&p->out, chosen, forced))
        wrong = failed("the chosen row gives other bits than when it is forced");
    p->cpu_features = 0;
    free(chosen);
    free(forced);
    return wrong;
}

static void print_call(const wan_attn_rope_params *p, numbers kind) {
    const char *const names[] = {"x", "out", "weight", "table", "grid_sizes"};
    const wan_attn_tensor *const all[] = {&p->x, &p->out, &p->weight, &p->table, &p->grid_sizes};
    for (int n = 0; n < 5; n++)
        if (all[n]->ndim)
            print_tensor(names[n], all[n]);
    fprintf(stderr, "  norm %d, eps %g, per head %d, rounds %d, offset %lld, threads %d, kind %d\n",
            p->has_norm, p->eps, p->is_per_head, p->rounds_norm, (long long)p->seqlen_offset,
            p->num_threads, (int)kind);
}

static int run_case(uint64_t seed, uint64_t number) {
    wan_attn_rope_params p;
    begin_case(seed, number);
    numbers kind = random_call(&p);
    int wrong = check_choice(&p);
    for (int32_t row = 0; row < wan_attn_rope_kernel_count() && !wrong; row++) {
        int32_t taken = -1;
        p.kernel = row;
        if (wan_attn_rope_select(&p, &taken, NULL) == WAN_ATTN_OK)
            wrong = check_row(&p, row);
    }
    if (wrong)
        print_call(&p, kind);
    release_buffers_from(0);
    return wrong;
}

int main(int argc, char **argv) {
    uint64_t n = 0;
    int wrong = run_cases("rope", argc, argv, run_case, &n);
    if (wrong < 0)
        return 2;
    printf("%llu random calls, %lld runs, %lld heads against float64, %.1f%% of their elements to "
           "the bit: %d wrong\n",
           (unsigned long long)n, runs, checked_heads,
           100.0 * (double)points / (double)(elements ? elements : 1), wrong);
    printf("counted: %lld calls, 0 crashes, %d wrong, 0 accepted\n", runs, wrong);
    return wrong != 0;
}
