# SPDX-License-Identifier: Apache-2.0
"""test_comfyui.py - the node folder and ComfyUI's calling convention, against a stand-in of it."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stub_comfy
import torch
import torch.nn.functional as F
from torch import Tensor

import oracle
import wan_attn
from wan_attn import __main__ as cli
from wan_attn import config, log
from wan_attn.cli import comfyui as command
from wan_attn.integrations import comfyui

HEADS, HEAD_DIM = 4, 32


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder like ComfyUI's, importable; what was loaded from it is forgotten afterwards."""
    stub_comfy.write(tmp_path)
    (tmp_path / "custom_nodes").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("WAN_ATTN_COMFYUI", raising=False)
    config.refresh()
    importlib.invalidate_caches()
    log.forget()
    yield tmp_path
    comfyui._replaced.clear()
    for name in list(sys.modules):
        if name.partition(".")[0] in ("comfy", "kijai") or name.startswith("custom_nodes/"):
            del sys.modules[name]
    log.disable("comfyui")
    monkeypatch.undo()
    config.refresh()


@pytest.fixture
def host(root: Path) -> Any:
    return importlib.import_module("comfy.ldm.modules.attention")


def start(root: Path) -> Any:
    """Install the folder by the command line and load it as ComfyUI does."""
    assert cli.main(["comfyui", "install", str(root)]) == 0
    return stub_comfy.load_node(root / "custom_nodes" / command.FOLDER)


def merged(lengths: tuple[int, int] = (9, 14), dtype: torch.dtype = torch.float32) -> Any:
    """q, k, v as [batch, seqlen, heads * head_dim]."""
    return tuple(
        torch.randn(2, n, HEADS * HEAD_DIM).to(dtype) for n in (lengths[0], lengths[1], lengths[1])
    )


def split(x: Tensor) -> Tensor:
    """[batch, seqlen, heads * head_dim] -> [batch, heads, seqlen, head_dim]."""
    heads: Tensor = x.unflatten(-1, (-1, HEAD_DIM))
    return heads.transpose(1, 2)


def exact(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The oracle's result for merged operands, merged."""
    operands = (x.unflatten(-1, (-1, HEAD_DIM)) for x in (q, k, v))
    return torch.from_numpy(oracle.attention(*operands, **options)[0]).flatten(2)


def close(found: Tensor, want: Tensor) -> bool:
    return found.shape == want.shape and torch.allclose(found.double(), want, atol=1e-5)


class TestLayouts:
    @pytest.mark.parametrize("skip_output_reshape", (False, True))
    @pytest.mark.parametrize("skip_reshape", (False, True))
    def test_all_four(self, host: Any, skip_reshape: bool, skip_output_reshape: bool) -> None:
        q, k, v = merged()
        operands = map(split, (q, k, v)) if skip_reshape else (q, k, v)
        out = comfyui.register(host)(
            *operands,
            HEADS,
            skip_reshape=skip_reshape,
            skip_output_reshape=skip_output_reshape,
        )
        want = exact(q, k, v)
        assert close(out, split(want) if skip_output_reshape else want)
        assert host.calls == [], "nothing of ComfyUI's ran"

    @pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
    def test_the_dtype_stays(self, host: Any, dtype: torch.dtype) -> None:
        out = comfyui.register(host)(*merged(dtype=dtype), HEADS)
        assert out.dtype == dtype and out.shape == (2, 9, HEADS * HEAD_DIM)

    @pytest.mark.parametrize("skip_reshape", (False, True))
    def test_grouped_heads(self, host: Any, skip_reshape: bool) -> None:
        q, k, v = merged()
        k, v = k[..., : 2 * HEAD_DIM], v[..., : 2 * HEAD_DIM]
        operands = map(split, (q, k, v)) if skip_reshape else (q, k, v)
        out = comfyui.register(host)(*operands, HEADS, enable_gqa=True, skip_reshape=skip_reshape)
        assert close(out, exact(q, k, v))

    def test_scale(self, host: Any) -> None:
        q, k, v = merged()
        assert close(comfyui.register(host)(q, k, v, HEADS, scale=0.5), exact(q, k, v, scale=0.5))

    def test_what_says_nothing_about_an_exact_result_is_taken(self, host: Any) -> None:
        q, k, v = merged()
        out = comfyui.register(host)(
            q,
            k,
            v,
            heads=HEADS,
            attn_precision=torch.float32,
            low_precision_attention=False,
            preferred_attention=None,
            transformer_options={},
        )
        assert close(out, exact(q, k, v)) and host.calls == []


@pytest.mark.compile
def test_compiles_without_a_break() -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return comfyui.attend(None, q * 2, k, v, HEADS, scale=0.2, transformer_options={})  # type: ignore[arg-type]

    torch._dynamo.reset()
    q, k, v = merged()
    with torch.no_grad():
        compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, k, v), plain(q, k, v))
    torch._dynamo.reset()


class TestWhatItLeaves:
    def test_a_mask_goes_to_pytorch_and_the_log_says_why(
        self, host: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        q, k, v = merged()
        mask = torch.rand(9, 14) > 0.3
        mask[:, 0] = True
        function = comfyui.register(host)
        with caplog.at_level(logging.INFO, "wan_attn"):
            for _ in range(2):
                out = function(q, k, v, HEADS, mask)
        want = F.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=mask)
        assert torch.allclose(split(out), want, atol=1e-6)
        assert host.calls == ["pytorch", "pytorch"]
        lines = [r.getMessage() for r in caplog.records]
        assert len(lines) == 1 and "Using attention_pytorch (a mask is given" in lines[0], lines

    def test_an_unknown_option_is_not_dropped(self, host: Any) -> None:
        q, k, v = merged()
        comfyui.register(host)(q, k, v, HEADS, heads_to_skip=[1])
        assert host.calls == ["pytorch"]

    def test_other_dtypes_and_shapes(self, host: Any) -> None:
        q, k, v = merged()
        function = comfyui.register(host)
        function(q.double(), k.double(), v.double(), HEADS)
        function(split(q), split(k)[:1], split(v)[:1], HEADS, skip_reshape=True)  # broadcasts
        assert host.calls == ["pytorch", "pytorch"]


class TestRegistry:
    def test_by_name_and_only_once(self, host: Any, caplog: pytest.LogCaptureFixture) -> None:
        first = comfyui.register(host)
        assert comfyui.register(host) is first
        assert host.get_attention_function("wan_attn") is first
        assert "already registered" not in caplog.text

    def test_a_models_override_goes_before_it(self, host: Any) -> None:
        options = {"optimized_attention_override": lambda function, *args, **kwargs: "theirs"}
        assert comfyui.register(host)(*merged(), HEADS, transformer_options=options) == "theirs"

    def test_an_old_comfyui_is_refused(self, host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(host, "register_attention_function")
        with pytest.raises(RuntimeError, match="has register_attention_function, got an older one"):
            comfyui.register(host)

    @pytest.mark.parametrize("given", [None, "comfy", 3])
    @pytest.mark.parametrize("name", ["register", "patch", "unpatch"])
    def test_what_is_no_host_is_refused(self, name: str, given: Any) -> None:
        said = f"wan_attn: host must be ComfyUI's module .* got {given!r}"
        with pytest.raises(RuntimeError, match=said):
            getattr(comfyui, name)(given)

    def test_what_is_no_model_or_backend_is_refused(self, host: Any) -> None:
        comfyui.register(host)
        with pytest.raises(RuntimeError, match="model must be a ModelPatcher .* got None"):
            comfyui.enable(host, None, "wan_attn")
        for given in ("sdpa", None, 3):
            with pytest.raises(
                ValueError, match=f"backend must be one of wan_attn.* got {given!r}"
            ):
                comfyui.enable(host, None, given)  # type: ignore[arg-type]


class TestNode:
    def node(self, root: Path) -> Any:
        module = start(root)
        assert module.NODE_DISPLAY_NAME_MAPPINGS == {"WanAttention": "Wan attention"}
        return module.NODE_CLASS_MAPPINGS["WanAttention"]

    def test_what_comfyui_asks_a_node_for(self, root: Path) -> None:
        node = self.node(root)
        inputs = node.INPUT_TYPES()["required"]
        assert inputs["model"] == ("MODEL",)
        assert inputs["backend"][0] == ["wan_attn", "pytorch", "sage", "split"]
        assert inputs["backend"][1]["default"] == "wan_attn"
        assert node.RETURN_TYPES == ("MODEL",) and callable(getattr(node, node.FUNCTION))
        assert isinstance(node.CATEGORY, str)

    def test_one_model_and_no_other(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WAN_ATTN_COMFYUI", "node")
        config.refresh()
        node = self.node(root)
        wan = importlib.import_module("comfy.ldm.wan.model")
        host = sys.modules["comfy.ldm.modules.attention"]
        plain = stub_comfy.Model()
        (patched,) = node().apply(plain, "wan_attn")
        assert plain.override is None, "the model that came in is another node's"
        q, k, v = merged()
        want = exact(q, k, v)
        for model, ran in ((plain, ["pytorch"]), (patched, [])):
            host.calls.clear()
            options = model.model_options["transformer_options"]
            assert close(wan.self_attention(q, k, v, HEADS, options), want)
            assert host.calls == ran

    def test_a_backend_of_comfyuis(self, root: Path) -> None:
        (patched,) = self.node(root)().apply(stub_comfy.Model(), "split")
        host = sys.modules["comfy.ldm.modules.attention"]
        wan = importlib.import_module("comfy.ldm.wan.model")
        wan.self_attention(*merged(), HEADS, patched.model_options["transformer_options"])
        assert host.calls == ["split"]

    def test_one_that_is_not_here(self, root: Path) -> None:
        """A graph from a machine that has it."""
        with pytest.raises(ValueError, match="one of wan_attn, pytorch, sage, split, got 'xform"):
            self.node(root)().apply(stub_comfy.Model(), "xformers")

    def test_what_it_leaves_goes_to_the_override_that_was_there(self, root: Path) -> None:
        seen = []

        def theirs(function: Any, *args: Any, **kwargs: Any) -> str:
            seen.append((function.__name__, kwargs["mask"] is not None))
            return "theirs"

        model = stub_comfy.Model({comfyui.OVERRIDE: theirs, "other": 1})
        (patched,) = self.node(root)().apply(model, "wan_attn")
        options = patched.model_options["transformer_options"]
        assert options["other"] == 1 and model.override is theirs
        host = sys.modules["comfy.ldm.modules.attention"]
        q, k, v = merged()
        run = host.get_attention_function("split")
        assert close(run(q, k, v, HEADS, transformer_options=options), exact(q, k, v))
        mask = torch.ones(9, 14, dtype=torch.bool)
        assert run(q, k, v, HEADS, mask, transformer_options=options) == "theirs"
        assert seen == [("attention_split", True)] and host.calls == []

    def test_the_last_choice_wins_and_survives_deep_copies(self, root: Path) -> None:
        node = self.node(root)()
        (sage,) = node.apply(stub_comfy.Model(), "sage")
        (ours,) = node.apply(sage, "wan_attn")
        (again,) = node.apply(ours, "pytorch")
        host = sys.modules["comfy.ldm.modules.attention"]
        run = host.get_attention_function("split")
        for model, ran in ((sage, "sage"), (ours.clone(), None), (again, "pytorch")):
            host.calls.clear()
            run(*merged(), HEADS, transformer_options=model.model_options["transformer_options"])
            assert host.calls == ([ran] if ran else [])

    @pytest.mark.parametrize("before", (False, True), ids=("alone", "over another"))
    def test_containers(self, root: Path, before: bool) -> None:
        """Ours takes the tensors out of them; over another override ComfyUI unpacks them."""
        other = {comfyui.OVERRIDE: lambda function, *args, **kwargs: None} if before else None
        (patched,) = self.node(root)().apply(stub_comfy.Model(other), "wan_attn")
        assert hasattr(patched.clone().override, "container_function") != before
        host = sys.modules["comfy.ldm.modules.attention"]
        options = patched.model_options["transformer_options"]
        q, k, v = merged()
        for name in ("split", "wan_attn"):
            run, boxes = host.get_attention_function(name), host.AttentionTensorContainer
            given = [boxes(x) for x in (q, k, v)]
            out = run(*given, heads=HEADS, transformer_options=options)
            assert close(out, exact(q, k, v)) and host.calls == []
            assert [box.tensor for box in given] == [None] * 3

    def test_containers_without_the_node(self, root: Path) -> None:
        """The registered function takes them; ComfyUI's own gets tensors where that leaves one."""
        start(root)
        host = sys.modules["comfy.ldm.modules.attention"]
        run = host.get_attention_function("wan_attn")
        q, k, v = merged()
        mask = torch.zeros(2, 9, 14)
        for given, ran in (({}, []), ({"mask": mask}, ["pytorch"])):
            out = run(*map(host.AttentionTensorContainer, (q, k, v)), heads=HEADS, **given)
            assert close(out, exact(q, k, v)) and host.calls == ran

    def test_one_of_comfyuis_own_keeps_its_way_with_containers(self, root: Path) -> None:
        node = self.node(root)()
        host = sys.modules["comfy.ldm.modules.attention"]
        assert not hasattr(node.apply(stub_comfy.Model(), "sage")[0].override, "container_function")
        host.get_attention_function("sage").container_function = takes = lambda *args: None
        (patched,) = node.apply(stub_comfy.Model(), "sage")
        assert patched.override.container_function is takes


class TestGlobal:
    def test_reaches_what_no_override_does(self, root: Path) -> None:
        """Face blocks and kijai's mode "comfy" call without a model's options."""
        early = importlib.import_module("comfy.ldm.wan.model")
        start(root)
        late = importlib.import_module("kijai")
        host = sys.modules["comfy.ldm.modules.attention"]
        q, k, v = merged()
        want = exact(q, k, v)
        assert close(early.face_block(q, k, v, HEADS), want)
        operands = (x.unflatten(-1, (-1, HEAD_DIM)) for x in (q, k, v))
        assert close(late.attention(*operands, heads=HEADS, attention_mode="comfy"), want)
        assert host.calls == []

    def test_comfyuis_own_names_stay_its_own(self, root: Path, host: Any) -> None:
        """Its default is attention_pytorch, which other code calls by that name."""
        before = host.attention_pytorch
        start(root)
        assert host.attention_pytorch is before is host.get_attention_function("pytorch")
        assert host.optimized_attention is host.optimized_attention_masked is not before

    def test_restored(self, root: Path, host: Any) -> None:
        early = importlib.import_module("comfy.ldm.wan.model")
        before = host.optimized_attention
        start(root)
        late = importlib.import_module("kijai")
        comfyui.unpatch(host)
        for module in (host, early, late):
            assert module.optimized_attention is before, module
        comfyui.unpatch(host)

    def test_says_so_at_start(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "wan_attn"):
            start(root)
        assert [r.getMessage() for r in caplog.records] == ["Using wan_attn attention"]

    def test_a_flag_of_comfyuis_stays(
        self, root: Path, host: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        host.args.use_sage_attention = True
        before = host.optimized_attention
        with caplog.at_level(logging.INFO, "wan_attn"):
            start(root)
        assert host.optimized_attention is before
        assert "--use-sage-attention stays" in caplog.text and "Using wan" not in caplog.text

    def test_the_node_alone(
        self,
        root: Path,
        host: Any,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("WAN_ATTN_COMFYUI", "node")
        config.refresh()
        before = host.optimized_attention
        with caplog.at_level(logging.INFO, "wan_attn"):
            start(root)
        assert host.optimized_attention is before
        assert "WAN_ATTN_COMFYUI=node" in caplog.text and "Using wan" not in caplog.text


class TestCommand:
    def test_install_twice_remove_once(self, root: Path) -> None:
        target = root / "custom_nodes" / command.FOLDER
        for _ in range(2):
            assert cli.main(["comfyui", "install", str(root)]) == 0
            assert sorted(p.name for p in target.iterdir()) == ["LICENSE.md", "__init__.py"]
        assert cli.main(["comfyui", "remove", str(root)]) == 0
        assert not target.exists()

    def test_refusals(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["comfyui", "install", str(root / "comfy")]) == 2
        assert "PATH must be ComfyUI's folder" in capsys.readouterr().err
        assert cli.main(["comfyui", "remove", str(root)]) == 2
        assert "does not exist" in capsys.readouterr().err
        target = root / "custom_nodes" / command.FOLDER
        target.mkdir()
        (target / "__init__.py").write_text("somebody's\n")
        for action in ("install", "remove"):
            assert cli.main(["comfyui", action, str(root)]) == 2
            assert "left alone" in capsys.readouterr().err
        assert (target / "__init__.py").read_text() == "somebody's\n"

    def test_the_folder_is_in_the_package(self) -> None:
        for name in command.FILES:
            assert (command.source() / name).is_file()
        assert command.source().parent == Path(wan_attn.__file__).parent / "integrations"


def test_nothing_of_the_package_imports_the_node_folder() -> None:
    """It is the only part that imports ComfyUI, and stands alone for its licence."""
    package = Path(wan_attn.__file__).parent
    folder = command.source()
    for file in package.rglob("*.py"):
        if folder not in file.parents:
            text = file.read_text(encoding="utf-8")
            assert "import comfyui_node" not in text and "import comfy" not in text.replace(
                "import comfyui", ""
            ), file
