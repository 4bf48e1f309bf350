"""The problem: a jaxpr with all that it reads, captured arrays included, among its inputs, and
the role of every leaf of the state.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import eval_jaxpr
from jax.interpreters import partial_eval
from jaxtyping import Bool, PyTree

from .._jaxpr import open_constants
from ._axes import coupled_axes, subjaxprs
from ._call import Call, is_array, split_call, Static
from ._entries import carried_entries
from ._flow import dependencies
from ._key import fingerprint
from ._match import match
from ._roles import assign_roles, Roles
from ._table import Leaf, Structure
from ._view import Flow


class Problem:
    """A traced map `state, aux = f(state, ...)`, or `g` whose state is to be zero. Equal to another
    if it is the same program, see `_key.py`: what the map returned that is no array belongs to one
    call, and is no part of that.

    Its jaxpr takes `num_consts` captured arrays, then the arrays of the call, and returns the
    array leaves of the state, then those of `aux`.

    - `root`: whether the state that is returned is to be zero, and not that which went in.
    - `state`: for each array leaf of the state its index among the inputs; `paths`: its path.
    - `state_tree`, `aux_tree`: the structures of state and `aux`.
    - `statics`, `aux_statics`: leaf by leaf what is no array, `None` where one is.
    """

    def __init__(
        self,
        closed: jec.ClosedJaxpr,
        call: Call,
        inputs: list,
        seen: dict[str, Any],
        root: bool = False,
    ):
        jaxpr, self.root = closed.jaxpr, root
        self.num_consts = len(jaxpr.constvars)
        self.jaxpr = open_constants(jaxpr)
        self.state_tree, self.statics = call.trees[1], seen["statics"]
        self.aux_tree, self.aux_statics = seen["aux_tree"], seen["aux_statics"]
        self.dtypes = tuple(v.aval.dtype for v in self.jaxpr.invars)  # pyright: ignore[reportAttributeAccessIssue]
        self.state = tuple(self.num_consts + i for i in call.state_arrays() if i is not None)
        self.paths = _paths(call, inputs)
        self._key = (fingerprint(jaxpr), self.state, self.paths, root)
        self._hash = hash(self._key)
        self._parts: dict[tuple[int, ...], Any] = {}

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Problem) and self._key == other._key

    def rebuild(self, state: list, aux: list) -> tuple[PyTree, PyTree]:
        """State and `aux` as the map returned them, from their arrays."""
        value = jax.tree.unflatten(self.state_tree, _fill(self.statics, state))
        return value, jax.tree.unflatten(self.aux_tree, _fill(self.aux_statics, aux))

    @property
    def rounded(self) -> bool:
        """Whether this device computes products of the map in less than their dtype, float32: by
        default all do but CPUs.
        """
        return jax.default_backend() != "cpu" and _some(_is_rounded, self.jaxpr)

    @property
    def kind(self) -> str:
        """What is looked for, for the words of an error."""
        return "root" if self.root else "fixed point"

    @property
    def aux_outputs(self) -> tuple[int, ...]:
        """Which outputs of the jaxpr are those of `aux`."""
        return tuple(range(len(self.state), len(self.jaxpr.outvars)))

    def rebuild_history(self, by_leaf: Sequence[Array]) -> PyTree:
        """The residuals of each leaf of the unknown in the structure of the state."""
        leaves: list[Any] = [None] * len(self.state)
        for i, leaf in zip(self.roles.feedback, by_leaf, strict=True):
            leaves[i] = leaf
        arrays = iter(leaves)
        full = [None if s is not None else next(arrays) for s in self.statics]
        return jax.tree.unflatten(self.state_tree, full)

    @functools.cached_property
    def flows(self) -> list:
        """For every output the inputs that it depends on; that of a root is taken from `x`."""
        flows = dependencies(self.jaxpr)
        if self.root:
            for k, i in enumerate(self.state):
                flows[k] = Flow(depends=flows[k].depends | 1 << i)
        return flows

    @functools.cached_property
    def roles(self) -> Roles:
        """The role of every array leaf of the state; an integer must not feed back."""
        empty = [i for i in self.state if 0 in _shape(self.jaxpr.invars[i])]
        roles = assign_roles(self.flows, self.state, empty)
        for i in roles.feedback:
            aval = self.jaxpr.invars[self.state[i]].aval
            if not jnp.issubdtype(aval.dtype, jnp.inexact):  # pyright: ignore[reportAttributeAccessIssue]
                raise TypeError(
                    f"The leaf {self.paths[i]} of the state, {aval}, is not of a float or complex "
                    "dtype, but the map reads it again: an unknown must be continuous. Make it a "
                    "float, or take it out of the state.\n" + self.table(roles).brief()
                )
        return roles

    def table(self, roles: Roles) -> Structure:
        """The roles of the array leaves of the state, for people."""
        group = {i: number for number, group in enumerate(roles.groups, start=1) for i in group}
        leaves = []
        for i, (path, position) in enumerate(zip(self.paths, self.state, strict=True)):
            aval: Any = self.jaxpr.invars[position].aval
            leaves.append(Leaf(path, aval.shape, aval.dtype, roles.roles[i], group.get(i)))
        return Structure(tuple(leaves), len(roles.groups))

    def carried_entries(self, inputs: Sequence[Any]) -> list[Bool[Array, "..."] | None]:
        """For every leaf of the unknown which of its entries are carried, or `None` for none. The
        inputs hold the guess.
        """
        feedback, mixed = self.roles.feedback, self.roles.mixed
        if not mixed:
            return [None] * len(feedback)
        jaxpr, used = self._part(feedback)
        place = {i: k for k, i in enumerate(i for i, u in enumerate(used) if u)}
        read = [x for x, u in zip(inputs, used, strict=True) if u]
        unknown = [place.get(self.state[i]) for i in feedback]
        return carried_entries(jaxpr, read, unknown, [feedback.index(i) for i in mixed])

    @functools.cached_property
    def pullback_only(self) -> bool:
        """Whether what feeds back goes through a function with a pullback alone."""
        jaxpr, _ = self._part(self.roles.feedback)
        return _some(_is_custom_vjp, jaxpr)

    @functools.cached_property
    def coupled_axes(self) -> tuple[Hashable, ...]:
        """The names of the axes, bound outside, over which what feeds back has a collective."""
        if not coupled_axes(self.jaxpr):
            return ()
        return coupled_axes(self._part(self.roles.feedback)[0])

    def _part(self, outputs: tuple[int, ...]) -> tuple[jec.Jaxpr, list[bool]]:
        """The equations behind some of the outputs, and which inputs they read."""
        if outputs not in self._parts:
            wanted = [i in outputs for i in range(len(self.jaxpr.outvars))]
            self._parts[outputs] = partial_eval.dce_jaxpr(self.jaxpr, wanted)
        return self._parts[outputs]

    def program(self, outputs: tuple[int, ...]) -> Callable[[Sequence[Array]], list[Array]]:
        """The part of the map that computes some of its outputs, and nothing else."""
        jaxpr, used = self._part(outputs)
        order = sorted(outputs)

        def run(inputs: Sequence[Array]) -> list[Array]:
            read = [x for x, u in zip(inputs, used, strict=True) if u]
            results = zip(eval_jaxpr(jaxpr, (), *read), jaxpr.outvars, strict=True)
            # An output that is a constant number is a Python scalar.
            arrays = [x if is_array(x) else jnp.asarray(x, _dtype(v)) for x, v in results]
            values = dict(zip(order, arrays, strict=True))
            return [values[i] for i in outputs]

        return run


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _dtype(variable: Any) -> Any:
    return variable.aval.dtype


def _fill(statics: tuple[Static | None, ...], arrays: list) -> list:
    left = iter(arrays)
    return [next(left) if s is None else s.value for s in statics]


def trace(f: Any, x0: Any, args: tuple, has_aux: bool, root: bool = False) -> tuple[Problem, list]:
    """Traces the map, and again after each correction of the dtypes of its guess.

    Returns the problem and its inputs: the captured arrays, then those of the call, where a Python
    number, or another weakly typed leaf of the guess, has the dtype of the output; a Python
    integer that the map changes is an array.
    """
    call, arrays = split_call(f, x0, args, has_aux)
    for _ in range(3):
        closed, seen = _trace_once(call, arrays)
        if not seen["corrections"]:
            _check_floats(call, arrays)
            return Problem(closed, call, arrays, seen, root), [*closed.consts, *arrays]
        call, arrays = _correct(call, arrays, seen["corrections"])
    raise TypeError(
        "The map returns another dtype for each dtype of the guess: pass a guess of a fixed "
        f"dtype, such as jnp.asarray(x0, {jnp.zeros(()).dtype.name})."
    )


def _check_floats(call: Call, arrays: list) -> None:
    """An unknown is a float or complex array: a guess without any is a mistake."""
    state = [arrays[i] for i in call.state_arrays() if i is not None]
    if not any(jnp.issubdtype(jnp.asarray(a).dtype, jnp.inexact) for a in state):
        raise TypeError(
            "The guess x0 has no float or complex leaf, so there is nothing to solve for: "
            f"pass floats, got {call.rebuild(arrays)[1]!r}."
        )


def _trace_once(call: Call, arrays: list) -> tuple[jec.ClosedJaxpr, dict[str, Any]]:
    """The jaxpr, and what the map returned apart from its arrays."""
    seen: dict[str, Any] = {}

    def flat(arrays: list) -> list:  # made anew each time: JAX caches traces by function
        f, x0, args = call.rebuild(arrays)
        value = f(x0, *args)
        aux = None
        if call.has_aux:
            if not isinstance(value, tuple) or len(value) != 2:
                raise TypeError(
                    "With has_aux=True the map must return a pair (x, aux), got "
                    f"{type(value).__name__}."
                )
            value, aux = value
        state, seen["statics"], seen["corrections"] = match(call, arrays, x0, value)
        aux_leaves, seen["aux_tree"] = jax.tree.flatten(aux)
        seen["aux_statics"] = tuple(None if is_array(a) else Static(a) for a in aux_leaves)
        return state + [a for a in aux_leaves if is_array(a)]

    return jax.make_jaxpr(flat)(arrays), seen


def _correct(call: Call, arrays: list, corrections: dict[int, Any]) -> tuple[Call, list]:
    """The call again, with leaves of the guess as arrays of the dtypes that are named."""
    statics, left, out = list(call.statics), iter(arrays), []
    for i, static in enumerate(call.statics):
        value = next(left) if static is None else static.value
        if i in corrections:
            statics[i] = None
            out.append(lax.convert_element_type(value, corrections[i]))
        elif static is None:
            out.append(value)
    return call._replace(statics=tuple(statics)), out


def _paths(call: Call, arrays: list) -> tuple[str, ...]:
    """The paths of the array leaves of the state."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(call.rebuild(arrays)[1])
    indices = call.state_arrays()
    named = zip(leaves, indices, strict=True)
    return tuple("x0" + jax.tree_util.keystr(path) for (path, _), i in named if i is not None)


def _some(test: Callable[[jec.JaxprEqn], bool], jaxpr: jec.Jaxpr) -> bool:
    """Whether it holds for an equation, also of a jaxpr within."""
    return any(test(eqn) or any(_some(test, sub) for sub in subjaxprs(eqn)) for eqn in jaxpr.eqns)


def _is_custom_vjp(eqn: jec.JaxprEqn) -> bool:
    return eqn.primitive.name == "custom_vjp_call"


def _is_rounded(eqn: jec.JaxprEqn) -> bool:
    if eqn.primitive.name not in ("dot_general", "conv_general_dilated"):
        return False
    factors: Any = [v.aval for v in eqn.invars]
    single = any(aval.dtype in (np.float32, np.complex64) for aval in factors)
    return single and eqn.params["precision"] in (None, (lax.Precision.DEFAULT,) * 2)
