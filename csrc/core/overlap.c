/* SPDX-License-Identifier: Apache-2.0
 * overlap.c - which bytes an operand occupies, and whether two elements may share one. Knows no
 * kernel.
 *
 * Two operands share a byte if the sum of step * i of the one, less that of the other, can be the
 * distance between them. Largest step first, few i are left to try at each step where both are
 * views of one tensor: equal steps are one term there, and the smaller ones reach less than one
 * step of it.
 */
#include "core/overlap.h"

#include "core/util.h"

enum { MOST_TERMS = 2 * WAN_ATTN_MAX_NDIM + 1, MOST_STEPS = 1 << 13 };

static int is_empty(const wan_attn_tensor *t) {
    for (int32_t d = 0; d < t->ndim; d++)
        if (t->shape[d] == 0)
            return 1;
    return 0;
}

static uint64_t size_of(int64_t stride) {
    return stride < 0 ? 0 - (uint64_t)stride : (uint64_t)stride;
}

int wan_attn_is_within_reach(const wan_attn_tensor *t) {
    uint64_t reach = (uint64_t)wan_attn_dtype_size(t->dtype), width = reach;
    for (int32_t d = 0; d < t->ndim && !is_empty(t); d++) {
        if (t->shape[d] == 1)
            continue;
        uint64_t last = (uint64_t)t->shape[d] - 1, most = (WAN_ATTN_MAX_REACH - reach) / width;
        if (size_of(t->stride[d]) > most / last)
            return 0;
        reach += last * size_of(t->stride[d]) * width;
    }
    return 1;
}

int wan_attn_find_extent(const wan_attn_tensor *t, wan_attn_extent *e) {
    wan_attn_extent found = {.reach = -1, .width = wan_attn_dtype_size(t->dtype)};
    *e = found;
    if (is_empty(t) || !t->data)
        return 1;
    int64_t before = 0;
    e->reach = e->width - 1;
    for (int32_t d = 0; d < t->ndim; d++) {
        if (t->shape[d] == 1 || t->stride[d] == 0)
            continue;
        int64_t step = t->stride[d] * e->width, last = t->shape[d] - 1;
        before += step < 0 ? -step * last : 0;
        step = step < 0 ? -step : step;
        e->reach += step * last;
        e->step[e->ndim] = step;
        e->last[e->ndim++] = last;
    }
    e->first = (uintptr_t)t->data - (uintptr_t)before;
    return (uintptr_t)before <= (uintptr_t)t->data && (uintptr_t)e->reach <= UINTPTR_MAX - e->first;
}

int wan_attn_may_overlap(const wan_attn_tensor *t) {
    uint64_t reach = 0; /* the last element, as far as strides have been looked at */
    int is_done[WAN_ATTN_MAX_NDIM] = {0};
    for (int32_t n = 0; n < t->ndim && !is_empty(t); n++) {
        int next = -1; /* of those that are left, the smallest stride that is walked along */
        for (int32_t d = 0; d < t->ndim; d++)
            if (!is_done[d] && t->shape[d] > 1 &&
                (next < 0 || size_of(t->stride[d]) < size_of(t->stride[next])))
                next = d;
        if (next < 0)
            return 0;
        if (size_of(t->stride[next]) <= reach)
            return 1;
        reach += (uint64_t)(t->shape[next] - 1) * size_of(t->stride[next]);
        is_done[next] = 1;
    }
    return 0;
}

/* step * i, for low <= i <= high; and what all terms from this one on can be at least, at most. */
typedef struct term {
    int64_t step, low, high;
    int64_t least, most;
} term;

/* Terms with falling steps; the last one's is 1: a byte of an element. */
typedef struct search {
    term terms[MOST_TERMS];
    int count, steps_left;
} search;

static void add_term(search *s, int64_t step, int64_t low, int64_t high) {
    int at = 0;
    while (at < s->count && s->terms[at].step > step)
        at++;
    if (at == s->count || s->terms[at].step < step) {
        for (int n = s->count++; n > at; n--)
            s->terms[n] = s->terms[n - 1];
        term made = {.step = step};
        s->terms[at] = made;
    }
    s->terms[at].low += low;
    s->terms[at].high += high;
}

static int64_t divide_down(int64_t n, int64_t by) { return n / by - (n % by < 0); }

/* Whether the terms from number n on can be `sum`, which lies between their least and their most:
 * bytes can be every number between. */
static int can_be(search *s, int n, int64_t sum) {
    if (n == s->count - 1 || s->steps_left-- <= 0)
        return 1;
    const term *t = &s->terms[n], *rest = t + 1;
    int64_t first = -divide_down(rest->most - sum, t->step);
    int64_t last = divide_down(sum - rest->least, t->step);
    first = first > t->low ? first : t->low;
    last = last < t->high ? last : t->high;
    for (int64_t i = first; i <= last; i++)
        if (can_be(s, n + 1, sum - i * t->step))
            return 1;
    return 0;
}

int wan_attn_share_memory(const wan_attn_extent *a, const wan_attn_extent *b) {
    if (a->reach < 0 || b->reach < 0 || a->first > b->first + (uintptr_t)b->reach ||
        b->first > a->first + (uintptr_t)a->reach)
        return 0;
    search s = {.steps_left = MOST_STEPS};
    for (int32_t d = 0; d < a->ndim; d++)
        add_term(&s, a->step[d], 0, a->last[d]);
    for (int32_t d = 0; d < b->ndim; d++)
        add_term(&s, b->step[d], -b->last[d], 0);
    add_term(&s, 1, 1 - b->width, a->width - 1);
    int64_t least = 0, most = 0;
    for (int n = s.count - 1; n >= 0; n--) {
        s.terms[n].least = least += s.terms[n].step * s.terms[n].low;
        s.terms[n].most = most += s.terms[n].step * s.terms[n].high;
    }
    int64_t distance =
        b->first > a->first ? (int64_t)(b->first - a->first) : -(int64_t)(a->first - b->first);
    return distance >= least && distance <= most && can_be(&s, 0, distance);
}
