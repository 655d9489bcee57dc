# SPDX-License-Identifier: Apache-2.0
"""test_wan22_patch.py - patch() and unpatch() over a stub of Wan2.2's module tree."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
import logging
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import stub_wan
from patching import assert_all_ours, assert_all_stock, held, ours, patch

from wan_attn.integrations import wan22


@pytest.mark.parametrize("order", ["patch first", "import first"])
def test_all_bindings_in_both_orders(stubs: Path, order: str) -> None:
    stub_wan.write(stubs)
    if order == "patch first":
        report = patch()
        assert len(report.pending) == 10 and not report.bindings
        importlib.import_module("wan")
    else:
        importlib.import_module("wan")
        assert_all_stock()
        patch()
    assert_all_ours()
    report = patch()
    assert len(report.bindings) == 10 and not report.pending and not report.foreign
    wan22.unpatch()
    assert_all_stock()


def test_patch_half_way_through_the_imports(stubs: Path) -> None:
    stub_wan.write(stubs)
    (stubs / "wan" / "__init__.py").write_text("")
    (stubs / "wan" / "modules" / "__init__.py").write_text(
        "from .attention import flash_attention\n"
    )
    importlib.import_module("wan.modules.model")
    patch()
    for name in stub_wan.FLASH_ATTENTION + stub_wan.FLASH_ATTN_FUNC_HOLDERS:
        importlib.import_module(f"wan.{name}")
    assert_all_ours()
    wan22.unpatch()
    assert_all_stock()


def test_patch_called_by_a_module_of_the_package_itself(stubs: Path) -> None:
    folder = stub_wan.write(stubs)
    (folder / "distributed" / "__init__.py").write_text(
        "from ..modules.attention import flash_attention\n"
        "import patching\npatching.patch()\nfrom . import ulysses\n"
    )
    importlib.import_module("wan")
    assert_all_ours()
    assert sys.modules["wan.distributed"].flash_attention()[0] == "ours"
    wan22.unpatch()
    assert_all_stock()


def test_patch_called_while_the_attention_module_itself_is_imported(stubs: Path) -> None:
    """In the same thread: there is nobody to wait for, and that module passes the hook by."""
    folder = stub_wan.write(stubs)
    path = folder / "modules" / "attention.py"
    path.write_text("import patching\npatching.patch()\n" + path.read_text())
    importlib.import_module("wan")
    assert_all_ours()
    wan22.unpatch()
    assert_all_stock()


def test_unpatch_before_import_and_import_after_unpatch(stubs: Path) -> None:
    stub_wan.write(stubs)
    patch()
    wan22.unpatch()
    wan22.unpatch()
    importlib.import_module("wan")
    assert_all_stock()


def test_patching_twice_is_patching_once(stubs: Path) -> None:
    stub_wan.write(stubs)
    importlib.import_module("wan")
    first = patch()
    before = held()
    finders = list(sys.meta_path)
    second = patch()
    assert first == second
    assert all(value is before[name] for name, value in held().items())
    assert sys.meta_path == finders
    wan22.unpatch()
    assert_all_stock()


def test_patch_unpatch_patch(stubs: Path) -> None:
    stub_wan.write(stubs)
    for _ in range(3):
        importlib.import_module("wan")
        patch()
        assert_all_ours()
        wan22.unpatch()
        assert_all_stock()


def test_the_users_own_names_follow_by_identity(stubs: Path) -> None:
    stub_wan.write(stubs)
    (stubs / "someone.py").write_text(
        "from wan.modules.attention import flash_attention as fa\n"
        "def flash_attention(*args): return 'mine'\n"
        "mine = flash_attention\n"
    )
    someone = importlib.import_module("someone")
    report = patch()
    assert someone.fa()[0] == "ours"
    assert someone.flash_attention() == "mine", "same name, another function: not ours to replace"
    assert "someone.fa" in [str(binding) for binding in report.bindings]
    late = importlib.import_module("wan.modules.attention").flash_attention
    vars(someone).update(late=late)  # taken while patched
    wan22.unpatch()
    assert someone.fa(1, 2, 3) == someone.late(1, 2, 3) == "stock"


def test_what_somebody_else_put_there_is_left_alone_and_reported(
    stubs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stub_wan.write(stubs)
    importlib.import_module("wan")
    model = sys.modules["wan.modules.model"]

    def theirs(*args: Any) -> str:
        return "theirs"

    theirs.__module__ = "wan.modules.attention"  # as functools.wraps would leave it
    model.flash_attention = theirs  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, "wan_attn"):
        report = patch()
    assert model.flash_attention is theirs
    assert [str(binding) for binding in report.foreign] == ["wan.modules.model.flash_attention"]
    assert "left alone" in str(report) and "wan.modules.model.flash_attention" in caplog.text
    assert len(report.bindings) == 9
    wan22.unpatch()
    assert model.flash_attention is theirs


def test_replaced_again_while_patched_stays_replaced(stubs: Path) -> None:
    stub_wan.write(stubs)
    importlib.import_module("wan")
    patch()
    model = sys.modules["wan.modules.model"]
    model.flash_attention = theirs = lambda *args: "theirs"  # type: ignore[attr-defined]
    wan22.unpatch()
    assert model.flash_attention is theirs


def test_wan_attns_own_names_survive_unpatch(stubs: Path) -> None:
    stub_wan.write(stubs)
    importlib.import_module("wan")
    patch()
    sys.modules["someone"] = someone = type(sys)("someone")
    someone.flash_attention = ours  # type: ignore[attr-defined]
    wan22.unpatch()
    assert someone.flash_attention is ours


def test_reload_gives_a_new_original_which_is_patched_and_restored(stubs: Path) -> None:
    stub_wan.write(stubs)
    importlib.import_module("wan")
    old = sys.modules["wan.modules.model"].flash_attention
    patch()
    importlib.reload(sys.modules["wan.modules.attention"])
    assert_all_ours()
    wan22.unpatch()
    assert sys.modules["wan.modules.model"].flash_attention is old
    new = sys.modules["wan.modules.attention"].flash_attention
    assert new is not old and new(1, 2, 3) == "stock"


def test_two_generations_before_the_patch(stubs: Path) -> None:
    stub_wan.write(stubs)
    importlib.import_module("wan")
    importlib.reload(sys.modules["wan.modules.attention"])
    before = held()
    patch()
    assert_all_ours()
    wan22.unpatch()
    assert all(value is before[name] for name, value in held().items())


def test_a_vendored_copy_under_another_name(stubs: Path) -> None:
    stub_wan.write(stubs, "vendored")
    stub_wan.write(stubs)
    importlib.import_module("wan")
    patch(package="vendored")
    importlib.import_module("vendored")
    assert_all_ours("vendored")
    assert_all_stock()
    with pytest.raises(ValueError, match="package must be 'vendored'"):
        patch(package="wan")


@pytest.mark.parametrize("given", [None, 3, "", "wan/modules", "wan..modules"])
def test_what_is_no_package_is_refused(stubs: Path, given: Any) -> None:
    said = re.escape(
        f"wan_attn: package must be the name of a package, as in `import wan`, got {given!r}"
    )
    with pytest.raises(RuntimeError, match=said):
        wan22.patch(package=given)
    with pytest.raises(RuntimeError, match="attention must be a function .* got 'sdpa'"):
        wan22.patch(attention="sdpa")  # type: ignore[arg-type]
    assert wan22.report() is None, "nothing is patched by half"


def test_arguments_reach_the_replacement(stubs: Path) -> None:
    stub_wan.write(stubs)
    importlib.import_module("wan")
    patch()
    call = sys.modules["wan.modules.s2v.model_s2v"].call
    assert call(1, k=2, v=3, k_lens=4, version=2) == (
        "ours",
        (1,),
        {"k": 2, "v": 3, "k_lens": 4, "version": 2},
    )


def test_stock_attention_no_longer_loses_lengths(stubs: Path) -> None:
    stub_wan.write(stubs)
    attention = importlib.import_module("wan.modules.attention")
    assert attention.attention(1, 2, 3, k_lens=4) == "without lengths"
    report = patch()
    assert attention.attention(1, 2, 3, k_lens=4)[2]["k_lens"] == 4
    assert report.flags == ("wan.modules.attention.FLASH_ATTN_2_AVAILABLE",)
    wan22.unpatch()
    assert attention.FLASH_ATTN_2_AVAILABLE is False


def test_an_error_in_wan_itself_passes_through(stubs: Path) -> None:
    folder = stub_wan.write(stubs)
    (folder / "modules" / "s2v" / "motioner.py").write_text("1 / 0\n")
    patch()
    with pytest.raises(ZeroDivisionError):
        importlib.import_module("wan")
    (folder / "modules" / "s2v" / "motioner.py").write_text(stub_wan.USES)
    importlib.import_module("wan")
    assert_all_ours()


def test_modules_keep_their_real_loader(stubs: Path) -> None:
    stub_wan.write(stubs)
    patch()
    model = importlib.import_module("wan.modules.model")
    assert type(model.__loader__) is importlib.machinery.SourceFileLoader
    assert model.__spec__ and model.__spec__.loader is model.__loader__
    assert "class WanAttentionBlock" in inspect.getsource(model.WanAttentionBlock)


def test_another_hook_that_asks_every_other_finder(stubs: Path) -> None:
    """Two hooks that both delegate must not ask each other forever."""

    class Delegating:
        @classmethod
        def find_spec(cls, name: str, path: Any, target: Any = None) -> Any:
            for finder in sys.meta_path:
                spec = finder.find_spec(name, path, target) if finder is not cls else None
                if spec is not None:
                    return spec
            return None

    stub_wan.write(stubs)
    patch()
    for position in (0, 1):
        sys.meta_path.insert(position, Delegating)
        try:
            importlib.import_module("wan")
        finally:
            sys.meta_path.remove(Delegating)
        assert_all_ours()


def test_report_reads_and_serialises(stubs: Path) -> None:
    stub_wan.write(stubs)
    assert wan22.report() is None
    importlib.import_module("wan")
    report = patch()
    assert report == wan22.report()
    data = json.loads(json.dumps(dataclasses.asdict(report)))
    assert data["package"] == "wan" and len(data["bindings"]) == 10
    assert data["bindings"][0]["original"] == "wan.modules.attention.flash_attention"
    text = str(report)
    assert text.startswith("wan_attn: 10 of 10 names patched in `wan`")
    for name in held():
        assert f"patched     wan.{name}" in text
    assert "TF32" in text and "compile" in text


def test_report_names_what_this_wan_lacks(stubs: Path) -> None:
    folder = stub_wan.write(stubs)
    (folder / "distributed" / "ulysses.py").write_text("")
    importlib.import_module("wan")
    assert patch().missing == ("wan.distributed.ulysses.flash_attention",)


class TestThreads:
    def test_many_threads_patch_and_import(self, stubs: Path) -> None:
        stub_wan.write(stubs)
        for _ in range(5):
            gate = threading.Barrier(8)
            errors: list[BaseException] = []

            def work(number: int, gate: Any = gate, errors: Any = errors) -> None:
                try:
                    gate.wait()
                    importlib.import_module("wan") if number % 2 else patch()
                except BaseException as error:  # noqa: BLE001 - reported by the test
                    errors.append(error)

            threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
                assert not thread.is_alive(), "deadlock"
            assert not errors
            assert_all_ours()
            wan22.unpatch()
            assert_all_stock()
            for name in [n for n in sys.modules if n.partition(".")[0] == "wan"]:
                del sys.modules[name]

    def test_patch_waits_for_an_import_that_began_before_it(self, stubs: Path) -> None:
        """A module found before the hook stood, which takes the original after the scan."""
        folder = stub_wan.write(stubs)
        (folder / "modules" / "model.py").write_text(
            "import someone\n"
            "from .attention import flash_attention as taken\n"
            "someone.began.set()\n"
            "someone.go_on.wait(20)\n"
            "flash_attention = taken\ndel taken\n"
        )
        someone = type(sys)("someone")
        someone.began, someone.go_on = threading.Event(), threading.Event()  # type: ignore[attr-defined]
        sys.modules["someone"] = someone
        importing = threading.Thread(target=importlib.import_module, args=("wan",))
        importing.start()
        assert someone.began.wait(20)
        patching = threading.Thread(target=patch)
        patching.start()
        patching.join(0.2)
        assert patching.is_alive(), "patch() must not return while an import is under way"
        someone.go_on.set()
        patching.join(20)
        importing.join(20)
        assert_all_ours()


@pytest.mark.parametrize("package", [None, 3, ["wan"], ""])
def test_a_package_that_is_no_name_leaves_nothing_behind(package: Any) -> None:
    before = list(sys.meta_path)
    with pytest.raises(RuntimeError, match="package must be the name of a package"):
        wan22.patch(package=package)
    with pytest.raises(RuntimeError, match="attention must be a function"):
        wan22.patch(attention=3)  # type: ignore[arg-type]
    assert sys.meta_path == before
    importlib.import_module("colorsys")
    wan22.unpatch()
