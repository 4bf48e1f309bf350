"""What to look at: the role of every leaf of a map."""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jaxtyping import PyTree

from ._solve import evaluate_levels
from ._trace import Leaf, Structure, trace


def structure(f: Callable[..., Any], x0: PyTree, *args: Any, has_aux: bool = False) -> Structure:
    """The role of every leaf of the state of `x = f(x, *args)`, read from the map itself.

    The map is traced once, not evaluated. A leaf of the state is

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
    table, counts = problem.table(problem.roles).leaves, {}
    if problem.roles.mixed and not any(isinstance(a, Tracer) for a in inputs):
        evaluate_levels(problem, problem.roles.sources, inputs)
        masks = problem.carried_entries(inputs)
        named = zip(problem.roles.feedback, masks, strict=True)
        counts = {table[i].path: int(mask.sum()) for i, mask in named if mask is not None}
    known = {leaf.path: leaf._replace(handed_on=counts.get(leaf.path, 0)) for leaf in table}
    leaves = []
    for path, _ in jax.tree_util.tree_flatten_with_path(x0)[0]:
        name = "x0" + jax.tree_util.keystr(path)
        leaves.append(known.get(name, Leaf(name, None, None, "static", None)))
    return Structure(tuple(leaves), len(problem.roles.groups))
