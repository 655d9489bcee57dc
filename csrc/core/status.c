/* SPDX-License-Identifier: Apache-2.0
 * status.c - status codes, error messages and what this library says of itself. Knows no kernel and
 * no device.
 */
#include <stdarg.h>
#include <stdio.h>

#include "core/kernel.h"

int32_t wan_attn_abi_version(void) { return WAN_ATTN_ABI_VERSION; }

const char *wan_attn_status_name(int32_t status) {
    static const char *const NAMES[] = {"OK", "INVALID_ARGUMENT", "UNSUPPORTED", "DEVICE_ERROR",
                                        "INTERNAL"};
    return status >= 0 && status <= WAN_ATTN_INTERNAL ? NAMES[status] : "UNKNOWN";
}

wan_attn_status wan_attn_fail(wan_attn_error *err, wan_attn_status status, const char *format,
                              ...) {
    if (err) {
        va_list args;
        va_start(args, format);
        err->status = (int32_t)status;
        vsnprintf(err->message, sizeof(err->message), format, args);
        va_end(args);
    }
    return status;
}

wan_attn_status wan_attn_ok(wan_attn_error *err) {
    return wan_attn_fail(err, WAN_ATTN_OK, "%s", "");
}

#if defined(__clang__)
#define COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define COMPILER "gcc " __VERSION__
#elif defined(_MSC_VER)
#define STRING_OF(x) #x
#define STRING(x) STRING_OF(x)
#define COMPILER "MSVC " STRING(_MSC_FULL_VER)
#else
#define COMPILER "unknown compiler"
#endif

#if defined(__x86_64__) || defined(_M_X64)
#define TARGET "x86-64"
#elif defined(__aarch64__) || defined(_M_ARM64)
#define TARGET "arm64"
#else
#define TARGET "portable"
#endif

const char *wan_attn_build_info(void) { return TARGET ", " COMPILER; }
