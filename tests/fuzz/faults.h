/* SPDX-License-Identifier: Apache-2.0
 * faults.h - numbers for the faults of a list, and what puts fault number so-and-so into a call.
 *
 * The includer has before: TENSOR_FAULTS(F), ways to break a tensor's description, each
 * F(name, of, code) with t and d in the code; OTHER_FAULTS(F), the rest, each F(name, argument,
 * code) with p in the code; fault_params, the type of *p; TENSORS and TENSOR_NAMES;
 * TAKES(of, which), whether tensor number `which` has a fault of this kind; and
 * tensor_at(p, which).
 */
#ifndef WAN_ATTN_TESTS_FAULTS_H
#define WAN_ATTN_TESTS_FAULTS_H

#include "refusing.h"

#define NUMBER(name, ...) TENSOR_##name,
enum { TENSOR_FAULTS(NUMBER) TENSOR_FAULT_COUNT };
#undef NUMBER
#define NUMBER(name, ...) OTHER_##name,
enum { OTHER_FAULTS(NUMBER) OTHER_FAULT_COUNT };
#undef NUMBER

enum { FIRST_OTHER = TENSORS * TENSOR_FAULT_COUNT, FAULTS = FIRST_OTHER + OTHER_FAULT_COUNT };

/* The argument that fault `number` breaks. */
static const char *argument_of(int number) {
#define WORD(name, word, ...) word,
    static const char *const WORDS_OF_OTHERS[] = {OTHER_FAULTS(WORD)};
#undef WORD
    return number < FIRST_OTHER ? TENSOR_NAMES[number / TENSOR_FAULT_COUNT]
                                : WORDS_OF_OTHERS[number - FIRST_OTHER];
}

static int break_tensor(wan_attn_tensor *t, int what, int64_t d, int which) {
#define CASE(name, of, ...)                                                                        \
    case TENSOR_##name:                                                                            \
        if (TAKES(of, which)) {                                                                    \
            __VA_ARGS__;                                                                           \
            return 1;                                                                              \
        }                                                                                          \
        return 0;
    switch (what) {
        TENSOR_FAULTS(CASE)
    default: return 0;
    }
#undef CASE
}

/* Puts fault `number` into the call; 0: there is no such fault. d chooses a dimension. */
static int break_call(fault_params *p, int number, int64_t d, fault *f) {
    static const char *const TENSOR_FAULT[] = {
#define NAME(name, ...) #name,
        TENSOR_FAULTS(NAME)
#undef NAME
    };
    f->argument = argument_of(number);
    f->is_misfit = number < FIRST_OTHER;
    if (f->is_misfit) {
        int which = number / TENSOR_FAULT_COUNT, what = number % TENSOR_FAULT_COUNT;
        wan_attn_tensor *t = tensor_at(p, which);
        int is_used = t->data != NULL && t->ndim >= 1 && t->ndim <= 4; /* not broken before */
        int64_t dim = is_used ? d % t->ndim : 0;
        snprintf(f->name, sizeof(f->name), "%s.%s[%d]", f->argument, TENSOR_FAULT[what], (int)dim);
        return is_used && break_tensor(t, what, dim, which);
    }
#define CASE(name_of, word, ...)                                                                   \
    case OTHER_##name_of:                                                                          \
        snprintf(f->name, sizeof(f->name), #name_of);                                              \
        __VA_ARGS__;                                                                               \
        return 1;
    switch (number - FIRST_OTHER) {
        OTHER_FAULTS(CASE)
    default: return 0;
    }
#undef CASE
}

/* Whether the second fault may undo the first: both of one argument, or the same of two tensors. */
static int may_undo(int one, int other) {
    return !strcmp(argument_of(one), argument_of(other)) ||
           (one < FIRST_OTHER && other < FIRST_OTHER &&
            one % TENSOR_FAULT_COUNT == other % TENSOR_FAULT_COUNT);
}

#endif /* WAN_ATTN_TESTS_FAULTS_H */
