"""Paired tests, their correction, agreement and clustered intervals: figures by hand or from print, and wrong versions."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest

from edgesafe.certify import stats
from edgesafe.certify.stats import clustered_rate, cohen_kappa, holm, mcnemar_clustered, wilson


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


def _sign_lost(differences):
    chi2 = sum(map(abs, differences)) ** 2 / sum(d * d for d in differences)
    return _p(chi2)


def _cluster_ignored(differences):
    return _p(sum(differences) ** 2 / sum(map(abs, differences)))


def _one_sided(differences):
    return mcnemar_clustered(differences) / 2


def _not_squared(differences):
    return _p(abs(sum(differences)) / sum(d * d for d in differences))


@pytest.mark.parametrize("wrong", [_sign_lost, _cluster_ignored, _one_sided, _not_squared])
def test_wrong_versions_of_mcnemar_would_be_seen(wrong):
    assert any(wrong(d) != pytest.approx(_p(chi2), abs=1e-6) for d, chi2 in CLUSTERS)


# p-values and Holm's correction, worked by hand: sorted, times m, m - 1, ..., and never below the one before.
HOLM = [
    ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
    ([0.5, 0.6], [1.0, 1.0]),
    ([0.02], [0.02]),
    ([0.01, 0.01, 0.9], [0.03, 0.03, 0.9]),
    ([0.011, 0.02, 0.021], [0.033, 0.04, 0.04]),
    ([], []),
]


@pytest.mark.parametrize("given, wanted", HOLM)
def test_holm_by_hand(given, wanted):
    assert holm(given) == pytest.approx(wanted)


def _bonferroni(p):
    return [min(1.0, len(p) * x) for x in p]


def _not_monotone(p):
    order = sorted(range(len(p)), key=lambda i: p[i])
    return [min(1.0, p[i] * (len(p) - order.index(i))) for i in range(len(p))]


def _not_capped(p):
    return [x if x < 1 else x + 0.2 for x in holm(p)]


def _sorted_output(p):
    return sorted(holm(p))


def _off_by_one(p):
    order = sorted(range(len(p)), key=lambda i: p[i])
    return [min(1.0, p[i] * (len(p) - 1 - order.index(i))) for i in range(len(p))]


@pytest.mark.parametrize("wrong", [_bonferroni, _not_monotone, _not_capped, _sorted_output, _off_by_one])
def test_wrong_versions_of_holm_would_be_seen(wrong):
    assert any(wrong(given) != pytest.approx(wanted) for given, wanted in HOLM)


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


def _plain_agreement(first, second):
    return sum(x == y for x, y in zip(first, second, strict=True)) / len(first)


def _chance_of_the_first_alone(first, second):
    return cohen_kappa(first, first[1:] + first[:1])


def _chance_not_in_the_denominator(first, second):
    observed = _plain_agreement(first, second)
    chance = sum(first.count(c) * second.count(c) for c in set(first)) / len(first) ** 2
    return observed - chance


@pytest.mark.parametrize("wrong", [_plain_agreement, _chance_of_the_first_alone, _chance_not_in_the_denominator])
def test_wrong_versions_of_kappa_would_be_seen(wrong):
    assert wrong(*_labels(READERS)) != pytest.approx(0.4)


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


def test_the_clusters_matter():
    # The wrong version that ignores them gives Wilson's own interval of 40 of 160, which is narrower.
    found = clustered_rate([(8, 8)] * 5 + [(0, 8)] * 15)
    low, high = stats.wilson(40, 160)
    assert found.lower_95 < low - 0.05 and found.upper_95 > high + 0.05
