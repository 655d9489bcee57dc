/* SPDX-License-Identifier: Apache-2.0
 * amx_permission.c - asks Linux for the tile registers. A file of its own, so that the tests can
 * put an emulator in its place.
 */
#include "cpu/amx_permission.h"

#include <stddef.h>

#if defined(__linux__) && defined(__x86_64__)

/* arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): Documentation/arch/x86/xstate.rst */
static int is_granted(void) {
    enum { SYS_ARCH_PRCTL = 158, ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    long result = SYS_ARCH_PRCTL;
    __asm__ volatile("syscall"
                     : "+a"(result)
                     : "D"((long)ARCH_REQ_XCOMP_PERM), "S"((long)XFEATURE_XTILEDATA)
                     : "rcx", "r11", "memory");
    return result == 0;
}

/* Asking again is harmless and takes less than a microsecond, so no answer is kept. */
const char *wan_attn_amx_refusal(void) {
    return is_granted() ? NULL : "Linux does not let this process use the AMX tile registers";
}

#else

const char *wan_attn_amx_refusal(void) { return "AMX is only used on Linux so far"; }

#endif
