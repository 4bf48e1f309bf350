"""Times that can be divided by each other: interleaved, the shortest of many."""

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

Call = Callable[[], Any]


def shortest(
    calls: Mapping[str, Call], seconds: float = 2.0, block: float = 2e-3, warm: bool = False
) -> dict[str, float]:
    """Seconds of one call of each, to be divided by one another and by nothing else.

    Every call is made once beforehand, unless all are `warm`, so that nothing compiles that
    need not. Then rounds follow, in each of which all calls have their turn, repeated until a
    turn lasts about `block` seconds; of each the shortest turn counts. A disturbance from
    outside lengthens some turns of all, and the minimum forgets it. A turn starts with a call
    that is not counted, since it finds the caches, and the threads of XLA asleep, as the call
    before left them. Three rounds at least, then for `seconds`; a call that lasts longer than
    half of that is left at its first time.
    """
    if not warm:
        for call in calls.values():
            turn(call)
    best = {name: turn(call) for name, call in calls.items()}
    repeats = {name: max(1, round(block / t)) for name, t in best.items() if t < seconds / 2}
    gc.collect()
    gc.disable()
    try:
        start, rounds = time.perf_counter(), 0
        while rounds < 3 or time.perf_counter() - start < seconds:
            for name, count in repeats.items():
                turn(calls[name])
                best[name] = min(best[name], turn(calls[name], count))
            rounds += 1
    finally:
        gc.enable()
    return best


def turn(call: Call, repeats: int = 1) -> float:
    """Seconds of one call, from `repeats` in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / repeats


def compile_time(program: Callable, *args: Any, repeats: int = 3) -> float:
    """Seconds of tracing and compiling, when nothing of it is known from before."""
    best = float("inf")
    for _ in range(repeats):
        jax.clear_caches()
        start = time.perf_counter()
        jax.jit(program).lower(*args).compile()
        best = min(best, time.perf_counter() - start)
    return best
