"""What passes for convergence but is none: entries 13, 14 and 15.

Most tests solve several lanes in one program. Lanes that cannot be solved must be refused. Lanes
that can be solved must be solved, so that refusing everything does not pass.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import implicitjax as ij

from . import PICARD, solve

ANDERSON, TWO, NEWTON = ij.Anderson(), ij.Anderson(memory=2), ij.Newton()


def right_or_refused(solution, exact, rtol, atol: float | None = 0.0):
    """Which lanes converged. Each of those must be within ten tolerances of `exact`, in the root
    mean square. `inf` stands for "no solution". `atol=None` stands for `rtol` times the largest
    entry of each leaf of `exact`.
    """
    converged = np.asarray(solution.converged)
    errors = []
    with np.errstate(all="ignore"):
        for x, want in zip(jax.tree.leaves(solution.value), jax.tree.leaves(exact), strict=True):
            x = np.asarray(x).astype(complex).reshape(*converged.shape, -1)
            want = np.broadcast_to(want, x.shape)
            size = np.abs(want).max(-1, keepdims=True)
            unit = (rtol * size if atol is None else atol) + rtol * np.abs(x)
            errors.append(np.where(x == want, 0.0, np.abs(x - want) / unit))
        error = np.sqrt(np.mean(np.concatenate(errors, -1) ** 2, -1))
    wrong = converged & ~(error <= 10.0)
    assert not wrong.any(), f"called converged at an error of {error[wrong]} tolerances"
    return converged


def max_norm(tree):
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)]))


# 13. A solver that did not move, a first iterate, or a difference lost in round-off passes for
# convergence: what was not learned counts as the worst.


class Rest(ij.AbstractSolver):
    """One step of Picard's iteration in `period` steps, and no move in the others."""

    period: int

    def init(self, x):
        return jnp.zeros((), jnp.int32)

    def step(self, f, x, fx, state):
        moves = (state + 1) % self.period == 0
        return [jnp.where(moves, b, a) for a, b in zip(x, fx, strict=True)], state + 1


class Creep(ij.AbstractSolver):
    """Moves by one unit of round-off at a time, always upward or to and fro."""

    sways: bool

    def init(self, x):
        return jnp.ones(())

    def step(self, f, x, fx, state):
        moved = [a * (1 + state * jnp.finfo(a.dtype).eps) for a in x]
        return moved, -state if self.sways else state


@pytest.mark.parametrize(
    ("solver", "early_stop"),
    [
        *[(Rest(10**6), True), (Rest(2), True), (Rest(5), False)],
        *[(Creep(sways=False), True), (Creep(sways=True), False)],
    ],
    ids=str,
)
def test_13_a_solver_that_did_not_move_has_not_converged(solver, early_stop):
    rate = np.array([1e-12, 1e-8, 1e-5, 0.3, 0.9])

    def lane(c):
        options = {"solver": solver, "rtol": 1e-3, "atol": 0.0, "early_stop": early_stop}
        return solve(lambda x: x + c * (5.0 - x), jnp.full(3, 1.1), max_steps=200, **options)

    converged = right_or_refused(jax.jit(jax.vmap(lane))(jnp.asarray(rate)), 5.0, 1e-3)
    moves = isinstance(solver, Rest) and solver.period < 10
    np.testing.assert_array_equal(converged, moves & (rate >= 0.1))


CASES = [(PICARD, "float64"), (PICARD, "float32"), (ANDERSON, "float32"), (NEWTON, "float64")]


@pytest.mark.parametrize(("solver", "dtype"), CASES, ids=str)
def test_13_a_difference_lost_in_roundoff_teaches_nothing(solver, dtype):
    rate = np.r_[0.5, 10.0 ** np.arange(-1, -21, -1)]

    def lane(c):
        f = lambda x: (1 - c) * x + 5 * c
        return solve(f, jnp.full(3, 1.1, dtype), solver=solver, rtol=1e-4, atol=0.0, max_steps=200)

    converged = right_or_refused(jax.vmap(lane)(jnp.asarray(rate, dtype)), 5.0, 1e-4)
    assert converged[:2].all()


SMALL = {  # a residual, a guess, the root: one equation is far smaller than the other
    "1e-12": (
        lambda x: jnp.stack([1e-12 * (x[0] * x[1] - 2), x[0] - x[1] + 1]),
        [3.0, 3.0],
        [1, 2],
    ),
    "1e-3": (lambda x: jnp.stack([1e-3 * (x[0] * x[1] - 2), x[0] - x[1] + 1]), [3.0, 3.0], [1, 2]),
    "buffer": (  # hydrogen, hydroxide, a weak base and its acid, in mol/l
        lambda x: jnp.stack(
            [
                x[0] * x[1] - 1e-14,
                x[0] * x[2] - 1.8e-9 * x[3],
                x[2] + x[3] - 0.1,
                x[0] - x[1] - x[2] + 0.05,
            ]
        ),
        [1e-7, 1e-7, 0.05, 0.05],
        [1.8003998309e-9, 5.5543217985e-6, 0.0499944474780, 0.0500055525220],
    ),
}


@pytest.mark.parametrize("case", SMALL)
def test_13_an_equation_that_is_small_beside_another_is_solved_too_or_refused(case):
    """Newton's method has the matrix in which the small equation counts as much as the other."""
    g, guess, root = SMALL[case]
    solution = ij.implicit_root(g, jnp.asarray(guess), on_failure="return")
    if solution.converged:
        np.testing.assert_allclose(solution.value, root, rtol=1e-6)
    assert solution.converged or case != "1e-3"


@pytest.mark.parametrize("guess", [[5.0, 1.0], [0.6, 0.3]])
@pytest.mark.parametrize("loss", [1e-9, 1e-3])
def test_13_a_step_that_newton_has_left_to_take_is_part_of_its_error(guess, loss):
    """A fast exchange of two species, and a slow loss, by which round-off is divided."""

    def f(x):
        exchange = x[0] - 2 * x[1]
        return x + 0.3 * jnp.stack([loss - exchange, exchange - loss * x[1]])

    solver = ij.Newton()
    solution = ij.implicit_fixed_point(f, jnp.asarray(guess), solver=solver, on_failure="return")
    if solution.converged:
        np.testing.assert_allclose(solution.value, [2 + loss, 1.0], rtol=1e-9)
    assert solution.converged == (loss == 1e-3)


# 14. The guess, or a value that overflows, enlarges the tolerance; an iterate that runs away is
# caught up by `rtol |x|`; a residual that rounds to zero passes for a solution.


@pytest.mark.parametrize(("solver", "dtype"), [*CASES, (ANDERSON, "float64")], ids=str)
def test_14_a_far_guess_does_not_enlarge_the_tolerance(solver, dtype):
    """Neither the default `atol` nor what counts as round-off."""
    rtol = 1e-8 if dtype == "float64" else 1e-4
    atol = None if (solver is ANDERSON) == (dtype == "float32") else 0.0
    rate = jnp.asarray([0.0, 0.5, 0.9], dtype)
    guess = np.kron([[1, 1, 1], [1, 0, 0], [0, 0, 1]], 10.0 ** np.arange(0, 15, 3)[:, None])

    def lane(x0):
        f = lambda x: rate * x + (1 - rate)
        return solve(f, x0, solver=solver, rtol=rtol, atol=atol, max_steps=1000)

    assert right_or_refused(jax.vmap(lane)(jnp.asarray(guess, dtype)), 1.0, rtol, atol).all()


@pytest.mark.parametrize(
    ("solver", "atol"), [(ANDERSON, None), (ANDERSON, 0.0), (PICARD, 0.0)], ids=str
)
def test_14_a_huge_value_does_not_enlarge_the_tolerance(solver, atol):
    slope = np.array([-3.0, 10.0, 1e6, 1e12, 1e30, 1e100, 1e160, 1e300])

    def lane(c):
        options = {"solver": solver, "rtol": 1e-8, "atol": atol, "norm": max_norm}
        return solve(lambda x: 1 + c * (x - 1), jnp.zeros(2), max_steps=100, **options)

    converged = right_or_refused(jax.vmap(lane)(jnp.asarray(slope)), 1.0, 1e-8, atol)
    assert solver is PICARD or converged[:2].all()


@pytest.mark.parametrize(
    ("solver", "dtype"),
    [*CASES[1:2], (PICARD, "bfloat16"), (ANDERSON, "float64"), CASES[3]],
    ids=str,
)
def test_14_an_iterate_that_runs_away_is_not_caught_up_by_the_tolerance(solver, dtype):
    """`x + 1`, `x + sqrt(1 + x)`, `x + 1 / (1 + x)`; `(1 + 1e-6) x` with the solution 0 alone; and
    one that does not run away.
    """
    rtol = 0.05 if dtype == "bfloat16" else 1e-4
    kind, guess = np.repeat(np.eye(5), 4, axis=0), np.tile([1.0, 200.0, 1e5, 1e8], 5)
    exact = np.repeat([np.inf, np.inf, np.inf, 0.0, 3.0], 4)[:, None]

    def lane(k, x0):
        def f(x):
            size = 1 + jnp.abs(x)
            away = k[0] + k[1] * jnp.sqrt(size) + k[2] / size + k[3] * 1e-6 * x
            return x + away + k[4] * 0.5 * (3.0 - x)

        return solve(f, x0, solver=solver, rtol=rtol, atol=1e-9, max_steps=300)

    solution = jax.vmap(lane)(jnp.asarray(kind, dtype), jnp.asarray(guess, dtype))
    assert right_or_refused(solution, exact, rtol, 1e-9)[-4:].all()


@pytest.mark.parametrize(("solver", "dtype"), [*CASES[:2], (ANDERSON, "float64")], ids=str)
def test_14_a_large_entry_does_not_excuse_a_small_one(solver, dtype):
    norm = ij.rms_norm if solver is PICARD else max_norm
    rtol, digits = (1e-6, 20) if dtype == "float64" else (1e-3, 10)
    large = 10.0 ** np.linspace(0, digits, 6)
    exact = np.stack([large, np.ones(6), 1 / large], axis=1)
    rate = jnp.asarray([0.1, 0.9, 0.5], dtype)

    def lane(exact):
        options = {"solver": solver, "rtol": rtol, "atol": 0.0, "norm": norm}
        f = lambda x: rate * x + (1 - rate) * exact
        return solve(f, jnp.ones(3, dtype), max_steps=1000, **options)

    converged = right_or_refused(jax.vmap(lane)(jnp.asarray(exact, dtype)), exact, rtol)
    assert converged.all() if solver is PICARD else converged[0]


@pytest.mark.usefixtures("x32")
@pytest.mark.parametrize(
    ("solver", "dtype"),
    [(PICARD, "float32"), (PICARD, "bfloat16"), (ANDERSON, "float16"), (ANDERSON, "complex64")],
    ids=str,
)
def test_14_a_residual_that_rounds_to_zero_is_no_solution(solver, dtype):
    """Each lane has a guess, a rate, and a bound below which the map adds 1.3 instead."""
    rtol = 0.1 if dtype in ("bfloat16", "float16") else 1e-4
    tiny = float(jnp.finfo(dtype).eps) / 1000  # at this rate the residual rounds to zero
    exact = 20.0 + (15.0j if dtype == "complex64" else 0.0)
    lanes = [(1, 0.5, 0), (exact, 0.5, 0), (1, 0.5, 2), (1, tiny, 0), (7, tiny, 0), (0, tiny, 2)]
    dtypes = (dtype, dtype, jnp.finfo(dtype).dtype)

    def lane(x0, c, bound):
        f = lambda x: jnp.where(x.real < bound, x + 1.3, x + c * (jnp.asarray(exact, dtype) - x))
        return solve(f, x0, solver=solver, rtol=rtol, atol=0.0, max_steps=100)

    arrays = [jnp.asarray(a, d) for a, d in zip(zip(*lanes, strict=True), dtypes, strict=True)]
    assert right_or_refused(jax.vmap(lane)(*arrays), exact, rtol)[:3].all()


@pytest.mark.usefixtures("x32")
@pytest.mark.parametrize(
    ("solver", "dtype"), [(PICARD, "bfloat16"), (ANDERSON, "float32")], ids=str
)
def test_14_a_residual_that_rounds_to_zero_in_one_leaf_is_no_solution(solver, dtype):
    """The leaf `c` starts and stays at its solution, which is no reason to refuse."""
    rtol = 0.03 if dtype == "bfloat16" else 1e-4

    def lane(rate):
        def f(s):
            a, b, c = s["a"], s["b"], s["c"]
            return {"a": a + rate * (50 - a), "b": jnp.cos(b), "c": 0.5 * c}

        x0 = {"a": jnp.ones(2, dtype), "b": jnp.zeros(3, dtype), "c": jnp.zeros(2, dtype)}
        return solve(f, x0, solver=solver, rtol=rtol, max_steps=100)

    exact = {"a": 50.0, "b": 0.7390851332151607, "c": 0.0}
    rates = jnp.asarray([0.5, 1e-9, 1e-12, 1e-17], dtype)
    assert right_or_refused(jax.vmap(lane)(rates), exact, rtol, None)[0]


# 15. The estimate is beaten by a spectrum that turns: rotations, drifting walks, non-normal maps,
# a window of two.

N, LANES = 20, 40


def rotations(radius, angle, real=()):
    """Planes that turn and shrink, and real eigenvalues."""
    λ = np.asarray(radius) * np.exp(1j * np.asarray(angle))
    J = np.zeros((N, N))
    for i, z in enumerate(λ):
        J[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[z.real, -z.imag], [z.imag, z.real]]
    J[len(J) - len(real) :, len(J) - len(real) :] += np.diag(real)
    return J


def walk(rate, stay, drift):
    """A walk on a ring that stays with probability `stay`, or else goes on with `drift`."""
    S = np.roll(np.eye(N), 1, axis=0)
    return rate * (stay * np.eye(N) + (1 - stay) * (drift * S + (1 - drift) * S.T))


def non_normal(g):
    S = np.eye(N) + np.triu(g.normal(size=(N, N)), 1)
    return S @ np.diag(g.uniform(-0.9, 0.99, N)) @ np.linalg.inv(S)


def hidden(g):
    fast = g.uniform(0.5, 0.9, 2), g.uniform(0.5, np.pi, 2)
    return rotations(*fast, real=[1 - 10 ** g.uniform(-3, -1)])


SPECTRA = {
    "a shift around a ring": lambda g: walk(0.99, 0.0, 1.0),
    "walks": lambda g: walk(g.choice([0.9, 0.99, 0.999]), g.uniform(0, 0.5), g.uniform(0.3, 1)),
    "slow walks": lambda g: walk(0.999, g.uniform(0, 0.5), g.uniform(0.3, 1)),
    "turns": lambda g: rotations(g.choice([0.9, 0.99, 0.995], 10), 10 ** g.uniform(-3, 0.5, 10)),
    "one slow turn": lambda g: rotations(
        [0.995, *g.uniform(0.5, 0.9, 9)], [0.003, *g.uniform(0.5, np.pi, 9)]
    ),
    "policies": lambda g: 0.999 * g.dirichlet(np.full(N, 0.03), size=N),
    "non-normal": non_normal,
    "a slow mode under two turns": hidden,
}


@functools.partial(jax.jit, static_argnums=3)
def solve_all(J, b, tolerance, solver):
    options = {"solver": solver, "rtol": 0.0, "atol": tolerance, "max_steps": 4000}
    return jax.vmap(lambda J, b: solve(lambda x: J @ x + b, jnp.zeros(N), **options))(J, b)


@pytest.mark.parametrize(
    ("solver", "tolerance", "name"),
    [(PICARD, 1e-3, name) for name in ("a shift around a ring", "turns")]
    + [(TWO, 1e-3, name) for name in ("a shift around a ring", "walks", "turns", "non-normal")]
    + [(TWO, 1e-8, name) for name in ("one slow turn", "policies")]
    + [(ANDERSON, 1e-3, name) for name in ("turns", "one slow turn", "non-normal")]
    + [(ANDERSON, 1e-8, "slow walks")]
    + [(solver, 1e-3, "a slow mode under two turns") for solver in (PICARD, ANDERSON)],
    ids=str,
)
def test_15_the_estimate_is_not_beaten_by_a_spectrum_that_turns(solver, tolerance, name):
    g = np.random.default_rng(0)
    J = np.stack([SPECTRA[name](g) for _ in range(LANES)])
    A = np.eye(N) - J
    b = A @ np.ones((N, 1)) if SPECTRA[name] is hidden else g.normal(size=(LANES, N, 1))
    exact = np.linalg.solve(A, b)
    size = np.sqrt(np.mean(exact**2, axis=1, keepdims=True))
    b, exact = (b / size)[..., 0], (exact / size)[..., 0]
    solution = solve_all(jnp.asarray(J), jnp.asarray(b), tolerance, solver)
    assert right_or_refused(solution, exact, 0.0, tolerance).mean() >= 0.8
