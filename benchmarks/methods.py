"""What is compared: our solvers, the textbook's windows, jaxopt and optimistix, in one form."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import implicitjax as ij
from implicitjax._loop import _number
from implicitjax._tree import cut

from .problems import flat, in_reals, lane, Map, Problem, Vector

TARGET = 1e-8  # rtol and atol of every method
LIMIT = 1000  # steps of a method that extrapolates
SLOW = 25_000  # of plain iteration, which may be that slow and still converge
DENSE = 2_000  # unknowns up to which a method may form a Jacobian
# A library that raises inside a program would print a traceback, too.
logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)
# Compiling is most of what this takes; how well the programs are optimised is not counted.
QUICK: Any = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
}
if jax.__version_info__ < (0, 11):  # the older emitters, which are no longer in jaxlib 0.11.1
    QUICK["xla_cpu_use_fusion_emitters"] = False


@dataclasses.dataclass
class Answer:
    """What a method made of a problem.

    - `says`: whether it calls itself converged; `x`: what it returned then.
    - `evaluations`: of the map, until it stopped; `first`: until an iterate was within the
      tolerance; `None` if none was.
    - `gradient`: of the functional; `None` if it has none.
    - `sure`: of a textbook's method the evaluations until our stop test was met too.
    """

    says: bool
    x: PyTree
    evaluations: int
    first: int | None
    gradient: PyTree = None
    sure: int | None = None


class Recorder:
    """The identity on an iterate, which looks at it on the host: at which evaluation was an
    iterate first within the tolerance?"""

    def watch(self, problem: Problem) -> None:
        """Counts anew."""
        if problem.kind != "none":
            problem.excess(problem.x_star, TARGET)  # known before a callback asks for it
        self.problem, self.last, self.count, self.first = problem, np.array(np.nan), 0, None

    def _see(self, x: PyTree) -> PyTree:
        x = jax.tree.map(np.asarray, x)
        here = flat(x)
        if not np.array_equal(here, self.last):  # a Jacobian evaluates where the map was
            exists = self.problem.kind != "none"
            if self.first is None and exists and self.problem.excess(x, TARGET) <= 1:
                self.first = self.count
            self.last, self.count = here, self.count + 1
        return x

    def __call__(self, x: PyTree) -> PyTree:
        @jax.custom_jvp
        def seen(x: PyTree) -> PyTree:
            like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x)
            return jax.pure_callback(self._see, like, x, vmap_method="sequential")

        seen.defjvp(lambda x, dx: (seen(*x), dx[0]))
        return seen(x)


# From a map and its guess and parameters to value, verdict, and evaluations if it counts them.
Solve = Callable[[Callable[[Any, Any], Any], PyTree, PyTree], tuple[PyTree, Any, Any]]


def run_library(problem: Problem, solve: Solve, gradient: bool, batched: bool) -> Answer | None:
    """Lanes are solved one by one, and once more side by side where the method is `batched`; `None`
    if the library does not take the map. A solve that is watched iterates every leaf, since it
    looks at every leaf: it tells when an iterate was first within the tolerance, and what the
    library does not count itself. All else is told by a solve of the map as it is."""
    recorder = Recorder()

    def whole(watched: bool) -> Callable[[PyTree, PyTree], Any]:
        f = problem.map
        look = (lambda x, t: f(recorder(x), t)) if watched else f

        def functional(theta: PyTree, x0: PyTree, weights: PyTree) -> tuple[Any, Any]:
            x, says, count = solve(look, x0, theta)
            terms = jax.tree.map(lambda w, a: jnp.sum((jnp.conj(w) * a).real), weights, x)
            return sum(jax.tree.leaves(terms)), (x, says, count)

        both = jax.value_and_grad(functional, has_aux=True)
        none = lambda theta, *rest: (functional(theta, *rest), None)
        return both if gradient and not watched else none

    def one(p: Problem, weights: PyTree) -> Answer:
        recorder.watch(p)
        jax.block_until_ready(watched(p.theta, p.x0, weights))
        answer = told(p, plain, weights)
        return dataclasses.replace(answer, first=recorder.first)

    def told(p: Problem, program: Any, weights: PyTree) -> Answer:
        (_, (x, says, count)), slope = jax.block_until_ready(program(p.theta, p.x0, weights))
        count = recorder.count if count is None else int(np.max(count))
        return Answer(bool(np.all(says)), x, count, None, slope)

    watched, plain = (jax.jit(whole(w), compiler_options=QUICK) for w in (True, False))
    try:
        if not problem.lanes:
            return one(problem, problem.known_weights)
        lanes = [problem.of_lane(i) for i in range(problem.count)]
        answers = [one(p, lane(problem.known_weights, i)) for i, p in enumerate(lanes)]
        answer = together(answers)
        if batched:
            several = jax.jit(jax.vmap(whole(False)), compiler_options=QUICK)
            side_by_side = told(problem, several, problem.known_weights)
            return dataclasses.replace(side_by_side, first=answer.first)
        return answer
    except (TypeError, ValueError, NotImplementedError, RuntimeError):
        return None


def together(answers: list[Answer]) -> Answer:
    """Lanes as one answer: the slowest counts."""
    stack = lambda trees: jax.tree.map(lambda *a: np.stack(a), *trees)
    latest = lambda counts: None if None in counts else max(counts)
    return Answer(
        says=all(a.says for a in answers),
        x=stack([a.x for a in answers]),
        evaluations=max(a.evaluations for a in answers),
        first=latest([a.first for a in answers]),
        gradient=None if answers[0].gradient is None else stack([a.gradient for a in answers]),
        sure=latest([a.sure for a in answers]),
    )


def ours(solver: ij.AbstractSolver | None, max_steps: int = LIMIT) -> Solve:
    """One of our solvers; `None` is the default, untouched."""
    chosen: dict[str, Any] = {} if solver is None else {"solver": solver}

    def solve(f: Any, x0: PyTree, theta: PyTree) -> tuple[PyTree, Any, Any]:
        solution = ij.implicit_fixed_point(
            f, x0, theta, rtol=TARGET, atol=TARGET, max_steps=max_steps, on_failure="nan", **chosen
        )
        return solution.value, solution.converged, solution.stats.num_evaluations

    return solve


def jaxopt_solve(method: Any) -> Solve:
    """Its tolerance is one number, for the Euclidean norm of the residual."""

    def solve(f: Any, x0: PyTree, theta: PyTree) -> tuple[PyTree, Any, Any]:
        tol = TARGET * float(np.sqrt(sum(np.size(a) for a in jax.tree.leaves(x0))))
        value, state = method(fixed_point_fun=f, tol=tol, maxiter=SLOW).run(x0, theta)
        return value, state.error <= tol, state.num_fun_eval

    return solve


def optimistix_solve(optx: Any, method: Any) -> Solve:
    """With the same tolerances and norm."""

    def solve(f: Any, x0: PyTree, theta: PyTree) -> tuple[PyTree, Any, Any]:
        solver = method(rtol=TARGET, atol=TARGET, norm=optx.rms_norm)
        x0 = jax.tree.map(jnp.asarray, x0)
        s = optx.fixed_point(f, solver, x0, theta, max_steps=SLOW, throw=False)
        return s.value, s.result == optx.RESULTS.successful, s.stats["num_steps"]

    return solve


def textbook_steps(f: Map, x: Vector, memory: int) -> Iterator[tuple[Vector, Vector]]:
    """Anderson (1965) as Walker and Ni (2011, section 4) have it, in numpy: the last differences,
    least squares by QR with scaled columns, the oldest dropped until the condition is 1e10. Yields
    each iterate with its residual, one evaluation each."""
    last, dX, dR = None, np.zeros((x.size, 0), order="F"), np.zeros((x.size, 0), order="F")
    while True:
        r = np.asarray(f(jnp.asarray(x))) - x
        yield x, r
        if last is not None:
            keep = memory - 1
            dX = np.column_stack([dX[:, dX.shape[1] - min(keep, dX.shape[1]) :], x - last[0]])
            dR = np.column_stack([dR[:, dR.shape[1] - min(keep, dR.shape[1]) :], r - last[1]])
        last, step = (x, r), r
        if dR.shape[1]:
            lengths = np.linalg.norm(dR, axis=0)
            if not np.isfinite(lengths).all() or (lengths == 0).any():
                return
            Q, R = np.linalg.qr(dR / lengths)
            while R.shape[1] > 1 and (len(R) < R.shape[1] or np.linalg.cond(R) > 1e10):
                dX, dR, lengths = dX[:, 1:], dR[:, 1:], lengths[1:]
                Q, R = np.linalg.qr(dR / lengths)
            step = r - (dX + dR) @ (np.linalg.solve(R, Q.T @ r) / lengths)
        x = x + step


class StopTest:
    """That of our loop, for the iterates of another method: true from where error and residual are
    within the tolerance. A probe, which ours may add, is not asked for.
    """

    def __init__(self) -> None:
        start = cut(*_number.nothing_seen(jnp.dtype(float)))
        self.seen, self.last, self.step = _number.Seen(*start), None, 0

    def __call__(self, x: Vector, r: Vector) -> bool:
        unit = TARGET * (1 + np.abs(x))
        before = (x, np.zeros_like(r)) if self.last is None else self.last
        roundoff = np.finfo(float).eps * np.minimum(np.abs(x), np.abs(x + r))
        vectors = r / unit, roundoff / unit, r, (x - before[0]) / unit, (r - before[1]) / unit
        norms = [np.sqrt(np.mean(v**2, keepdims=True)) for v in vectors]
        self.seen, is_met = _looked_at(self.seen, np.int32(self.step), _number.Measured(*norms))
        self.last, self.step = (x, r), self.step + 1
        return bool(is_met)


@jax.jit
def _looked_at(seen: Any, step: Any, now: Any) -> tuple[Any, Any]:
    new = _number.see(seen, step, _number.Measured(*map(jnp.asarray, now)), True, True)
    enough = _number.enough(new, now.roundoff, float(np.finfo(float).eps))
    return new, _number.within(new.error, now.residual, enough)[0]


def textbook(problem: Problem, memory: int) -> Answer:
    """It stops when the root mean square of the residual is within the tolerance, as textbooks
    do, which says nothing of the error."""
    if problem.lanes:
        lanes = [problem.of_lane(i) for i in range(problem.count)]
        return together([textbook(p, memory) for p in lanes])
    f, tree = in_reals(problem.f, problem.x0)
    first, sure, stopped, evaluations, x = None, None, None, 0, flat(problem.x0)
    is_sure, exists = StopTest(), problem.kind != "none"
    with np.errstate(all="ignore"):  # of a method that diverges
        for x, r in textbook_steps(jax.jit(f), flat(problem.x0), memory):
            if evaluations >= LIMIT or not np.isfinite(r).all():
                break
            if first is None and exists and problem.excess(tree(jnp.asarray(x)), TARGET) <= 1:
                first = evaluations
            evaluations += 1
            if sure is None and is_sure(x, r):
                sure = evaluations
            if stopped is None and np.sqrt(np.mean((r / (TARGET * (1 + np.abs(x)))) ** 2)) <= 1:
                stopped = evaluations, x
            if stopped is not None:
                seen = first is not None and sure is not None
                if not exists or seen or evaluations > 2 * stopped[0] + 50:
                    break
    count, x = stopped or (evaluations, x)
    return Answer(stopped is not None, tree(jnp.asarray(x)), count, first, sure=sure)
