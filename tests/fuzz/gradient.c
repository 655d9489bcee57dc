/* SPDX-License-Identifier: Apache-2.0
 * gradient.c - random calls of wan_attn_backward that the contract allows, on every CPU row and on
 * the row that is chosen: gradients within their bounds, NaN where it must be, the same bits with
 * any threads, and not one byte read or written beyond operands, workspace and parameters.
 *
 *     gradient SEED FIRST COUNT [SECONDS]   prints a line; 1 and how to repeat the case that failed
 */
#include "c/expected_gradient.h"

#include "gradient_call.h"
#include "running.h"

enum { GRADIENTS = 3, MOST_THREADS = 8 };

static const char *const NAMES[GRADIENTS] = {"dq", "dk", "dv"};

/* What a run left behind, element after element. */
typedef struct result {
    unsigned char *of[GRADIENTS];
    size_t size[GRADIENTS];
} result;

static long long runs, judged, unknown, zeros;

/* In memory of its own that ends where it does. */
static void *guarded(const void *from, size_t size) {
    buffer *b = make_buffer(size, sizeof(uint64_t), 1, 0);
    memcpy(b->at, from, size);
    make_read_only(b);
    return b->at;
}

static int is_refused(wan_attn_status status, const wan_attn_error *err) {
    if (status == WAN_ATTN_OK)
        return 0;
    fprintf(stderr, "%s: %s\n", wan_attn_status_name((int32_t)status), err->message);
    return failed("a legal call is refused");
}

/* Runs the call as it is; gradients get memory of their own, full of `fill`. row: that must run. */
static int run(const gradient_call *g, int fill, int32_t row, result *r) {
    int before = buffer_count;
    wan_attn_params p = g->p;
    wan_attn_backward_params a = g->a;
    wan_attn_tensor *const tensors[GRADIENTS] = {&a.dq, &a.dk, &a.dv};
    wan_attn_error err = {0, ""};
    buffer *memory[GRADIENTS];
    int32_t ran = -1;
    size_t size = 0;
    a.forward = &p;
    if (is_refused(wan_attn_backward_select(&a, NULL, &size, &err), &err))
        return 1;
    buffer *workspace = make_buffer(size, 64, 1, POISON);
    p.workspace = workspace->at;
    p.workspace_size = size;
    a.forward = guarded(&p, p.struct_size);
    for (int n = 0; n < GRADIENTS; n++)
        memory[n] = give_memory(tensors[n], fill);
    const wan_attn_backward_params *all = guarded(&a, sizeof(a));
    if (is_refused(wan_attn_backward(all, one_in(8) ? NULL : &ran, &err), &err))
        return 1;
    if (ran != -1 && ran != row)
        return failed("another row ran");
    for (int n = 0; n < GRADIENTS; n++) {
        r->size[n] = take(tensors[n], memory[n], &r->of[n]);
        if (!all_is(memory[n]))
            return failed("it writes between or beside the elements of a gradient");
    }
    if (!beside_is_untouched(workspace))
        return failed("it writes beside the workspace");
    release_buffers_from(before);
    runs++;
    return 0;
}

static void free_result(result *r) {
    for (int n = 0; n < GRADIENTS; n++)
        free(r->of[n]);
    memset(r, 0, sizeof(*r));
}

static int is_same(const result *a, const result *b) {
    for (int n = 0; n < GRADIENTS; n++)
        if (memcmp(a->of[n], b->of[n], a->size[n]) != 0)
            return 0;
    return 1;
}

/* One gradient, shaped like t, against the sums it must be made of. */
static int compare_gradient(const wan_attn_params *p, int which, const wan_attn_tensor *t,
                            const unsigned char *got, const product_sum *sums) {
    size_t width = element_size(t->dtype);
    for (int64_t n = 0; n < count_of(t); n++, got += width) {
        estimate e = expected_number(&sums[n], p, which < 2, t->dtype);
        judged++;
        unknown += e.is == ANYTHING;
        zeros += e.is == A_NUMBER && e.value == 0.0 && e.error == 0.0;
        double x = read_element(got, t->dtype);
        if (is_as_expected(x, &e, t->dtype))
            continue;
        int64_t d = n % t->shape[3], h = n / t->shape[3], i = h / t->shape[2];
        fprintf(stderr, "%s[%lld, %lld, %lld, %lld] is %.9g, not %.9g +- %.3g (%d)\n", NAMES[which],
                (long long)(i / t->shape[1]), (long long)(i % t->shape[1]),
                (long long)(h % t->shape[2]), (long long)d, x, e.value, e.error, (int)e.is);
        return failed("a wrong gradient");
    }
    return 0;
}

/* The sums of all gradients, for rows that compute so. */
static void expect(gradient_inputs *x, arithmetic in, gradient_sums *to) {
    const wan_attn_params *p = x->p;
    size_t of_q = (size_t)count_of(&p->q), of_k = (size_t)count_of(&p->k);
    to->dq = calloc(of_q + 2 * of_k + 1, sizeof(*to->dq));
    to->dk = to->dq + of_q;
    to->dv = to->dk + of_k;
    x->in = in;
    for (int64_t b = 0; b < p->q.shape[0]; b++)
        for (int64_t h = 0; h < p->q.shape[2]; h++)
            for (int64_t i = 0; i < p->q.shape[1]; i++)
                if (sees_a_key(p, b, i))
                    add_row_to_gradients(x, b, h, i, to);
}

static int compare(const gradient_call *g, const result *r, const gradient_sums *truth) {
    return compare_gradient(&g->p, 0, &g->a.dq, r->of[0], truth->dq) ||
           compare_gradient(&g->p, 1, &g->a.dk, r->of[1], truth->dk) ||
           compare_gradient(&g->p, 2, &g->a.dv, r->of[2], truth->dv);
}

static int other_bits(const gradient_call *g, int fill, int32_t row, const result *first) {
    result again = {0};
    int wrong = run(g, fill, row, &again);
    if (!wrong && !is_same(first, &again))
        wrong = failed("other threads or other memory, other bits");
    free_result(&again);
    return wrong;
}

/* The row against the truth, then again on other threads and in other memory: the same bits. */
static int check_row(gradient_call *g, gradient_inputs *x, gradient_sums truths[2], int32_t row) {
    static const wan_attn_parallel_fn LOOPS[] = {NULL, on_threads, backwards, broken_loop};
    wan_attn_kernel_info info = {.struct_size = sizeof(info)};
    result first = {0};
    wan_attn_backward_kernel_at(row, &info);
    arithmetic in = strstr(info.name, "bf16") ? IN_BF16 : IN_FLOATS;
    if (!truths[in].dq)
        expect(x, in, &truths[in]);
    g->a.kernel = row;
    g->p.num_threads = (int32_t)pick(MOST_THREADS + 1);
    g->p.parallel = PICK(LOOPS);
    int wrong = run(g, UNTOUCHED, row, &first) || compare(g, &first, &truths[in]);
    int all = one_in(16) ? MOST_THREADS : 2;
    for (int n = 1; n <= all && !wrong; n++) {
        g->p.num_threads = all > 2 ? n : 1 + (int32_t)pick(MOST_THREADS);
        g->p.parallel = PICK(LOOPS);
        wrong = other_bits(g, n % 2 ? UNTOUCHED : POISON, row, &first);
    }
    if (wrong)
        fprintf(stderr, "in row %s\n", info.name);
    free_result(&first);
    return wrong;
}

/* The chosen row, under features masked at random, gives what it gives when it is forced. */
static int check_choice(gradient_call *g) {
    int32_t row = -1;
    result chosen = {0};
    g->a.kernel = -1;
    g->a.forward = &g->p;
    g->p.cpu_features = one_in(2) ? 0 : WAN_ATTN_CPU_KNOWN | (uint32_t)pick(32);
    if (wan_attn_backward_select(&g->a, &row, NULL, NULL) != WAN_ATTN_OK)
        return failed("no row is chosen");
    if (needs_others(wan_attn_backward_kernel_at, row, g->p.cpu_features))
        return failed("the chosen row needs features that may not be used");
    int wrong = run(g, UNTOUCHED, row, &chosen);
    g->a.kernel = row;
    wrong = wrong || other_bits(g, POISON, row, &chosen);
    g->p.cpu_features = 0;
    free_result(&chosen);
    return wrong;
}

static void print_call(const gradient_call *g) {
    const wan_attn_params *p = &g->p;
    const char *const names[] = {"q",      "k",    "v",    "out", "lse", "q_lens",
                                 "k_lens", "dout", "dlse", "dq",  "dk",  "dv"};
    const wan_attn_tensor *const all[] = {&p->q,      &p->k,         &p->v,         &p->out,
                                          &p->lse,    &p->seqused_q, &p->seqused_k, &g->a.dout,
                                          &g->a.dlse, &g->a.dq,      &g->a.dk,      &g->a.dv};
    for (int n = 0; n < 12; n++)
        if (all[n]->ndim)
            print_tensor(names[n], all[n]);
    fprintf(stderr, "  scale %g (%d), causal %d, window %lld %lld, threads %d, numbers %d\n",
            p->softmax_scale, p->has_softmax_scale, p->is_causal, (long long)p->window_size_left,
            (long long)p->window_size_right, p->num_threads, (int)g->kind);
}

/* Dense copies of all operands in one piece of memory, which begins with those of q. */
static gradient_inputs decode_all(const gradient_call *g) {
    const wan_attn_params *p = &g->p;
    size_t of_q = (size_t)count_of(&p->q), of_k = (size_t)count_of(&p->k);
    size_t of_lse = (size_t)count_of(&p->lse);
    gradient_inputs x = {.p = p, .dout_dtype = g->a.dout.dtype};
    x.q = malloc((3 * of_q + 2 * of_k + 2 * of_lse + 1) * sizeof(double));
    x.k = decode(&p->q, x.q);
    x.v = decode(&p->k, x.k);
    x.out = decode(&p->v, x.v);
    x.dout = decode(&p->out, x.out);
    x.lse = decode(&g->a.dout, x.dout);
    x.dlse = decode(&p->lse, x.lse);
    if (g->a.dlse.ndim)
        decode(&g->a.dlse, x.dlse);
    else
        x.dlse = NULL;
    return x;
}

static int run_case(uint64_t seed, uint64_t number) {
    gradient_call g;
    gradient_sums truths[2] = {{NULL, NULL, NULL}, {NULL, NULL, NULL}};
    wan_attn_error err = {0, ""};
    begin_case(seed, number);
    int wrong = is_refused(random_gradient(&g, &err), &err) || check_choice(&g);
    gradient_inputs x = decode_all(&g);
    for (int32_t row = 0; row < wan_attn_backward_kernel_count() && !wrong; row++) {
        g.a.kernel = row;
        if (wan_attn_backward_select(&g.a, NULL, NULL, NULL) == WAN_ATTN_OK)
            wrong = check_row(&g, &x, truths, row);
    }
    if (wrong)
        print_call(&g);
    free(x.q);
    free(truths[IN_FLOATS].dq);
    free(truths[IN_BF16].dq);
    release_buffers_from(0);
    return wrong;
}

int main(int argc, char **argv) {
    uint64_t n = 0;
    int wrong = run_cases("gradient", argc, argv, run_case, &n);
    if (wrong < 0)
        return 2;
    double all = (double)(judged ? judged : 1);
    printf("%llu random calls, %lld runs, %lld numbers against float64, of which %.1f%% can be "
           "anything and %.1f%% must be 0: %d wrong\n",
           (unsigned long long)n, runs, judged, 100.0 * (double)unknown / all,
           100.0 * (double)zeros / all, wrong);
    printf("counted: %lld calls, 0 crashes, %d wrong, 0 accepted\n", runs, wrong);
    return wrong != 0;
}
