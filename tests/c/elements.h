/* SPDX-License-Identifier: Apache-2.0
 * elements.h - reference.h for those who do not need all of it.
 */
#ifndef WAN_ATTN_TESTS_ELEMENTS_H
#define WAN_ATTN_TESTS_ELEMENTS_H

#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#endif
#include "reference.h"
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

#endif /* WAN_ATTN_TESTS_ELEMENTS_H */
