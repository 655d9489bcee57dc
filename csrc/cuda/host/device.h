/* SPDX-License-Identifier: Apache-2.0
 * device.h - one CUDA device: what it is, and how a thread works on it. Knows no kernel.
 */
#ifndef WAN_ATTN_CUDA_HOST_DEVICE_H
#define WAN_ATTN_CUDA_HOST_DEVICE_H

#include "cuda/host/driver.h"

enum { WAN_ATTN_CUDA_MAX_DEVICES = 32 };

/* What is known of device `index`, asked of the driver once; or NULL, and why. */
const wan_attn_cuda_device *wan_attn_cuda_find_device(int32_t index, char *reason, size_t size);

/* The device's primary context, which is torch's too, becomes this thread's; end with leave. */
wan_attn_status wan_attn_cuda_enter(const wan_attn_cuda_driver *driver, int32_t index,
                                    wan_attn_error *err);
void wan_attn_cuda_leave(const wan_attn_cuda_driver *driver);

#endif /* WAN_ATTN_CUDA_HOST_DEVICE_H */
