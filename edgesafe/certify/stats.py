"""Wilson intervals for counted rates."""

from __future__ import annotations

import math

from edgesafe.certificate import Rate

Z_95 = 1.959963984540054  # the 97.5 % point of the standard normal: two-sided 95 %


def wilson(k: int, n: int) -> tuple[float, float]:
    """The two-sided 95 % Wilson score interval of a rate; (0, 1), which says nothing, where nothing was counted.

    Args:
        k: How many of the n.
        n: How many were counted.

    Returns:
        The lower and the upper bound, 0..1; exactly 0 at k = 0 and exactly 1 at k = n.

    Raises:
        ValueError: k of n is no count.

    Source: Wilson 1927; Newcombe 1998, Statistics in Medicine 17, method 3 (no continuity correction).

    >>> [round(bound, 4) for bound in wilson(81, 263)]
    [0.2553, 0.3662]
    >>> wilson(0, 0)
    (0.0, 1.0)
    """
    if n < 0 or not 0 <= k <= n:
        raise ValueError(f"{k} of {n} is no count")
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
    """k of n with its interval; the rate itself is 0 where nothing was counted.

    >>> r = rate(0, 100)
    >>> r.rate, r.lower_95, round(r.upper_95, 4)
    (0.0, 0.0, 0.037)
    """
    lower, upper = wilson(k, n)
    return Rate(k=k, n=n, rate=k / n if n else 0.0, lower_95=lower, upper_95=upper)
