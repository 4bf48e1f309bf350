"""A bar, `progress=True`: the estimated error on its way to the tolerance, within `jit` too.

A callback on every step would cost more than many a step. The host therefore answers each call with
the step at which it wants the next one, about a tenth of a second later; until then the loop does
no more than compare two integers. A batch under `vmap` has one bar: it shows the largest error of
all lanes and how many of them have ended.
"""

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from . import _tree

GOES_ON, CONVERGED, FAILED = range(3)
_SECONDS = 0.1  # between two calls
_STALE = 30.0  # a bar that has not been called for so long is taken for that of an aborted program

Told = Int[Array, " 2"]  # the number of the bar, and the step at which to call next
_bars: dict[int, "_Bar"] = {}
_numbers = itertools.count()


def require() -> None:
    """Raises where there is no tqdm."""
    try:
        import tqdm.auto  # noqa: F401
    except ImportError:
        raise ImportError(
            'progress=True needs tqdm: pip install "implicitjax[progress]".'
        ) from None


def nothing_told() -> Told:
    """Before the first call."""
    return jnp.array([-1, 0], jnp.int32)


def tell(
    told: Told,
    step: Int[Array, ""],
    now: Callable[[], tuple[Int[Array, " 2"], Float[Array, ""]]],
    was_running: Bool[Array, ""],
    goes_on: Bool[Array, ""],
) -> Int[Array, " 3"]:
    """Calls the host if it is due, or if the solve ends. Returns what the host has told, and the
    step, which comes by way of the host: XLA drops a call on which nothing depends.

    - `now`: how the solve stands: one of the constants above, the steps that led there; and the
      error in tolerances.
    - `was_running`: false for a lane of a batch that had ended before; `goes_on`: true until a lane
      ends.
    """
    due = was_running & ((step >= told[1]) | ~goes_on)
    shape = jax.ShapeDtypeStruct((3,), np.dtype(np.int32))

    def call(told_and_step: Array) -> Array:
        stands, error = now()
        numbers = jnp.append(told_and_step, stands)
        # A batch comes as one call, with axes of lanes in front.
        return jax.pure_callback(
            _hear, shape, numbers, lax.stop_gradient(error), vmap_method="broadcast_all"
        )

    return _tree.call_if(due, call, jnp.append(told, step))


def _hear(numbers: Any, error: Any) -> np.ndarray:
    """The host's side."""
    numbers = np.array(numbers)
    number, _, step, state, steps = np.moveaxis(numbers, -1, 0)
    key = int(number.max())
    if key not in _bars:
        close(_STALE)
        key = next(_numbers)
        _bars[key] = _Bar()
    wait = _bars[key].show(int(steps.max()), float(np.max(error)), np.asarray(state))
    numbers[..., 1] = step.max() + wait
    numbers[..., 0] = key
    if np.all(state != GOES_ON):
        _bars.pop(key).bar.close()
    return numbers[..., :3]


def close(age: float = 0.0) -> None:
    """Closes the bars that have not been called for some seconds."""
    for key, bar in list(_bars.items()):
        if time.monotonic() - bar.heard >= age:
            _bars.pop(key).bar.close()


class _Bar:
    """One bar, and when it was called and drawn last."""

    def __init__(self) -> None:
        from tqdm.auto import tqdm

        layout, outermost = "{l_bar}{bar}| {elapsed}{postfix}", not _bars
        self.bar = tqdm(total=1.0, desc="implicitjax", leave=outermost, bar_format=layout)
        self.heard = self.drawn = time.monotonic()
        self.step, self.largest = 0, 1.0

    def show(self, step: int, error: float, state: np.ndarray) -> int:
        """Draws the bar if it is time to, and returns after how many steps to call next."""
        now = time.monotonic()
        if math.isfinite(error):
            self.largest = max(self.largest, error)
        ended, right = np.count_nonzero(state != GOES_ON), np.count_nonzero(state == CONVERGED)
        if ended == state.size or now - self.drawn >= _SECONDS:
            known = f"{error:.1e}" if math.isfinite(error) else "unknown"
            words = f"{step} steps, error/tolerance {known}"
            if state.size > 1:
                words += f", {right} of {state.size} lanes converged"
                words += f", {ended - right} failed" if ended > right else ""
            elif ended:
                words += ", converged" if right else ", not converged"
            self.bar.set_postfix_str(words, refresh=False)
            self.bar.n = 1.0 if right == state.size else min(self._done(error), 0.99)
            self.drawn = now
            if ended < state.size:  # to close it draws it
                self.bar.refresh()
        steps, seconds = step - self.step, max(now - self.heard, 1e-6)
        self.step, self.heard = step, time.monotonic()
        return max(1, min(step, int(steps * _SECONDS / seconds)))

    def _done(self, error: float) -> float:
        """The share of the way, in digits."""
        if not math.isfinite(error):
            return float(self.bar.n)
        return 1.0 if error <= 1 else 1 - math.log(error) / math.log(self.largest)
