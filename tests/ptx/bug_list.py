# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (each bug is a line of a table)
"""bug_list.py - changes of the text of wrappers, to be planted by bugs.py."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from emu.rows import CSRC


@dataclass(frozen=True)
class Bug:
    """Replace `right` by `wrong` in `file`, at its occurrence number `which`."""

    name: str
    file: str
    right: str
    wrong: str
    row: str = "slim"
    which: int = 0

    def plant(self, folder: Path) -> Path:
        """Sources with this bug."""
        csrc = folder / "csrc"
        if not csrc.exists():
            shutil.copytree(CSRC, csrc)
        file = csrc / "cuda" / self.file
        text = (CSRC / "cuda" / self.file).read_text(encoding="utf-8")
        parts = text.split(self.right)
        assert len(parts) > self.which + 1, f"{self.name}: {self.file} has changed"
        head, tail = parts[: self.which + 1], parts[self.which + 1 :]
        file.write_text(
            self.right.join(head) + self.wrong + self.right.join(tail), encoding="utf-8"
        )
        return csrc

    def remove(self, csrc: Path) -> None:
        shutil.copy(CSRC / "cuda" / self.file, csrc / "cuda" / self.file)


THREAD, MEMORY, MMA, MATH = (f"ptx/{n}.cuh" for n in ("thread", "memory", "mma", "math"))
CLUSTER, BARRIER, TMA, WGMMA = (f"ptx/{n}.cuh" for n in ("cluster", "mbarrier", "tma", "wgmma"))
RING, PRODUCER = "tile/ring.cuh", "tile/producer.cuh"

# fmt: off
BUGS = (
    Bug("the thread's number is the block's", THREAD, "%%tid.x", "%%ctaid.x"),
    Bug("the block's number is the thread's", THREAD, "%%ctaid.x", "%%tid.x"),
    Bug("redux of half a warp", THREAD, "%0, %0, 0xffffffff;", "%0, %0, 0x0000ffff;"),
    Bug("redux: =r for +r", THREAD, '"+r"(x)', '"=r"(x)'),
    Bug("no barrier of the block", THREAD, "barrier.sync.aligned 0;", ""),
    Bug("barrier of the block without memory", THREAD, '"barrier.sync.aligned 0;" ::: "memory"', '"barrier.sync.aligned 0;"'),
    Bug("shfl of bits: a clamp of 0", THREAD, "%1, %2, 0x1f", "%1, %2, 0x00"),
    Bug("shfl of floats: a clamp of 0", THREAD, "%1, %2, 0x1f", "%1, %2, 0x00", which=1),
    Bug("shfl: operands swapped", THREAD, "%0, %1, %2, 0x1f", "%0, %2, %1, 0x1f", which=1),
    Bug("shfl: half a warp", THREAD, "0x1f, 0xffffffff", "0x1f, 0x0000ffff", which=1),
    Bug("shfl is not volatile", THREAD, 'asm volatile("shfl', 'asm("shfl'),
    Bug("vote: all for any", THREAD, "vote.sync.any", "vote.sync.all"),
    Bug("vote: turned round", THREAD, "selp.s32 %0, 1, 0, q", "selp.s32 %0, 0, 1, q"),
    Bug("i32 lengths: one further", MEMORY, "ld.global.nc.s32 %0, [%1]", "ld.global.nc.s32 %0, [%1+4]"),
    Bug("i64 lengths: half of one", MEMORY, "ld.global.nc.s64 %0, [%1]", "ld.global.nc.s32 %0, [%1]"),
    Bug("16 bits from an odd address", MEMORY, "ld.global.nc.b16 %0, [%1]", "ld.global.nc.b16 %0, [%1+1]", "convert"),
    Bug("Q misaligned", MEMORY, "ld.global.nc.b32 %0, [%1]", "ld.global.nc.b32 %0, [%1+2]"),
    Bug("scales: one further", MEMORY, "ld.global.nc.f32 %0, [%1]", "ld.global.nc.f32 %0, [%1+4]", "pv16"),
    Bug("f32 Q: words swapped", MEMORY, "ld.global.nc.v2.f32 {%0, %1}", "ld.global.nc.v2.f32 {%1, %0}"),
    Bug("lse: one further", MEMORY, "st.global.f32 [%0]", "st.global.f32 [%0+4]"),
    Bug("store of 32 bits: one further", MEMORY, "st.global.b32 [%0], %1", "st.global.b32 [%0+4], %1", "convert"),
    Bug("f32 out: words swapped", MEMORY, "st.global.v2.f32 [%0], {%1, %2}", "st.global.v2.f32 [%0], {%2, %1}"),
    Bug("out: words swapped", MEMORY, "st.global.v2.b32 [%0], {%1, %2}", "st.global.v2.b32 [%0], {%2, %1}"),
    Bug("out: half of it", MEMORY, "st.global.v2.b32 [%0], {%1, %2}", "st.global.b32 [%0], %1"),
    Bug("store to global without memory", MEMORY, '"l"(at), "f"(x) : "memory"', '"l"(at), "f"(x)'),
    Bug("ld.shared: words swapped", MEMORY, "ld.shared.v4.b32 {%0, %1", "ld.shared.v4.b32 {%1, %0", "wide"),
    Bug("ld.shared is not volatile", MEMORY, 'asm volatile("ld.shared', 'asm("ld.shared', "wide"),
    Bug("st.shared: words swapped", MEMORY, "[%0], {%1, %2, %3, %4}", "[%0], {%2, %1, %3, %4}", "wide"),
    Bug("Turing's copies: words swapped", MEMORY, "ld.global.nc.v4.b32 {%0, %1", "ld.global.nc.v4.b32 {%1, %0", "turing"),
    Bug("no zeros behind the keys", MEMORY, "[%0], [%1], 16, %2;", "[%0], [%1], 16;"),
    Bug("zeros before the end of the keys", MEMORY, "is_zero ? 0 : 16", "is_zero ? 16 : 0"),
    Bug("cp.async of 8 bytes", MEMORY, "[%0], [%1], 16;", "[%0], [%1], 8;"),
    Bug("cp.async: addresses swapped", MEMORY, "[%0], [%1], 16;", "[%1], [%0], 16;"),
    Bug("cp.async without memory", MEMORY, '"r"(to), "l"(from) : "memory"', '"r"(to), "l"(from)'),
    Bug("copies are not committed", MEMORY, "cp.async.commit_group;", ""),
    Bug("copies: one group less is waited for", MEMORY, "cp.async.wait_group %0;", "cp.async.wait_group %0 + 1;"),
    Bug("sub: operands swapped", MEMORY, "sub.s64 %0, %1, %2", "sub.s64 %0, %2, %1"),
    Bug("shared memory is aligned to 16", MEMORY, "__align__(1024)", "__align__(16)"),
    Bug("K is transposed", MMA, "m8n8.x4.shared.b16", "m8n8.x4.trans.shared.b16"),
    Bug("V is not transposed", MMA, "m8n8.x4.trans.shared.b16", "m8n8.x4.shared.b16"),
    Bug("ldmatrix: matrices swapped", MMA, ".b16 {%0, %1, %2, %3}", ".b16 {%1, %0, %2, %3}"),
    Bug("ldmatrix of V: matrices swapped", MMA, ".b16 {%0, %1, %2, %3}", ".b16 {%2, %1, %0, %3}", which=1),
    Bug("ldmatrix is not volatile", MMA, 'asm volatile("ldmatrix', 'asm("ldmatrix'),
    Bug("mma: =f for +f", MMA, '"+f"(d[0])', '"=f"(d[0])'),
    Bug("mma: A's registers swapped", MMA, "{%4, %5, %6, %7}", "{%5, %4, %6, %7}"),
    Bug("mma: B's registers swapped", MMA, '"{%8, %9}', '"{%9, %8}'),
    Bug("mma: D's registers swapped", MMA, "f32.bf16.bf16.f32 {%0, %1, %2, %3}", "f32.bf16.bf16.f32 {%0, %2, %1, %3}"),
    Bug("mma: f16 for bf16", MMA, "f32.bf16.bf16.f32", "f32.f16.f16.f32"),
    Bug("mma of f16: A's registers swapped", MMA, "{%4, %5, %6, %7}", "{%4, %6, %5, %7}", "f16", 1),
    Bug("Turing: the right half times B's left", MMA, "{%6, %7}, {%9}", "{%6, %7}, {%8}", "turing"),
    Bug("Turing: A's registers swapped", MMA, "{%4, %5}, {%8}", "{%5, %4}, {%8}", "turing"),
    Bug("f16 sums: =r for +r", MMA, '"+r"(d[0])', '"=r"(d[0])', "pv16"),
    Bug("f16 sums: B's registers swapped", MMA, '{%6, %7}, "', '{%7, %6}, "', "pv16"),
    Bug("bf16 pairs: halves swapped", MATH, '"f"(high), "f"(low)', '"f"(low), "f"(high)'),
    Bug("f16 pairs: halves swapped", MATH, '"f"(high), "f"(low)', '"f"(low), "f"(high)', "f16", 1),
    Bug("Turing's pairs: halves swapped", MATH, "{l, h}", "{h, l}", "turing"),
    Bug("f16 pairs are taken apart the wrong way", MATH, "cvt.f32.f16 %0, l; cvt.f32.f16 %1, h", "cvt.f32.f16 %0, h; cvt.f32.f16 %1, l", "pv16"),
    Bug("cvt cuts off", MATH, "cvt.rn.bf16x2", "cvt.rz.bf16x2"),
    Bug("ex2 without .ftz", MATH, "ex2.approx.ftz", "ex2.approx"),
    Bug("ex2 for rcp", MATH, "rcp.approx.ftz", "ex2.approx.ftz"),
    Bug("fma: operands swapped", MATH, "%0, %1, %2, %3;", "%0, %1, %3, %2;"),
    Bug("max of one", MATH, "max.f32 %0, %1, %2", "max.f32 %0, %1, %1"),
    Bug("every block has rank 0", CLUSTER, "mov.u32 %0, %%cluster_ctarank;", "mov.u32 %0, 0;", "hopper"),
    Bug("no arrival at the cluster's barrier", CLUSTER, "barrier.cluster.arrive.relaxed.aligned;", "", "hopper"),
    Bug("no wait at the cluster's barrier", CLUSTER, "barrier.cluster.wait.acquire.aligned;", "", "hopper"),
    Bug("cluster's barrier without memory", CLUSTER, '"barrier.cluster.wait.acquire.aligned;" ::: "memory"', '"barrier.cluster.wait.acquire.aligned;"', "hopper"),
    Bug("a warp's barrier for one lane", CLUSTER, "bar.warp.sync 0xffffffff", "bar.warp.sync 0x1", "hopper"),
    Bug("named barrier: operands swapped", CLUSTER, "barrier.sync.aligned %0, %1", "barrier.sync.aligned %1, %0", "hopper"),
    Bug("the turn: operands swapped", CLUSTER, "barrier.arrive.aligned %0, %1", "barrier.arrive.aligned %1, %0", "hopper"),
    Bug("registers: dec for inc", CLUSTER, "setmaxnreg.inc", "setmaxnreg.dec", "hopper"),
    Bug("registers: inc for dec", CLUSTER, "setmaxnreg.dec", "setmaxnreg.inc", "hopper"),
    Bug("a fence of the wrong proxy", CLUSTER, "fence.proxy.async.shared::cta", "fence.proxy.alias", "hopper"),
    Bug("a fence of global memory", CLUSTER, "fence.proxy.async.shared::cta", "fence.proxy.async.global", "hopper"),
    Bug("a fence of threads for one of proxies", CLUSTER, "fence.proxy.async.shared::cta", "fence.acq_rel.cta", "hopper"),
    Bug("proxy fence without memory", CLUSTER, '"fence.proxy.async.shared::cta;" ::: "memory"', '"fence.proxy.async.shared::cta;"', "hopper"),
    Bug("stmatrix: transposed", CLUSTER, "x4.shared.b16", "x4.trans.shared.b16", "hopper"),
    Bug("stmatrix: matrices swapped", CLUSTER, "[%0], {%1, %2, %3, %4}", "[%0], {%1, %3, %2, %4}", "hopper"),
    Bug("mbarrier for one arrival", BARRIER, "mbarrier.init.shared::cta.b64 [%0], %1;", "mbarrier.init.shared::cta.b64 [%0], 1;", "hopper"),
    Bug("mbarriers are not fenced", BARRIER, "fence.mbarrier_init.release.cluster;", "", "hopper"),
    Bug("mbarriers: another fence", BARRIER, "fence.mbarrier_init.release.cluster;", "fence.acq_rel.cluster;", "hopper"),
    Bug("bytes are not announced", BARRIER, "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;", "mbarrier.arrive.shared::cta.b64 _, [%0];", "hopper"),
    Bug("half the bytes are announced", BARRIER, '"r"(bytes)', '"r"(bytes / 2)', "hopper"),
    Bug("too many bytes are announced", BARRIER, '"r"(bytes)', '"r"(bytes + 16)', "alone"),
    Bug("an arrival at the own block's place", BARRIER, "_, [remote];", "_, [%0];", "hopper"),
    Bug("mapa: operands swapped", BARRIER, "remote, %0, %1", "remote, %1, %0", "hopper"),
    Bug("a remote address as one of the own block", BARRIER, "mbarrier.arrive.shared::cluster", "mbarrier.arrive.shared::cta", "hopper"),
    Bug("no arrival", BARRIER, "mbarrier.arrive.shared::cta.b64 _, [%0];", "", "alone"),
    Bug("the other parity", BARRIER, '"r"(parity)', '"r"(parity ^ 1)', "hopper"),
    Bug("waits until it is not over", BARRIER, "@done bra.uni over", "@!done bra.uni over", "hopper"),
    Bug("mbarrier wait without memory", BARRIER, '"r"(parity)\n                 : "memory"', '"r"(parity)', "hopper"),
    Bug("Q: column and row swapped", TMA, "{%3, %4, %5, %6}", "{%4, %3, %5, %6}", "hopper"),
    Bug("K, V: head and sample swapped", TMA, "{%4, %5, %6, %7}", "{%4, %5, %7, %6}", "hopper"),
    Bug("multicast to one block", TMA, '"h"((unsigned short)blocks)', '"h"((unsigned short)1)', "hopper"),
    Bug("no multicast", TMA, '".multicast::cluster [%0], [%1, {%4, %5, %6, %7}], [%2], %3;"', '" [%0], [%1, {%4, %5, %6, %7}], [%2];"', "hopper"),
    Bug("place and mbarrier swapped", TMA, "[%0], [%1, {%3, %4, %5, %6}], [%2];", "[%2], [%1, {%3, %4, %5, %6}], [%0];", "hopper"),
    Bug("out: row and head swapped", TMA, "[%0, {%2, %3, %4, %5}]", "[%0, {%2, %4, %3, %5}]", "hopper"),
    Bug("stores are not committed", TMA, "cp.async.bulk.commit_group;", "", "hopper"),
    Bug("stores are not waited for", TMA, "cp.async.bulk.wait_group.read 0;", "cp.async.bulk.wait_group.read 1;", "hopper"),
    Bug("a map's address is off", TMA, "prefetch.tensormap [%0];", "prefetch.tensormap [%0+32];", "hopper"),
    Bug("bulk load without memory", TMA, '"r"(sample)\n                 : "memory"', '"r"(sample)', "hopper"),
    Bug("no wgmma.fence", WGMMA, "wgmma.fence.sync.aligned;", "", "hopper"),
    Bug("products are not committed", WGMMA, "wgmma.commit_group.sync.aligned;", "", "hopper"),
    Bug("one group less is waited for", WGMMA, "wgmma.wait_group.sync.aligned %0;", "wgmma.wait_group.sync.aligned %0 + 1;", "hopper"),
    Bug("wait without memory", WGMMA, '"n"(pending) : "memory"', '"n"(pending)', "hopper"),
    Bug("a hold that holds nothing", WGMMA, 'asm volatile("" : "+f"(x)::"memory");', 'asm("" : "+f"(x));', "hopper"),
    Bug("scale-d turned round", WGMMA, "setp.ne.s32 p", "setp.eq.s32 p", "hopper"),
    Bug("K as if it were MN-major", WGMMA, "p, 1, 1, 0, 0;", "p, 1, 1, 0, 1;", "hopper"),
    Bug("V as if it were K-major", WGMMA, ", 1, 1, 1, 1;", ", 1, 1, 1, 0;", "hopper"),
    Bug("B negated", WGMMA, ", 1, 1, 1, 1;", ", 1, 1, -1, 1;", "hopper"),
    Bug("A's registers swapped", WGMMA, '{%" #a0 ", %" #a1 "', '{%" #a1 ", %" #a0 "', "hopper"),
    Bug("descriptors swapped", WGMMA, '%" #a_at ", %" #b_at ", p', '%" #b_at ", %" #a_at ", p', "hopper"),
    Bug("wgmma: =f for +f", WGMMA, '"+f"(d[j][0])', '"=f"(d[j][0])', "hopper"),
    Bug("products are not volatile", WGMMA, 'asm volatile("wgmma.mma_async', 'asm("wgmma.mma_async', "hopper"),
    Bug("f16 products of bf16", WGMMA, 'k16.f32." #type "." #type', 'k16.f32.f16.f16"', "hopper", 1),
    Bug("a descriptor without mask", RING, "(x & 0x3ffff) >> 4", "x >> 4", "hopper128"),
    Bug("a descriptor of another swizzle", RING, "(u64)1 << 62", "(u64)2 << 62", "hopper"),
    Bug("a block leaves under multicast", PRODUCER, "stage < STAGES && CLUSTER > 1; stage++", "stage < 0; stage++", "hopper"),
)
# fmt: on
