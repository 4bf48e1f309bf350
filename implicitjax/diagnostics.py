"""What to look at: the role of every leaf of a map, and what a map does at a point."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import PyTree

from ._diagnosis import Diagnosis
from ._examine import examine
from ._solve import with_sources
from ._trace import Leaf, Problem, Structure, trace
from ._trace._axes import refuse_coupled


def structure(f: Callable[..., Any], x0: PyTree, *args: Any, has_aux: bool = False) -> Structure:
    """The role of every leaf of the state of `x = f(x, *args)`, read from the map itself.

    The map is traced, not evaluated, unless single entries are counted, see below. A leaf of the
    state is

    - *carried*: the map returns it as it came, value and derivative. It is a parameter; its
      gradient belongs to the guess that holds it.
    - *feedback*: the map reads it again, directly or by way of others. Only these leaves are
      iterated, kept in histories, and solved for.
    - *source*: it follows from carried leaves and parameters alone, and the unknown reads it.
    - *output*: nothing that feeds back depends on it. It is computed once, at the end.

    Of a leaf that feeds back, single entries may be carried, such as the edges of a grid in
    `u.at[1:-1].set(...)`, or what lies within the bounds of `jnp.clip`. They are counted at the
    guess, unless that is being traced.

    **Arguments**

    - `f`, `x0`, `args`, `has_aux`: as for `implicit_fixed_point`.

    **Returns**

    A `Structure`; `print` shows it as a table.

    **Raises**

    `TypeError` for a map that does not fit its guess, or in which an integer feeds back; the
    latter shows the table.

    ```python
    >>> import jax.numpy as jnp, implicitjax as ij
    >>> def f(s):
    ...     new = jnp.cos(s["k"] * s["x"])
    ...     return {"k": s["k"], "x": new, "twice": 2 * s["x"]}
    >>> print(ij.structure(f, {"k": 0.5, "x": jnp.ones(3), "twice": jnp.ones(3)}))
    leaf         array       role
    x0['k']      float32[]   carried
    x0['twice']  float32[3]  output
    x0['x']      float32[3]  feedback
    carried       1 of 3 leaves,        1 of 7 numbers
    source        0 of 3 leaves,        0 of 7 numbers
    feedback      1 of 3 leaves,        3 of 7 numbers
    output        1 of 3 leaves,        3 of 7 numbers

    ```

    Source: for the groups, strongly connected components, Tarjan, *SIAM J. Comput.* 1, 1972.
    """
    problem, inputs = trace(f, x0, args, has_aux)
    if problem.roles.mixed and not _traced(inputs):
        inputs = with_sources(problem, inputs)
    return _table(problem, inputs, x0)


def _table(problem: Problem, inputs: list, x0: PyTree) -> Structure:
    """With the entries that are carried, if the inputs are known."""
    table, counts = problem.table(problem.roles).leaves, {}
    if problem.roles.mixed and not _traced(inputs):
        masks = problem.carried_entries(inputs)
        named = zip(problem.roles.feedback, masks, strict=True)
        counts = {table[i].path: int(mask.sum()) for i, mask in named if mask is not None}
    known = {leaf.path: leaf._replace(handed_on=counts.get(leaf.path, 0)) for leaf in table}
    leaves = []
    for path, _ in jax.tree_util.tree_flatten_with_path(x0)[0]:
        name = "x0" + jax.tree_util.keystr(path)
        leaves.append(known.get(name, Leaf(name, None, None, "static", None)))
    return Structure(tuple(leaves), len(problem.roles.groups))


def _traced(inputs: list) -> bool:
    return any(isinstance(a, Tracer) for a in inputs)


def diagnose(
    f: Callable[..., Any], x: PyTree, *args: Any, has_aux: bool = False, root: bool = False
) -> Diagnosis:
    """What stands between the point `x` and the solution of `x = f(x, *args)`, and what to try.

    All is to first order at `x`: the map is replaced by `f(x) + J (y - x)`. Up to 256 unknown reals
    the matrix of `J` is formed; beyond, a few hundred products with `J` and its transpose give
    estimates. The unknown comes to the host.

    The steps of Picard's iteration are `log(error) / -log(radius)`, with the error `(I - J)^-1 r`
    in default tolerances, which belong to the larger of `x` and `f(x)`; those of Anderson's are
    counted on the affine map, as if its memory were unbounded.

    **Arguments**

    - `f`, `args`, `has_aux`: as for `implicit_fixed_point`; with `root` as for `implicit_root`,
      and `f` below is its `x - s g(x)`.
    - `x`: the point, such as `solution.value` of a solve with `on_failure="return"`: a pytree
      like the guess.

    **Returns**

    A `Diagnosis`; `print` shows it as a report.

    **Raises**

    `TypeError` within `jit`, `vmap` or `grad`, since it looks at numbers; and for a map that does
    not fit `x`, as `implicit_fixed_point`.

    ```python
    >>> import jax.numpy as jnp, implicitjax as ij
    >>> d = ij.diagnose(lambda x: jnp.array([0.998, 0.5]) * x + 1.0, jnp.zeros(2))
    >>> print(d.spectral_radius, d.smallest_singular_value)
    0.998 0.002
    >>> print(d.advice[0])
    rate 0.998: `Picard()` needs about 7 900 more steps, `Anderson()` about 3.

    ```

    Source: Saad, *Numerical Methods for Large Eigenvalue Problems*, 2011, section 6.2; Walker and
    Ni, *SIAM Journal on Numerical Analysis* 49, 2011, theorem 2.2.
    """
    problem, inputs = trace(f, x, args, has_aux, root)
    if _traced([*inputs, jnp.add(0, 0)]):  # within jit an operation on numbers is traced too
        raise TypeError(
            "diagnose looks at numbers, and within jit, vmap or grad there are none yet: call it "
            "outside, with the value that the solve returned."
        )
    refuse_coupled("The map", problem.coupled_axes)
    return examine(problem, with_sources(problem, inputs), lambda at: _table(problem, at, x))
