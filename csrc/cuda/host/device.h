/* SPDX-License-Identifier: Apache-2.0
 * device.h - one CUDA device: what it is, and how a thread works on it. Knows no kernel.
 */
#ifndef WAN_ATTN_CUDA_HOST_DEVICE_H
#define WAN_ATTN_CUDA_HOST_DEVICE_H

#include "cuda/host/driver.h"

enum { WAN_ATTN_CUDA_MAX_DEVICES = 32 };

/* What is known of device `index`, asked of the driver once; or NULL, and why: UNSUPPORTED, or
 * DEVICE_ERROR where a device is in trouble. */
const wan_attn_cuda_device *wan_attn_cuda_find_device(int32_t index, wan_attn_error *err);

/* The driver's name for a device that has been found. */
wan_attn_cu_device wan_attn_cuda_handle_of(int32_t index);

/* Makes this thread work on the device. If the thread already has a context of this device, that
 * one stays: torch's, or a green context (a part of the GPU) that the caller has chosen. Otherwise
 * the primary context, which torch uses too, is current until leave. */
wan_attn_status wan_attn_cuda_enter(const wan_attn_cuda_driver *driver, int32_t index,
                                    int *is_pushed, wan_attn_error *err);
void wan_attn_cuda_leave(const wan_attn_cuda_driver *driver, int is_pushed);

#endif /* WAN_ATTN_CUDA_HOST_DEVICE_H */
