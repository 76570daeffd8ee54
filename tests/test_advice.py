"""Advice whether to upcycle: numbers by hand, the published law, the words, and the command."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from test_cli import fails
from tiny import dense_folder

from fusion_upcycle.cli import main
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.inspection import scaling_law
from fusion_upcycle.inspection.advice import Case, advise
from fusion_upcycle.inspection.advice_text import advice_lines
from fusion_upcycle.inspection.measured import (
    Interval,
    Row,
    interval_of,
    nearest_rows,
    read_measured,
    rows_of_setting,
)
from fusion_upcycle.inspection.numbers import read_count

#: As the studies: 8 experts top-1 of 32,800 parameters that have seen 122 tokens each.
STUDIED = Case(
    parameters=32_800,
    source_tokens=122 * 32_800,
    budget_tokens=0.1 * 122 * 32_800,
    cost_ratio=1.01,
    num_experts=8,
    experts_per_token=1,
    hidden_size=32,
    renormalised=False,
)
#: As the paper's own 8x1B (table 7): 74B tokens dense, then 37B tokens upcycled.
PUBLISHED = replace(
    STUDIED,
    parameters=1e9,
    source_tokens=74e9,
    budget_tokens=37e9 * 1.6,
    cost_ratio=1.6,
    experts_per_token=2,
    hidden_size=2048,
)


def said(case: Case) -> str:
    return "\n".join(advice_lines(advise(case)))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5000", 5e3),
        ("2T", 2e12),
        ("1.5b", 1.5e9),
        ("500M", 5e8),
        ("20 k", 2e4),
        ("1e12", 1e12),
        ("2.5e+3", 2500),
        ("1_000_000", 1e6),
        ("1,000,000", 1e6),
    ],
)
def test_numbers_parse_as_users_write_them(text: str, number: float) -> None:
    assert read_count(text, "--tokens") == number


@pytest.mark.parametrize("text", ["", "0", "0B", "-1", "2TB", "many", "nan", "inf", "1e", "1e-3"])
def test_other_numbers_are_refused_by_name(text: str) -> None:
    with pytest.raises(UpcyclingError, match=f"--budget-tokens {text} must be .* 1e12"):
        read_count(text, "--budget-tokens")


# --- our studies ------------------------------------------------------------------------------


def row(tokens: float, share: float, difference: float, spread: float | None = None) -> Row:
    return Row(8, 1, tokens, 1000, share, difference, spread, 1)


ROWS = [row(10, 0.5, -0.1), row(40, 0.1, -0.2), row(40, 0.5, -0.3, 0.05), row(90, 0.5, -0.4)]


@pytest.mark.parametrize(
    ("tokens", "share", "expected"),
    [
        (40, 0.5, [-0.3]),  # measured
        (20, 0.5, [-0.1, -0.3]),  # between two sources
        (40, 0.3, [-0.2, -0.3]),  # between two budgets
        (1, 0.5, [-0.1]),  # at the edges, what is there
        (900, 0.9, [-0.4]),
    ],
)
def test_rows_next_to_a_case_are_taken_as_they_are(
    tokens: float, share: float, expected: list[float]
) -> None:
    assert [near.difference for near in nearest_rows(ROWS, tokens, share)] == expected


def test_the_interval_spans_the_rows_and_their_spread() -> None:
    found = interval_of(nearest_rows(ROWS, 20, 0.5), 0.5, 0.01, below=0.0)
    assert (found.low, found.high) == pytest.approx((-0.35, -0.09))  # the spread of each its own
    small = interval_of(nearest_rows(ROWS, 40, 0.05), 0.05, 0.01, below=0.0)
    assert (small.low, small.high) == pytest.approx((-0.21, 0.0))  # nothing trained, no difference


def test_a_setting_without_rows_shows_the_one_with_most() -> None:
    other = replace(ROWS[0], num_experts=16)
    assert rows_of_setting([other, *ROWS], 16, 1) == [other]
    assert rows_of_setting([other, *ROWS], 64, 8) == ROWS


def test_a_measured_case_by_hand() -> None:
    """The row of the trunk at +10 %, three seeds: its difference, give or take its spread."""
    measured = read_measured()
    (row,) = (
        row
        for row in measured.rows
        if (row.num_experts, row.experts_per_token, row.share) == (8, 1, 0.1) and row.seeds == 3
    )
    advice = advise(STUDIED)
    assert advice.tokens_per_parameter == pytest.approx(122)
    assert advice.budget_share == pytest.approx(0.1)
    dense, upcycled, scratch = advice.choices
    assert upcycled.tokens == scratch.tokens == pytest.approx(0.1 * 122 * 32_800 / 1.01)
    assert row.difference < 0 < (row.spread or 0)
    expected = (-row.difference - row.spread, -row.difference + row.spread)
    assert (dense.measured.low, dense.measured.high) == pytest.approx(expected)
    assert scratch.measured.low > 0.2
    assert scratch.measured.high == math.inf  # measured from +25 % on
    std = measured.settings.logit_std / math.sqrt(32)
    assert advice.row_std == pytest.approx(std)
    assert advice.router_learning_rate == pytest.approx(0.005 * std)


def test_what_is_measured_is_complete() -> None:
    measured = read_measured()
    assert measured.source
    for found in (*measured.rows, *measured.from_scratch):
        assert 0 < found.share <= 10
        assert (found.spread is None) == (found.seeds == 1)
    assert {found.share for found in measured.from_scratch}


@pytest.mark.parametrize("name", ["parameters", "source_tokens", "budget_tokens", "cost_ratio"])
def test_a_case_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(UpcyclingError, match=f"{name}=0"):
        replace(STUDIED, **{name: 0})


# --- the law ----------------------------------------------------------------------------------


def test_the_law_by_hand() -> None:
    """Table 2 of arXiv 2502.03009, term by term, at N = 1e9, D1 = 74e9, D2 = 37e9."""
    data = 16.3 * math.exp(-0.043 * math.log(74e9))
    data *= math.exp((-0.085 + 7.98e-4 * math.log(74e9)) * math.log(37e9))
    model = 8.53 * math.exp(-0.112 * math.log(1e9))
    assert scaling_law.upcycled_loss(1e9, 74e9, 37e9) == pytest.approx(data + model + 0.165)
    assert scaling_law.dense_loss(1e9, 74e9) == pytest.approx(
        8.83 * math.exp(-0.088 * math.log(74e9)) + 12.3 * math.exp(-0.116 * math.log(1e9)) + 0.165
    )
    assert scaling_law.scratch_loss(1e9, 37e9) == pytest.approx(
        32 * math.exp(-0.161 * math.log(37e9)) + 7.05 * math.exp(-0.08 * math.log(1e9)) + 0.165
    )


def test_the_law_agrees_with_what_its_authors_report() -> None:
    """Table 7: their 8x1B is better than its source on every benchmark. And the abstract: the more
    the source has seen, the less a factor in upcycled tokens helps."""
    assert scaling_law.upcycled_loss(1e9, 74e9, 37e9) < scaling_law.dense_loss(1e9, 74e9)
    gains = [
        scaling_law.upcycled_loss(1e9, before, 1e10) - scaling_law.upcycled_loss(1e9, before, 1e11)
        for before in (1e10, 1e11, 1e12)
    ]
    assert gains == sorted(gains, reverse=True)
    # An MoE from scratch wins in the end: the interaction limits upcycling at large budgets.
    assert scaling_law.scratch_loss(1e9, 1e12) < scaling_law.upcycled_loss(1e9, 74e9, 1e12)


def test_the_printed_digits_are_the_uncertainty() -> None:
    found = scaling_law.with_rounding(lambda c: c["dense a"])
    assert (found.low, found.high) == pytest.approx(
        (0.088 - 2 * 0.0005 / math.sqrt(3), 0.088 + 2 * 0.0005 / math.sqrt(3))
    )
    assert scaling_law.with_rounding(lambda c: 1.0) == Interval(1.0, 1.0)


def test_a_crossing_is_where_the_losses_are_equal() -> None:
    advice = advise(PUBLISHED)
    for crossing, choice in ((advice.pays_from, 0), (advice.caught_at, 1)):
        assert crossing.share is not None and crossing.low is not None
        assert crossing.low < crossing.share
        assert crossing.high is None or crossing.share < crossing.high
        losses = scaling_law.against_upcycled(1e9, 74e9, crossing.share, 1.6)
        assert losses[choice](scaling_law.COEFFICIENTS) == pytest.approx(0, abs=0.01)


# --- words ------------------------------------------------------------------------------------


def test_a_case_outside_is_told_so_and_one_inside_is_not() -> None:
    inside = said(STUDIED)
    assert "Inside the range of our studies" in inside
    assert "OUTSIDE the range of the law: it is of 8 experts top-2 only" in inside
    outside = said(replace(STUDIED, parameters=3.28e9, source_tokens=32.8e12))
    assert "OUTSIDE the range of our studies" in outside
    rows = [r for r in read_measured().rows if (r.num_experts, r.experts_per_token) == (8, 1)]
    size, seen = max(r.parameters for r in rows), max(r.tokens_per_parameter for r in rows)
    assert f"parameters {float(f'{3.28e9 / size:.2g}'):,.0f} x the largest measured" in outside
    assert f"tokens per parameter {1e4 / seen:.0f} x the largest measured ({seen:g})" in outside
    assert "of the smallest measured (10%)" in outside  # a budget far below what was measured
    assert "Advice, extrapolated:" in outside


def test_the_law_knows_its_own_range() -> None:
    assert "Inside the range of the law" in said(PUBLISHED)
    large = said(replace(PUBLISHED, parameters=8e9, source_tokens=15e12))
    assert "parameters 8 x its largest dense model (1B); tokens 41 x its data set" in large


@pytest.mark.parametrize(
    ("case", "verdict"),
    [
        (replace(PUBLISHED, source_tokens=5e9, budget_tokens=0.5e9), "open: our studies and the"),
        (replace(PUBLISHED, source_tokens=150e9, budget_tokens=75e9), "upcycle: our studies and"),
        (replace(PUBLISHED, budget_tokens=1e9), "train the dense model on: the law has it ahead"),
        (replace(PUBLISHED, budget_tokens=500e9), "MoE from scratch: the law has"),
    ],
)
def test_the_verdict_is_what_both_sources_allow(case: Case, verdict: str) -> None:
    assert advise(case).verdict.startswith(verdict)


def test_renormalised_top_1_is_warned_of() -> None:
    warning = "no gradient of the language loss"
    assert warning in said(replace(STUDIED, renormalised=True))
    assert warning not in said(STUDIED)
    assert warning not in said(replace(PUBLISHED, renormalised=True))


# --- the command ------------------------------------------------------------------------------


def test_inspect_advises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(dense_folder(tmp_path / "dense"))
    main(["inspect", source, "--num-experts", "8"])
    plain = capsys.readouterr().out
    assert "training on 100.0B tokens" in plain
    assert "Advice" not in plain
    main(
        ["inspect", source, "--num-experts", "8", "--source-tokens", "2M", "--budget-tokens", "1e6"]
    )
    lines = capsys.readouterr().out.splitlines()
    out = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= 80
    assert "training on 1.000M tokens" in out  # --tokens follows the budget
    for shown in (
        *("train the dense model on", "upcycle, 8 top-2", "MoE from scratch"),
        *("Source: 2.000M tokens", "budget is 50 % of its training compute", "arXiv 2502.03009"),
        *(
            "Router: --router-init normal,logit_std=",
            "Schedule: wsd",
            "OUTSIDE the range of the law",
        ),
    ):
        assert shown in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source-tokens", "2T"], "--budget-tokens is missing"),
        (["--budget-tokens", "1B"], "--source-tokens is missing"),
        (["--source-tokens", "2T", "--budget-tokens", "lots"], "--budget-tokens lots must be"),
        (["--source-tokens", "0", "--budget-tokens", "1B"], "--source-tokens 0 must be"),
    ],
    ids=str,
)
def test_half_a_question_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails("inspect", "--recipe", "mixtral_8x7b", *arguments) == 2
    assert message in capsys.readouterr().err
