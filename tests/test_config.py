# SPDX-License-Identifier: Apache-2.0
"""test_config.py - every environment variable: what it takes, what it refuses, what contradicts."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import readme_tables
import torch

from source_tree import read
from wan_attn import config, log
from wan_attn.attention import sdpa
from wan_attn.backends import REGISTRY, _common, fa2, fa3
from wan_attn.config import VARIABLES, ConfigError, Settings
from wan_attn.selection import run
from wan_attn.selfcheck import first_call

FLAGS = [variable for variable in VARIABLES if variable.kind == "flag"]
CHOICES = [variable for variable in VARIABLES if variable.kind == "choice"]


@pytest.fixture(autouse=True)
def _keep_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test sees none of our variables, and leaves none of its settings."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setattr(config, "_current", None)
    yield


def test_an_empty_environment_gives_the_defaults() -> None:
    assert Settings.from_env({}) == Settings()
    assert Settings.from_env({variable.name: "" for variable in VARIABLES}) == Settings()


def test_the_table_and_the_settings_name_the_same_fields() -> None:
    assert [v.field for v in VARIABLES] == [f.name for f in dataclasses.fields(Settings)]
    assert len({v.name for v in VARIABLES}) == len(VARIABLES)


def test_every_field_has_the_type_that_its_kind_parses_to() -> None:
    hints = typing.get_type_hints(Settings)
    kinds = {"flag": bool, "integer": int, "share": float | None, "choice": str, "path": str | None}
    for variable in VARIABLES:
        assert hints[variable.field] == kinds[variable.kind], variable.name


def test_the_backends_that_can_be_named_are_those_that_exist() -> None:
    (backend,) = [v for v in VARIABLES if v.name == "USE_ATTENTION_BACKEND"]
    assert set(backend.values) == {"auto", *REGISTRY}


@pytest.mark.parametrize("variable", FLAGS, ids=lambda v: v.name)
@pytest.mark.parametrize(
    ("text", "value"),
    [("1", True), ("0", False), ("true", True), ("OFF", False), (" yes ", True), ("No", False)],
)
def test_flags(variable: config.Variable, text: str, value: bool) -> None:
    assert getattr(Settings.from_env({variable.name: text}), variable.field) is value


@pytest.mark.parametrize("variable", FLAGS, ids=lambda v: v.name)
@pytest.mark.parametrize("text", ["2", "-1", "y", "enabled", "1.0"])
def test_flags_refuse(variable: config.Variable, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_env({variable.name: text})
    assert str(caught.value) == (
        f"{variable.name} must be 1 or 0 (also true/false, yes/no, on/off), got {text!r}"
    )


@pytest.mark.parametrize("variable", CHOICES, ids=lambda v: v.name)
def test_choices(variable: config.Variable) -> None:
    for value in variable.values:
        for text in (value, value.upper(), f" {value} "):
            assert getattr(Settings.from_env({variable.name: text}), variable.field) == value


@pytest.mark.parametrize("variable", CHOICES, ids=lambda v: v.name)
@pytest.mark.parametrize("text", ["flash", "1", "auto,sdpa", "sdpa2"])
def test_choices_refuse_and_list_what_is_valid(variable: config.Variable, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_env({variable.name: text})
    assert str(caught.value) == (
        f"{variable.name} must be one of {', '.join(variable.values)}; got {text!r}"
    )


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("1048576", 1048576), (" 12 ", 12)])
def test_threshold(text: str, value: int) -> None:
    assert Settings.from_env({"WAN_ATTN_CHUNK_THRESHOLD": text}).chunk_threshold == value


@pytest.mark.parametrize("text", ["-1", "1e6", "many", "1.5", "1_000", "٣"])
def test_threshold_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="must be an integer, 0 or more, got"):
        Settings.from_env({"WAN_ATTN_CHUNK_THRESHOLD": text})


@pytest.mark.parametrize(("text", "value"), [("0.02", 0.02), ("1e-3", 1e-3), (" .5 ", 0.5)])
def test_error_budget(text: str, value: float) -> None:
    assert Settings.from_env({"WAN_ATTN_ERROR_BUDGET": text}).error_budget == value


@pytest.mark.parametrize("text", ["0", "1", "-0.1", "2%", "nan", "inf", "little"])
def test_error_budget_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="ERROR_BUDGET must be a number between 0 and 1, got"):
        Settings.from_env({"WAN_ATTN_ERROR_BUDGET": text})


def test_a_path_keeps_its_case() -> None:
    assert Settings.from_env({"WAN22_DIR": "/Data/Wan2.2"}).wan22_dir == "/Data/Wan2.2"


@pytest.mark.parametrize(
    ("env", "name", "forced_by"),
    [
        ({}, None, ""),
        ({"USE_ATTENTION_BACKEND": "auto"}, None, ""),
        ({"USE_ATTENTION_BACKEND": "torch"}, "torch", "USE_ATTENTION_BACKEND=torch"),
        ({"USE_SDPA": "1"}, "sdpa", "USE_SDPA=1"),
        ({"USE_SDPA": "1", "USE_ATTENTION_BACKEND": "auto"}, "sdpa", "USE_SDPA=1"),
        (
            {"USE_SDPA": "1", "USE_ATTENTION_BACKEND": "sdpa"},
            "sdpa",
            "USE_ATTENTION_BACKEND=sdpa",
        ),
        ({"USE_SDPA": "0", "USE_ATTENTION_BACKEND": "fa2"}, "fa2", "USE_ATTENTION_BACKEND=fa2"),
        ({"DISABLE_FLASH_ATTN": "1"}, None, ""),
    ],
)
def test_the_forced_backend(env: dict[str, str], name: str | None, forced_by: str) -> None:
    settings = Settings.from_env(env)
    assert (settings.forced_backend, settings.forced_by) == (name, forced_by)


@pytest.mark.parametrize(
    "env",
    [
        {"USE_SDPA": "1", "USE_ATTENTION_BACKEND": "fa2"},
        {"USE_SDPA": "1", "USE_ATTENTION_BACKEND": "torch"},
        {"DISABLE_FLASH_ATTN": "1", "USE_ATTENTION_BACKEND": "fa2"},
        {"DISABLE_FLASH_ATTN": "1", "USE_ATTENTION_BACKEND": "fa3"},
    ],
)
def test_contradictions_are_errors_that_name_both(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_env(env)
    for name, value in env.items():
        assert f"{name}={value}" in str(caught.value)
    assert "contradict each other" in str(caught.value)


def test_current_is_parsed_once_and_refreshed_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    first = config.current()
    monkeypatch.setenv("WAN_ATTN_STRICT", "1")
    assert config.current() is first and not first.strict
    assert config.refresh().strict and config.current().strict


def test_a_bad_refresh_leaves_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    first = config.current()
    monkeypatch.setenv("USE_ATTENTION_BACKEND", "flash")
    with pytest.raises(ConfigError):
        config.refresh()
    assert config.current() is first


def test_a_bad_environment_is_an_error_at_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_ATTENTION_BACKEND", "flash")
    with pytest.raises(ConfigError, match="USE_ATTENTION_BACKEND must be one of auto, sdpa"):
        config.current()


def test_every_variable_is_in_one_of_the_two_lists() -> None:
    lines = "\n".join(map(readme_tables.variable_list, (False, True))).splitlines()
    for variable in VARIABLES:
        assert sum(line.startswith(f"- `{variable.name}` (") for line in lines) == 1


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("WAN_ATTN_STRCT", "did you mean WAN_ATTN_STRICT?"),
        ("wan_attn_log", "did you mean WAN_ATTN_LOG?"),
        ("WAN_ATTN_CACHEDIR", "did you mean WAN_ATTN_CACHE_DIR?"),
        ("WAN_ATTN_SHIM", "`wan-attn --help` lists all that it reads"),  # gone
    ],
)
def test_a_variable_that_nothing_reads_is_told(name: str, hint: str) -> None:
    expected = f"{name} is set, but wan_attn reads no variable of that name; {hint}"
    assert config.unknown({name: "1", "WANDB_MODE": "off"}) == [expected]


def test_every_variable_that_something_reads_is_known() -> None:
    asked = re.findall(r'(?:asked|environ\.get)\("(WAN_ATTN_\w+)"', read(Path("setup.py")))
    assert set(asked) == set(config.BUILD_VARIABLES)
    names = [variable.name for variable in VARIABLES]
    assert config.unknown(dict.fromkeys([*names, *asked], "1")) == []


def test_a_misspelt_variable_is_a_warning_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WAN_ATTN_STRCT", "1")
    config.forget()
    config.current()
    config.refresh()
    told = [r for r in caplog.records if "WAN_ATTN_STRCT" in r.getMessage()]
    assert [r.levelname for r in told] == ["WARNING"]


def test_forget_reaches_every_memory_of_the_engine() -> None:
    """Whatever is kept between calls is dropped: the next call is a process's first one."""
    x = torch.randn(1, 8, 2, 16)
    sdpa(x, x, x)
    fa2._load()
    fa3._load()
    _common.capability(x.device)
    first_call._verdicts[x.device, x.dtype, 16, False, False] = "wrong"
    caches = (fa2._load, fa3._load, _common.capability)
    assert run._plans and log._described and all(c.cache_info().currsize for c in caches)
    config.forget()
    assert not run._plans and not log._described and not first_call._verdicts
    assert config._current is None and not any(c.cache_info().currsize for c in caches)


def test_followers_hear_of_changes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[bool] = []
    monkeypatch.setattr(config, "_followers", [])
    config.follow(lambda settings: heard.append(settings.strict))
    for value in ("0", "0", "1", "1", "0"):
        monkeypatch.setenv("WAN_ATTN_STRICT", value)
        config.refresh()
    assert heard == [heard[0], True, False]
    monkeypatch.undo()
    config.refresh()
