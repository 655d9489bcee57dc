# SPDX-License-Identifier: Apache-2.0
"""test_lightx2v_wan2gp.py - the two adapters against stand-ins with the hosts' recorded names."""

from __future__ import annotations

import copy
import functools
import io
import logging
import sys
import types
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import wan_attn
from calls import BF16, operands
from tolerances import assert_close_to_oracle
from wan_attn.integrations import lightx2v, wan2gp


class Register(dict[str, Any]):
    """lightx2v.utils.registry_factory.Register: called with a name it is a decorator."""

    def __call__(self, name: str) -> Any:
        def register(target: Any) -> Any:
            if name in self:
                raise Exception(f"{name} already exists.")
            self[name] = target
            return target

        return register


class Template:
    """lightx2v.common.ops.attn.template.AttnWeightTemplate."""

    def __init__(self, weight_name: str) -> None:
        raise AssertionError("attention classes are made without a name")

    def load(self, weight_dict: Any) -> None:
        """Attention has no weights."""


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Register]:
    register = Register()
    modules: dict[str, dict[str, Any]] = {
        "lightx2v.utils.registry_factory": {"ATTN_WEIGHT_REGISTER": register},
        "lightx2v.common.ops.attn.template": {"AttnWeightTemplate": Template},
    }
    for name, members in modules.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            part = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        vars(sys.modules[name]).update(members)
    yield register
    lightx2v.unregister()
    assert not register


class TestLightX2V:
    def test_registered_by_name_and_only_once(self, registry: Register) -> None:
        made = lightx2v.register()
        assert registry == {"wan_attn": made} and lightx2v.register() is made
        assert issubclass(made, Template)
        cast(Any, made)().load({})

    @pytest.mark.parametrize("dims", (3, 4))
    def test_one_sequence(self, registry: Register, dims: int) -> None:
        """As its runner calls: cu_seqlens of the one sequence, and where the call comes from."""
        attention = lightx2v.register()()
        q, k, v = operands(1, 21, 40, dtype=BF16)
        given = [x[0] if dims == 3 else x for x in (q, k, v)]
        cu_q, cu_k = torch.tensor([0, 21]), torch.tensor([0, 40])
        out = attention.apply(*given, cu_q, cu_k, 21, 40, block_idx=3, model_cls="wan2.2")
        assert out.shape == (21, 2 * 64)
        assert_close_to_oracle(out.view(1, 21, 2, 64), q, k, v)

    def test_a_batch(self, registry: Register) -> None:
        q, k, v = operands(3, 21, 40)
        cu_q, cu_k = torch.arange(0, 64, 21), torch.arange(0, 121, 40)
        apply = lightx2v.register()().apply
        out = apply(q, k, v, cu_q, cu_k, 21, 40, causal=True, softmax_scale=0.1)
        assert_close_to_oracle(out.view(3, 21, 2, 64), q, k, v, is_causal=True, scale=0.1)
        assert torch.equal(out, apply(q, k, v, causal=True, softmax_scale=0.1))

    def test_several_sequences(self, registry: Register) -> None:
        q, k, v = (x[0] for x in operands(1, 21, 40))
        cu_q, cu_k = torch.tensor([0, 9, 21]), torch.tensor([0, 15, 40])
        out = lightx2v.register()().apply(q, k, v, cu_q, cu_k, 12, 25)
        want = wan_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 12, 25)
        assert isinstance(want, Tensor) and torch.equal(out, want.flatten(1))

    def test_with_lse_for_the_ring(self, registry: Register) -> None:
        q, k, v = operands(1, 21, 40)
        out, lse = lightx2v.register()().apply_with_lse(q[0], k[0], v[0], softmax_scale=0.2)
        assert out.shape == (21, 128) and lse.shape == (21, 2)
        assert_close_to_oracle(out.view(1, 21, 2, 64), q, k, v, lse=lse.T.unsqueeze(0), scale=0.2)

    def test_a_mask(self, registry: Register) -> None:
        q, k, v = operands(1, 21, 40)
        mask = torch.rand(21, 40) > 0.3
        out = lightx2v.register()().apply(q, k, v, attn_mask=mask)
        want = wan_attn.sageattn(q, k, v, "NHD", attn_mask=mask)
        assert isinstance(want, Tensor) and torch.equal(out, want.flatten(2)[0])

    def test_refusals(self, registry: Register) -> None:
        apply = lightx2v.register()().apply
        q, k, v = operands(1, 21, 40)
        mask, cu = torch.ones(21, 40, dtype=torch.bool), torch.tensor([0, 9, 21])
        for options, message in (
            ({"drop_rate": 0.1}, "drop_rate must be 0"),
            ({"cu_seqlens_q": cu}, "cu_seqlens_q and cu_seqlens_kv must be given both or neither"),
            ({"attn_mask": mask, "causal": True}, "attn_mask must be None with causal"),
            (
                {"attn_mask": mask, "cu_seqlens_q": cu, "cu_seqlens_kv": cu},
                "attn_mask must be None with several sequences",
            ),
        ):
            with pytest.raises(RuntimeError, match=f"wan_attn: {message}"):
                apply(q, k, v, **options)
        for name, given in (("q", (None, k, v)), ("k", (q, "k", v)), ("v", (q, k, v[0, 0]))):
            with pytest.raises(RuntimeError, match=rf"wan_attn: {name} must be \[tokens, heads, "):
                apply(*given)

    def test_copies_and_files(self, registry: Register) -> None:
        """torch.save finds no class that was made at run time; this one says how it is made."""
        attention = lightx2v.register()()
        attention.config["heads"] = 2
        file = io.BytesIO()
        torch.save(attention, file)
        file.seek(0)
        lightx2v.unregister()
        again = torch.load(file, weights_only=False)
        assert type(again) is registry["wan_attn"]
        for other in (again, copy.deepcopy(attention)):
            assert other.config == {"heads": 2}
            q, k, v = operands(1, 5, 5)
            assert torch.equal(other.apply(q, k, v), attention.apply(q, k, v))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """shared.attention and a model that has taken pay_attention from it."""

    def pay_attention(qkv_list: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        qkv_list.clear()
        return "theirs", args, kwargs

    module, model = types.ModuleType("shared.attention"), types.ModuleType("models.wan.model")
    module.pay_attention = model.pay_attention = pay_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shared", types.ModuleType("shared"))
    monkeypatch.setitem(sys.modules, "shared.attention", module)
    monkeypatch.setitem(sys.modules, "models.wan.model", model)
    return module


class TestWan2GP:
    def test_everywhere_and_back(self, host: Any) -> None:
        before, model = host.pay_attention, sys.modules["models.wan.model"]
        assert sorted(map(str, wan2gp.patch())) == [
            "models.wan.model.pay_attention",
            "shared.attention.pay_attention",
        ]
        assert host.pay_attention is model.pay_attention is not before
        assert wan2gp.patch() == ()
        wan2gp.unpatch()
        wan2gp.unpatch()
        assert host.pay_attention is before is model.pay_attention

    def test_a_wrapper_of_somebody_elses(self, host: Any, caplog: pytest.LogCaptureFixture) -> None:
        """functools.wraps copies attributes: the wrapper must not be taken for ours."""
        before, model = host.pay_attention, sys.modules["models.wan.model"]
        wan2gp.patch()
        ours = host.pay_attention

        @functools.wraps(ours)
        def theirs(*args: Any, **kwargs: Any) -> Any:
            return ours(*args, **kwargs)

        host.pay_attention = theirs
        with caplog.at_level(logging.INFO, "wan_attn"):
            wan2gp.unpatch()
        assert host.pay_attention is theirs and model.pay_attention is before
        assert "was put around wan_attn's function since" in caplog.text
        host.pay_attention = before

    @pytest.mark.parametrize("function", [wan2gp.patch, wan2gp.unpatch])
    @pytest.mark.parametrize(
        "given, said",
        [("shared.attention", "'shared.attention'"), (types, "the module types"), (3, "3")],
    )
    def test_what_is_no_module_is_refused(self, function: Any, given: Any, said: str) -> None:
        rule = "wan_attn: module must be one with pay_attention, got"
        with pytest.raises(RuntimeError, match=f"{rule} {said}"):
            function(given)

    def test_operands_that_are_not_three(self, host: Any) -> None:
        wan2gp.patch()
        given = list(operands())[:2]
        with pytest.raises(RuntimeError, match=r"qkv_list must be \[q, k, v\], got 2 operands"):
            host.pay_attention(given)
        assert len(given) == 2
        wan2gp.unpatch()

    def test_exact_and_the_list_is_emptied(self, host: Any) -> None:
        wan2gp.patch()
        q, k, v = operands(2, 21, 40, dtype=BF16)
        given = [q, k, v]
        out = host.pay_attention(given, softmax_scale=0.2, causal=True, recycle_q=True)
        assert given == []
        assert_close_to_oracle(out, q, k, v, scale=0.2, is_causal=True)
        wan2gp.unpatch()

    def test_lengths_and_a_shared_key(self, host: Any) -> None:
        wan2gp.patch()
        q, k, v = operands(2, 21, 40)
        out = host.pay_attention([q, k[:1], v[:1]], k_lens=torch.tensor([40, 7]))
        shared = (k[:1].expand_as(k), v[:1].expand_as(v))
        assert_close_to_oracle(out, q, *shared, k_lens=[40, 7])
        wan2gp.unpatch()

    def test_a_mask_or_a_forced_mode_stays_theirs(self, host: Any) -> None:
        wan2gp.patch()
        for option in ({"attention_mask": torch.ones(1)}, {"force_attention": "sdpa"}):
            given = list(operands())
            who, _, kwargs = host.pay_attention(given, k_lens=[33], **option)
            assert who == "theirs" and given == [] and kwargs["k_lens"] == [33]
            assert kwargs | option == kwargs
        wan2gp.unpatch()
