# SPDX-License-Identifier: Apache-2.0
"""test_workloads.py - the models' shapes are the published ones; a wrong shape is told the rule."""

from __future__ import annotations

import pytest

from wan_attn.workloads import MODELS, WORKLOADS, parse_shape

# The calls of stock Wan2.2, of MiniMax-H3 and of encoders, typed again:
# (batch, Lq, Lk, heads, head_dim, calls per forward)
PUBLISHED = {
    "ti2v-5b-720p": (1, 27_280, 27_280, 24, 128, 30),
    "ti2v-5b-720p-cross": (1, 27_280, 512, 24, 128, 30),
    "a14b-480p": (1, 32_760, 32_760, 40, 128, 40),
    "a14b-480p-cross": (1, 32_760, 512, 40, 128, 40),
    "a14b-720p": (1, 75_600, 75_600, 40, 128, 40),
    "a14b-720p-cross": (1, 75_600, 512, 40, 128, 40),
    "a14b-720p-image": (1, 75_600, 257, 40, 128, 40),
    "h3-32k": (1, 32_700, 32_700, 56, 128, 50),
    "h3-38k": (1, 38_222, 38_222, 56, 128, 50),
    "h3-79k": (1, 79_567, 79_567, 56, 128, 50),
    "h3-104k": (1, 104_050, 104_050, 56, 128, 50),
    "clip-vit-h": (1, 257, 257, 16, 80, 32),
    "wav2vec2-10s": (1, 499, 499, 16, 64, 24),
    "gemma-3-12b": (1, 1024, 1024, 16, 256, 48),
}


def test_every_workload_has_its_published_shape() -> None:
    actual = {
        name: (w.batch, w.seqlen_q, w.seqlen_k, w.num_heads_q, w.head_dim, w.calls)
        for name, w in WORKLOADS.items()
    }
    assert actual == PUBLISHED


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_is_read_back_from_its_name_and_from_its_shape(name: str) -> None:
    workload = WORKLOADS[name]
    assert parse_shape(name.upper()) == workload
    again = parse_shape(workload.shape, num_heads_k=workload.num_heads_k)
    assert again.shape == workload.shape
    assert (again.batch, again.seqlen_q, again.seqlen_k) == (
        1,
        workload.seqlen_q,
        workload.seqlen_k,
    )
    assert (again.num_heads_q, again.num_heads_k, again.head_dim) == (
        workload.num_heads_q,
        workload.num_heads_k,
        workload.head_dim,
    )


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("ti2v-5b:1280x704x121", 27_280),
        ("ti2v-5b:1280*704*121", 27_280),  # as generate.py writes sizes
        ("t2v-a14b:832x480x81", 32_760),
        ("animate-14b:1280x720x81", 75_600),
        ("a14b:16x16x1", 1),
    ],
)
def test_tokens_of_a_video(text: str, tokens: int) -> None:
    call = parse_shape(text)
    assert (call.seqlen_q, call.seqlen_k) == (tokens, tokens)


def test_key_length_and_key_heads_can_differ() -> None:
    call = parse_shape("2x100x12x64", seqlen_k=7, num_heads_k=4)
    assert (call.seqlen_q, call.seqlen_k, call.num_heads_q, call.num_heads_k) == (100, 7, 12, 4)
    assert parse_shape("2x100:7x12x64").seqlen_k == 7
    assert parse_shape("ti2v-5b-720p", seqlen_k=512).seqlen_k == 512


def test_flops_count_both_products() -> None:
    assert parse_shape("1x32760x40x128").flops == 4 * 40 * 32760 * 32760 * 128


@pytest.mark.parametrize(
    ("text", "seqlen_k", "num_heads_k", "message"),
    [
        (
            "27280",
            None,
            None,
            r"shape must be BxLxHxD .*, BxLq:LkxHxD .*one of ti2v-5b-720p,.* got '27280'",
        ),
        ("1x2x3", None, None, r"shape must be .* got '1x2x3'"),
        ("1x2x3x4x5", None, None, r"shape must be .* got '1x2x3x4x5'"),
        ("1x-2x3x4", None, None, r"shape must be .* got '1x-2x3x4'"),
        ("", None, None, r"shape must be .* got ''"),
        ("1x2x3x٤", None, None, r"shape must be "),
        ("0x2x3x4", None, None, "batch must be at least 1, got 0"),
        ("1x2x0x4", None, None, "num_heads_q must be at least 1, got 0"),
        ("1x2x3x0", None, None, "head_dim must be at least 1, got 0"),
        ("1x2x3x4", -1, None, "seqlen_k must be at least 0, got -1"),
        ("1x2x3x4", None, 0, "num_heads_k must be at least 1, got 0"),
        ("1x2x12x4", None, 5, "num_heads_k must divide num_heads_q, got 5 and 12"),
        (
            "wan9:1280x704x121",
            None,
            None,
            "model must be one of ti2v-5b, a14b, t2v-a14b, .*, got 'wan9'",
        ),
        ("ti2v-5b:1280x720x121", None, None, "multiples of 32 for ti2v-5b, got 1280x720"),
        ("a14b:0x480x81", None, None, "multiples of 16 for a14b, got 0x480"),
        ("a14b:832x480x80", None, None, r"frames must be 4\*n \+ 1, got 80"),
        ("a14b:832x480x0", None, None, r"frames must be 4\*n \+ 1, got 0"),
    ],
)
def test_a_wrong_shape_says_the_rule(
    text: str, seqlen_k: int | None, num_heads_k: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_shape(text, seqlen_k, num_heads_k)


def test_models_agree_with_the_checkpoints() -> None:
    assert {m.name: (m.num_heads, m.head_dim, m.layers) for m in MODELS.values()} == {
        "ti2v-5b": (24, 128, 30),
        "a14b": (40, 128, 40),
    }
