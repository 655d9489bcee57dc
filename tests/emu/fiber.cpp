// SPDX-License-Identifier: Apache-2.0
// fiber.cpp - switching stacks: by hand on x86-64, where a switch then costs a few nanoseconds (a
// test makes hundreds of millions), with ucontext elsewhere.
#include "fiber.h"

#include <cstdint>

namespace emu {

namespace {
// Not a multiple of 4 KiB: stacks at such distances fall into the same cache sets, and the whole
// emulation takes twice as long.
constexpr std::size_t STACK_BYTES = 128 * 1024 + 17 * 64;
} // namespace

void fiber_stacks::reserve(int count) {
    while (static_cast<int>(stacks.size()) < count)
        stacks.emplace_back(new std::byte[STACK_BYTES]);
}

#if defined(__x86_64__)

// What the System V ABI asks a function to preserve goes onto the old stack; the same comes from
// the new one.
asm(R"(
.text
.globl wan_attn_emu_switch
.hidden wan_attn_emu_switch
.type wan_attn_emu_switch, @function
wan_attn_emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size wan_attn_emu_switch, . - wan_attn_emu_switch
)");
extern "C" void wan_attn_emu_switch(void **old_stack, void *new_stack);

void fiber_stacks::prepare(int number, context &fiber, void (*entry)()) {
    auto top = reinterpret_cast<std::uintptr_t>(stacks[static_cast<std::size_t>(number)].get());
    top = (top + STACK_BYTES) & ~std::uintptr_t{63};
    // As if entry had been called: its return address, here nobody's, is 8 below a multiple of 16.
    auto *stack = reinterpret_cast<void **>(top - 64);
    *--stack = nullptr;
    *--stack = reinterpret_cast<void *>(entry);
    for (int saved = 0; saved < 6; saved++)
        *--stack = nullptr;
    fiber.stack_pointer = stack;
}

void switch_context(context &from, context &to) {
    wan_attn_emu_switch(&from.stack_pointer, to.stack_pointer);
}

#else

void fiber_stacks::prepare(int number, context &fiber, void (*entry)()) {
    getcontext(&fiber.machine);
    fiber.machine.uc_stack.ss_sp = stacks[static_cast<std::size_t>(number)].get();
    fiber.machine.uc_stack.ss_size = STACK_BYTES;
    fiber.machine.uc_link = nullptr;
    makecontext(&fiber.machine, entry, 0);
}

void switch_context(context &from, context &to) { swapcontext(&from.machine, &to.machine); }

#endif

} // namespace emu
