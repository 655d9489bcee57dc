/* SPDX-License-Identifier: Apache-2.0
 * target.h - lets the functions of one file use an instruction set that the rest of the library
 * does not assume. In the source, so that every build and every tool agrees; MSVC needs no
 * permission.
 */
#ifndef WAN_ATTN_CPU_TARGET_H
#define WAN_ATTN_CPU_TARGET_H

#define TEXT_OF(...) #__VA_ARGS__

/* TARGET_BEGIN("avx2,fma"): from here to TARGET_END, at the end of the file. */
#if defined(__clang__)
#define TARGET_BEGIN(features)                                                                     \
    _Pragma(TEXT_OF(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define TARGET_END _Pragma("clang attribute pop")
#elif defined(__GNUC__)
#define TARGET_BEGIN(features) _Pragma(TEXT_OF(GCC target(features)))
#define TARGET_END /* the end of the file */
#else
#define TARGET_BEGIN(features)
#define TARGET_END
#endif

#endif /* WAN_ATTN_CPU_TARGET_H */
