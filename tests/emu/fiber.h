// SPDX-License-Identifier: Apache-2.0
// fiber.h - stacks that take turns: every CUDA thread of a block is one. Knows nothing of GPUs.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

// A suspended computation; empty until its first switch.
struct context {
#if defined(__x86_64__)
    void *stack_pointer = nullptr;
#else
    ucontext_t machine{};
#endif
};

// Stacks for `count` fibers. They are reused from block to block and never cleaned: kernels own
// nothing that would need a destructor.
class fiber_stacks {
  public:
    void reserve(int count);
    // Makes `fiber` begin in entry(), which must never return, at its next switch.
    void prepare(int number, context &fiber, void (*entry)());

  private:
    std::vector<std::unique_ptr<std::byte[]>> stacks;
};

// Suspends the running computation as `from` and goes on with `to`.
void switch_context(context &from, context &to);

} // namespace emu
