"""Times that can be divided by each other: interleaved, the shortest or the median of many."""

import gc
import operator
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

Call = Callable[[], Any]
Clock = Callable[[], float]


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


def paired(
    a: Clock, b: Clock, *more: Clock, pairs: int, ratio: Callable[..., float] = operator.truediv
) -> float:
    """The median of `ratio(seconds of a, seconds of b, ...)` over neighbouring turns of A B A B.

    A clock makes one turn and returns its seconds; each makes `pairs` turns. The turns A1 B1 A2 B2
    give the ratios A1/B1, A2/B1 and A2/B2. On a machine that becomes slower some of them are too
    small and as many too large, so that their median is right.
    """
    clocks = (a, b, *more)
    k = len(clocks)
    turns = [clock() for _ in range(pairs) for clock in clocks]
    ratios = []
    for i in range(len(turns) - k + 1):
        neighbours, first = turns[i : i + k], -i % k  # first: where the turn of `a` stands
        ratios.append(ratio(*neighbours[first:], *neighbours[:first]))
    return statistics.median(ratios)


def steady(call: Call, block: float = 1e-3) -> Clock:
    """A clock for `paired`. A turn is one call that is not counted, then as many as take about
    `block` seconds; the clock returns the seconds of one."""
    turn(call)
    repeats = max(1, round(block / turn(call)))

    def clock() -> float:
        turn(call)
        return turn(call, repeats)

    return clock


def compile_time(program: Callable, *args: Any, repeats: int = 3) -> float:
    """Seconds of tracing and compiling, when nothing of it is known from before."""
    best = float("inf")
    for _ in range(repeats):
        jax.clear_caches()
        gc.collect()  # frees what the caches held, before the time starts
        start = time.perf_counter()
        jax.jit(program).lower(*args).compile()
        best = min(best, time.perf_counter() - start)
    return best
