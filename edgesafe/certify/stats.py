"""Statistics of counted answers: Wilson intervals, paired tests before and after, agreement of two judges.

Plain arithmetic of counts and labels; no model, no files, no scipy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from edgesafe.format.certificate import Rate

Z_95 = 1.959963984540054  # the 97.5 % point of the standard normal: two-sided 95 %
Z_ONE_SIDED = 1.6448536269514722  # its 95 % point: one-sided 95 %
CONFIDENCE = 0.95


def wilson(k: float, n: float) -> tuple[float, float]:
    """The two-sided 95 % Wilson score interval of a rate; (0, 1), which says nothing, where nothing was counted.

    Args:
        k: How many of the n.
        n: How many were counted; an effective number, where answers hang together, need not be whole.

    Returns:
        The lower and the upper bound, 0..1; exactly 0 at k = 0 and exactly 1 at k = n.

    Raises:
        ValueError: k of n is not a count.

    Source: Wilson 1927; Newcombe 1998, Statistics in Medicine 17, method 3 (no continuity correction).

    >>> [round(bound, 4) for bound in wilson(81, 263)]
    [0.2553, 0.3662]
    >>> wilson(0, 0)
    (0.0, 1.0)
    """
    if n < 0 or not 0 <= k <= n:
        raise ValueError(f"{k} of {n} is not a count")
    if n == 0:
        return 0.0, 1.0
    p, z2 = k / n, Z_95 * Z_95
    centre = p + z2 / (2 * n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    scale = 1 + z2 / n
    # Rounding must not move the two bounds that are exact.
    lower = 0.0 if k == 0 else (centre - half) / scale
    upper = 1.0 if k == n else (centre + half) / scale
    return lower, upper


def rate(k: int, n: int) -> Rate:
    """The rate k of n with its interval; the rate itself is 0 where nothing was counted.

    >>> r = rate(0, 100)
    >>> r.rate, r.lower_95, round(r.upper_95, 4)
    (0.0, 0.0, 0.037)
    """
    lower, upper = wilson(k, n)
    return Rate(k=k, n=n, rate=k / n if n else 0.0, lower_95=lower, upper_95=upper)


def clustered_rate(clusters: Sequence[tuple[int, int]]) -> Rate:
    """A rate over clusters whose members hang together, such as one request's answers at several depths.

    Args:
        clusters: (k, n) of each cluster.

    Returns:
        All k of all n; the interval is Wilson's for the effective number of answers, which lies between the number of clusters
        (members say all the same) and the number of answers (they say nothing of each other).

    Source: Korn and Graubard 1998, Survey Methodology 24; Franco et al. 2019, J. Survey Statistics and Methodology 7: Wilson's
    interval with n / (design effect) in place of n.
    Differs: the effective number is kept within those two bounds, and is the lower one where the rate is 0 or 1 and no design
    effect can be measured.

    >>> r = clustered_rate([(3, 3), (0, 3), (0, 3), (0, 3)])
    >>> r.k, r.n, (r.lower_95, r.upper_95) == wilson(1, 4)
    (3, 12, True)
    """
    found = [(k, n) for k, n in clusters if n]
    k, n, many = sum(k for k, _ in found), sum(n for _, n in found), len(found)
    if n == 0:
        return rate(0, 0)
    p = k / n
    effective = float(many)
    if many > 1 and 0 < k < n:
        variance = many / (many - 1) * sum((one - p * size) ** 2 for one, size in found) / (n * n)
        effective = min(max(p * (1 - p) / variance, many), n) if variance else float(n)
    lower, upper = wilson(p * effective if k < n else effective, effective)
    return Rate(k=k, n=n, rate=p, lower_95=lower, upper_95=upper)


def mcnemar_clustered(differences: Sequence[int]) -> float:
    """Two-sided p-value of a paired change from yes to no or back, over clusters of pairs; 1 where no cluster changed.

    Args:
        differences: b - c of each cluster, b the pairs that went from yes to no and c those from no to yes.

    Returns:
        The chance of a statistic (sum d)^2 / sum d^2 at least as large under no change, by chi-square with 1 degree of freedom.
        It holds for large samples: with fewer than about ten clusters that changed, read it as a hint.

    Source: McNemar 1947, which it is where each cluster is one pair: (b - c)^2 / (b + c). With clusters: Yang, Sun and Hardin
    2010, Biometrical Journal 52, the modified Obuchowski test, preferred from about 50 clusters on.
    Differs: without Yang's factor (K - 1) / K over K clusters, which would make single pairs differ from McNemar's. Durkalski
    et al. 2003, Statistics in Medicine 22, divide d by the cluster's size; here each pair counts the same, as in the rates.

    >>> round(mcnemar_clustered([1] * 15 + [-1] * 5), 4)  # (15 - 5)^2 / 20 = 5
    0.0253
    >>> round(mcnemar_clustered([3, 2, -1]), 4), mcnemar_clustered([0, 0])  # (3 + 2 - 1)^2 / (9 + 4 + 1) = 8 / 7
    (0.285, 1.0)
    """
    squares = sum(d * d for d in differences)
    if not squares:
        return 1.0
    return math.erfc(math.sqrt(sum(differences) ** 2 / squares / 2))


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided p-value of a paired change from yes to no or back, exact; 1 where nothing changed.

    Args:
        b: pairs that went from yes to no.
        c: pairs that went from no to yes.

    Returns:
        The chance of so uneven a split of the b + c changed pairs if each went either way by the toss of a coin. It takes pairs
        that say nothing of each other; for others see `mcnemar_clustered`.

    Raises:
        ValueError: the numbers are no counts.

    Source: McNemar 1947, with the binomial distribution in place of its limit; twice the smaller tail, at most 1.

    >>> mcnemar_exact(0, 5), mcnemar_exact(1, 9), mcnemar_exact(3, 3)  # 2 / 2^5, 2 (1 + 10) / 2^10, 1
    (0.0625, 0.021484375, 1.0)
    """
    if min(b, c) < 0:
        raise ValueError(f"{b} and {c} are not counts")
    tail: int = sum(math.comb(b + c, i) for i in range(min(b, c) + 1))
    return min(1.0, 2 * tail / (1 << (b + c)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for how many they are, in the order given.

    Source: Holm 1979, Scandinavian Journal of Statistics 6: the i-th smallest of m times m - i + 1, at most 1, and never below
    that of a smaller one.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03, 0.005])]
    [0.03, 0.06, 0.06, 0.02]
    """
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, p_values[place] * (len(p_values) - rank)))
        corrected[place] = highest
    return corrected


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Agreement of two judges' labels beyond what their habits alone would give: 1 all, 0 none.

    Returns:
        (observed - expected) / (1 - expected); None where both gave the one same label throughout, or there is none.

    Raises:
        ValueError: The two judged different numbers of answers.

    Source: Cohen 1960, Educational and Psychological Measurement 20.

    >>> round(cohen_kappa("yyyyn", "yyynn"), 4)  # observed 4/5, expected 4/5 3/5 + 1/5 2/5 = 14/25
    0.5455
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} labels against {len(second)}")
    n = len(first)
    ones, others = Counter(first), Counter(second)
    chance = sum(ones[label] * others[label] for label in ones)  # expected agreement times n^2
    if chance == n * n:
        return None
    agreed = sum(x == y for x, y in zip(first, second, strict=True))
    return (agreed * n - chance) / (n * n - chance)


def binomial_upper(k: float, n: float) -> float:
    """The one-sided 95 % Clopper-Pearson upper bound of a rate: with fewer, k of n would be a 5 % surprise. 1 of nothing.

    Args:
        k: how many of the n.
        n: how many were counted; an effective number need not be whole.

    Raises:
        ValueError: k of n is not a count.

    Source: Clopper and Pearson 1934; the 95 % point of Beta(k + 1, n - k).

    >>> round(binomial_upper(0, 299), 4), round(binomial_upper(3, 773), 4), binomial_upper(5, 5)
    (0.01, 0.01, 1.0)
    """
    if n < 0 or not 0 <= k <= n:
        raise ValueError(f"{k} of {n} is not a count")
    return 1.0 if k == n else _solve(lambda p: _beta_cdf(p, k + 1, n - k) - CONFIDENCE)


def binomial_lower(k: float, n: float) -> float:
    """The one-sided 95 % Clopper-Pearson lower bound of a rate; 0 of nothing.

    >>> round(binomial_lower(100, 100), 4), binomial_lower(0, 0)
    (0.9705, 0.0)
    """
    return 0.0 if n == 0 else 1.0 - binomial_upper(n - k, n)


def paired_upper(b: float, c: float, n: float, z: float = Z_ONE_SIDED) -> float:
    """The one-sided upper bound of how much more often something happens in one of two answers to the same requests.

    Args:
        b: requests where it happens in the first answer alone.
        c: requests where it happens in the second answer alone.
        n: all requests; effective numbers need not be whole.
        z: the standard normal's point of the confidence, by default 95 %.

    Returns:
        The bound of P(first) - P(second), -1..1; 1 of nothing.

    Raises:
        ValueError: the numbers are no counts of pairs.

    Source: Tango 1998, Statistics in Medicine 17: the difference at which the score test of paired rates just rejects.

    >>> round(paired_upper(0, 0, 300), 4), round(paired_upper(8, 2, 300), 4)
    (0.0089, 0.0409)
    """
    if min(b, c, n) < 0 or b + c > n:
        raise ValueError(f"{b} and {c} of {n} are not counts of pairs")
    if n == 0:
        return 1.0

    def excess(d: float) -> float:
        linear = (2 * n - b + c) * d - b - c
        second = (math.sqrt(linear * linear + 8 * n * c * d * (1 - d)) - linear) / (4 * n)  # P(second alone) if d is the truth
        return (n * d - b + c) - z * math.sqrt(max(n * (2 * second + d * (1 - d)), 0.0))

    return _solve(excess, (b - c) / n)


def paired_interval(b: float, c: float, n: float) -> tuple[float, float]:
    """The two-sided 95 % interval of P(first) - P(second), with b, c and n as for `paired_upper`; (-1, 1) of nothing.

    Source: Tango 1998, as there.

    >>> [round(bound, 3) for bound in paired_interval(8, 2, 300)]
    [-0.001, 0.046]
    """
    return -paired_upper(c, b, n, Z_95), paired_upper(b, c, n, Z_95)


def effective_number(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """How many independent values say as much of their mean as these, of which those of one cluster hang together.

    Args:
        values: one for each request, such as 1 where it was helped.
        clusters: each request's cluster, such as its wording.

    Returns:
        Between the number of clusters and that of values; the former where all values are one, and nothing can be measured.

    Source: Korn and Graubard 1998, as in `clustered_rate`.

    >>> effective_number([0, 0, 0, 0], "aabb"), effective_number([1, 1, 0, 0], "aabb"), effective_number([1, 0, 1, 0], "aabb")
    (2.0, 2.0, 4.0)
    """
    n = len(values)
    members: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        members.setdefault(cluster, []).append(value)
    many = len(members)
    if many < 2 or len(set(values)) < 2:
        return float(many)
    mean = sum(values) / n
    single = sum((value - mean) ** 2 for value in values) / n / n
    together = many / (many - 1) * sum(sum(value - mean for value in one) ** 2 for one in members.values()) / n / n
    return float(min(max(n * single / together, many), n)) if together else float(n)


def _solve(f: Callable[[float], float], low: float = 0.0) -> float:
    """Where a function that rises from below 0 at `low` to above 0 at 1 crosses it, by halving."""
    high = 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if f(middle) > 0 else (middle, high)
    return high


def _beta_cdf(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function, by its continued fraction (DLMF 8.17.22), evaluated as Lentz does."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _beta_cdf(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    value, c, d = 1.0, 1.0, 0.0
    for i in range(1000):
        m = i // 2
        if i == 0:
            factor = 1.0
        elif i % 2 == 0:
            factor = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            factor = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1.0 / (1.0 + factor * d or tiny)
        c = 1.0 + factor / c or tiny
        value *= c * d
        if abs(1.0 - c * d) < 1e-14 and i:
            break
    return front * (value - 1.0)
