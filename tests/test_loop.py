"""The parts of the loop by themselves: the number that judges, and the unit of error."""

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import Array
from jax.custom_batching import custom_vmap

import implicitjax as ij
from implicitjax import _tree
from implicitjax._loop import (
    _lanes,
    _number,
    _probe,
    _watch,
    check_answer,
    nothing_to_solve,
    Settings,
    Tolerances,
)
from implicitjax._loop._finish import finish
from implicitjax._loop._number import Measured, Seen
from implicitjax._loop._outcome import (
    ACCEPTED,
    CONVERGED,
    DIVERGED,
    MAX_STEPS,
    NONFINITE,
    PROBING,
    RUNNING,
    STAGNATED,
)
from implicitjax._loop._units import normalise
from implicitjax._packing import packing, whole
from implicitjax._solution import RESULT_NAMES
from implicitjax._tree import SMALL

from .test_budget import equations

EPS = float(np.finfo(np.float64).eps)
DTYPES = [np.float64, np.float32]


def number(value: Any, dtype: Any = np.float64) -> Any:
    return jnp.asarray([value], dtype)


def nothing(dtype: Any = np.float64) -> Seen:
    return Seen(*_tree.cut(*_number.nothing_seen(jnp.dtype(dtype))))


def within(seen: Seen, error: Any, residual: Any, roundoff: float = 0.0) -> bool:
    return bool(_number.within(error, residual, _number.enough(seen, number(roundoff), EPS))[0])


def measured(residual=0.0, roundoff=0.0, raw=0.0, dx=0.0, dr=0.0) -> Measured:
    return Measured(*map(number, (residual, roundoff, raw, dx, dr)))


def watch(
    residuals: Any,
    roundoff: float = 0.0,
    samples: Any = None,
    steps: Any = None,
    dtype: Any = np.float64,
) -> Iterator[tuple[int, Seen]]:
    """The steps, and what was seen at each of them; `samples` are the `|dx|` of a `|dr|` of 1."""
    seen = nothing(dtype)
    for i, residual in enumerate(residuals):
        step = i if steps is None else steps[i]
        dx = 0.0 if samples is None else samples[i]
        dr = 0.0 if samples is None else 1.0
        now = Measured(*(number(v, dtype) for v in (residual, roundoff, residual, dx, dr)))
        seen = _number.see(seen, jnp.asarray(step, jnp.int32), now, *2 * (samples is not None,))
        yield step, seen


def last(steps: Iterator[tuple[int, Seen]]) -> Seen:
    return list(steps)[-1][1]


def start_of_window(step: int) -> int:
    """The last power of two but one."""
    return 0 if step < 2 else 2 ** (int(np.log2(step)) - 1)


# --- the number ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q", [0.1, 0.75])
def test_a_geometric_sequence_leaves_what_its_sum_says(q, dtype):
    residuals = 100 * q ** np.arange(12.0)
    tolerance = 30 * np.finfo(dtype).eps
    for step, seen in watch(residuals, dtype=dtype):
        assert seen.error.dtype == dtype
        if step == 0:
            assert np.isinf(seen.error[0])
            continue
        left = sum(residuals[step] * q**k for k in range(2000))
        np.testing.assert_allclose(seen.error[0], left, rtol=tolerance)
        np.testing.assert_allclose(seen.last[0], q, rtol=tolerance)
        np.testing.assert_allclose(seen.mean[0], q, rtol=tolerance)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("q", [0.9, 0.3])
def test_of_a_linear_map_in_one_dimension_the_error_is_exact(q, sampled):
    unit, fixed_point, x = 1e-3, 2.0, 7.0
    iterates = [x := q * x + (1 - q) * fixed_point for _ in range(10)]
    residuals = [abs(q * x + (1 - q) * fixed_point - x) / unit for x in iterates]
    # |dx| / |dr| of a linear map.
    samples = [0.0] + 9 * [1 / (1 - q)] if sampled else None
    for step, seen in watch(residuals, samples=samples):
        if step > 0:
            exact = abs(iterates[step] - fixed_point) / unit
            np.testing.assert_allclose(seen.error[0], exact, rtol=1e-9)


def test_a_residual_that_alternates_is_judged_by_its_size():
    # x -> -x / 2 leaves r / 1.5, its rate says r / 0.5; a sample cannot lower the rate's word.
    x = np.array([(-0.5) ** k for k in range(6)])
    residuals = np.abs(-0.5 * x - x)
    seen = last(watch(residuals, samples=[0.0] + 5 * [1 / 1.5]))
    np.testing.assert_allclose(seen.error[0], residuals[-1] / 0.5, rtol=1e-12)


def test_of_a_linear_map_in_two_dimensions_the_slow_mode_counts():
    J = np.array([[0.55, 0.35], [0.35, 0.55]])  # eigenvalues 0.9 and 0.2
    x_star = np.array([1.0, -2.0])
    x = np.array([40.0, 11.0])
    errors, residuals = [], []
    for _ in range(41):
        errors.append(np.sqrt(np.mean((x - x_star) ** 2)))
        x_new = x_star + J @ (x - x_star)
        residuals.append(np.sqrt(np.mean((x_new - x) ** 2)))
        x = x_new
    for step, seen in watch(residuals):
        if step == 0:
            continue
        e = start_of_window(step)
        mean = (residuals[step] / residuals[e]) ** (1 / (step - e))
        rate = max(residuals[step] / residuals[step - 1], mean)
        np.testing.assert_allclose(seen.error[0], residuals[step] / (1 - rate), rtol=1e-9)
        if step > 20:
            np.testing.assert_allclose(seen.error[0], errors[step], rtol=1e-6)


def test_in_two_dimensions_a_sample_of_the_slow_mode_outweighs_the_rate():
    # Two steps of any method: the first moves along the slow mode, the second along the fast one.
    slow, fast = 1 / (1 - 0.99), 1 / (1 - 0.2)
    residuals = [1.0, 0.1, 0.01]
    seen = list(watch(residuals, samples=[0.0, slow, fast]))
    np.testing.assert_allclose(seen[1][1].error[0], 0.1 * slow, rtol=1e-12)
    np.testing.assert_allclose(seen[2][1].error[0], 0.01 * slow, rtol=1e-12)


def test_the_window_begins_at_the_last_power_of_two_but_one():
    rng = np.random.default_rng(0)
    residuals = 10.0 ** rng.uniform(-3, 3, size=70)
    samples = 10.0 ** rng.uniform(-3, 3, size=70)
    for step, seen in watch(residuals, samples=samples):
        e = start_of_window(step)
        assert seen.at[0] == step
        if step > 0:
            assert seen.earlier_at[0] == e
            mean = (residuals[step] / residuals[e]) ** (1 / (step - e))
            np.testing.assert_allclose(seen.mean[0], mean, rtol=1e-12)
        in_window = np.maximum(seen.sample[0], seen.before[0])
        assert in_window == samples[e : step + 1].max()


def test_the_window_forgets_a_far_guess():
    # Of a far guess it shows 1000; from step 4 on the map is a contraction by a half.
    residuals = np.concatenate([np.ones(4), 0.5 ** np.arange(1, 7)])
    samples = np.array([0, 1, 1, 1000] + 6 * [2.0])
    errors = {step: float(seen.error[0]) for step, seen in watch(residuals, samples=samples)}
    assert np.isinf(errors[3])  # the residual has not fallen
    np.testing.assert_allclose(errors[7], 1000 * residuals[7], rtol=1e-12)
    np.testing.assert_allclose(errors[8], 2 * residuals[8], rtol=1e-12)


def test_looks_that_leave_steps_out_have_the_same_rate():
    steps = [0, 1, 2, 5, 11, 19]
    residuals = [0.8**k for k in steps]
    for step, seen in watch(residuals, steps=steps):
        if step > 0:
            np.testing.assert_allclose(seen.last[0], 0.8, rtol=1e-12)
            np.testing.assert_allclose(seen.error[0], 0.8**step / 0.2, rtol=1e-11)


def test_a_rate_that_roundoff_blurs_counts_against_the_solve():
    # Residuals 1, 1/2, 1/4 at the steps 0, 1, 2; the mean since step 1 is of 1/4 + 1/8.
    seen = last(watch([1.0, 0.5, 0.25], roundoff=0.125))
    np.testing.assert_allclose(seen.last[0], 0.5)
    np.testing.assert_allclose(seen.mean[0], 0.375 / 0.5)
    np.testing.assert_allclose(seen.error[0], 0.25 / (1 - 0.75), rtol=1e-12)


def test_the_factor_in_the_units_of_the_unknown_is_that_of_the_raw_residual():
    seen = nothing()
    for step, (residual, raw) in enumerate([(8.0, 3.0), (2.0, 2.4)]):
        numbers = [number(v) for v in (residual, 0.0, raw, 0.0, 0.0)]
        seen = _number.see(seen, jnp.asarray(step, jnp.int32), Measured(*numbers), False, False)
    np.testing.assert_allclose([seen.last[0], seen.falls[0]], [0.25, 0.8], rtol=1e-14)


@pytest.mark.parametrize(
    ("dr", "roundoff", "sample", "most"),
    [
        (0.5, 0.05, 6.0, 6.0),
        (0.1, 0.05, 0.0, 15.0),  # four times round-off is 0.2
        (0.0, 0.05, 0.0, 15.0),
        (0.0, 0.0, 0.0, 0.0),
    ],
)
def test_a_step_that_round_off_hides_has_amplified_so_much_at_least(dr, roundoff, sample, most):
    now = measured(residual=1.0, raw=1.0, dx=3.0, dr=dr, roundoff=roundoff)
    seen = _number.see(nothing(), jnp.asarray(1, jnp.int32), now, True, True)
    np.testing.assert_allclose([seen.sample[0], seen.most[0]], [sample, most], rtol=1e-14)


def test_what_was_best_and_first_is_kept():
    seen = last(watch([8.0, 3.0, 2.0, 5.0, 2.0]))
    assert [float(v[0]) for v in (seen.best, seen.best_at, seen.first)] == [2.0, 2.0, 8.0]
    assert float(seen.raw[0]) == 2.0


@pytest.mark.parametrize("sampled", [False, True])
def test_a_residual_that_does_not_fall_proves_nothing(sampled):
    for residuals in ([1e-3, 1e-3, 1e-3], [1e-9, 1e-6, 1e-3], [1e-2, 1e-3, 2e-3]):
        seen = last(watch(residuals, samples=[0.0, 2.0, 2.0] if sampled else None))
        assert np.isinf(seen.error[0])
        assert not within(seen, seen.error, seen.residual)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_residual_that_is_not_finite_never_converges(bad, sampled):
    for residuals in ([bad], [1e-2, bad], [1e-2, 1e-4, bad], [bad, 1e-3], [1.0, bad, 1e-3]):
        samples = len(residuals) * [2.0] if sampled else None
        seen = last(watch(residuals, samples=samples))
        assert not np.isfinite(seen.error[0])
        assert not within(seen, seen.error, seen.residual)


def test_a_residual_of_zero_leaves_its_roundoff():
    # The mean factor is (2^-6 / 1)^(1/1).
    seen = last(watch([1.0, 0.0], roundoff=2.0**-6))
    np.testing.assert_allclose(seen.error[0], 2.0**-6 / (1 - 2.0**-6), rtol=1e-12)
    assert seen.last[0] == 0
    assert within(seen, seen.error, seen.residual, 2.0**-6)
    # Without round-off there is nothing left; and of a guess alone nothing is known.
    assert last(watch([1.0, 0.0])).error[0] == 0
    first = last(watch([0.0]))
    assert not within(first, first.error, first.residual)


def test_a_residual_below_roundoff_counts_as_roundoff():
    seen = last(watch([1.0, 0.25, 0.0625], roundoff=0.1))
    # The mean factor since step 1 is 0.1625 / 0.25.
    np.testing.assert_allclose(seen.error[0], 0.1 / (1 - 0.65), rtol=1e-12)


@pytest.mark.parametrize(
    ("dx", "dr", "roundoff", "sample"),
    [
        (6.0, 3.0, 0.5, 2.0),
        (6.0, 3.0, 0.75, 0.0),  # not above four times the round-off
        (6.0, 3.0, 0.74, 2.0),
        (6.0, 0.0, 0.0, 0.0),
        (0.0, 3.0, 0.0, 0.0),
        (6.0, np.nan, 0.0, 0.0),
        (np.inf, 3.0, 0.0, np.inf),
    ],
)
def test_a_sample_stands_above_roundoff(dx, dr, roundoff, sample):
    assert _number.take_sample(number(dx), number(dr), number(roundoff))[0] == sample


@pytest.mark.parametrize(
    ("last_factor", "mean", "sample", "before", "of_rate", "with_samples"),
    [
        (0.5, 0.75, 3.0, 1.0, 4.0, 4.0),
        (0.75, 0.5, 3.0, 1.0, 4.0, 4.0),
        (0.5, 0.5, 3.0, 5.0, 2.0, 5.0),
        (0.5, 0.5, 5.0, 3.0, 2.0, 5.0),
        (0.5, 0.5, 0.0, 0.0, 2.0, np.inf),
        (0.5, 0.5, 0.0, 0.5, 2.0, 2.0),
        (1.0, 0.5, 3.0, 3.0, np.inf, np.inf),
        (0.5, 1.5, 3.0, 3.0, np.inf, np.inf),
        (0.0, 0.0, 3.0, 3.0, 1.0, 3.0),
    ],
)
def test_the_amplification_is_the_largest_that_was_seen(
    last_factor, mean, sample, before, of_rate, with_samples
):
    values = {"last": last_factor, "mean": mean, "sample": sample, "before": before}
    seen = nothing()._replace(**{k: number(v) for k, v in values.items()})
    assert _number.amplification(seen, False)[0] == of_rate
    assert _number.amplification(seen, True)[0] == with_samples


@pytest.mark.parametrize(
    ("error", "residual", "roundoff", "expected"),
    [
        (1.0, 0.1, 0.0, True),
        (1.001, 0.1, 0.0, False),
        (1.0, 0.101, 0.0, False),
        (1.0, 0.5, 0.125, True),  # four times the round-off
        (1.0, 0.501, 0.125, False),
        (0.0, 0.0, 0.0, True),
        (np.nan, 0.0, 0.0, False),
        (np.inf, 0.0, 0.0, False),
        (0.5, np.nan, 0.0, False),
    ],
)
def test_converged_is_an_error_of_one_and_a_residual_of_a_tenth(
    error, residual, roundoff, expected
):
    assert within(nothing(), number(error), number(residual), roundoff) is expected


@pytest.mark.parametrize(
    ("residual", "roundoff", "expected"),
    [(0.01, 0.0, True), (0.011, 0.0, False), (0.01, 0.125, True), (0.5, 0.125, True)],
)
def test_a_caller_may_ask_for_less_than_a_tenth(residual, roundoff, expected):
    numbers = _number.nothing_seen(jnp.dtype(np.float64), most=number(3.0), part=number(0.01))
    seen = Seen(*_tree.cut(*numbers))
    assert seen.most[0] == 3
    assert within(seen, number(1.0), number(residual), roundoff) is expected


@pytest.mark.parametrize("part", [0.1, 0.01])
@pytest.mark.parametrize(
    ("residuals", "size", "expected"),
    [
        ([1e6, 0.99], 1.1e6, True),
        ([9e5, 0.99], 1.1e6, False),
        ([9e5, 0.89, 0.99], 1.1e6, False),  # it has grown again
        ([0.0, 1e6, 0.99], 1.1e6, True),  # the first that is not zero
        ([0.0, 0.0, 0.99], 1.1e6, False),
        ([0.99], 1.1e6, False),
        ([np.nan, 0.99], 1.1e6, False),
        ([1e9, 0.99], 0.9e6, False),  # the iterate is not so many tolerances large
    ],
)
def test_of_a_millionth_of_first_residual_and_iterate_the_tolerance_itself_is_asked(
    residuals, size, part, expected
):
    seen, epsilon = nothing()._replace(part=number(part)), 1e-10
    for step, residual in enumerate(residuals):
        now = measured(residual=residual, raw=residual, roundoff=size * epsilon)
        seen = _number.see(seen, jnp.asarray(step, jnp.int32), now, False, False)
    enough = _number.enough(seen, number(size * epsilon), epsilon)
    holds = lambda error, residual: bool(_number.within(number(error), number(residual), enough)[0])
    assert holds(1.0, 0.99) is expected
    assert not holds(1.0, 1.001) and not holds(1.001, 0.99)


@pytest.mark.parametrize(
    ("q", "at", "residual"),
    [(0.9, 400, 3.0), (0.9, 20, 1e6), (0.99, 400, 1e3), (0.5, 400, 200.0), (0.99, 30, 0.2)],
)
def test_the_next_look_is_after_most_of_the_steps_to_go(q, at, residual):
    error = residual / (1 - q)
    # Steps of the factor q until the error is 1 and the residual a tenth.
    to_go = max(np.log(error), np.log(residual / 0.1)) / -np.log(q)
    expected = max(1, int(min(to_go / 1.25, at, 12)))
    values = {"error": error, "residual": residual, "at": at, "last": q, "mean": q / 2}
    seen = nothing()._replace(**{k: number(v) for k, v in values.items()})
    assert int(_number.steps_to_go(seen, number(0.1))) == expected
    swapped = seen._replace(last=seen.mean, mean=seen.last)
    assert int(_number.steps_to_go(swapped, number(0.1))) == expected


@pytest.mark.parametrize("q", [0.9, 0.999])
def test_the_next_look_is_never_beyond_the_end(q):
    for residual in 10.0 ** np.arange(-0.9, 6):
        values = {"error": residual / (1 - q), "residual": residual, "at": 1e6, "last": q}
        seen = nothing()._replace(mean=number(q), **{k: number(v) for k, v in values.items()})
        steps = int(_number.steps_to_go(seen, number(0.1)))
        before = residual * q ** (steps - 1)
        assert 1 <= steps <= 12
        assert steps == 1 or before / (1 - q) > 1 or before > 0.1


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_without_a_rate_every_step_is_looked_at(bad):
    fields = {"error": bad, "residual": bad, "at": 1.0, "last": bad, "mean": bad}
    seen = nothing()._replace(**{k: number(v) for k, v in fields.items()})
    assert int(_number.steps_to_go(seen, number(0.1))) == 1


def test_a_rate_of_one_is_looked_at_after_as_many_steps_as_were_taken_and_twelve():
    fields = {"error": np.inf, "residual": 5.0, "last": 1.0, "mean": 1.0}
    seen = nothing()._replace(**{k: number(v) for k, v in fields.items()})
    for at, steps in ((1, 1), (8, 8), (11, 11), (32, 12), (500, 12)):
        assert int(_number.steps_to_go(seen._replace(at=number(at)), number(0.1))) == steps


def test_the_norms_of_several_vectors_are_those_of_each():
    a = [np.array([3.0, 4.0]), np.array([[1.0 + 2.0j]])]
    b = [np.array([-1.0, 0.5]), np.array([[2.0 - 1.0j]])]
    sizes = [np.array([0.25, 0.5]), np.array([[3.0]])]  # real where the unknown is complex

    def rms(v):
        return np.sqrt(sum(np.sum(np.abs(vi) ** 2) for vi in v) / 3)

    vectors = [[jnp.asarray(vi) for vi in v] for v in (a, b, sizes)]
    norms = _number.measure(ij.rms_norm, vectors)
    assert [n.shape for n in norms] == [(1,)] * 3
    np.testing.assert_allclose([n[0] for n in norms], [rms(a), rms(b), rms(sizes)], rtol=1e-14)


def test_a_large_leaf_is_not_copied_to_be_measured():
    vector = [jnp.zeros(1), jnp.zeros(SMALL)]
    measure = lambda *vectors: _number.measure(ij.rms_norm, vectors)
    jaxpr = jax.make_jaxpr(measure)(vector, vector)
    assert all(v.aval.size <= SMALL for eqn in jaxpr.eqns for v in eqn.outvars)


def test_a_norm_that_overflows_is_the_largest_number_and_nan_stays():
    vectors = [[jnp.asarray([v, 1.0])] for v in (1e300, np.inf, np.nan)]
    norms = [float(n[0]) for n in _number.measure(ij.rms_norm, vectors)]
    assert norms[:2] == 2 * [np.finfo(np.float64).max]
    assert np.isnan(norms[2])


# --- what is seen by looking back -----------------------------------------------------------------


def looking_back(**fields: float) -> Seen:
    return nothing()._replace(**{name: number(value) for name, value in fields.items()})


@pytest.mark.parametrize(("mean", "patience"), [(1.0, 64), (0.99, 164)])
def test_noise_is_what_has_not_improved_for_as_long_as_a_mode_takes_to_fade(mean, patience):
    def noise(residual, waited):
        now = measured(residual, roundoff=0.1)
        seen = looking_back(mean=mean, at=1000.0, best_at=1000.0 - waited)
        return bool(_watch.is_noise(seen, now)[0])

    assert noise(9.9, patience + 1e-6) and not noise(9.9, patience - 0.5)
    assert not noise(10.1, 1000.0)


def test_a_cycle_is_a_method_that_moves_and_came_back_to_the_last_digit():
    def cycle(residual, dx, at):
        now = measured(residual, roundoff=0.1, dx=dx)
        return bool(_watch.is_cycle(now, looking_back(at=at))[0])

    assert cycle(10.1, 0.1, 1.0)
    assert not cycle(9.9, 0.1, 1.0) and not cycle(10.1, 0.11, 1.0) and not cycle(10.1, 0.1, 0.0)


def test_what_has_grown_beyond_return_diverges():
    grown = lambda raw: bool(_watch.has_diverged(looking_back(first=3.0, raw=raw))[0])
    limit = 3.0 * EPS**-2.9
    assert grown(1.001 * limit) and not grown(0.999 * limit)


# --- a probe ----------------------------------------------------------------------------------


def settled(
    code: int,
    old: Seen,
    seen: Seen,
    now: Measured,
    probed: bool = False,
    quiet: bool = False,
    sampled: bool = True,
) -> tuple[int, Seen]:
    flags = jnp.asarray(probed), jnp.asarray([code], jnp.int32), jnp.asarray([not quiet])
    settles, seen = _probe.settle(
        *flags, old, seen, now, _number.enough(seen, now.roundoff, EPS), sampled
    )
    return int(settles), seen


def test_a_solve_that_would_end_with_a_quiet_leaf_looks_aside():
    ends = looking_back(at=3.0, sample=1.0), measured(residual=0.05)
    assert settled(CONVERGED, nothing(), *ends, quiet=True)[0] == PROBING
    assert settled(CONVERGED, nothing(), *ends)[0] == CONVERGED
    assert settled(RUNNING, nothing(), *ends, quiet=True)[0] == RUNNING


def test_a_guess_whose_residual_is_small_is_probed_where_it_shows_nothing():
    small, guess = measured(residual=0.05), looking_back(at=0.0, sample=0.0)
    assert settled(RUNNING, nothing(), guess, small, quiet=True)[0] == PROBING
    assert settled(RUNNING, nothing(), guess, small)[0] == RUNNING
    enough = measured(residual=_number.PART)
    assert settled(RUNNING, nothing(), guess, enough, quiet=True)[0] == PROBING
    beside = looking_back(at=0.0, sample=2.0)  # an iterate that was known before
    assert settled(RUNNING, nothing(), beside, small)[0] == PROBING
    assert settled(RUNNING, nothing(), beside, measured(residual=0.2))[0] == RUNNING
    later = looking_back(at=1.0, sample=2.0)
    assert settled(RUNNING, nothing(), later, small, quiet=True)[0] == RUNNING


def test_so_is_a_later_iterate_where_all_steps_were_lost_in_round_off():
    small, later = measured(residual=0.05), looking_back(at=3.0)
    assert settled(RUNNING, nothing(), later, small, quiet=True)[0] == PROBING
    assert settled(RUNNING, nothing(), later, small)[0] == RUNNING
    assert settled(RUNNING, nothing(), later, measured(residual=0.2), quiet=True)[0] == RUNNING
    assert settled(RUNNING, nothing(), later, small, quiet=True, sampled=False)[0] == RUNNING
    before = looking_back(at=3.0, before=1.0)
    assert settled(RUNNING, nothing(), before, small, quiet=True)[0] == RUNNING
    # The probe is then the only sample: 2 / 4 of a residual of 0.05, or 200 / 4 of it.
    old, seen = looking_back(at=3.0, residual=0.05), looking_back(at=4.0, most=0.0)
    for dx, ends in ((2.0, ACCEPTED), (200.0, RUNNING)):
        now = measured(residual=5.0, roundoff=0.01, dx=dx, dr=4.0)
        assert settled(RUNNING, old, seen, now, probed=True)[0] == ends


@pytest.mark.parametrize(
    "solver",
    [ij.Anderson(), ij.Newton(), ij.Broyden(), ij.Squarem()],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.usefixtures("x32")
def test_a_guess_from_which_all_steps_are_lost_in_round_off(solver):
    """The residual of the guess stands above round-off, but the steps hardly do: no sample."""
    f = lambda x: 1 + 0.5 * (x - 1)
    solve = lambda x: ij.implicit_fixed_point(f, x, solver=solver, on_failure="nan").value
    x = jax.vmap(solve)(1 + jnp.arange(20, dtype=jnp.float32) * 2.0**-23)
    np.testing.assert_allclose(x, 1.0, rtol=3e-6)


def test_an_iterate_that_shows_a_residual_beside_it_is_accepted_with_its_own_numbers():
    names = {"error": 0.5, "residual": 0.05, "raw": 7.0, "falls": 0.4}
    old = looking_back(at=4.0, sample=1.0, **names)
    seen = looking_back(at=5.0, sample=1.0, most=1.0, error=9.0, residual=9.0, raw=9.0, falls=9.0)
    now = measured(residual=5.0, roundoff=0.01, dx=2.0, dr=4.0)
    code, out = settled(CONVERGED, old, seen, now, probed=True)
    assert code == ACCEPTED
    assert {name: float(getattr(out, name)[0]) for name in names} == names
    code, out = settled(RUNNING, old, seen, now, probed=True, quiet=True)
    assert code == RUNNING and out.error == out.residual == out.raw == out.falls == 9.0
    assert (out.mark, out.mark_at, out.earlier, out.earlier_at) == (5.0, 5.0, 5.0, 5.0)
    code, out = settled(RUNNING, old, seen, now)
    assert code == RUNNING and (out.mark, out.earlier) == (seen.mark, seen.earlier)


@pytest.mark.parametrize(
    "solver",
    [ij.Picard(damping=0.5), ij.Anderson(), ij.Newton(), ij.Broyden(), ij.Squarem()],
    ids=lambda s: type(s).__name__,
)
def test_a_solve_that_comes_back_to_a_solution_looks_elsewhere(solver):
    """Where `x` and `y` are equal and move alike, the residual of `y = x` vanishes: the first look
    beside the solution shows nothing of that leaf, and nor does any other in that direction.
    """
    f = lambda s: (2 - 0.5 * s[0] - 0.5 * s[1], s[0])
    solution = ij.implicit_fixed_point(f, (1.0, 1.0), solver=solver)
    assert solution.stats.num_evaluations <= 10
    np.testing.assert_allclose(solution.value, 1.0, rtol=1e-10)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("solver", [ij.Picard(), ij.Anderson()], ids=["Picard", "Anderson"])
def test_a_far_guess_does_not_hide_a_slow_mode(solver, dtype):
    """The residual of the fast mode falls to a millionth of the first, that of the slow one is 0.3
    tolerances, and its error 300: a tenth of the tolerance shows it.
    """
    f = lambda x: (1 + 0.3 * (x[0] - 1), 1 + 0.999 * (x[1] - 1))
    guess = jnp.asarray(1e6, dtype), jnp.asarray(1.6)  # of one leaf the round-off may be larger
    value = ij.implicit_fixed_point(f, guess, solver=solver, rtol=1e-3, max_steps=10_000).value
    np.testing.assert_allclose(value, 1.0, rtol=5e-3)


def test_newton_on_a_slow_map_is_held_to_its_error():
    """Near `sqrt(2)` the residual is 350 times less than the error. At the second iterate, 17/12,
    it is below a tenth of the tolerance, and the error is 25 tolerances.
    """
    f = lambda x: x + 0.001 * (2 - x**2)
    value = ij.implicit_fixed_point(f, 1.0, solver=ij.Newton(), rtol=0.0, atol=1e-4).value
    np.testing.assert_allclose(value, np.sqrt(2), rtol=0, atol=1e-4)


def test_a_solve_that_failed_returns_the_iterate_with_the_least_residual():
    """Of `3 - 2 x` from 1.25 each residual is twice the last; the first is -0.75."""
    f = lambda x: 3 - 2 * x
    keywords: dict[str, Any] = {"solver": ij.Picard(), "on_failure": "return", "max_steps": 3}
    solution = ij.implicit_fixed_point(f, 1.25, **keywords)
    assert not solution.converged and solution.value == 1.25
    assert solution.stats.residual_norm == 0.75


def test_a_history_has_no_residual_of_a_probe():
    f = lambda x: 1 + 0.5 * (x - 1)
    stats = ij.implicit_fixed_point(f, 1.0, max_steps=3, history=True).stats
    assert stats.num_steps == 0 and stats.num_evaluations == 2  # the guess is the solution
    np.testing.assert_array_equal(stats.residual_history, np.zeros(4))


@pytest.mark.usefixtures("x32")
def test_a_solve_goes_on_from_a_probe_that_one_leaf_did_not_show():
    """By chance the residual of a leaf may vanish there too. Newton's method is then down to
    round-off in every second step, and no rate can be told of those.
    """
    rng, exact, systems = np.random.default_rng(0), [], []
    while len(exact) < 1000:
        Q, R = (np.linalg.qr(rng.normal(size=(4, 4)))[0] for _ in range(2))
        W = (Q * rng.uniform(0.3, 2.1, 4)) @ R.T
        x = rng.uniform(0.2, 0.8, 4) * rng.choice([-1, 1], 4)
        if np.linalg.norm(np.linalg.inv(np.eye(4) - (1 - x**2)[:, None] * W), 2) <= 8:
            systems.append((W, np.arctanh(x) - W @ x, x + 0.01 * rng.normal(size=4)))
            exact.append(x)

    def solve(W: Array, c: Array, guess: Array) -> Array:
        f = lambda x: tuple(jnp.tanh(W @ jnp.stack(x) + c))
        x0, solver = tuple(guess), ij.Newton()
        solution = ij.implicit_fixed_point(f, x0, solver=solver, on_failure="nan")
        return jnp.stack(solution.value)

    arrays = (jnp.asarray(np.stack(each), jnp.float32) for each in zip(*systems, strict=True))
    np.testing.assert_allclose(jax.vmap(solve)(*arrays), np.stack(exact), rtol=1e-3)


@pytest.mark.parametrize(
    ("sampled", "sample", "most", "residual", "error"),
    [
        (True, 0.0, 0.0, 0.05, 2 / 4 * 0.05),  # `|dx| / |dr|` of the residual
        (False, 0.0, 0.0, 0.05, 2 / 4.95 * 0.05),  # of a steady method the residuals differ by that
        (True, 10.0, 0.0, 0.05, 10 * 0.05),  # the larger of two samples
        (True, 0.0, 60.0, 0.05, 60 * 0.01),  # round-off, amplified by the largest of all
        (True, 0.0, 0.0, 0.001, 2 / 4 * 0.01),  # a residual below round-off counts as that
        (True, 30.0, 0.0, 0.05, None),
        (True, 0.0, 0.0, 0.2, None),  # above a tenth of the tolerance
    ],
)
def test_of_a_guess_the_probe_is_a_sample(sampled, sample, most, residual, error):
    old = looking_back(at=0.0, residual=residual, sample=sample)
    seen = looking_back(at=1.0, most=most, error=9.0)
    now = measured(residual=5.0, roundoff=0.01, dx=2.0, dr=4.0)
    code, out = settled(RUNNING, old, seen, now, probed=True, sampled=sampled)
    assert code == (RUNNING if error is None else ACCEPTED)
    np.testing.assert_allclose(out.error, 9.0 if error is None else error, rtol=1e-12)


def test_of_a_guess_a_probe_that_shows_no_sample_proves_nothing():
    old, seen = looking_back(at=0.0, residual=0.05), looking_back(at=1.0, most=0.0)
    now = measured(residual=5.0, roundoff=0.01, dx=2.0, dr=0.03)
    assert settled(RUNNING, old, seen, now, probed=True)[0] == RUNNING


def test_it_looks_along_the_residual_and_else_towards_zero():
    """Two tolerances, in the norm along the residual or in each entry; no entry moves by more than
    `2 sqrt(n)` times that, and at zero it moves upwards.
    """
    x, unit = np.array([1.0, -2.0, 0.0, 3.0]), np.array([0.1, 0.2, 0.3, 0.4])

    def aside(r, residual, probing=True):
        args = ([jnp.asarray(x)], [jnp.asarray(r)], [jnp.asarray(unit)])
        more = (measured(residual=residual), number(5.0), whole(args[0]))
        return _probe.perturb([jnp.full(4, 7.0)], jnp.asarray(probing), *args, *more)[0]

    r = np.array([0.4, -0.3, 0.0, 1e9])
    np.testing.assert_array_equal(aside(r, 5.0, probing=False), np.full(4, 7.0))
    towards_zero = [1.0 - 0.2, -2.0 + 0.4, 0.6, 3.0 - 0.8]
    expected = [1.0 + 0.4 * 2 / 5, -2.0 - 0.3 * 2 / 5, *towards_zero[2:]]
    np.testing.assert_allclose(aside(r, 5.0), expected, rtol=1e-14)
    np.testing.assert_allclose(aside(r, 0.0), towards_zero, rtol=1e-14)
    r = np.array([0.79, 0.81, -1.59, -3.3])  # the last by more than eight tolerances
    expected = [1.0 + 0.79, -2.0 + 0.81, -1.59, 3.0 - 0.8]
    np.testing.assert_allclose(aside(r, 2.0), expected, rtol=1e-14)


def test_a_complex_number_is_moved_towards_zero():
    x, r, unit = [jnp.asarray([3j, 3 + 4j, 0j])], [jnp.zeros(3, complex)], [jnp.ones(3)]
    more = (measured(residual=0.0), number(0.0), whole(x))
    moved = _probe.perturb(x, jnp.asarray(True), x, r, unit, *more)[0]
    np.testing.assert_allclose(moved, [1j, (3 + 4j) * 3 / 5, 2], rtol=1e-14)


def test_after_the_guess_leaves_are_moved_by_different_parts_at_each_step():
    """Those of one vector, and vectors of their own; from a guess none is."""
    layout = packing([jnp.zeros(2), jnp.zeros(2), jnp.zeros((), np.float32)])
    x = [jnp.zeros(4), jnp.zeros((), np.float32)]

    def moved(step):
        units = list(map(jnp.ones_like, x))
        more = (measured(residual=0.0), number(step), layout)
        first, last = _probe.perturb(x, jnp.asarray(True), x, x, units, *more)
        return np.asarray([first[0], first[2], last], np.float64)

    for step in (0.0, 6.0, 8.0):
        expected = 2 + np.sin(step * np.arange(3))
        np.testing.assert_allclose(moved(step), expected, rtol=1e-6)


def test_a_leaf_stands_out_whose_residual_is_above_roundoff():
    leaves = [jnp.zeros(2), jnp.zeros(3)]
    layout = packing(leaves)

    def both(first, second):
        r = layout.pack([jnp.full(2, first), jnp.full(3, second)])
        ones = list(map(jnp.ones_like, r))
        return bool(_probe.stands_out(measured(9.0, 1.0), r, ones, layout)[0])

    assert both(4.1, -4.1)
    assert not (both(4.0, 9.0) or both(9.0, -3.9) or both(9.0, np.nan))
    one = lambda r: bool(_probe.stands_out(measured(r, 1.0), [], [], whole(leaves[:1]))[0])
    assert one(4.1) and not one(4.0) and not one(np.nan)


@pytest.mark.parametrize(
    ("residual", "off", "code"),
    [
        (1.0, 9.0, CONVERGED),
        (1.01, 9.0, MAX_STEPS),
        (1.01, 2.0, CONVERGED),
        (1.01, 2.01, MAX_STEPS),
    ],
)
def test_the_answer_of_another_solver_is_held_to_the_larger_tolerance(residual, off, code):
    """Either its residual is within one tolerance of the larger, or its error within two."""
    x, unit = [jnp.asarray([4.0])], 0.25
    x0 = [x[0] - off * unit]
    fx0 = [x0[0] + residual * unit]
    pair = tolerances(x, 0.0, unit), tolerances(x, 0.0, unit / 8)
    outcome = check_answer(x0, fx0, x, nothing_to_solve(None), pair, ij.rms_norm)
    assert outcome.code == code
    np.testing.assert_allclose(outcome.numbers[2], 0.0 if code == CONVERGED else off)


def test_numbers_that_are_not_finite_are_told_as_bounds():
    """Of a largest sample 0 stands for none."""
    bad = {"error": np.nan, "falls": np.nan, "most": np.inf}
    state = SimpleNamespace(
        seen=_tree.join(looking_back(raw=np.inf, residual=np.inf, **bad)),
        x=[jnp.ones(1)],
        value=[jnp.ones(1)],
        code=jnp.asarray(NONFINITE, jnp.int32),
        step=jnp.asarray(3, jnp.int32),
        best=None,
        history=None,
        tried=None,
    )
    settings = Settings(9, ij.rms_norm, True, False, False, None)
    _, outcome = finish(state, tolerances(state.x), settings, by_steps=False)
    largest = np.finfo(np.float64).max
    np.testing.assert_array_equal(outcome.numbers, [largest, largest, largest, 0.0, 0.0])


def test_a_norm_that_drops_nan_does_not_hide_it():
    norm = lambda leaves: jnp.nanmax(jnp.abs(jnp.stack([jnp.nan_to_num(v) for v in leaves])))
    f = lambda x: jnp.stack([0.5 * x[0], jnp.log(x[1])])
    solution = ij.implicit_fixed_point(f, jnp.array([1.0, -1.0]), norm=norm, on_failure="return")
    assert solution.result == ij.Result.nonfinite


# --- the unit -----------------------------------------------------------------------------------


def tolerances(x: list, rtol: Any = None, atol: Any = None, packed: Any = whole) -> Tolerances:
    epsilons = tuple(float(jnp.finfo(xi.dtype).eps) for xi in x)
    return Tolerances(rtol, atol, epsilons, packed(x))


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e300, 0.0, 5.0])
@pytest.mark.parametrize(("rtol", "atol"), [(None, None), (1e-6, 1e-9), (None, 0.0)])
def test_the_tolerance_depends_on_the_iterate_alone(value, rtol, atol):
    x = [jnp.asarray([1.0, -3.0, 0.0]), jnp.asarray(7.0)]
    t = tolerances(x, rtol, atol)
    reference = t.at(x, x)
    other = t.at(x, [jnp.full_like(xi, value) for xi in x])
    for a, b in ((reference.asked, other.asked), (reference.tolerance(), other.tolerance())):
        for ai, bi in zip(a, b, strict=True):
            np.testing.assert_array_equal(ai, bi)
    # The iterate does change it.
    moved = t.at([2 * xi for xi in x], x)
    assert all(np.any(a > b) for a, b in zip(moved.asked, reference.asked, strict=True))


def test_the_default_tolerance_has_the_scale_of_each_leaf():
    x = [np.array([1.0, -3.0, 0.0, 8.0]), np.array([[1e6, -2e6]]), np.array(0.0)]
    arrays = [jnp.asarray(xi) for xi in x]
    asked = tolerances(arrays).at(arrays, arrays).asked
    rtol = EPS ** (2 / 3)
    for xi, unit in zip(x, asked, strict=True):
        expected = rtol * np.mean(np.abs(xi)) + EPS**3 + rtol * np.abs(xi)
        np.testing.assert_allclose(unit, expected, rtol=1e-14)
    np.testing.assert_allclose(asked[2], EPS**3, rtol=1e-14)  # a solution of zero can be met


def test_leaves_that_travel_in_one_vector_have_each_its_own_scale():
    x = [np.array([1e3, -3e3]), np.array(1e-5), np.array([2.0, 4.0]), np.array([0.0, 1.0, 5.0])]
    arrays = [jnp.asarray(xi) for xi in x]
    t = tolerances(arrays, packed=packing)
    (vector,) = t.packing.pack(arrays)
    rtol = EPS ** (2 / 3)
    order = [1, 0, 2, 3]  # by size
    means = np.concatenate([np.full(x[i].size, np.mean(np.abs(x[i]))) for i in order])
    entries = np.concatenate([np.abs(x[i]).reshape(-1) for i in order])
    units = t.at([vector], [vector])
    np.testing.assert_allclose(units.asked[0], rtol * (means + entries) + EPS**3, rtol=1e-14)


def test_leaves_in_one_vector_are_held_each_to_its_own_roundoff():
    x = [jnp.asarray([2.0, 4.0]), jnp.asarray([3.0])]
    coarse = float(np.finfo(np.float32).eps)
    t = Tolerances(None, None, (coarse, EPS), packing(x))
    (vector,) = t.packing.pack(x)
    units = t.at([vector], [vector])
    eps = np.array([EPS, coarse, coarse])
    entries, means = np.array([3.0, 2.0, 4.0]), 3.0
    np.testing.assert_allclose(
        units.asked[0], eps ** (2 / 3) * (means + entries) + eps**3, rtol=1e-14
    )
    np.testing.assert_allclose(units.roundoff[0], eps * entries, rtol=1e-14)


def test_tolerances_that_are_given_are_those():
    x = [np.array([1.0, -3.0, 0.0]), np.array([[50.0]])]
    arrays = [jnp.asarray(xi) for xi in x]
    both = tolerances(arrays, 1e-3, 1e-5).at(arrays, arrays)
    absolute = tolerances(arrays, 0.0, jnp.asarray(1e-5)).at(arrays, arrays)
    relative = tolerances(arrays, 1e-3).at(arrays, arrays)
    for k, xi in enumerate(x):
        size = np.abs(xi)
        np.testing.assert_allclose(both.asked[k], 1e-5 + 1e-3 * size, rtol=1e-14)
        np.testing.assert_allclose(both.tolerance()[k], 1e-5 + 1e-3 * size, rtol=1e-14)
        np.testing.assert_allclose(absolute.asked[k], np.full_like(xi, 1e-5), rtol=1e-14)
        expected = 1e-3 * (np.mean(size) + size) + EPS**3
        np.testing.assert_allclose(relative.asked[k], expected, rtol=1e-14)


def test_roundoff_is_that_of_the_smaller_of_iterate_and_value_entry_by_entry():
    x = [jnp.asarray([1.0, -4.0, 0.0, 2.0]), jnp.asarray(1e300)]
    fx = [jnp.asarray([3.0, 1.0, 5.0, -np.inf]), jnp.asarray(-2.0)]
    roundoff = tolerances(x).at(x, fx).roundoff
    np.testing.assert_array_equal(roundoff[0], EPS * np.array([1.0, 1.0, 0.0, 2.0]))
    np.testing.assert_array_equal(roundoff[1], EPS * 2.0)


def test_no_tolerance_is_below_eight_units_of_roundoff():
    x, fx = [jnp.asarray([1.0, -4.0, 0.0])], [jnp.asarray([3.0, 2.0, 5.0])]
    t = tolerances(x, 0.0, 0.0)
    tiny = np.finfo(np.float64).tiny
    np.testing.assert_array_equal(t.at(x, fx).tolerance()[0], [8 * EPS, 16 * EPS, tiny])


def test_a_tolerance_that_was_clamped_is_told():
    x = [jnp.asarray([1.0, 4.0]), jnp.asarray([2.0])]
    assert not tolerances(x).clamped(x, x)
    assert not tolerances(x, 8 * EPS, 0.0).clamped(x, x)
    assert tolerances(x, 7.9 * EPS, 0.0).clamped(x, x)
    assert tolerances(x, 0.0, 31 * EPS).clamped(x, x)  # of the entry 4 alone
    assert not tolerances(x, 0.0, 33 * EPS).clamped(x, x)


@pytest.mark.parametrize(
    ("dtype", "eps", "unit_dtype"),
    [
        (ml_dtypes.bfloat16, 2.0**-7, np.float32),
        (np.float16, 2.0**-10, np.float32),
        (np.float32, 2.0**-23, np.float32),
        (np.complex64, 2.0**-23, np.float32),
        (np.complex128, 2.0**-52, np.float64),
    ],
)
def test_the_unit_is_real_and_in_float32_at_least(dtype, eps, unit_dtype):
    x = np.array([3.0, -0.5, 0.0]).astype(dtype)
    if np.issubdtype(dtype, np.complexfloating):
        x = (x * (0.6 + 0.8j)).astype(dtype)
    fx = (2 * x).astype(dtype)
    units = tolerances([jnp.asarray(x)]).at([jnp.asarray(x)], [jnp.asarray(fx)])
    size, rtol = np.array([3.0, 0.5, 0.0]), eps ** (2 / 3)
    assert units.asked[0].dtype == units.roundoff[0].dtype == unit_dtype
    least = 8 * 2.0**-24 if dtype is np.float16 else eps**3  # the subnormals of float16 are coarse
    expected = rtol * (3.5 / 3 + size) + least
    np.testing.assert_allclose(units.asked[0], expected, rtol=1e-6)
    np.testing.assert_allclose(units.roundoff[0], eps * size, rtol=1e-6)


def test_a_vector_in_units_is_wide_and_keeps_its_phase():
    v = [jnp.asarray([3.0 + 4.0j]), jnp.asarray([1.0, 3.0], jnp.bfloat16)]
    unit = [jnp.asarray([0.5]), jnp.asarray([4.0, 0.5], jnp.float32)]
    out = normalise(v, unit)
    assert [o.dtype for o in out] == [np.complex128, np.float32]
    np.testing.assert_array_equal(out[0], [6.0 + 8.0j])
    np.testing.assert_array_equal(out[1], [0.25, 6.0])


def test_each_code_has_its_result():
    """The numbers of `Result` follow the codes; `RESULT_NAMES` has the same order."""
    results = {
        CONVERGED: ij.Result.converged,
        MAX_STEPS: ij.Result.max_steps_reached,
        STAGNATED: ij.Result.stagnated,
        DIVERGED: ij.Result.diverged,
        NONFINITE: ij.Result.nonfinite,
    }
    outcome = nothing_to_solve(None)
    for code, result in results.items():
        found = dataclasses.replace(outcome, code=jnp.asarray(code, jnp.int32)).result()
        assert found == result and str(found) == str(result)
        assert getattr(ij.Result, RESULT_NAMES[code - CONVERGED]) == result
    assert len(RESULT_NAMES) == len(results)


def test_a_norm_that_looks_at_the_narrower_leaf_alone():
    x0 = (jnp.zeros(2, jnp.float32), jnp.zeros(3))
    f = lambda s: (jnp.cos(s[0]), 0.5 * s[1] + 1)
    solution = ij.implicit_fixed_point(f, x0, norm=lambda v: jnp.max(jnp.abs(v[0])))
    np.testing.assert_allclose(solution.value[0], 0.7390851, rtol=1e-4)


# Lanes that end one after another.

RATES = np.asarray([[0.1, 0.9, 0.5], [0.99, 0.3, 0.7]])


def lanes_of(solver: ij.AbstractSolver) -> Any:
    f = lambda x, q: 1 + q * jnp.tanh(x[::-1] * jnp.asarray([1.0, 0.5, 0.25, 2.0, 1.0]))
    return lambda q: ij.implicit_fixed_point(f, jnp.zeros(5), q, solver=solver, rtol=1e-11)


class Chain(NamedTuple):
    """A state of which each number is batched one round after the next."""

    x: Any
    y: Any
    z: Any
    left: Any


def test_the_body_of_a_loop_is_batched_at_once():
    """`jax.vmap` alone traces it anew for each array that it finds to be batched late."""
    batched = []

    @custom_vmap
    def watched(x):
        return x

    @watched.def_vmap
    def _(lanes, is_batched, x):
        batched.append(is_batched)
        return x, is_batched[0]

    def solve(b):
        body = lambda s: Chain(s.y, s.z, watched(s.z + b), s.left - 1)
        zero = jnp.zeros(())
        state = Chain(zero, zero, zero, jnp.asarray(3))
        return _lanes.while_loop(lambda s: s.left > 0, body, state, (), [b]).x

    np.testing.assert_array_equal(jax.vmap(solve)(jnp.arange(3.0)), [0, 1, 2])
    assert batched == [[True]]


@pytest.mark.parametrize(
    "solver",
    [ij.Anderson(), ij.Anderson(memory=2), ij.Broyden(), ij.Squarem(), ij.Newton(), ij.Picard()],
    ids=lambda s: f"{type(s).__name__}{getattr(s, 'memory', '')}",
)
def test_lanes_end_one_after_another_each_as_it_would_alone(solver):
    solve = lanes_of(solver)
    nested, one_axis = jax.vmap(jax.vmap(solve)), jax.vmap(solve)
    found, flat = jax.jit(nested)(RATES), one_axis(RATES.reshape(-1))
    alone = [[solve(q) for q in row] for row in RATES]
    steps = np.asarray([[one.stats.num_steps for one in row] for row in alone])
    assert len(set(steps.ravel().tolist())) > 1  # they end at different steps
    np.testing.assert_array_equal(found.stats.num_steps, steps)
    values = np.asarray([[one.value for one in row] for row in alone])
    np.testing.assert_allclose(found.value, values, rtol=1e-10)
    np.testing.assert_array_equal(flat.value, np.asarray(found.value).reshape(flat.value.shape))


def test_the_window_of_a_lane_that_has_ended_is_left_to_itself():
    solve = lanes_of(ij.Anderson(memory=4))
    jaxpr = jax.make_jaxpr(jax.vmap(solve))(RATES.reshape(-1)).jaxpr
    windows = [e for e in equations(jaxpr) if e.outvars[0].aval.shape == (6, 4, 5)]
    assert windows and not any(e.primitive.name == "select_n" for e in windows)


def test_numbers_are_joined_in_sixes_and_cut_again():
    numbers = [number(i) for i in range(8)]
    vectors = _tree.join(numbers)
    assert [v.shape for v in vectors] == [(6,), (2,)]
    np.testing.assert_array_equal(np.ravel(_tree.cut(*vectors)), range(8))
    constants = jax.make_jaxpr(lambda: _tree.join([np.zeros(1)] * 8))()
    assert not constants.eqns


@pytest.mark.parametrize("rates", [[0.9, 1e9], [0.9, -1.0, 0.95], [0.9, 3.0]])
def test_a_lane_that_has_ended_costs_the_others_no_evaluations(rates):
    """One diverges, one comes back to its guess: each long before the others converge."""
    count = [0]

    def tick() -> None:
        count[0] += 1

    def solve(q: Array) -> ij.Solution:
        def f(x: Array) -> Array:
            jax.debug.callback(tick)
            return q * x + 1

        return ij.implicit_fixed_point(
            f, jnp.zeros(3), solver=ij.Picard(), rtol=1e-8, on_failure="return"
        )

    found = jax.vmap(solve)(jnp.asarray(rates))
    jax.effects_barrier()
    assert count[0] <= int(jnp.max(found.stats.num_evaluations)) + 1
