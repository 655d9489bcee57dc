/* SPDX-License-Identifier: Apache-2.0
 * device.c - what each CUDA device is. Asking makes no context; the primary one is retained when a
 * thread without one makes a call, and then kept: it is torch's, and ends with the process.
 */
#include "cuda/host/device.h"

#include <stdio.h>
#include <string.h>

#include "core/platform.h"

typedef struct device_slot {
    int is_known;
    wan_attn_cu_device handle;
    wan_attn_cu_context context; /* NULL: not retained yet */
    wan_attn_cuda_device facts;
} device_slot;

static wan_attn_lock lock = WAN_ATTN_UNLOCKED;
static device_slot slots[WAN_ATTN_CUDA_MAX_DEVICES];

/* Cards whose tensor cores sum f32 at half the rate of f16, by a word of their name: compute
 * capability alone does not tell, since the professional cards of the same chips do not. */
static int is_half_rate(int32_t arch, const char *name) {
    static const struct {
        int32_t arch;
        const char *word;
    } CARDS[] = {
#define HALF_RATE(arch, word) {arch, word},
#include "cuda/sdpa_rows.def"
    };
    for (size_t n = 0; n < sizeof(CARDS) / sizeof(CARDS[0]); n++)
        if (CARDS[n].arch == arch && strstr(name, CARDS[n].word))
            return 1;
    return 0;
}

/* 0, or the driver's error. */
static wan_attn_cu_result ask(const wan_attn_cuda_driver *d, int32_t index, device_slot *slot) {
    int major = 0, minor = 0, sms = 0, version = 0;
    wan_attn_cu_result error = d->device_get(&slot->handle, index);
    if (error == 0)
        error = d->device_attribute(&major, WAN_ATTN_CU_ATTRIBUTE_CAPABILITY_MAJOR, slot->handle);
    if (error == 0)
        error = d->device_attribute(&minor, WAN_ATTN_CU_ATTRIBUTE_CAPABILITY_MINOR, slot->handle);
    if (error == 0)
        error = d->device_attribute(&sms, WAN_ATTN_CU_ATTRIBUTE_NUM_SMS, slot->handle);
    if (error == 0)
        error = d->device_name(slot->facts.name, (int)sizeof(slot->facts.name), slot->handle);
    if (error == 0)
        error = d->driver_version(&version);
    if (error != 0)
        return error;
    slot->facts.struct_size = sizeof(slot->facts);
    slot->facts.arch = 10 * major + minor;
    slot->facts.num_sms = sms;
    slot->facts.driver_version = version;
    slot->facts.is_half_rate = is_half_rate(slot->facts.arch, slot->facts.name);
    slot->is_known = 1;
    return 0;
}

static wan_attn_status no_answer(const wan_attn_cuda_driver *d, wan_attn_cu_result error,
                                 int32_t index, wan_attn_error *err) {
    char what[40];
    snprintf(what, sizeof(what), "cuda:%d is", (int)index);
    if (wan_attn_cuda_is_trouble(error))
        return wan_attn_cuda_fail(d, error, "when asked what", what, err);
    const char *name, *text = wan_attn_cuda_words(d, error, &name);
    return wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "the driver does not tell what %s: %s (%s)",
                         what, name, text);
}

const wan_attn_cuda_device *wan_attn_cuda_find_device(int32_t index, wan_attn_error *err) {
    char reason[300];
    const wan_attn_cuda_driver *d = wan_attn_cuda_open_driver(reason, sizeof(reason));
    if (!d) {
        (void)wan_attn_fail(err, WAN_ATTN_UNSUPPORTED, "%s", reason);
        return NULL;
    }
    int count = 0, is_there = index >= 0 && index < WAN_ATTN_CUDA_MAX_DEVICES;
    wan_attn_cu_result error = 0;
    wan_attn_acquire(&lock);
    if (!is_there || !slots[index].is_known)
        error = d->device_count(&count);
    if (is_there && !slots[index].is_known && error == 0) {
        is_there = index < count;
        error = is_there ? ask(d, index, &slots[index]) : 0;
    }
    wan_attn_release(&lock);
    if (error != 0)
        (void)no_answer(d, error, index, err);
    else if (!is_there)
        (void)wan_attn_fail(err, WAN_ATTN_UNSUPPORTED,
                            "the driver has %d devices, there is no cuda:%d", count, (int)index);
    return error == 0 && is_there ? &slots[index].facts : NULL; /* never changes again */
}

wan_attn_status wan_attn_cuda_find_arch(int32_t index, int32_t *arch, wan_attn_error *err) {
    wan_attn_error why = {WAN_ATTN_OK, ""};
    const wan_attn_cuda_device *device = wan_attn_cuda_find_device(index, &why);
    if (!device)
        return wan_attn_fail(err, (wan_attn_status)why.status, "%s", why.message);
    *arch = device->arch;
    return WAN_ATTN_OK;
}

wan_attn_cu_device wan_attn_cuda_handle_of(int32_t index) {
    wan_attn_acquire(&lock);
    wan_attn_cu_device handle = slots[index].handle;
    wan_attn_release(&lock);
    return handle;
}

wan_attn_status wan_attn_cuda_device_at(int32_t index, wan_attn_cuda_device *device,
                                        wan_attn_error *err) {
    wan_attn_error why = {WAN_ATTN_OK, ""};
    if (!device || device->struct_size < sizeof(uint32_t))
        return wan_attn_fail(err, WAN_ATTN_INVALID_ARGUMENT,
                             "device must have its struct_size set, got %s",
                             device ? "a smaller one" : "NULL");
    const wan_attn_cuda_device *found = wan_attn_cuda_find_device(index, &why);
    if (!found)
        return wan_attn_fail(err, (wan_attn_status)why.status, "%s", why.message);
    uint32_t size = device->struct_size;
    memcpy(device, found, size < sizeof(*found) ? size : sizeof(*found));
    device->struct_size = size;
    return wan_attn_ok(err);
}

/* Whether this thread works on the device already. */
static wan_attn_cu_result is_entered(const wan_attn_cuda_driver *d, int32_t index, int *answer) {
    wan_attn_cu_context current = NULL;
    wan_attn_cu_device device = 0;
    *answer = 0;
    wan_attn_cu_result error = d->context_current(&current);
    if (error == 0 && current) {
        error = d->context_device(&device);
        *answer = error == 0 && device == wan_attn_cuda_handle_of(index);
    }
    return error;
}

wan_attn_status wan_attn_cuda_enter(const wan_attn_cuda_driver *d, int32_t index, int *is_pushed,
                                    wan_attn_error *err) {
    int is_here = 0;
    wan_attn_cu_result error = is_entered(d, index, &is_here);
    *is_pushed = 0;
    if (error != 0)
        return wan_attn_cuda_fail(d, error, "when asked for", "the thread's context", err);
    if (is_here)
        return WAN_ATTN_OK;
    wan_attn_acquire(&lock);
    device_slot *slot = &slots[index];
    if (!slot->context)
        error = d->context_retain(&slot->context, slot->handle);
    wan_attn_cu_context context = slot->context;
    wan_attn_release(&lock);
    if (error == 0)
        error = d->context_push(context);
    *is_pushed = error == 0;
    return error == 0 ? WAN_ATTN_OK
                      : wan_attn_cuda_fail(d, error, "when entering", "the primary context", err);
}

void wan_attn_cuda_leave(const wan_attn_cuda_driver *d, int is_pushed) {
    /* It takes off what enter has pushed, which cannot fail; and there would be nothing to do. */
    wan_attn_cu_context context;
    if (is_pushed)
        (void)d->context_pop(&context);
}
