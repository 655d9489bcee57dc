/* SPDX-License-Identifier: Apache-2.0
 * fuzz.h - what the C campaigns share: random numbers that depend on seed and case alone, memory
 * between guard pages, and the line that repeats a case, printed whatever ends the process.
 */
#ifndef WAN_ATTN_TESTS_FUZZ_H
#define WAN_ATTN_TESTS_FUZZ_H

#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "wan_attn.h"

enum { PAGE = 4096, MOST_BUFFERS = 64, SECONDS_FOR_A_CASE = 60, MOST_FAILURES = 20 };

/* Random numbers (splitmix64). */
static uint64_t random_state;

static uint64_t random_bits(void) {
    uint64_t z = random_state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

static int64_t pick(int64_t below) { return (int64_t)(random_bits() % (uint64_t)below); }
#define PICK(array) (array)[pick((int64_t)(sizeof(array) / sizeof((array)[0])))]

/* The case at work, and how to repeat it. */
static const char *campaign = "?";
static unsigned long long seed_at_work, case_at_work;

static void begin_case(uint64_t seed, uint64_t number) {
    seed_at_work = seed, case_at_work = number;
    random_state = seed * 0xd1342543de82ef95ull + number;
    random_state = random_bits();
    alarm(SECONDS_FOR_A_CASE); /* a case that hangs is a failure, too */
}

static void say_how_to_repeat(void) {
    char line[200];
    int n = snprintf(line, sizeof(line),
                     "repeat: make fuzz ARGS=\"--only %s --seed %llu --case %llu\"\n", campaign,
                     seed_at_work, case_at_work);
    if (write(STDERR_FILENO, line, (size_t)n) != n)
        _exit(3);
}

static void on_signal(int number) {
    char line[60];
    int n = snprintf(line, sizeof(line), "FAILED: signal %d%s\n", number,
                     number == SIGALRM ? " (the case hangs)" : "");
    if (write(STDERR_FILENO, line, (size_t)n) == n)
        say_how_to_repeat();
    _exit(3);
}

/* The sanitizers, where the program has them, end it by SIGABRT. */
const char *__asan_default_options(void);
const char *__ubsan_default_options(void);
const char *__tsan_default_options(void);
const char *__asan_default_options(void) { return "abort_on_error=1:detect_leaks=0"; }
const char *__ubsan_default_options(void) { return "abort_on_error=1:print_stacktrace=1"; }
const char *__tsan_default_options(void) { return "abort_on_error=1:halt_on_error=1"; }

static void say_the_case_of_every_death(const char *name) {
    static const int SIGNALS[] = {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGALRM};
    campaign = name;
    for (size_t n = 0; n < sizeof(SIGNALS) / sizeof(SIGNALS[0]); n++)
        signal(SIGNALS[n], on_signal);
}

static int failed(const char *what) {
    fprintf(stderr, "FAILED: %s\n", what);
    say_how_to_repeat();
    return 1;
}

static double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Memory between two pages that nobody may touch. What is left of its own pages is filled as the
 * buffer is, and must stay so. */
typedef struct buffer {
    unsigned char *pages, *at;
    size_t room, size; /* bytes of its pages, and of the buffer in them */
    int fill;
} buffer;

static buffer buffers[MOST_BUFFERS];
static int buffer_count;

/* is_at_end: one byte further is the guard; else one byte before, as far as `align` allows. */
static buffer *make_buffer(size_t size, size_t align, int is_at_end, int fill) {
    buffer *b = &buffers[buffer_count++];
    b->room = (size + PAGE - 1) / PAGE * PAGE;
    b->size = size;
    b->fill = fill;
    b->pages = mmap(NULL, b->room + 2 * (size_t)PAGE, PROT_NONE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (b->pages == MAP_FAILED || buffer_count == MOST_BUFFERS)
        abort();
    b->pages += PAGE;
    if (b->room && mprotect(b->pages, b->room, PROT_READ | PROT_WRITE))
        abort();
    memset(b->pages, fill, b->room);
    b->at = b->pages + (is_at_end ? (b->room - size) / align * align : 0);
    return b;
}

static void make_read_only(const buffer *b) {
    if (b->room && mprotect(b->pages, b->room, PROT_READ))
        abort();
}

static inline void make_writable(const buffer *b) {
    if (b->room && mprotect(b->pages, b->room, PROT_READ | PROT_WRITE))
        abort();
}

/* The buffer that an address lies in. */
static inline const buffer *buffer_at(const void *at) {
    for (int n = 0; n < buffer_count; n++)
        if ((const unsigned char *)at >= buffers[n].pages &&
            (const unsigned char *)at < buffers[n].pages + buffers[n].room)
            return &buffers[n];
    abort();
}

static void release_buffers_from(int first) {
    while (buffer_count > first) {
        buffer *b = &buffers[--buffer_count];
        munmap(b->pages - PAGE, b->room + 2 * (size_t)PAGE);
    }
}

#endif /* WAN_ATTN_TESTS_FUZZ_H */
