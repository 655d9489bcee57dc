/* SPDX-License-Identifier: Apache-2.0
 * amx_permission.h - Linux keeps the tile registers from a process until it asks. Knows no kernel.
 */
#ifndef WAN_ATTN_CPU_AMX_PERMISSION_H
#define WAN_ATTN_CPU_AMX_PERMISSION_H

/* NULL if this process may use the tile registers from now on, in all threads and children, else
 * why not. */
const char *wan_attn_amx_refusal(void);

#endif /* WAN_ATTN_CPU_AMX_PERMISSION_H */
