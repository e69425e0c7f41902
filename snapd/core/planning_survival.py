"""What of memory survives: simultaneous losses of nodes and of failure domains, in exact whole-number arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import combinations

from snapd.core.cluster import Code

ENUMERATED_MAX = 20_000
SAMPLES = 20_000


def survival(group_sizes: Iterable[int], m: int, lost: int) -> Fraction:
    """Probability that no group loses more than `m` nodes when `lost` of all nodes, any as likely, go at once.

    The coefficient of x^lost in the product over groups of sum over j <= m of C(size, j) x^j, over C(nodes, lost).
    Replication to r nodes is a group of r with m = r - 1.
    """
    sizes = Counter(group_sizes)
    nodes = sum(size * count for size, count in sizes.items())
    if lost > nodes:
        raise ValueError(f"{lost} of {nodes} nodes cannot be lost")
    product = [1]
    for size, count in sorted(sizes.items()):
        factor = [math.comb(size, j) for j in range(min(m, size, lost) + 1)]
        product = _times(product, _power(factor, count, lost), lost)
    return Fraction(product[lost] if lost < len(product) else 0, math.comb(nodes, lost))


def _power(factor: Sequence[int], exponent: int, degree: int) -> list[int]:
    result, square = [1], list(factor)
    while exponent:
        if exponent & 1:
            result = _times(result, square, degree)
        square = _times(square, square, degree)
        exponent >>= 1
    return result


def _times(a: Sequence[int], b: Sequence[int], degree: int) -> list[int]:
    """The product of two polynomials without what is above x^degree."""
    result = [0] * min(len(a) + len(b) - 1, degree + 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b[: len(result) - i]):
            result[i + j] += x * y
    return result


def domain_survival(
    domain_sets: Iterable[Mapping[str, int]],
    code: Code,
    domains: Sequence[str],
    lost: int,
    draw: Callable[[], float],
) -> tuple[float, bool]:
    """Probability that memory survives the loss of `lost` domains at once, any as likely; whether it is exact.

    Args:
        domain_sets: of each group how many of its nodes each domain has; equal ones may be given once.
        draw: uniform numbers in [0, 1), for clusters where neither the formula nor counting all cases will do.
    """
    groups = [dict(found) for found in domain_sets]
    if lost > len(domains):
        raise ValueError(f"{lost} of {len(domains)} domains cannot be lost")
    shared = Counter(domain for group in groups for domain in group)
    if max(shared.values(), default=1) == 1 and all(set(group.values()) == {1} for group in groups):
        sizes = [*(len(group) for group in groups), *([1] * (len(domains) - len(shared)))]
        # A domain without a node of any group costs nothing: it counts as a group of one, which bears m >= 1.
        return float(survival(sizes, max(1, code.m), lost)), True
    if math.comb(len(domains), lost) <= ENUMERATED_MAX:
        cases = list(combinations(domains, lost))
        return sum(_bears(groups, code, case) for case in cases) / len(cases), True
    good = sum(_bears(groups, code, _sample(domains, lost, draw)) for _ in range(SAMPLES))
    return good / SAMPLES, False


def _bears(groups: Sequence[Mapping[str, int]], code: Code, gone: Sequence[str]) -> bool:
    return all(sum(group.get(domain, 0) for domain in gone) <= code.m for group in groups)


def _sample(domains: Sequence[str], count: int, draw: Callable[[], float]) -> list[str]:
    """`count` different domains: the beginning of a shuffle."""
    left = list(domains)
    for i in range(count):
        j = i + int(draw() * (len(left) - i))
        left[i], left[j] = left[j], left[i]
    return left[:count]


def loss_rate(group_sizes: Iterable[int], m: int, *, node_rate: float, window_s: float) -> float:
    """How often a second some group loses `m + 1` nodes within the time it takes to be whole again.

    First order, for losses that have nothing to do with one another: with m of 2 or more that is so rare that only
    common causes count.

    Args:
        node_rate: losses of one node's memory a second.
        window_s: from a loss until the group has all its parity again.
    """
    per_group = (
        math.prod(size - i for i in range(m + 1)) * node_rate ** (m + 1) * window_s**m / math.factorial(m)
        for size in group_sizes
    )
    return math.fsum(per_group)
