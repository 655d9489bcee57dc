# SPDX-License-Identifier: Apache-2.0
"""test_torch_flash.py - torch's list of flash implementations: offered, activated, restored.

Without a GPU the operator cannot be called where it lives: the dispatcher's tables show that it was
replaced and put back, and the function is called by itself, on CPU tensors.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from wan_attn.backends import native
from wan_attn.integrations import torch_flash

needs_torch = pytest.mark.skipif(
    not hasattr(torch.nn.attention, "register_flash_attention_impl"),
    reason="torch before 2.11 has one flash implementation",
)
needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None, reason="this torch is built without CUDA"
)


def kernels() -> list[str]:
    """What the dispatcher holds for the operator on CUDA, the active one first."""
    table = torch._C._dispatch_dump(f"aten::{torch_flash.OPERATOR}")
    return [line for line in table.splitlines() if line.startswith("CUDA")]


@pytest.fixture
def impls() -> Iterator[Any]:
    from torch.nn.attention import _registry

    before = dict(_registry._FLASH_ATTENTION_IMPLS)
    yield torch.nn.attention
    torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
    _registry._FLASH_ATTENTION_IMPLS.clear()
    _registry._FLASH_ATTENTION_IMPLS.update(before)


@needs_torch
@needs_cuda_build
def test_offered_activated_and_restored(impls: Any) -> None:
    own = kernels()
    assert "wan_attn" not in impls.list_flash_attention_impls()
    torch_flash.register()
    torch_flash.register()
    assert "wan_attn" in impls.list_flash_attention_impls()
    assert kernels() == own, "offering it replaces nothing"
    assert impls.current_flash_attention_impl() is None

    for _ in range(2):
        impls.activate_flash_attention_impl("wan_attn")
        assert impls.current_flash_attention_impl() == "wan_attn"
        active, *shadowed = kernels()
        assert active != own[0] and len(shadowed) == len(own)
        assert shadowed[0].removeprefix("CUDA (inactive)") == own[0].removeprefix("CUDA")
    impls.restore_flash_attention_impl()
    assert kernels() == own
    impls.restore_flash_attention_impl(_raise_warn=False)
    assert kernels() == own


@needs_torch
@needs_cuda_build
def test_torch_itself_stays_what_ours_falls_back_on(impls: Any) -> None:
    """Activated twice, ours must not take itself for torch's own kernel."""
    torch_flash.register()
    impls.activate_flash_attention_impl("wan_attn")
    impls.activate_flash_attention_impl("wan_attn")
    assert len(kernels()) == 2


@needs_torch
@needs_cuda_build
def test_removing_is_not_left_to_the_garbage_collector() -> None:
    own = kernels()
    handle = torch_flash._activate()
    assert kernels() != own
    for _ in range(2):
        handle.remove()
        assert kernels() == own


def test_importing_activates_nothing() -> None:
    code = (
        "import torch, wan_attn.integrations.torch_flash;"
        "names = getattr(torch.nn.attention, 'list_flash_attention_impls', list)();"
        "assert 'wan_attn' not in names and not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl", raising=False)
    with pytest.raises(RuntimeError, match="torch must be 2.11 or newer .* got"):
        torch_flash.register()


class Own:
    """Stands in for torch's kernel; hands back what it was called with."""

    def call_boxed(self, *args: Any, **kwargs: Any) -> Any:
        return "own", args, kwargs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_function_returns_what_the_operator_does(
    native: str, is_causal: bool, dtype: torch.dtype
) -> None:
    query, key, value = torch.randn(3, 2, 4, 9, 16, dtype=dtype).unbind()
    forward = torch_flash.make_forward(Own())
    with torch.no_grad():
        out, lse, cum_q, cum_k, max_q, max_k, *rest = forward(
            None, query, key, value, 0.0, is_causal, False, scale=0.3
        )
        theirs, their_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, scale=0.3
        )
    limit = 2e-2 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(out, theirs, rtol=0, atol=limit)
    torch.testing.assert_close(lse, their_lse.view_as(lse), rtol=0, atol=limit)
    assert (cum_q, cum_k, max_q, max_k) == (None, None, 9, 9)
    assert [x.dtype for x in rest] == [torch.uint64, torch.uint64, dtype]


@pytest.mark.parametrize("why", ["grad", "dropout", "debug mask", "causal", "value", "kernels"])
def test_other_calls_go_to_torchs_own_kernel(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda r: "no row" if why == "kernels" else None)
    query, key, value = torch.randn(3, 1, 2, 5, 8).unbind()
    if why == "causal":
        query = query[:, :, :3]
    if why == "value":
        value = value[..., :4]
    options = (0.1 if why == "dropout" else 0.0, why == "causal", why == "debug mask")
    with torch.set_grad_enabled(why == "grad"):
        said, args, kwargs = torch_flash.make_forward(Own())(
            "keys", query, key, value, *options, scale=None
        )
    assert said == "own" and args[0] == "keys" and args[1] is query and args[4:] == options
    assert kwargs == {"scale": None}
