/* SPDX-License-Identifier: Apache-2.0
 * legal.c - random calls that the contract allows, on every CPU row and on the row that is chosen:
 * results within their bounds, the same bits with any threads, and not one byte read or written
 * beyond the operands. Guard pages around all memory, inputs that cannot be written to.
 *
 *     legal SEED FIRST COUNT [SECONDS]      prints a line; 1 and how to repeat the case that failed
 */
#include "c/expected.h"
#include "random_lists.h"
#include "running.h"

/* What a run left behind, element after element. */
typedef struct result {
    unsigned char *out, *lse;
    size_t out_size, lse_size;
} result;

static long long runs, checked_rows;

static wan_attn_status compute(wan_attn_params *p, buffer **workspace, wan_attn_error *err) {
    size_t size = 0;
    wan_attn_status status = wan_attn_workspace_size(p, &size, err);
    if (status != WAN_ATTN_OK)
        return status;
    *workspace = make_buffer(size, 64, 1, POISON);
    p->workspace = (*workspace)->at;
    p->workspace_size = size;
    if (one_in(2)) {
        wan_attn_call call = {.struct_size = sizeof(call)};
        status = wan_attn_prepare(p, &call, err);
        if (status == WAN_ATTN_OK && call.workspace_size != size)
            abort();
        if (status == WAN_ATTN_OK && one_in(4))
            status = wan_attn_run(p, &call, err);
        return status == WAN_ATTN_OK ? wan_attn_run(p, &call, err) : status;
    }
    return wan_attn_forward(p, err);
}

/* Runs the call as it is in p; out and lse get memory of their own, full of `fill`. */
static int run(wan_attn_params *p, int fill, result *r) {
    int before = buffer_count;
    wan_attn_error err = {0, ""};
    buffer *workspace = NULL, *out = give_memory(&p->out, fill), *lse = NULL;
    if (p->lse.ndim)
        lse = give_memory(&p->lse, fill);
    wan_attn_status status = compute(p, &workspace, &err);
    if (status != WAN_ATTN_OK) {
        fprintf(stderr, "%s: %s\n", wan_attn_status_name((int32_t)status), err.message);
        return failed("a legal call is refused");
    }
    r->out_size = take(&p->out, out, &r->out);
    r->lse_size = lse ? take(&p->lse, lse, &r->lse) : 0;
    if (!all_is(out) || (lse && !all_is(lse)))
        return failed("it writes between or beside the elements of out or lse");
    if (!beside_is_untouched(workspace))
        return failed("it writes beside the workspace");
    release_buffers_from(before);
    runs++;
    return 0;
}

static void free_result(result *r) {
    free(r->out);
    free(r->lse);
    memset(r, 0, sizeof(*r));
}

static int is_within(double got, double expected, double bound) {
    if (isnan(expected))
        return isnan(got);
    return got == expected || fabs(got - expected) <= bound;
}

static int compare_row(const wan_attn_params *p, const row_truth *row, const unsigned char *out,
                       double lse, int has_lse) {
    size_t width = element_size(p->out.dtype);
    for (int64_t d = 0; d < p->q.shape[3]; d++) {
        double got = read_element(out + (size_t)d * width, p->out.dtype);
        if (row->sees_none ? got == 0.0
                           : row->is_anything[d] || is_within(got, row->out[d], row->out_bound[d]))
            continue;
        fprintf(stderr, "out[%lld] is %.9g, not %.9g +- %.3g\n", (long long)d, got,
                row->sees_none ? 0.0 : row->out[d], row->out_bound[d]);
        return 0;
    }
    if (!has_lse || (row->sees_none       ? lse == -INFINITY
                     : isfinite(row->lse) ? is_within(lse, row->lse, row->lse_bound)
                                          : !isfinite(lse)))
        return 1;
    fprintf(stderr, "lse is %.9g, not %.9g +- %.3g\n", lse, row->sees_none ? -INFINITY : row->lse,
            row->lse_bound);
    return 0;
}

static int compare(const wan_attn_params *p, const decoded *x, const result *r, arithmetic in) {
    size_t width = element_size(p->out.dtype) * (size_t)p->q.shape[3];
    int64_t heads = p->q.shape[2], rows = p->q.shape[1];
    for (int64_t b = 0; b < p->q.shape[0]; b++)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t h = 0; h < heads; h++, checked_rows++) {
                row_truth row;
                expect_row(p, x, b, h, i, in, &row);
                double lse = NAN;
                if (p->lse.ndim)
                    lse = read_element(r->lse + 4 * ((b * heads + h) * rows + i), WAN_ATTN_F32);
                const unsigned char *out = r->out + (size_t)((b * rows + i) * heads + h) * width;
                if (!compare_row(p, &row, out, lse, p->lse.ndim != 0)) {
                    fprintf(stderr, "in sample %lld, row %lld, head %lld\n", (long long)b,
                            (long long)i, (long long)h);
                    return failed("a wrong result");
                }
            }
    return 0;
}

static int is_same(const result *a, const result *b) {
    return memcmp(a->out, b->out, a->out_size) == 0 &&
           (!a->lse_size || memcmp(a->lse, b->lse, a->lse_size) == 0);
}

/* Whether the truth is known: that of means and of what is left out is tests/test_blocks.py's. */
static int is_judged(const wan_attn_params *p) {
    return !p->pools_others && p->skip_threshold == 0.0;
}

/* The row against the truth, then again on other threads and in other memory: the same bits. */
static int check_row(wan_attn_params *p, const decoded *x, int32_t row) {
    static const wan_attn_parallel_fn LOOPS[] = {NULL, on_threads, backwards, broken_loop};
    wan_attn_kernel_info info = {.struct_size = sizeof(info)};
    result first = {0}, again = {0};
    wan_attn_kernel_at(row, &info);
    p->kernel = row;
    p->num_threads = (int32_t)pick(5);
    p->parallel = PICK(LOOPS);
    arithmetic in = info.is_lossy                                           ? IN_EIGHT_BITS
                    : strstr(info.name, "amx") || strstr(info.name, "bf16") ? IN_BF16
                                                                            : IN_FLOATS;
    int wrong = run(p, UNTOUCHED, &first) || (is_judged(p) && compare(p, x, &first, in));
    for (int n = 0; n < 2 && !wrong; n++) {
        p->num_threads = 1 + (p->num_threads + (int32_t)pick(3)) % 4;
        p->parallel = PICK(LOOPS);
        wrong = run(p, n ? POISON : UNTOUCHED, &again);
        if (!wrong && !is_same(&first, &again))
            wrong = failed("other threads or other memory, other bits");
        free_result(&again);
    }
    if (wrong)
        fprintf(stderr, "in row %s\n", info.name);
    free_result(&first);
    return wrong;
}

/* The chosen row, under features masked at random, gives what it gives when it is forced. */
static int check_choice(wan_attn_params *p) {
    int32_t row = -1;
    result chosen = {0}, forced = {0};
    p->kernel = -1;
    p->cpu_features = one_in(2) ? 0 : WAN_ATTN_CPU_KNOWN | (uint32_t)pick(32);
    if (wan_attn_select(p, &row, NULL) != WAN_ATTN_OK)
        return failed("no row is chosen");
    if (needs_others(wan_attn_kernel_at, row, p->cpu_features))
        return failed("the chosen row needs features that may not be used");
    int wrong = run(p, UNTOUCHED, &chosen);
    p->kernel = row;
    wrong = wrong || run(p, POISON, &forced);
    if (!wrong && !is_same(&chosen, &forced))
        wrong = failed("the chosen row gives other bits than when it is forced");
    p->cpu_features = 0;
    free_result(&chosen);
    free_result(&forced);
    return wrong;
}

static void print_call(const wan_attn_params *p, numbers kind) {
    const char *const names[] = {"q",      "k",      "v",      "out",    "lse",
                                 "q_lens", "k_lens", "counts", "indices"};
    const wan_attn_tensor *const all[] = {&p->q,
                                          &p->k,
                                          &p->v,
                                          &p->out,
                                          &p->lse,
                                          &p->seqused_q,
                                          &p->seqused_k,
                                          &p->block_counts,
                                          &p->block_indices};
    for (int n = 0; n < 9; n++)
        if (all[n]->ndim)
            print_tensor(names[n], all[n]);
    fprintf(stderr,
            "  scale %g (%d), causal %d, window %lld %lld, threads %d, numbers %d, pooled %d, "
            "threshold %g\n",
            p->softmax_scale, p->has_softmax_scale, p->is_causal, (long long)p->window_size_left,
            (long long)p->window_size_right, p->num_threads, (int)kind, p->pools_others,
            p->skip_threshold);
}

static int is_real_row(const wan_attn_params *p, int64_t sample, int64_t i) {
    return i < real_length(&p->seqused_q, sample, p->q.shape[1]);
}

static int is_real_key(const wan_attn_params *p, int64_t sample, int64_t j) {
    return j < real_length(&p->seqused_k, sample, p->k.shape[1]);
}

static int run_case(uint64_t seed, uint64_t number) {
    static const double THRESHOLDS[] = {1.0, 0.05, 0.5, 1e-3, 1e-300};
    static const wanted WANTED = {70, is_real_row, is_real_key};
    wan_attn_params p;
    begin_case(seed, number);
    numbers kind = random_call(&p, &WANTED);
    if (one_in(4))
        choose_lists(&p);
    p.skip_threshold = one_in(10) ? PICK(THRESHOLDS) : 0.0;
    p.out = describe(p.q.dtype, 4, p.q.shape[0], p.q.shape[1], p.q.shape[2], p.q.shape[3]);
    choose_strides(&p.out, 1);
    if (one_in(2)) {
        p.lse = describe(WAN_ATTN_F32, 3, p.q.shape[0], p.q.shape[2], p.q.shape[1], 0);
        choose_strides(&p.lse, 1);
    }
    double *numbers_of_inputs =
        malloc((size_t)(count_of(&p.q) + 2 * count_of(&p.k) + 1) * sizeof(double));
    decoded x = {numbers_of_inputs, NULL, NULL};
    x.k = decode(&p.q, x.q);
    x.v = decode(&p.k, x.k);
    decode(&p.v, x.v);
    int wrong = check_choice(&p);
    for (int32_t row = 0; row < wan_attn_kernel_count() && !wrong; row++)
        if (wan_attn_why_not(&p, row, NULL) == WAN_ATTN_OK)
            wrong = check_row(&p, &x, row);
    if (wrong)
        print_call(&p, kind);
    free(numbers_of_inputs);
    release_buffers_from(0);
    return wrong;
}

int main(int argc, char **argv) {
    uint64_t n = 0;
    int wrong = run_cases("legal", argc, argv, run_case, &n);
    if (wrong < 0)
        return 2;
    printf("%llu random calls, %lld runs, %lld rows against float64: %d wrong\n",
           (unsigned long long)n, runs, checked_rows, wrong);
    printf("counted: %lld calls, 0 crashes, %d wrong, 0 accepted\n", runs, wrong);
    return wrong != 0;
}
