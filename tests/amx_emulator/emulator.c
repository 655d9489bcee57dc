/* SPDX-License-Identifier: Apache-2.0
 * emulator.c - executes AMX tile instructions on any x86-64. The test puts a trap (ud2) before each
 * of them, so that the CPU raises SIGILL whether it has AMX or not; the handler decodes the
 * instruction behind the trap, does its work on tiles kept per thread, and steps over both. The
 * machine code under test is otherwise what the compiler made for real hardware. Linux; a
 * microsecond for an instruction. Stands in for core/cpuid.c's AMX and cpu/amx_permission.c.
 *
 * From Intel's Software Developer's Manual, volume 2, chapters "VEX encoding" and LDTILECFG to
 * TILEZERO: ldtilecfg, tilerelease, tilezero, tileloadd(t1), tilestored, tdpbf16ps.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <math.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include "cpu/amx_permission.h"

typedef struct tile {
    uint8_t row[16][64];
} tile;

typedef struct tile_state {
    uint8_t is_configured;
    uint16_t row_bytes[8];
    uint8_t rows[8];
    tile data[8];
    long executed;
} tile_state;

static __thread tile_state state;

/* The parts of one VEX-encoded instruction that tile instructions use. */
typedef struct instruction {
    uint8_t opcode, prefix; /* prefix: 0 none, 1 66, 2 F3, 3 F2 */
    uint8_t is_register, reg, rm, vvvv;
    uint64_t base, stride;
    int length;
} instruction;

static const uint8_t TRAP[2] = {0x0f, 0x0b}; /* ud2 */

static const int GREGS[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                              REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                              REG_R12, REG_R13, REG_R14, REG_R15};

static uint64_t general(const ucontext_t *u, int number) {
    return (uint64_t)u->uc_mcontext.gregs[GREGS[number]];
}

/* ModRM, SIB and displacement: where the memory is, and the distance of its rows (the index). */
static int decode_memory(const uint8_t *at, const ucontext_t *u, int x, int b, instruction *i) {
    int mod = at[0] >> 6, rm = at[0] & 7, used = 1;
    uint64_t base = 0, index = 0;
    if (rm == 4) {
        int sib = at[used++], scale = sib >> 6, ix = (sib >> 3 & 7) | x << 3, bs = sib & 7;
        if (ix != 4)
            index = general(u, ix) << scale;
        if (bs == 5 && mod == 0)
            mod = 2; /* a displacement and no base */
        else
            base = general(u, bs | b << 3);
    } else {
        base = general(u, rm | b << 3);
    }
    if (mod == 1)
        base += (uint64_t)(int64_t)(int8_t)at[used++];
    if (mod == 2) {
        int32_t displacement;
        memcpy(&displacement, at + used, 4);
        base += (uint64_t)(int64_t)displacement;
        used += 4;
    }
    i->base = base;
    i->stride = index;
    return used;
}

/* 1 if the bytes are an instruction of map 0F38 with a three-byte VEX prefix, which all are. */
static int decode(const uint8_t *at, const ucontext_t *u, instruction *i) {
    if (at[0] != 0xc4 || (at[1] & 0x1f) != 2)
        return 0;
    i->vvvv = ~(at[2] >> 3) & 15;
    i->prefix = at[2] & 3;
    i->opcode = at[3];
    i->is_register = at[4] >> 6 == 3;
    i->reg = at[4] >> 3 & 7;
    i->rm = at[4] & 7;
    i->length = 5;
    if (!i->is_register)
        i->length = 4 + decode_memory(at + 4, u, !(at[1] >> 6 & 1), !(at[1] >> 5 & 1), i);
    return 1;
}

static void configure(const uint8_t *config) {
    state.is_configured = config[0] == 1;
    for (int t = 0; t < 8; t++) {
        memcpy(&state.row_bytes[t], config + 16 + 2 * t, 2);
        state.rows[t] = config[48 + t];
    }
    memset(state.data, 0, sizeof(state.data));
}

static float flushed(float x) { return fpclassify(x) == FP_SUBNORMAL ? copysignf(0.0f, x) : x; }

static float bf16_at(const uint8_t *row, int n) {
    uint16_t half;
    float x;
    memcpy(&half, row + 2 * n, 2);
    uint32_t bits = (uint32_t)half << 16;
    memcpy(&x, &bits, 4);
    return flushed(x);
}

/* c += a b: even and odd terms are summed apart and meet at the end. */
static void multiply(int c, int a, int b) {
    for (int m = 0; m < state.rows[c]; m++)
        for (int n = 0; n < state.row_bytes[c] / 4; n++) {
            float even = 0.0f, odd = 0.0f, old;
            for (int k = 0; k < state.row_bytes[a] / 4; k++) {
                const uint8_t *left = state.data[a].row[m], *right = state.data[b].row[k];
                even = flushed(fmaf(bf16_at(left, 2 * k), bf16_at(right, 2 * n), even));
                odd = flushed(fmaf(bf16_at(left, 2 * k + 1), bf16_at(right, 2 * n + 1), odd));
            }
            memcpy(&old, state.data[c].row[m] + 4 * n, 4);
            old = flushed(old + flushed(even + odd));
            memcpy(state.data[c].row[m] + 4 * n, &old, 4);
        }
}

static void load(const instruction *i) {
    memset(&state.data[i->reg], 0, sizeof(tile));
    for (int m = 0; m < state.rows[i->reg]; m++)
        memcpy(state.data[i->reg].row[m], (const char *)i->base + (uint64_t)m * i->stride,
               state.row_bytes[i->reg]);
}

static void store(const instruction *i) {
    for (int m = 0; m < state.rows[i->reg]; m++)
        memcpy((char *)i->base + (uint64_t)m * i->stride, state.data[i->reg].row[m],
               state.row_bytes[i->reg]);
}

/* 0 if it is none of ours, or would fault on real hardware too. */
/* NOLINTBEGIN(bugprone-branch-clone): the order of the questions is the processor's */
static int execute(const instruction *i) {
    if (i->opcode == 0x49 && i->prefix == 0 && !i->is_register)
        configure((const uint8_t *)i->base);
    else if (i->opcode == 0x49 && i->prefix == 0)
        memset(&state, 0, offsetof(tile_state, executed));
    else if (!state.is_configured)
        return 0;
    else if (i->opcode == 0x49 && i->prefix == 3 && i->is_register)
        memset(&state.data[i->reg], 0, sizeof(tile));
    else if (i->opcode == 0x4b && (i->prefix == 3 || i->prefix == 1) && !i->is_register)
        load(i);
    else if (i->opcode == 0x4b && i->prefix == 2 && !i->is_register)
        store(i);
    else if (i->opcode == 0x5c && i->prefix == 2 && i->is_register)
        multiply(i->reg, i->rm, i->vvvv);
    else
        return 0;
    state.executed++;
    return 1;
}
/* NOLINTEND(bugprone-branch-clone) */

static void on_illegal_instruction(int number, siginfo_t *info, void *context) {
    ucontext_t *u = (ucontext_t *)context;
    instruction i = {0};
    (void)info;
    const uint8_t *at = (const uint8_t *)u->uc_mcontext.gregs[REG_RIP];
    if (memcmp(at, TRAP, sizeof(TRAP)) == 0 && decode(at + sizeof(TRAP), u, &i) && execute(&i))
        u->uc_mcontext.gregs[REG_RIP] += (greg_t)sizeof(TRAP) + i.length;
    else
        signal(number, SIG_DFL); /* a real one: it will be raised again */
}

/* For tests: 0 if the handler is in place. */
int wan_attn_emulate_amx(void) {
    struct sigaction action = {0};
    action.sa_sigaction = on_illegal_instruction;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    return sigaction(SIGILL, &action, NULL);
}

/* For tests: tile instructions that this thread has executed. */
long wan_attn_amx_instructions(void) { return state.executed; }

const char *wan_attn_amx_refusal(void) { return NULL; }
