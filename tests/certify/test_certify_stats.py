"""Paired tests, their correction, agreement and clustered intervals: figures by hand or from print, and wrong versions."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest

from edgesafe.certify.stats import (
    binomial_lower,
    binomial_upper,
    clustered_rate,
    cohen_kappa,
    effective_number,
    holm,
    mcnemar_clustered,
    paired_upper,
    wilson,
)
from mutants import wrong as edited


def _p(chi2: float) -> float:
    """Two-sided p of a chi-square with 1 degree of freedom, by the standard library's normal distribution."""
    return 2 * (1 - NormalDist().cdf(math.sqrt(chi2)))


# Differences b - c of each cluster, and the statistic (sum d)^2 / sum d^2 worked by hand.
CLUSTERS = [
    ([1] * 15 + [-1] * 5, 10**2 / 20),  # single pairs: McNemar's (b - c)^2 / (b + c)
    ([3, 2, -1], 4**2 / 14),
    ([4, 4, 4, -4], 8**2 / 64),
    ([2, 0, -1, 0, 3], 4**2 / 14),  # clusters in which nothing changed say nothing
    ([5], 1.0),  # one request can't be evidence, however many rows it has
]


@pytest.mark.parametrize("differences, chi2", CLUSTERS)
def test_mcnemar_by_hand(differences, chi2):
    assert mcnemar_clustered(differences) == pytest.approx(_p(chi2), abs=1e-12)


def test_mcnemar_against_published_figures():
    # Agresti, Categorical Data Analysis, section 10.1, approval in two surveys: 150 and 86 changed, z^2 = 17.36.
    assert mcnemar_clustered([1] * 150 + [-1] * 86) == pytest.approx(_p(17.36), rel=0.01)
    # The 5 % point of chi-square with 1 degree of freedom is 3.841: 12 against 4 lies just above it, 10 against 3 just below.
    assert mcnemar_clustered([1] * 12 + [-1] * 4) < 0.05 < mcnemar_clustered([1] * 10 + [-1] * 3)


def test_nothing_changed():
    assert mcnemar_clustered([]) == mcnemar_clustered([0, 0]) == 1.0
    assert mcnemar_clustered([2, -2]) == 1.0


def test_rows_of_one_request_are_no_new_evidence():
    ten_requests = [1] * 8 + [-1] * 2
    assert mcnemar_clustered([4 * d for d in ten_requests]) == mcnemar_clustered(ten_requests)


# p-values and Holm's correction, worked by hand: sorted, times m, m - 1, ..., and never below the one before.
HOLM = [
    ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
    ([0.5, 0.6], [1.0, 1.0]),
    ([0.7, 0.8, 0.9], [1.0, 1.0, 1.0]),
    ([0.02], [0.02]),
    ([0.01, 0.01, 0.9], [0.03, 0.03, 0.9]),
    ([0.011, 0.02, 0.021], [0.033, 0.04, 0.04]),
    ([], []),
]


@pytest.mark.parametrize("given, wanted", HOLM)
def test_holm_by_hand(given, wanted):
    assert holm(given) == pytest.approx(wanted)


# Two readers, 50 proposals: both yes 20, only the first 5, only the second 10, both no 15. Observed 35/50 = 0.7; by chance
# 25/50 30/50 + 25/50 20/50 = 0.5; kappa 0.4.
READERS = ["yy"] * 20 + ["yn"] * 5 + ["ny"] * 10 + ["nn"] * 15
# Three classes, worked by hand: observed 6/8; by chance (4 3 + 2 4 + 2 1) / 64 = 22/64; kappa (48 - 22) / (64 - 22) = 13/21.
THREE = ["rr", "rr", "rr", "rc", "cc", "cc", "ic", "ii"]


def _labels(pairs: list[str]) -> tuple[list[str], list[str]]:
    return [p[0] for p in pairs], [p[1] for p in pairs]


def test_kappa_by_hand():
    assert cohen_kappa(*_labels(READERS)) == pytest.approx(0.4)
    assert cohen_kappa(*_labels(THREE)) == pytest.approx(13 / 21)
    assert cohen_kappa("yn", "yn") == 1.0 and cohen_kappa("yn", "ny") == -1.0


def test_kappa_of_one_class_is_none():
    assert cohen_kappa("yyy", "yyy") is None and cohen_kappa("", "") is None
    assert cohen_kappa("yyy", "yyn") == 0.0
    with pytest.raises(ValueError, match="3 labels against 2"):
        cohen_kappa("yyy", "yy")


def test_a_clustered_interval_lies_between_its_bounds():
    # Members that say all the same count once a cluster; members that vary within clusters and not between them count all.
    same = clustered_rate([(8, 8)] * 5 + [(0, 8)] * 15)
    assert (same.k, same.n, same.rate) == (40, 160, 0.25)
    assert (same.lower_95, same.upper_95) == pytest.approx(wilson(5, 20))
    alike = clustered_rate([(2, 8)] * 20)
    assert (alike.lower_95, alike.upper_95) == pytest.approx(wilson(40, 160))
    # Worked by hand: p = 4/8; sum (k - p n)^2 = 1 + 0 + 0 + 1 = 2; variance 4/3 * 2 / 64 = 1/24; effective 0.25 * 24 = 6.
    between = clustered_rate([(2, 2), (1, 2), (1, 2), (0, 2)])
    assert (between.lower_95, between.upper_95) == pytest.approx(wilson(3, 6))


def test_a_clustered_rate_of_none_or_all_counts_clusters():
    none, every = clustered_rate([(0, 8)] * 20), clustered_rate([(8, 8)] * 20)
    assert (none.lower_95, none.upper_95) == wilson(0, 20) and (every.lower_95, every.upper_95) == wilson(20, 20)
    assert (none.k, none.n) == (0, 160)
    nothing = clustered_rate([])
    assert (nothing.n, nothing.lower_95, nothing.upper_95) == (0, 0.0, 1.0)
    assert clustered_rate([(1, 1), (0, 0), (0, 1)]).n == 2


def test_clusters_of_one_are_wilsons():
    rows = [(1, 1)] * 3 + [(0, 1)] * 37
    found = clustered_rate(rows)
    assert (found.lower_95, found.upper_95) == pytest.approx(wilson(3, 40))


def _mcnemar_holds(f) -> bool:
    return all(f(d) == pytest.approx(_p(chi2), abs=1e-9) for d, chi2 in CLUSTERS) and f([0, 0]) == 1.0


def _holm_holds(f) -> bool:
    return all(f(given) == pytest.approx(wanted) for given, wanted in HOLM)


def _kappa_holds(f) -> bool:
    by_hand = f(*_labels(READERS)) == pytest.approx(0.4) and f(*_labels(THREE)) == pytest.approx(13 / 21)
    return by_hand and f("yyy", "yyy") is None


def _clustered_holds(f) -> bool:
    cases = [
        ([(8, 8)] * 5 + [(0, 8)] * 15, (5, 20)),
        ([(2, 8)] * 20, (40, 160)),
        ([(2, 2), (1, 2), (1, 2), (0, 2)], (3, 6)),
        ([(0, 8)] * 20, (0, 20)),
        ([(8, 8)] * 20, (20, 20)),
    ]
    found = [(f(clusters), wilson(*as_if)) for clusters, as_if in cases]
    return all((r.lower_95, r.upper_95) == pytest.approx(interval) for r, interval in found)


CHECKS = {mcnemar_clustered: _mcnemar_holds, holm: _holm_holds, cohen_kappa: _kappa_holds, clustered_rate: _clustered_holds}
EDITS = [
    (mcnemar_clustered, "sum(d * d for d in differences)", "sum(abs(d) for d in differences)"),
    (mcnemar_clustered, "sum(differences) ** 2", "sum(map(abs, differences)) ** 2"),
    (mcnemar_clustered, "/ squares / 2", "/ squares"),
    (mcnemar_clustered, "math.erfc(", "0.5 * math.erfc("),
    (mcnemar_clustered, "return 1.0", "return 0.0"),
    (holm, "max(highest, min(", "max(0.0, min("),
    (holm, "len(p_values) - rank", "len(p_values)"),
    (holm, "len(p_values) - rank", "len(p_values) - rank - 1"),
    (holm, "corrected[place] = highest", "corrected[rank] = highest"),
    (holm, "min(1.0, p_values[place] * (len(p_values) - rank))", "p_values[place] * (len(p_values) - rank)"),
    (cohen_kappa, "ones[label] * others[label]", "ones[label] * ones[label]"),
    (cohen_kappa, "(n * n - chance)", "(n * n)"),
    (cohen_kappa, "(agreed * n - chance)", "(agreed * n)"),
    (cohen_kappa, "return None", "return 1.0"),
    (clustered_rate, "(one - p * size)", "(one - p)"),
    (clustered_rate, "many / (many - 1)", "1.0"),
    (clustered_rate, "max(p * (1 - p) / variance, many)", "(p * (1 - p) / variance)"),
    (clustered_rate, "float(many)", "float(n)"),
    (clustered_rate, "wilson(p * effective if k < n else effective, effective)", "wilson(k, n)"),
]


@pytest.mark.parametrize("function", CHECKS)
def test_the_shipped_functions_hold(function):
    assert CHECKS[function](function)


@pytest.mark.parametrize("function, old, new", EDITS)
def test_an_edit_of_the_source_is_seen(function, old, new):
    assert not CHECKS[function](edited(function, (old, new)))


def test_exact_bounds_are_where_the_binomials_own_tail_is_five_per_cent():
    for k, n in ((0, 1), (0, 299), (3, 10), (5, 1049), (10, 1693), (240, 300)):
        p = binomial_upper(k, n)
        assert sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)) == pytest.approx(0.05, abs=1e-9)
        assert binomial_lower(n - k, n) == pytest.approx(1 - p)
    assert binomial_upper(7, 7) == binomial_upper(0, 0) == 1.0 and binomial_lower(0, 7) == binomial_lower(0, 0) == 0.0
    assert binomial_upper(2, 100) < binomial_upper(2.5, 100) < binomial_upper(3, 100)


def test_the_bound_of_paired_rates_is_where_the_score_test_just_rejects():
    """Against the likelihood itself, maximized on a grid under the difference that is tested."""
    for b, c, n in ((0, 0, 50), (8, 2, 120), (2, 8, 120), (12, 12, 90), (30, 0, 200)):
        d = paired_upper(b, c, n)
        least = max(0.0, -d)
        best, q = -math.inf, least
        for i in range(1, 20_000):
            second = least + (1 - abs(d)) / 2 * i / 20_000
            cells = ((b, second + d), (c, second), (n - b - c, 1 - d - 2 * second))
            if all(p > 0 or not count for count, p in cells):
                value = sum(count * math.log(p) for count, p in cells if count)
                best, q = max((best, q), (value, second))
        score = (b - c - n * d) / math.sqrt(n * (2 * q + d - d * d))
        assert score == pytest.approx(-1.6449, abs=0.01), (b, c, n)
        assert d > (b - c) / n
    assert paired_upper(0, 0, 0) == 1.0


def test_counts_that_are_none_are_refused():
    for call in (lambda: binomial_upper(3, 2), lambda: binomial_upper(-1, 2), lambda: paired_upper(2, 1, 2)):
        with pytest.raises(ValueError):
            call()


def test_rows_of_one_cluster_are_worth_less_the_more_they_agree():
    pairs = [i // 2 for i in range(200)]
    same, mixed = ([float(i // 2 % 10 == 0) for i in range(200)], [float(i % 20 == 0) for i in range(200)])
    assert effective_number(same, pairs) == pytest.approx(100, rel=0.02)  # two that always agree are one
    assert effective_number(mixed, pairs) == 200
    assert effective_number([0.0] * 200, pairs) == 100 and effective_number([1.0, 0.0], ["a", "a"]) == 1
