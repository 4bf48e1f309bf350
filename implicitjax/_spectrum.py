"""The spectrum of a map that is known by its products, in NumPy: how fast methods would converge.

Up to `DENSE` unknowns by the matrix itself; beyond by Arnoldi's process, which gives
`J V_k = V_(k+1) H` with orthonormal `V` (Saad, *Numerical Methods for Large Eigenvalue Problems*,
2011, section 6.2).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Product = Callable[[np.ndarray], np.ndarray]

DENSE = 256
_STEPS = 200
_NUMBERS = 40_000_000  # of a basis, at most
_CONVERGED = 0.01


class Estimate(NamedTuple):
    """A figure, with how it is known.

    - `value`: NaN where it could not be had.
    - `word`: `""` from the whole matrix; `"about"` from products, to a percent; `"at least"` and
      `"at most"` for bounds; `"roughly"` where the products did not suffice.
    """

    value: float
    word: str = ""

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "not known"
        return f"{self.word} {self.value:.4g}".strip()

    def inverse(self) -> "Estimate":
        """Of the reciprocal."""
        word = "at least" if self.word == "at most" else self.word
        return Estimate(1 / self.value if self.value else np.inf, word)


class Spectrum(NamedTuple):
    """Of `J` and of `I - J`.

    - `radius`: the largest modulus of an eigenvalue of `J`.
    - `eigenvalues`: all of them, or Ritz values.
    - `smallest`: the smallest singular value of `I - J`.
    - `size`: about `1 + |J|`.
    """

    radius: Estimate
    eigenvalues: np.ndarray
    smallest: Estimate
    size: float

    def singular(self, roundoff: float) -> bool:
        """Whether `I - J` is, as far as products of that round-off tell."""
        return self.smallest.value <= 10 * roundoff * self.size


class Course(NamedTuple):
    """How a solve of the affine map would go on.

    - `error`: the size of the solution `e` of `(I - J) e = r`.
    - `steps`: how many steps of GMRES bring the error down to 1, `None` for more than were taken;
      Anderson's iteration without a bound on its memory is as fast (Walker and Ni, *SIAM Journal on
      Numerical Analysis* 49, 2011, theorem 2.2).
    - `taken`: how many were taken.
    """

    error: Estimate
    steps: int | None
    taken: int

    @property
    def anderson_steps(self) -> int | None:
        """A step of Anderson's is one of GMRES and one of Picard's."""
        return self.steps + 1 if self.steps else self.steps


def matrix(product: Product, n: int) -> np.ndarray:
    """The matrix, column by column."""
    return np.stack([product(unit) for unit in np.eye(n)], axis=1)


def arnoldi(
    product: Product, start: np.ndarray, steps: int, roundoff: float
) -> tuple[np.ndarray, np.ndarray]:
    """The rows `V` and the matrix `H`; fewer steps where the space is invariant up to round-off.

    By `einsum`, which has one thread: those of a BLAS wait for each other where cores are busy.
    """
    V, H = np.zeros((steps + 1, start.size)), np.zeros((steps + 1, steps))
    V[0] = start / np.linalg.norm(start)
    for k in range(steps):
        w = product(V[k])
        size = np.linalg.norm(w)
        for _ in range(2):  # once leaves round-off along the basis
            along = np.einsum("ij,j->i", V[: k + 1], w)
            w -= np.einsum("i,ij->j", along, V[: k + 1])
            H[: k + 1, k] += along
        left = np.linalg.norm(w)
        if left <= 10 * roundoff * max(size, 1.0):
            return V[: k + 2], H[: k + 2, : k + 1]
        H[k + 1, k], V[k + 1] = left, w / left
    return V, H


def by_matrix(J: np.ndarray) -> Spectrum:
    """Of a matrix."""
    eigenvalues = np.linalg.eigvals(J)
    smallest = np.linalg.svd(np.eye(len(J)) - J, compute_uv=False)[-1]
    radius = Estimate(float(abs(eigenvalues).max()))
    size = 1 + float(np.linalg.norm(J, 2))
    return Spectrum(radius, eigenvalues, Estimate(float(smallest)), size)


def by_products(J: Product, JT: Product | None, n: int, roundoff: float) -> Spectrum:
    """From products with `J`, and where there is one with its transpose.

    Ritz values are no bound of the radius in general; of a symmetric `J` they are at most the
    radius. `|(I - J) v|` for a unit vector `v` is at least the smallest singular value; the least
    of Arnoldi's space is improved by inverse iteration.
    """
    V, H = arnoldi(J, np.random.default_rng(0).normal(size=n), affordable(n), roundoff)
    k = H.shape[1]
    eigenvalues, vectors = np.linalg.eig(H[:k])
    i = int(abs(eigenvalues).argmax())
    radius, left = float(abs(eigenvalues[i])), float(H[k, k - 1] * abs(vectors[-1, i]))
    symmetric = np.linalg.norm(H[:k] - H[:k].T) <= 1e-6 * np.linalg.norm(H)
    word = "at least" if symmetric else "roughly"
    if left <= _CONVERGED * min(radius, abs(1 - radius)):  # steps go by 1 - radius
        word = "about"

    _, sizes, rows = np.linalg.svd(np.eye(k + 1, k) - H)
    v = rows[-1] @ V[:k]
    smallest = Estimate(float(sizes[-1]), "at most")
    if JT is not None:
        smallest = _inverse_iteration(J, JT, v, roundoff)
    size = 1 + float(np.linalg.norm(H, 2))
    return Spectrum(Estimate(radius, word), eigenvalues, smallest, size)


def _inverse_iteration(J: Product, JT: Product, v: np.ndarray, roundoff: float) -> Estimate:
    """The smallest singular value of `A = I - J` from a first `v`; a certificate ends it.

    With `A v = s u` there is a singular value within `|A^T u - s v|` of `s`, to first order.
    """
    best = Estimate(np.inf, "at most")
    for _ in range(3):
        Av = v - J(v)
        s = float(np.linalg.norm(Av))
        if s <= 10 * roundoff:
            return Estimate(s, "at most")
        u = Av / s
        certain = np.linalg.norm(u - JT(u) - s * v) <= _CONVERGED * s
        best = min(best, Estimate(s, "about" if certain else "at most"), key=lambda e: e.value)
        if certain:
            break
        w = _solve(JT, v, roundoff)
        v = _solve(J, w, roundoff)
        v /= np.linalg.norm(v)
    return best


def _solve(J: Product, b: np.ndarray, roundoff: float) -> np.ndarray:
    """`(I - J)^-1 b` by GMRES, as far as it gets."""
    V, H = arnoldi(J, b, affordable(b.size), roundoff)
    k = H.shape[1]
    return _least_squares(H, k, float(np.linalg.norm(b)))[0] @ V[:k]


def affordable(n: int) -> int:
    """How many steps of Arnoldi's process are taken."""
    return min(n, _STEPS, max(_NUMBERS // n, 10))


def course(J: Product, r: np.ndarray, smallest: float, steps: int, roundoff: float) -> Course:
    """How the solve goes on from the residual `r` until its error is below 1, and its residual
    below a tenth.
    """
    size = float(np.linalg.norm(r))
    if size == 0:
        return Course(Estimate(0.0), 0, 0)
    _, H = arnoldi(J, r, steps, roundoff)
    k = H.shape[1]
    y, left = _least_squares(H, k, size)
    error = float(np.linalg.norm(y))
    exact = left <= 0.1 * error * smallest
    known = Estimate(error, ("" if steps == r.size else "about") if exact else "roughly")
    if error <= 1:
        return Course(known, 0, k)
    for j in np.unique(np.geomspace(1, k, 60).astype(int)).tolist():
        yj, rest = _least_squares(H, j, size)
        if np.linalg.norm(y - np.pad(yj, (0, k - j))) <= 1 and rest <= 0.1:
            return Course(known, j, k)
    return Course(known, None, k)


def _least_squares(H: np.ndarray, k: int, size: float) -> tuple[np.ndarray, float]:
    """`y` with the least `|size e_1 - (I - H) y|` after `k` steps, and what is left."""
    A, b = np.eye(k + 1, k) - H[: k + 1, :k], np.zeros(k + 1)
    b[0] = size
    y = np.linalg.lstsq(A, b, rcond=None)[0]
    return y, float(np.linalg.norm(b - A @ y))


def best_damping(eigenvalues: np.ndarray) -> tuple[float, float]:
    """The damping `d` for which `1 - d + d J` has the smallest radius, and that radius."""
    choices = np.arange(1, 21) / 20
    radii = [float(abs(1 - d * (1 - eigenvalues)).max()) for d in choices]
    i = int(np.argmin(radii))
    return float(choices[i]), radii[i]


def picard_steps(rate: float, error: float) -> int | None:
    """How many steps of that rate bring an error down to 1: `log(error) / -log(rate)`."""
    if error <= 1:
        return 0
    if not (rate < 1 and np.isfinite(error)):
        return None
    return max(1, int(np.ceil(np.log(error) / -np.log(max(rate, 1e-300)))))
