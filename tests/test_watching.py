"""What people watch: the bar, what a solution prints, the picture."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest
import tqdm
import tqdm.auto

import implicitjax as ij
from implicitjax import progress
from implicitjax._solve import solve as compiled_solve

from . import systems

solve: Any = ij.implicit_fixed_point


def halve(x: Any, u: Any = 1.0) -> Any:
    """`x = 2 u`, and after `k` steps from zero the error is `2 u / 2^k`."""
    return 0.5 * x + u


class Clock:
    """Stands still, or goes on by so many seconds whenever it is read."""

    def __init__(self, by: float):
        self.now, self.by = 0.0, by

    def monotonic(self) -> float:
        self.now += self.by
        return self.now


@pytest.fixture
def bars(monkeypatch):
    """The bars that were made, and of each what was drawn: the share of the way, and the words."""
    made = []

    class Recorder(tqdm.tqdm):
        def __init__(self, *args: Any, **keywords: Any):
            self.drawn, self.closed = [], 0
            made.append(self)
            super().__init__(*args, **keywords)

        def refresh(self, *args: Any, **keywords: Any):
            self.drawn.append((self.n, self.postfix))
            return super().refresh(*args, **keywords)

        def close(self):
            if not self.disable:
                self.closed += 1
                self.drawn.append((self.n, self.postfix))
            super().close()

    monkeypatch.setattr(tqdm.auto, "tqdm", Recorder)
    yield made
    assert not progress._bars
    assert all(bar.closed == 1 for bar in made)


# --- what a solution prints ---------------------------------------------------------------------


def test_a_solution_prints_numbers():
    """From zero `x = x / 2 + 1` leaves the residual `2^-k` and the error `2^(1 - k)` after `k`
    steps, of which 13 bring the residual within a tenth of 2e-3.
    """
    solution = solve(halve, 0.0, solver=ij.Picard(), rtol=0.0, atol=2e-3)
    rows = [
        "  steps            13",
        "  evaluations      14",
        "  residual         0.000122",
        "  estimated error  0.000244",
        "  contraction rate 0.5",
    ]
    assert str(solution) == "\n".join(["Solution: converged", *rows])
    assert str(solution.stats) == "\n".join(["Stats", *rows])
    assert repr(solution) == str(solution)


def test_counts_are_printed_whole():
    """No step of `x + 1` ends the solve, so that it takes all of them."""
    solution = solve(lambda x: x + 1, 0.0, solver=ij.Picard(), max_steps=1234, on_failure="return")
    assert str(solution).split("\n")[1] == "  steps            1234"


def test_a_batch_prints_the_share_that_converged_and_ranges():
    keywords: dict[str, Any] = {"solver": ij.Picard(), "on_failure": "return"}
    value = lambda a: solve(lambda x: a * x + 1, 0.0, atol=1e-3, rtol=0.0, **keywords)
    text = str(jax.vmap(value)(jnp.asarray([0.5, -1.0, 0.0, 1.5])))
    assert text.startswith("Solution: 2 of 4 lanes converged, 1 stagnated, 1 diverged\n")
    assert "estimated error  0 to unknown" in text


def test_within_a_trace_it_prints_what_is_known():
    seen = []

    def value(a):
        solution = solve(halve, a)
        seen.append(str(solution))
        return solution

    concrete = jax.jit(jax.vmap(value))(jnp.ones(3))
    shapes = jax.eval_shape(lambda a: value(a).stats, 1.0)
    assert seen[0].startswith("Solution: the result is not known\n  steps            int32[]")
    assert "residual         float64[]" in str(shapes)
    assert "3 of 3 lanes" in str(concrete)
    assert "None" in str(jax.tree.map(lambda _: None, concrete))


# --- the bar ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["eager", "jit", "scan", "newton", "float32"])
def test_one_bar_ends_with_the_solve(bars, how, capsys):
    keywords: dict[str, Any] = {
        "newton": {"solver": ij.Newton()},
        "scan": {"early_stop": False, "max_steps": 60},
    }.get(how, {})
    value = lambda u: solve(halve, jnp.zeros_like(u), u, progress=True, **keywords).value
    u = jnp.ones(3, jnp.float32 if how == "float32" else None)
    call, programs = jax.jit(value) if how == "jit" else value, set()
    for _ in range(2):
        x = call(u)
        programs.add(systems.programs(compiled_solve))
        np.testing.assert_allclose(x, 2.0, rtol=1e-4 if how == "float32" else 1e-9)
    assert len(bars) == 2 and len(programs) == 1
    for bar in bars:
        share, words = bar.drawn[-1]
        assert share == bar.total
        assert words.endswith(", converged")
    assert "100%" in capsys.readouterr().err


@pytest.mark.parametrize("jitted", [False, True])
def test_a_solve_that_fails_ends_its_bar_short_of_the_end(bars, jitted):
    fail = lambda u: solve(lambda x: u - x, 0.0, solver=ij.Picard(), progress=True).value
    with pytest.raises(Exception, match="stagnated"):
        jax.block_until_ready((jax.jit(fail) if jitted else fail)(1.0))
    ((share, words),) = [bar.drawn[-1] for bar in bars]
    assert share < 1
    assert words.endswith(", not converged")


@pytest.mark.parametrize("solver", [ij.Picard(), ij.Anderson()])
def test_it_shows_the_error_of_the_step_on_a_scale_of_digits(bars, monkeypatch, solver):
    """Beside what a function is told; with a history both look at every step."""
    keywords: dict[str, Any] = {"solver": solver, "history": True}
    monkeypatch.setattr(progress, "time", Clock(by=1.0))  # time to draw at each call
    slow = lambda x: 0.9 * x + jnp.asarray([1.0, 2.0])
    heard = {}
    told = lambda step, error: heard.update({int(step): float(error)})
    solve(slow, jnp.zeros(2), progress=told, **keywords)
    jax.effects_barrier()
    solve(slow, jnp.zeros(2), progress=True, **keywords)
    first, *course, last = bars[0].drawn
    assert first == (0, None) and last[0] == 1 and len(course) >= 2
    largest = 1.0
    for share, words in course:
        step, error = int(words.split()[0]), words.split("tolerance ")[1]
        assert error == ("unknown" if np.isinf(heard[step]) else f"{heard[step]:.1e}")
        if np.isfinite(heard[step]):
            largest = max(largest, heard[step])
            done = 1 - np.log(heard[step]) / np.log(largest) if heard[step] > 1 else 1.0
            np.testing.assert_allclose(share, min(done, 0.99), atol=1e-12)


def test_the_host_is_called_rarely_while_steps_are_fast(bars, monkeypatch):
    monkeypatch.setattr(progress, "time", Clock(by=0.0))
    steps, real = [], progress._hear
    monkeypatch.setattr(progress, "_hear", lambda n, e: steps.append(int(n[2])) or real(n, e))
    keywords = {"solver": ij.Anderson(), "on_failure": "return", "max_steps": 600}
    solve(lambda x: jnp.roll(x, 1) + jnp.sin(x) + 1, jnp.arange(60.0), progress=True, **keywords)
    assert steps == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600]


def test_the_host_is_called_each_tenth_of_a_second_while_steps_are_slow(bars, monkeypatch):
    """With 0.04 seconds a step every other step."""
    clock = Clock(by=0.0)
    monkeypatch.setattr(progress, "time", clock)
    steps, real = [], progress._hear

    def hear(numbers, error):
        clock.now += 0.04 * (int(numbers[2]) - (steps[-1] if steps else 0))
        steps.append(int(numbers[2]))
        return real(numbers, error)

    monkeypatch.setattr(progress, "_hear", hear)
    keywords = {"solver": ij.Anderson(), "on_failure": "return", "max_steps": 20}
    solve(lambda x: jnp.roll(x, 1) + jnp.sin(x) + 1, jnp.arange(60.0), progress=True, **keywords)
    assert steps == [0, 1, 2, *range(4, 21, 2)]


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_batch_has_one_bar(bars, early_stop):
    """One lane goes round in a cycle; others end long before the last, one of them by a probe."""
    a = jnp.asarray([0.9, -1.0, 0.1, 0.0])

    def value(a):
        f = lambda x: a * x + 1
        keywords = {"solver": ij.Picard(), "early_stop": early_stop, "max_steps": 300}
        return solve(f, 0.0, progress=True, on_failure="nan", **keywords).value

    x = jax.jit(jax.vmap(value))(a)
    np.testing.assert_allclose(x, [10.0, np.nan, 1 / 0.9, 1.0], rtol=1e-9)
    ((share, words),) = [bar.drawn[-1] for bar in bars]
    assert share < 1
    assert words.endswith(", 3 of 4 lanes converged, 1 failed")


def test_a_solve_within_a_solve_has_a_bar_of_its_own(bars):
    def outer(x):
        return 0.5 * solve(lambda y: 0.5 * y + 0.25 * x + 1, 0.0, progress=True).value

    x = jax.block_until_ready(solve(outer, 0.0, progress=True).value)  # x = x / 4 + 1
    np.testing.assert_allclose(x, 4 / 3, rtol=1e-9)
    assert len(bars) > 2 and bars[0].drawn[-1][0] == 1


@pytest.mark.parametrize("adjoint", [ij.ImplicitAdjoint(), ij.UnrolledAdjoint()])
def test_derivatives_go_by_the_bar(bars, adjoint):
    def value(u):
        keywords: dict[str, Any] = {"adjoint": adjoint, "max_steps": 60}
        return solve(halve, 0.0, u, solver=ij.Picard(), progress=True, **keywords).value

    np.testing.assert_allclose(jax.jit(jax.grad(value))(1.0), 2.0, rtol=1e-9)
    np.testing.assert_allclose(jax.jvp(value, (1.0,), (3.0,))[1], 6.0, rtol=1e-9)


def test_a_program_that_was_aborted_leaves_no_bar(bars, monkeypatch):
    clock = Clock(by=0.0)
    monkeypatch.setattr(progress, "time", clock)

    def interrupted(x):
        def host(x):
            if x > 1.9:
                raise RuntimeError("interrupted")
            return x

        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return halve(jax.pure_callback(host, shape, x, vmap_method="sequential"))

    eager = lambda u: solve(interrupted, 0.0 * u, solver=ij.Picard(), progress=True).value
    with pytest.raises(Exception, match="interrupted"):
        eager(1.0)
    assert not progress._bars
    with pytest.raises(Exception, match="interrupted"):
        jax.block_until_ready(jax.jit(eager)(1.0))
    clock.now += 100.0
    solve(halve, 0.0, progress=True)
    assert len(bars) == 3


def test_off_it_adds_nothing():
    def program(how):
        f = lambda u: solve(halve, jnp.zeros(2), u, progress=how)
        return str(jax.make_jaxpr(lambda u: (f(u).value, f(u).stats))(jnp.ones(2)))

    off = program(None)
    assert off == program(False)
    assert "_hear" not in off and "_hear" in program(True)


@pytest.mark.parametrize("solver", [ij.Picard(), ij.Anderson()])
@pytest.mark.parametrize("a", [0.9, 0.0])  # the latter is proved by a probe, which is no step
def test_on_it_changes_no_solve(bars, solver, a):
    run = lambda how: solve(lambda x: a * jnp.cos(x), 1.0, solver=solver, progress=how)
    plain, shown = run(False), run(True)
    assert float(plain.value) == float(shown.value)
    jax.tree.map(np.testing.assert_array_equal, plain.stats, shown.stats)
    assert bars[-1].drawn[-1][1].startswith(f"{plain.stats.num_steps} steps, ")


def test_without_tqdm_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r'pip install "implicitjax\[progress\]"'):
        solve(halve, 0.0, progress=True)


# --- the picture --------------------------------------------------------------------------------


def axes() -> Any:
    return matplotlib.figure.Figure().subplots()


def legend(ax: Any) -> list[str]:
    ax.figure.canvas.draw()  # what cannot be drawn shows here
    return [text.get_text() for text in ax.get_legend().get_texts()]


def course(rate: Any, **keywords: Any) -> Any:
    """From zero `x = rate x + 1` has the residual `rate^k` after `k` steps, the error `rate^k / (1
    - rate)`.
    """
    keywords = {"solver": ij.Picard(), "history": True, "rtol": 0.0, "atol": 1e-3} | keywords
    return solve(
        lambda x: jax.tree.map(lambda r, xi: r * xi + 1, rate, x),
        jax.tree.map(jnp.zeros_like, rate),
        **keywords,
    )


def test_the_picture_of_one_solve():
    solution = course(jnp.asarray([0.5]))
    ax = ij.plot_convergence(solution, axes())
    assert legend(ax) == ["residual", "estimated error"]
    assert ax.get_yscale() == "log"
    line, end = ax.lines
    steps = np.arange(15)  # 2^-14 is the first below 1e-4
    np.testing.assert_array_equal(line.get_xdata(), steps)
    np.testing.assert_allclose(line.get_ydata(), 0.5**steps, rtol=1e-12)
    np.testing.assert_array_equal(end.get_xdata(), [14])
    np.testing.assert_allclose(end.get_ydata(), [2 * 0.5**14], rtol=1e-9)
    assert not ax.collections


def test_leaves_are_lines_the_worst_first():
    ax = ij.plot_convergence(course({"a": jnp.asarray(0.2), "b": jnp.asarray(0.6)}), axes())
    assert legend(ax) == ["x0['b']", "x0['a']", "estimated error"]
    for line, rate in zip(ax.lines[:2], (0.6, 0.2), strict=True):
        np.testing.assert_allclose(line.get_ydata()[:9], rate ** np.arange(9), rtol=1e-9)


def test_of_many_leaves_the_worst_and_a_band_of_the_others():
    rates = {f"r{i:02d}": jnp.asarray(0.01 * i) for i in range(1, 61)}
    ax = ij.plot_convergence(course(rates), axes())
    worst = [f"x0['r{i}']" for i in (60, 59, 58, 57, 56)]
    assert legend(ax) == [*worst, "the other 55 leaves", "estimated error"]
    np.testing.assert_allclose(ax.lines[5].get_ydata()[:4], 0.28 ** np.arange(4.0), rtol=1e-9)
    assert_band(ax, 2, 0.01**2, 0.55**2)


def assert_band(ax: Any, step: int, low: float, high: float) -> None:
    (band,) = ax.collections
    at = [y for x, y in band.get_paths()[0].vertices if x == step]
    np.testing.assert_allclose([min(at), max(at)], [low, high], rtol=1e-9)


def test_the_lanes_of_a_batch_are_a_band_in_which_the_last_residual_stays():
    batch = jax.vmap(lambda r: course(r, on_failure="return"))(jnp.asarray([0.1, 0.5, 0.7]))
    ax = ij.plot_convergence(batch, axes())
    assert legend(ax) == ["residual", "estimated error"]
    ends = np.array([4, 14, 26])  # the first residuals below 1e-4
    rows = np.array([0.1, 0.5, 0.7]) ** np.minimum(np.arange(27)[:, None], ends)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.median(rows, axis=1), rtol=1e-9)
    for step in (2, 10, 25):
        assert_band(ax, step, rows[step].min(), rows[step].max())
    np.testing.assert_array_equal(ax.lines[1].get_xdata(), ends)


@pytest.mark.parametrize("how", ["dict", "list", "again"])
def test_several_solutions_on_one_axis_have_colours_of_their_own(how):
    ax, two = axes(), {"a": course(jnp.asarray(0.5)), "b": course(jnp.asarray(0.3))}
    if how == "again":
        for name, one in two.items():
            assert ij.plot_convergence({name: one}, ax) is ax
    else:
        ij.plot_convergence(two if how == "dict" else list(two.values()), ax)
    names = ["solution 0", "solution 1"] if how == "list" else ["a", "b"]
    assert legend(ax) == [*names, "estimated error"]
    marker = ax.get_legend().legend_handles[-1]  # stands for the diamonds of all colours
    assert marker.get_markerfacecolor() not in {line.get_color() for line in ax.lines}
    first, its_end, second, _ = ax.lines
    assert first.get_color() == its_end.get_color() != second.get_color()


def test_what_failed_is_marked_and_what_is_not_known_is_not():
    ax = ij.plot_convergence(course(0.9, max_steps=5, on_failure="return"), axes())
    assert legend(ax) == ["residual", "estimated error, not converged"]
    ax = ij.plot_convergence(course(-1.0, on_failure="return"), axes())
    assert legend(ax) == ["residual"]
    bad = solve(lambda x: jnp.sqrt(x - 1), 1.5, on_failure="return", history=True)
    assert legend(ij.plot_convergence({"a": bad, "b": bad}, axes()))[:2] == ["a", "b"]
    zeros = jax.vmap(lambda a: solve(lambda x: 0 * x + a, 1.0, history=True))(jnp.ones(2))
    ij.plot_convergence(zeros, axes()).figure.canvas.draw()


def test_a_picture_of_what_has_none_is_refused(monkeypatch, unchecked):
    with pytest.raises(ValueError, match="history=True"):
        ij.plot_convergence(solve(halve, 0.0), axes())
    with pytest.raises(ValueError, match="return the solution from `jit`"):
        jax.jit(lambda u: ij.plot_convergence(solve(halve, u, history=True), axes()))(1.0)
    with pytest.raises(ValueError, match="some leaf feeds back"):
        ij.plot_convergence(solve(lambda x: 2.0, 0.0, history=True), axes())
    with pytest.raises(ValueError, match="no solution to draw"):
        ij.plot_convergence([], axes())
    with pytest.raises(TypeError, match="draws a Solution"):
        ij.plot_convergence(3.0, axes())  # pyright: ignore[reportArgumentType]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "implicitjax\[plot\]"'):
        ij.plot_convergence(course(0.5))


def test_without_axes_it_makes_some(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    ax = ij.plot_convergence(course(0.5))
    assert plt.gcf() is ax.figure
    plt.close(ax.figure)
