# SPDX-License-Identifier: Apache-2.0
"""test_wan22_around.py - what patch() does beside flash_attention: flash_attn_func, a broken
flash_attn, TF32.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import stub_wan
import torch
from patching import assert_all_ours, assert_all_stock, patch

from wan_attn.integrations import wan22


class TestFlashAttnFunc:
    def test_absent(self, stubs: Path) -> None:
        stub_wan.write(stubs)
        importlib.import_module("wan")
        patch()
        q, k, v = (torch.zeros(1, 2, 3, 4) for _ in range(3))
        name, args, kwargs = sys.modules["wan.modules.animate.face_blocks"].attention(q, k, v)
        assert name == "ours" and all(a is b for a, b in zip(args, (q, k, v), strict=True))
        neutral = {"dropout_p": 0.0, "softmax_scale": None, "causal": False}
        assert kwargs == {**neutral, "window_size": (-1, -1), "deterministic": False}

    @pytest.mark.parametrize("first", ["patch", "import"])
    def test_installed(self, stubs: Path, first: str) -> None:
        stub_wan.write(stubs)
        stub_wan.write_flash_attn(
            stubs,
            "def flash_attn_func(*args): return 'flash_attn'\n"
            "flash_attn_qkvpacked_func = flash_attn_varlen_func = None\n",
        )
        if first == "patch":
            patch()
        importlib.import_module("wan")
        patch()
        assert_all_ours()
        flash_attn = sys.modules["flash_attn"]
        assert flash_attn.flash_attn_func() == "flash_attn", "the package keeps its own function"
        assert sys.modules["wan.modules.attention"].FLASH_ATTN_2_AVAILABLE is True
        wan22.unpatch()
        for name in stub_wan.FLASH_ATTN_FUNC_HOLDERS:
            assert sys.modules[f"wan.{name}"].flash_attn_func is flash_attn.flash_attn_func
        assert sys.modules["wan.modules.attention"].FLASH_ATTN_2_AVAILABLE is True

    def test_positional_options_keep_their_places(self, stubs: Path) -> None:
        stub_wan.write(stubs)
        importlib.import_module("wan")
        patch()
        function = sys.modules["wan.modules.s2v.auxi_blocks"].flash_attn_func
        _, _, kwargs = function(1, 2, 3, 0.1, 0.5, True, (4, 0))
        assert kwargs["dropout_p"] == 0.1 and kwargs["softmax_scale"] == 0.5
        assert kwargs["causal"] is True and kwargs["window_size"] == (4, 0)

    @pytest.mark.parametrize(
        "option", [{"softcap": 30.0}, {"alibi_slopes": torch.ones(3)}, {"return_attn_probs": True}]
    )
    def test_refuses_what_it_does_not_do(self, stubs: Path, option: dict[str, Any]) -> None:
        stub_wan.write(stubs)
        importlib.import_module("wan")
        patch()
        function = sys.modules["wan.modules.animate.face_blocks"].flash_attn_func
        with pytest.raises(RuntimeError, match=f"wan_attn: {next(iter(option))} must be"):
            function(1, 2, 3, **option)


BROKEN = {
    "ImportError": "raise ImportError('DLL load failed while importing flash_attn_2_cuda')",
    "OSError": "raise OSError('libcudart.so.11: cannot open shared object file')",
    "RuntimeError": "raise RuntimeError('operator already registered')",
    "AttributeError": "import sys; sys.no_such_thing",
}


@pytest.mark.parametrize("error", BROKEN)
def test_a_broken_flash_attn_does_not_kill_import_wan(stubs: Path, error: str) -> None:
    stub_wan.write(stubs)
    stub_wan.write_flash_attn(stubs, BROKEN[error])
    patch()
    importlib.import_module("wan")
    assert_all_ours()
    assert "flash_attn" not in sys.modules
    assert sys.modules["wan.utils.prompt_extend"].FLASH_VER is None
    ((name, reason),) = patch().broken
    assert name == "flash_attn" and reason.startswith(error)
    # Others see it as it is: found, and failing in its own way.
    assert importlib.util.find_spec("flash_attn") is not None
    with pytest.raises(Exception) as raised:
        importlib.import_module("flash_attn")
    assert type(raised.value).__name__ == error
    wan22.unpatch()
    assert_all_stock()


def test_without_the_patch_a_broken_flash_attn_does_kill_it(stubs: Path) -> None:
    stub_wan.write(stubs)
    stub_wan.write_flash_attn(stubs, BROKEN["OSError"])
    with pytest.raises(OSError, match="libcudart"):
        importlib.import_module("wan")


class TestTF32:
    @pytest.fixture
    def cuda(self, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
        """A machine with one Ampere GPU and no CUDA context yet."""
        monkeypatch.setattr(torch.version, "cuda", "12.4")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
        return monkeypatch

    @staticmethod
    def state() -> list[Any]:
        backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
        return [
            getattr(b, name, None) for b in backends for name in ("allow_tf32", "fp32_precision")
        ]

    def test_allowed_while_patched_and_restored(self, stubs: Path, cuda: Any) -> None:
        before = self.state()
        assert before[0] is False
        report = patch()
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        assert report.tf32 == "allowed for matmul"  # cuDNN's default is to allow it
        patch()
        wan22.unpatch()
        assert self.state() == before

    def test_the_users_own_choice_comes_back(self, stubs: Path, cuda: Any) -> None:
        cudnn = torch.backends.cudnn
        try:
            cudnn.allow_tf32 = False
            before = self.state()
            assert patch().tf32 == "allowed for matmul and cuDNN"
            assert cudnn.allow_tf32
            wan22.unpatch()
            assert self.state() == before
        finally:
            cudnn.allow_tf32 = True

    def test_nothing_to_do_nothing_undone(self, stubs: Path, cuda: Any) -> None:
        matmul = torch.backends.cuda.matmul
        try:
            matmul.allow_tf32 = True
            assert patch().tf32 == "was already allowed"
            wan22.unpatch()
            assert matmul.allow_tf32
        finally:
            matmul.allow_tf32 = False

    def test_not_before_ampere(self, stubs: Path, cuda: pytest.MonkeyPatch) -> None:
        cuda.setattr(torch.cuda, "is_initialized", lambda: True)
        cuda.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
        assert "Ampere" in patch().tf32
        assert not torch.backends.cuda.matmul.allow_tf32

    def test_not_without_a_gpu(self, stubs: Path, cuda: pytest.MonkeyPatch) -> None:
        cuda.setattr(torch.cuda, "device_count", lambda: 0)
        assert patch().tf32 == "unchanged (no CUDA device)"
        assert not torch.backends.cuda.matmul.allow_tf32
