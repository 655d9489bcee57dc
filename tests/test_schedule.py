# SPDX-License-Identifier: Apache-2.0
"""test_schedule.py - which calls may be lossy: the rules, and where in a run a call stands."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from wan_attn.observe import place
from wan_attn.observe.place import Place
from wan_attn.precision import at, schedule

HEADS = 6
EVERY = ((0, HEADS),)


@pytest.fixture(autouse=True)
def _nowhere() -> Iterator[None]:
    """Each test begins as a new thread does."""
    place.forget()
    yield
    place.forget()


def heads(mode: str, where: Place, own: Any = ()) -> schedule.Heads:
    return schedule.lossy_heads(
        schedule.with_own(mode, schedule.parse(list(own), "rules")), where, HEADS
    )


def inner(kind: str = "self", **known: Any) -> Place:
    return Place(kind, **{"step": 5, "steps": 10, "layer": 4, "layers": 9, "expert": 0, **known})


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, True),
        *(({"step": step}, False) for step in (0, 1, 8, 9)),
        *(({"step": step}, True) for step in (2, 7)),
        *(({"layer": layer}, False) for layer in (0, 8)),
        *(({"layer": layer}, True) for layer in (1, 7)),
        *(({"kind": kind}, False) for kind in ("text", "image")),
        *(({name: None}, False) for name in ("step", "steps", "layer", "layers")),
        ({"expert": None}, True),
        ({"expert": 1}, True),
    ],
)
def test_balanced_and_auto(known: dict[str, Any], expected: bool) -> None:
    """First and last steps and layers are exact, and so is what cannot be told to be another."""
    for mode in ("balanced", "auto"):
        assert heads(mode, inner(**known)) == (EVERY if expected else ())


def test_exact_and_fast() -> None:
    for kind, is_lossy in (("self", True), ("text", True), ("image", False)):
        assert heads("exact", inner(kind)) == ()
        assert heads("fast", inner(kind)) == (EVERY if is_lossy else ())
        assert heads("fast", Place(kind)) == (EVERY if is_lossy else ())


def test_the_last_rule_that_fits_decides() -> None:
    rules = [
        {"precision": "qk8", "layers": "0-8", "steps": [0, -1]},
        {"precision": "exact", "layers": "4"},
        {"precision": "qk8", "layers": 4, "experts": [1]},
    ]
    assert heads("exact", inner(step=0, layer=3), rules) == EVERY
    assert heads("exact", inner(step=9, layer=3), rules) == EVERY
    assert heads("exact", inner(step=5, layer=3), rules) == ()
    assert heads("exact", inner(step=0, layer=4), rules) == ()
    assert heads("exact", inner(step=5, layer=4, expert=1), rules) == EVERY
    assert heads("exact", inner(step=5, layer=4, expert=None), rules) == ()
    # -1 cannot be told apart from another step while nobody says how many there are.
    assert heads("exact", inner(step=5, steps=None, layer=3), rules) == ()
    assert heads("exact", inner(step=0, steps=None, layer=3), rules) == EVERY


def test_heads() -> None:
    rules = [{"precision": "exact", "heads": "1-2, -1"}]
    assert heads("fast", inner(), rules) == ((0, 1), (3, 5))
    assert heads("fast", inner(), [{"precision": "exact", "heads": "0-5"}]) == ()


def test_images_are_exact_whoever_says_otherwise() -> None:
    assert heads("fast", inner("image"), [{"precision": "qk8"}]) == ()


BAD = {
    "5": "rules must be a list of rules",
    "{}": "rules must be a list of rules",
    "[3]": "rules must have only precision, kinds, steps, layers, experts, heads in rule 1, got 3",
    '[{"precision": "qk8", "layer": 1}]': "must have only precision, kinds",
    '[{"precision": "qk8"}, {"layers": 1}]': "must have precision exact or qk8 in rule 2, got None",
    '[{"precision": "int8"}]': "precision exact or qk8 in rule 1, got 'int8'",
    '[{"precision": "qk8", "kinds": "audio"}]': "kinds of self, text, image in rule 1, got 'audio'",
    '[{"precision": "qk8", "kinds": 3}]': "kinds of self, text, image in rule 1, got 3",
    '[{"precision": "qk8", "kinds": ["image"]}]': "image exact, as it always is, in rule 1",
    **{
        f'[{{"precision": "qk8", "steps": {steps}}}]': "steps"
        for steps in ('"3-1"', '"a"', "[]", "1.5", "true", '"-1-3"', "[[1]]", '"1--1"', "[null]")
    },
}


@pytest.mark.parametrize("text", BAD)
def test_rules_that_are_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must .*got") as caught:
        schedule.parse(json.loads(text), "rules")
    assert BAD[text] in str(caught.value)
    file = tmp_path / "rules.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="must"):
        schedule.load(str(file), "WAN_ATTN_SCHEDULE")


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("layers: 1")
    for name in ("text", "missing", "."):
        with pytest.raises(ValueError, match="^WAN_ATTN_SCHEDULE must be a JSON file, got"):
            schedule.load(str(tmp_path / name), "WAN_ATTN_SCHEDULE")


# --- places --------------------------------------------------------------------------------------


class Model:
    pass


def forward(model: object, t: Any, layers: int = 2) -> list[tuple[int | None, int | None]]:
    place.enter(model, t, layers)
    seen = []
    for index in range(layers):
        place.layer(index)
        where = place.here(64, 64)
        seen.append((where.step, where.layer))
    place.leave()
    return seen


def test_kinds() -> None:
    assert [place.here(*n).kind for n in ((64, 64), (64, 512), (64, 257), (257, 257))] == [
        *("self", "text", "image", "self")
    ]
    place.kind("image")
    assert place.here(64, 512).kind == "image"
    place.leave()
    assert place.here(64, 512).kind == "text"


def test_steps_of_a_run_whose_timesteps_are_told() -> None:
    model = Model()
    for run in (1, 2):
        place.begin(torch.tensor([1000.0, 700.0, 300.0]))
        for step, t in enumerate((1000.0, 700.0, 300.0)):
            for _ in range(2):  # guidance
                # Image-to-video: the tokens of the image are at 0.
                assert forward(model, torch.tensor([[0.0, t, t]])) == [(step, 0), (step, 1)]
            where = place.here(64, 64)
            assert (where.step, where.steps, where.run) == (step, 3, run)
            assert (where.layer, where.layers, where.expert) == (None, None, None)


def test_the_same_timesteps_again_are_another_run() -> None:
    """Of a host that tells its timesteps once."""
    model = Model()
    place.begin([2.0, 1.0])
    runs = []
    for t in (2.0, 1.0, 2.0, 1.0):
        forward(model, t)
        runs.append((place.here(1, 1).step, place.here(1, 1).run))
    assert runs == [(0, 1), (1, 1), (0, 2), (1, 2)]


def test_steps_without_a_list_are_counted() -> None:
    model, seen = Model(), []
    for t in (1000, 1000, 700, 700, 300, 999, 500):
        forward(model, t)
        where = place.here(1, 1)
        seen.append((where.step, where.steps, where.run))
    assert seen == [(n, None, 0) for n in (0, 0, 1, 1, 2)] + [(n, None, 1) for n in (0, 1)]


def test_a_list_that_begins_lower_continues_the_run() -> None:
    """Two samplers, one for each of A14B's models."""
    high, low = Model(), Model()
    seen = []
    for model, timesteps in ((high, [9.0, 8.0]), (low, [7.0, 3.0]), (high, [9.0, 8.0])):
        place.begin(timesteps)
        for t in timesteps:
            place.enter(model, t, 1)
            where = place.here(1, 1)
            seen.append((where.run, where.expert, where.step, where.steps))
            place.leave()
    assert seen == [(run, expert, n, 2) for run, expert in ((1, 0), (1, 1), (2, 0)) for n in (0, 1)]


def test_a_timestep_that_was_rounded_is_still_its_step() -> None:
    place.begin([999.0, 983.0, 961.0, 12.0])
    steps, model = [], Model()
    for t in (999.0, 983.0, 961.0, 12.0):
        place.enter(model, torch.tensor([t]).bfloat16(), 1)
        steps.append((place.here(1, 1).step, place.here(1, 1).steps))
    assert steps == [(n, 4) for n in range(4)]


def test_timesteps_that_belong_to_another_run_are_dropped() -> None:
    place.begin([3.0, 2.0, 1.0])
    forward(Model(), 2.5)
    assert place.here(1, 1).steps is None


def test_experts() -> None:
    high, low = Model(), Model()
    seen = []
    for model in (high, high, low, high):
        place.enter(model, 5.0, 1)
        seen.append(place.here(1, 1).expert)
        place.leave()
    assert seen == [0, 0, 1, 0]
    del high, model
    place.enter(Model(), 5.0, 1)  # takes the place of one that is gone
    assert place.here(1, 1).expert == 0
    place.enter(low, 9.0, 1)  # a new run
    assert place.here(1, 1).expert == 0


def test_threads_stand_in_places_of_their_own() -> None:
    place.begin([1.0])
    forward(Model(), 1.0)
    seen: list[Place] = []
    thread = threading.Thread(target=lambda: seen.append(place.here(8, 8)))
    thread.start()
    thread.join()
    assert seen == [Place("self")]


def test_at() -> None:
    with at(step=3, steps=8, layer=1, layers=2, expert=1, kind="text"):
        assert place.here(4, 4) == Place("text", 3, 8, 1, 2, 1)
        with at(layer=0):
            assert place.here(4, 4) == Place("text", 3, 8, 0, 2, 1)
    assert place.here(4, 4) == Place("self")


@pytest.mark.parametrize(
    "known", [{"step": -1}, {"layers": "2"}, {"expert": 0.5}, {"kind": "audio"}, {"kind": 1}]
)
def test_at_refuses(known: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=f"wan_attn: {next(iter(known))} must be"), at(**known):
        pass
