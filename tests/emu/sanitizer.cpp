// SPDX-License-Identifier: Apache-2.0
// sanitizer.cpp - where -fsanitize=bounds,shift,integer-divide-by-zero reports to. Our own handlers
// instead of the compiler's runtime: a finding ends the launch with a message, not the process.
#include "machine.h"

extern "C" {

[[noreturn]] void __ubsan_handle_out_of_bounds_abort(void *, std::size_t index);
[[noreturn]] void __ubsan_handle_shift_out_of_bounds_abort(void *, std::size_t, std::size_t by);
[[noreturn]] void __ubsan_handle_divrem_overflow_abort(void *, std::size_t, std::size_t);

void __ubsan_handle_out_of_bounds_abort(void *, std::size_t index) {
    emu::the_machine().fail("register array index " + std::to_string(index) + " is out of bounds");
}

void __ubsan_handle_shift_out_of_bounds_abort(void *, std::size_t, std::size_t by) {
    emu::the_machine().fail("shift by " + std::to_string(by));
}

void __ubsan_handle_divrem_overflow_abort(void *, std::size_t, std::size_t) {
    emu::the_machine().fail("division by zero");
}

} // extern "C"
