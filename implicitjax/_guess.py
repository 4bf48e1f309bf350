"""The derivative with respect to the guess of the unknown: zero where `A = I - J` is regular.

Where row `i` of `J` is that of the identity, equation `i` is `x_i = x_i` to first order, and the
guess has decided the value of `x_i`. If the trace has shown that the map hands that entry on, it
is a parameter, see `_trace/_entries.py`, and `J` has no such row. Of the others no derivative is
known, and zero would be wrong: it is NaN, or an exception, as `on_failure` has it. So it is with
a projection, such as `x / |x|`: row `i` of `J` is not zero, and the same as that of `J J`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Bool

from . import _tree
from ._failures import first_failure, raise_if
from ._loop import CONVERGED, Outcome
from ._packing import Packing
from ._solution import DerivativeError
from .linear._base import probe

Vector, Flags = list[Array], list[Bool[Array, "..."]]


@dataclasses.dataclass(frozen=True)
class Guess:
    """What is known of the unknown's leaves without a number.

    - `packed`: how they are packed; `reads`: for each leaf those that it depends on.
    - `paths`: their paths; `on_failure`: as the user has it.
    """

    packed: Packing
    reads: tuple[tuple[int, ...], ...]
    paths: tuple[str, ...]
    on_failure: str

    def decided(self, J: Callable[[Vector], Vector], x: Vector) -> Flags:
        """Which entries the guess has decided: row `i` of `J` is not zero, and another step does
        not change it. So it is for `J p`, `J J p`, ... of a vector `p` without a pattern, so many
        that this happens by chance nowhere.
        """
        to_reals, from_reals = _tree.as_reals(x)
        p = from_reals(probe(to_reals(x)))

        def once(carry: tuple, step: Array) -> tuple:
            found, v = carry
            Jv = J(v)
            same = [
                (abs(after - vi) <= 4 * jnp.finfo(vi.dtype).eps * abs(vi)) & (vi != 0)
                for after, vi in zip(Jv, v, strict=True)
            ]
            return ([f & (s | (step == 0)) for f, s in zip(found, same, strict=True)], Jv), None

        # Steps that compare 40 bits or more in all, and the first, which has nothing to compare.
        digits = min(jnp.finfo(leaf.dtype).nmant for leaf in x)
        start = ([xi == xi for xi in x], p)
        return lax.scan(once, start, jnp.arange(1 - -40 // digits))[0][0]

    def along(
        self, x0_dot: list, J: Callable[[Vector], Vector], x: Vector, outcome: Outcome
    ) -> tuple[Flags | None, Vector | None, Vector | None]:
        """Of a guess that moves: which entries it has decided, the right-hand side that a singular
        `A` must refuse, and the tangent along what it has decided. `None` of one that does not.
        """
        if all(isinstance(t, SymbolicZero) for t in x0_dot):
            return None, None, None
        moved = J(list(map(instantiate, x0_dot)))
        decided = self.decided(J, _tree.stop_gradient(x))
        rest = [jnp.where(d, 0, t).astype(t.dtype) for d, t in zip(decided, moved, strict=True)]
        return decided, rest, self.tangent(decided, moved, outcome)

    def tangent(self, decided: list, moved: Vector, outcome: Outcome) -> Vector:
        """The tangent of the solution along that of the guess, which moves its value by `moved`,
        and transposed: zero, where neither an entry that the guess has decided moves, nor the solve
        has failed.
        """
        failed = outcome.code != CONVERGED
        unknown = jnp.zeros((), bool) if self.on_failure == "return" else failed
        decided = [d | unknown for d in decided]
        of_leaf = self._any(decided)
        n = len(self.reads)
        reads = np.zeros((n, n), bool)
        for i, read in enumerate(self.reads):
            reads[i, list(read)] = True

        def forward(_: Callable, b: Vector) -> Vector:
            found = self._any([v != 0 for v in b])
            return self._refuse(found, jnp.any(reads & found[None], axis=1), failed, b)

        def transposed(_: Callable, b: Vector) -> Vector:
            moved = self._any([v != 0 for v in b])
            found = jnp.any(reads.T & moved[None], axis=1) & of_leaf
            return self._refuse(found, found, failed, b)

        moving = [jnp.where(d, t, 0).astype(t.dtype) for d, t in zip(decided, moved, strict=True)]
        moving = _tree.together(moving)  # one linear map
        solve = functools.partial(lax.custom_linear_solve, transpose_solve=transposed)
        return _tree.together(solve(lambda v: v, moving, forward))

    def _any(self, flags: list) -> Bool[Array, " leaves"]:
        return jnp.stack([jnp.any(leaf) for leaf in self.packed.unpack(flags)])

    def _refuse(
        self,
        found: Bool[Array, " leaves"],
        refused: Bool[Array, " leaves"],
        failed: Array,
        like: Vector,
    ) -> Vector:
        """NaN in some leaves, zero in the others; `found` are those that the guess has decided."""
        if self.on_failure == "raise":
            tell = jnp.any(found) & ~failed  # a failed solve has been reported
            leaf = {"leaf": jnp.argmax(found)}
            refused = refused | raise_if(tell, GuessFailure(self.paths), leaf)
        leaves = zip(refused, self.packed.unpack(like), strict=True)
        return self.packed.pack(
            [jnp.where(no, _tree.nan_like(leaf), jnp.zeros_like(leaf)) for no, leaf in leaves]
        )


def hold(decided: Flags | None, x: Vector, defect: Vector) -> Vector:
    """The defect, with `x_i` in place of an equation `x_i = x_i`."""
    return defect if decided is None else list(map(jnp.where, decided, x, defect))


def instantiate(t: Any) -> Array:
    """A tangent or cotangent as an array."""
    zero: Any = t
    return jnp.zeros(zero.shape, zero.dtype) if isinstance(t, SymbolicZero) else t


@dataclasses.dataclass(frozen=True)
class GuessFailure:
    """Raises the error of a derivative that belongs to the guess; a value, so that programs compare
    equal.
    """

    paths: tuple[str, ...]

    def __call__(self, failed: Any, operands: dict[str, Any]) -> None:
        """Called on the host with concrete numbers."""
        info, lane = first_failure(failed, operands)
        leaf = self.paths[int(info["leaf"])]
        raise DerivativeError(
            f"The derivative with respect to the guess is not known{lane}: at the solution some of "
            f"the leaf {leaf} depends on nothing but itself, and a further step does not change "
            "it, so the guess has decided its value.\n"
            "  (a) If that is a parameter, return it as it came, or pass it in `args`; choose by "
            "`jnp.where`, not by a product with a mask.\n"
            "  (b) If its derivative is of no interest, pass `jax.lax.stop_gradient(x0)`.\n"
            'Pass `on_failure="nan"` or "return" for NaN in its place.'
        )
