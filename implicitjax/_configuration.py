"""How to solve and how to differentiate: what the user asked for, checked and hashable."""

import dataclasses
import operator
import sys
import types
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from . import _tree, progress as bar
from ._adjoint import AbstractAdjoint, ImplicitAdjoint, UnrolledAdjoint
from ._check import positive_int
from ._loop import Settings
from ._packing import Packing, packing
from ._trace import Problem
from ._trace._axes import coupled_axes, refuse_coupled
from ._trace._call import is_array, Static
from ._trace._exact import exact, Identity
from ._trace._key import program_key
from .linear._base import scaled_solve
from .linear._transposable import OnFailure
from .solvers._base import AbstractSolver
from .solvers._optimistix import as_solver, Optimistix

# What a method of these does is told by its fields.
_PACKAGES = (__name__.split(".")[0], "optimistix", "lineax")
# Steps are counted in 32 bits; a guess and a probe are evaluated beside them.
_MOST_STEPS = 2**31 - 4


@dataclasses.dataclass(frozen=True, eq=False)
class Configuration:
    """The static part of a solve, apart from the map: a part of the key of its program.

    - `methods`: the structure of solver and adjoint; `statics`: their leaves, `None` for an array.
    - `settings`: what the loop is asked for.
    - `on_failure`: `"raise"`, `"nan"` or `"return"`.
    - `check_guess`: whether the guess is the answer of another solver, and must be a solution.
    - `key`: equal for two that make the same program of the same problem.
    """

    methods: Any
    statics: tuple[Static | None, ...]
    settings: Settings
    on_failure: OnFailure
    check_guess: bool = False
    key: Hashable = None

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Configuration) and self.key == other.key

    def rebuild(self, arrays: list) -> tuple[AbstractSolver, AbstractAdjoint]:
        """Solver and adjoint again, from the arrays among their leaves."""
        left = iter(arrays)
        leaves = [next(left) if s is None else s.value for s in self.statics]
        return jax.tree.unflatten(self.methods, leaves)

    def with_key(self, problem: Problem, inputs: list, arrays: list) -> "Configuration":
        """The same with its key, given the inputs of the problem and the arrays of the methods.

        A method of this package is known by its fields. A norm, a solver or a linear solver of the
        user's may read what no field shows: a global, a dictionary, an attribute of its class. It
        is known by a trace, as the map is, since that holds whatever is read.
        """
        on, (solver, adjoint) = self.settings, self.rebuild(arrays)
        linear_solver = getattr(adjoint, "linear_solver", None)
        traces = (
            None if on.norm is _tree.rms_norm else _trace_norm,
            None if _is_ours(solver) else _trace_solver,
            None if _is_ours(linear_solver) else _trace_linear_solver,
        )
        key: list[Any] = [self.on_failure, self.check_guess]
        key += [type(adjoint), getattr(adjoint, "rule", None)]
        key += [on.max_steps, on.early_stop, on.keep_best, on.history, Identity(on.progress)]
        key += [_fields(method) for method in (solver, linear_solver) if _is_ours(method)]
        if any(traces) and problem.roles.feedback:
            like = _Like(problem, inputs, self, arrays)
            key += [trace and trace(like) for trace in traces]
        return dataclasses.replace(self, key=tuple(key))


def configure(
    solver: Any,
    adjoint: Any,
    max_steps: Any,
    norm: Any,
    early_stop: bool,
    on_failure: Any,
    history: bool,
    progress: Any,
    check_guess: bool = False,
) -> tuple[Configuration, list]:
    """The configuration, and the arrays in solver and adjoint, which are inputs."""
    solver = as_solver(solver)
    if not isinstance(adjoint, (ImplicitAdjoint, UnrolledAdjoint)):
        raise TypeError(f"adjoint must be ImplicitAdjoint() or UnrolledAdjoint(), got {adjoint!r}.")
    if not callable(norm):
        raise TypeError(f"norm must be callable, got {norm!r}.")
    if progress is True:
        bar.require()
    elif progress is False:
        progress = None
    elif progress is not None and not callable(progress):
        raise TypeError(f"progress must be a bool, callable or None, got {progress!r}.")
    if on_failure not in ("raise", "nan", "return"):
        raise ValueError(f'on_failure must be "raise", "nan" or "return", got {on_failure!r}.')
    leaves, methods = jax.tree.flatten((solver, adjoint))
    if isinstance(solver, Optimistix):
        _refuse_watched(adjoint, early_stop, history, progress)
    early = bool(early_stop) and not isinstance(adjoint, UnrolledAdjoint)
    best = on_failure == "return"
    settings = Settings(_steps(max_steps), norm, early, best, bool(history), progress)
    statics = tuple(None if is_array(leaf) else Static(leaf) for leaf in leaves)
    configuration = Configuration(methods, statics, settings, on_failure, check_guess)
    return configuration, [leaf for leaf in leaves if is_array(leaf)]


def _refuse_watched(adjoint: Any, early_stop: Any, history: Any, progress: Any) -> None:
    """The steps of a solver of optimistix are its own: nobody sees them."""
    unrolled = isinstance(adjoint, UnrolledAdjoint)
    asked = {
        "adjoint=UnrolledAdjoint()": unrolled,
        "early_stop=False": not early_stop,
        "history=True": history,
        "progress": progress is not None,
    }
    for keyword in (k for k, given in asked.items() if given):
        raise ValueError(
            f"{keyword} needs one of our own solvers, such as Anderson() or Newton(): one of "
            "optimistix takes its steps by itself."
        )


def _steps(max_steps: Any) -> int:
    integer = hasattr(max_steps, "__index__") and not isinstance(max_steps, bool)
    steps = operator.index(max_steps) if integer else max_steps
    positive_int("max_steps", steps)
    if steps > _MOST_STEPS:
        raise ValueError(f"max_steps must be at most {_MOST_STEPS:,}, got {steps:,}.")
    return steps


def _is_ours(method: Any) -> bool:
    """Whether a method is of this package or of a neighbour, and holds nothing but arrays, numbers,
    strings, and functions of theirs.
    """

    def of_package(tree: Any) -> bool:
        kind = (tree.node_data() or (type(None),))[0]
        ours = kind is type(None) or _of_package(kind)
        return ours and all(map(of_package, tree.children()))

    def plain(leaf: Any) -> bool:
        if isinstance(leaf, types.FunctionType):
            home = sys.modules.get(leaf.__module__) if _of_package(leaf) else None
            return getattr(home, leaf.__name__, None) is leaf  # so it holds nothing of the user's
        return is_array(leaf) or type(leaf) in (bool, int, float, str)

    leaves, tree = jax.tree.flatten(method)
    return of_package(tree) and all(map(plain, leaves))


def _of_package(thing: Any) -> bool:
    return thing.__module__.split(".")[0] in _PACKAGES


def _fields(method: Any) -> Hashable:
    leaves, tree = jax.tree.flatten(method)
    return (exact(tree), tuple(None if is_array(leaf) else exact(leaf) for leaf in leaves))


class _Like:
    """What the user's own norm, solver and linear solver are traced with: vectors like those of
    the solve, and a map and an operator that stand for any.
    """

    def __init__(self, problem: Problem, inputs: list, configuration: Configuration, arrays: list):
        unknown = [problem.state[i] for i in problem.roles.feedback]
        self.dtypes = [problem.dtypes[i] for i in unknown]
        self.norm, self.rebuild = configuration.settings.norm, configuration.rebuild
        self.inputs = ([inputs[i] for i in unknown], arrays)

    def iterate(self, leaves: list) -> tuple[list, Packing]:
        """The vectors in which the leaves travel."""
        leaves = [jnp.asarray(x, d) for x, d in zip(leaves, self.dtypes, strict=True)]
        packed = packing(leaves)
        return packed.pack(leaves), packed

    def trace(self, name: str, function: Callable[..., Any], *more: Any) -> tuple[Hashable, Any]:
        """The key of a function of an iterate, its packing, the methods and more, and the shapes
        of what it returns.
        """

        def call(leaves: list, arrays: list, *more: Any) -> Any:
            return function(*self.iterate(leaves), *self.rebuild(arrays), *more)

        try:
            closed, out = jax.make_jaxpr(call, return_shape=True)(*self.inputs, *more)
        except Exception:  # it is raised again where it matters, with the map of this call
            return Identity(object()), None
        refuse_coupled(name, coupled_axes(closed.jaxpr))
        return program_key(closed), out


def _twice(v: list) -> list:
    """Stands for a map, or for an operator."""
    return [leaf + leaf for leaf in v]


def _trace_norm(like: _Like) -> Hashable:
    """Of a vector in units of the tolerance, and of a real one, such as its sizes."""

    def norms(x: list, *_: Any) -> list:
        wide = [_tree.widen(xi, _tree.accumulation_dtype(xi)) for xi in x]
        real = [] if not any(map(jnp.iscomplexobj, wide)) else [like.norm(list(map(jnp.abs, wide)))]
        return [like.norm(wide), *real]

    return like.trace("The norm", norms)[0]


def _trace_solver(like: _Like) -> Hashable:
    """Of the first state, of a step from any state, and what the loop asks of the solver."""
    if isinstance(like.rebuild(like.inputs[1])[0], Optimistix):
        return Identity(object())  # the rules within are made anew: no two traces are the same
    asked = []

    def init(x: list, packed: Packing, solver: AbstractSolver, _: Any) -> Any:
        solver = solver.arrange(packed)
        flags = (solver.steady, solver.uses_map, solver.takes_back, solver.steps_to_value)
        asked.extend(map(bool, flags))
        state = solver.init(x)
        return state, solver.tried(state), solver.found(state), solver.judged(x, state)

    def step(x: list, packed: Packing, solver: AbstractSolver, _: Any, fx: list, state: Any) -> Any:
        return solver.arrange(packed).step(_twice, x, like.iterate(fx)[0], state)

    first, shown = like.trace("The solver", init)
    state = None if shown is None else shown[0]
    return (tuple(asked), first, like.trace("The solver", step, like.inputs[0], state)[0])


def _trace_linear_solver(like: _Like) -> Hashable:
    """Of a solution."""

    def solve(x: list, packed: Packing, solver: Any, adjoint: Any) -> Any:
        linear_solver = adjoint.linear_solver.at_precision(_tree.epsilon(x))
        return scaled_solve(linear_solver, _twice, _tree.as_reals(x)[0](x))

    return like.trace("The linear solver", solve)[0]
