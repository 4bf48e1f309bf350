"""Affine maps `x = A x + b`, by the spectrum of `A`."""

import numpy as np

from ._problem import known, newton, Problem, Vector


def affine(name: str, kind: str, A: np.ndarray, seed: int = 0) -> Problem:
    """`x = A x + theta` with a random `theta`: solution and gradient by dense solves."""
    theta = np.random.default_rng(seed).normal(size=len(A))
    closed = lambda b, w: (
        np.linalg.solve(np.eye(len(A)) - A, b),
        np.linalg.solve(np.eye(len(A)) - A.T, w),
    )
    return Problem(name, kind, lambda x, b: A @ x + b, np.zeros(len(A)), theta, known(closed))


def symmetric(eigenvalues: Vector, seed: int) -> np.ndarray:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    G = np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2)
    Q = np.linalg.qr(G)[0]
    return Q * eigenvalues @ Q.T


def problems(n: int = 100) -> list[Problem]:
    """All of this file."""
    ring = lambda rho: affine(
        f"symmetric, ±{rho}",
        "slow" if rho > 0.9 else "contractive",
        symmetric(np.linspace(-rho, rho, n), 1),
    )
    return [
        *map(ring, (0.9, 0.99, 0.999)),
        *(one_slow_mode(rate, n) for rate in (0.999, 0.9999)),
        *(ginibre(rho, n) for rho in (0.9, 0.99)),
        below_minus_one(n), four_eigenvalues(), far_outside(), rotations(), jordan(), grcar(),
        convection(), leontief(), neumann_problem(),
        *(pagerank(damping) for damping in (0.85, 0.99)),
    ]  # fmt: skip


def one_slow_mode(rate: float, n: int) -> Problem:
    """One mode that the residual hides under fast ones (Jennings, 1971)."""
    spectrum = np.append(np.linspace(-0.5, 0.5, n - 1), rate)
    return affine(f"one slow mode, {rate}", "slow", symmetric(spectrum, 2), 2)


def ginibre(rho: float, n: int) -> Problem:
    """A dense random matrix, eigenvalues in a disc (Ginibre, 1965)."""
    G = np.random.default_rng(3).normal(size=(n, n))
    G *= rho / np.abs(np.linalg.eigvals(G)).max()
    return affine(f"nonsymmetric, {rho}", "slow" if rho > 0.9 else "contractive", G, 3)


def below_minus_one(n: int) -> Problem:
    """The spectrum of a Richardson iteration with too long a step (Richardson, 1911)."""
    spectrum = symmetric(np.linspace(-3, 0.9, n), 4)
    return affine("no contraction, -3 to 0.9", "expanding", spectrum, 4)


def four_eigenvalues() -> Problem:
    """Eigenvalues 5, -3, 1.5 and -9 with random eigenvectors: Anderson's method ends after five
    evaluations in exact arithmetic (Walker and Ni, 2011, theorem 2.2)."""
    S = np.random.default_rng(5).normal(size=(4, 4))
    A = S @ np.diag([5.0, -3.0, 1.5, -9.0]) @ np.linalg.inv(S)
    return affine("eigenvalues 5, -3, 1.5, -9", "expanding", A, 5)


def far_outside() -> Problem:
    """Twelve eigenvalues between 2 and 30 in size, of both signs (Walker and Ni, 2011, theorem
    2.2: at most thirteen evaluations)."""
    sizes = np.linspace(2, 30, 12) * np.where(np.arange(12) % 3, 1, -1)
    return affine("eigenvalues ±2 to ±30", "expanding", symmetric(sizes, 6), 6)


def rotations(n: int = 40) -> Problem:
    """Planes that turn by angles of their own, rates 0.5 to 0.99: the residual of a simultaneous
    gradient step on a bilinear game (Daskalakis, Ilyas, Syrgkanis and Zeng, 2018)."""
    angles, rates = np.linspace(0.3, 3, n // 2), np.linspace(0.5, 0.99, n // 2)
    A = np.zeros((n, n))
    for i, (angle, rate) in enumerate(zip(angles, rates, strict=True)):
        c, s = rate * np.cos(angle), rate * np.sin(angle)
        A[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[c, -s], [s, c]]
    return affine("rotations to 0.99", "slow", A, 7)


def jordan(n: int = 20) -> Problem:
    """One Jordan block of 0.7 with 0.5 beside it: powers grow before they decay (Trefethen and
    Embree, 2005, section 7)."""
    return affine("Jordan block, 0.7", "non-normal", 0.7 * np.eye(n) + 0.5 * np.eye(n, k=1), 8)


def grcar(n: int = 50) -> Problem:
    """Grcar's matrix, scaled: eigenvalues inside, pseudospectrum far outside (Grcar, 1989)."""
    G = sum(np.eye(n, k=k) for k in range(4)) - np.eye(n, k=-1)
    A = G * 0.95 / np.abs(np.linalg.eigvals(G)).max()
    return affine("Grcar, 0.95", "non-normal", A, 9)


def convection(n: int = 60) -> Problem:
    """Jacobi's iteration for `-u'' + v u' = 1`, central differences with a cell Péclet number of
    0.9: nearly one-sided, so far from normal (Trefethen and Embree, 2005, section 12)."""
    A = 0.5 * (0.1 * np.eye(n, k=1) + 1.9 * np.eye(n, k=-1))
    return affine("convection by Jacobi", "non-normal", A, 10)


def leontief(n: int = 40) -> Problem:
    """Gross output from final demand, `x = A x + d` (Leontief, 1936): columns sum to below 1."""
    rng = np.random.default_rng(11)
    A = rng.gamma(0.3, size=(n, n))
    A *= rng.uniform(0.4, 0.9, size=n) / A.sum(axis=0)
    return affine("Leontief's input-output", "contractive", A, 11)


def neumann_problem(n: int = 32) -> Problem:
    """A heat balance that is insulated at both ends, by Jacobi's iteration damped by a half: the
    mean is free, and the source has none (Berman and Plemmons, 1979, chapter 7)."""
    A = 0.5 * np.eye(n) + 0.25 * (np.eye(n, k=1) + np.eye(n, k=-1))
    A[0, 0] = A[-1, -1] = 0.75
    source = np.sin(np.arange(n))
    centred = lambda v: v - v.mean()
    return Problem(
        "insulated rod", "gauge", lambda x, s: A @ x + s * centred(source), np.zeros(n),
        np.asarray(1.3), newton(singular=True), gauge=centred,
        weights=centred(np.cos(np.arange(n))),
    )  # fmt: skip


def pagerank(damping: float, n: int = 200) -> Problem:
    """PageRank with the weight of the links as parameter (Brin and Page, 1998; its derivative:
    Boldi, Santini and Vigna, 2005)."""
    rng = np.random.default_rng(12)
    links = rng.random((n, n)) < rng.pareto(1.5, size=n)[:, None] * 2 / n
    links[rng.integers(n, size=n), np.arange(n)] = True
    P = links / links.sum(axis=0)
    f = lambda x, a: a * P @ x + (1 - a) / n
    kind = "slow" if damping > 0.9 else "contractive"
    return Problem(
        f"PageRank, {damping}", kind, f, np.full(n, 1 / n), np.asarray(damping), newton()
    )
