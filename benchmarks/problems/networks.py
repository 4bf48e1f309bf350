"""Neural, electrical and probabilistic networks."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._problem import newton, Problem


def problems() -> list[Problem]:
    """All of this file."""
    return [
        layer(), relu_layer(), two_layers(), balanced(), hopfield(), feeder(0.6), feeder(0.999),
        belief(), kuramoto(),
    ]  # fmt: skip


def layer(n: int = 100) -> Problem:
    """`z = tanh(W z + u)` with `|W| = 0.99` (Bai, Kolter and Koltun, 2019)."""
    rng = np.random.default_rng(0)
    W, u = rng.normal(size=(n, n)), rng.normal(size=n)
    W = 0.99 * W / np.linalg.norm(W, 2)
    f = lambda z, u: jnp.tanh(W @ z + 0.3 * u)
    return Problem("tanh layer", "contractive", f, np.zeros(n), u, newton())


def relu_layer(n: int = 80) -> Problem:
    """`z = relu(W z + u)` with `W` of a monotone operator, so that the solution is unique though
    the map need not contract (Winston and Kolter, 2020)."""
    rng = np.random.default_rng(1)
    A, B = rng.normal(size=(2, n, n)) / np.sqrt(n)
    W = 0.9 * np.eye(n) - 0.5 * A.T @ A + 0.5 * (B - B.T)
    f = lambda z, u: jnp.maximum(W @ z + u, 0)
    return Problem("monotone relu layer", "non-smooth", f, np.zeros(n), rng.normal(size=n),
                   newton(warm=3000, damping=0.1))  # fmt: skip


def two_layers(n: int = 30, batch: int = 4) -> Problem:
    """A batch of states at two resolutions that feed each other, with layer norms, a pytree (Bai,
    Koltun and Kolter, 2020)."""
    rng = np.random.default_rng(2)
    scale = lambda *shape: rng.normal(size=shape) * 1.1 / np.sqrt(sum(shape))
    theta = {"fine": scale(n, n), "coarse": scale(n // 2, n // 2), "up": scale(n, n // 2),
             "down": scale(n // 2, n), "x": rng.normal(size=(batch, n))}  # fmt: skip

    def norm(z: Array) -> Array:
        centred = z - jnp.mean(z, axis=-1, keepdims=True)
        return centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-3)

    def f(z: dict[str, Array], t: dict[str, Array]) -> dict[str, Array]:
        return {
            "fine": jnp.tanh(norm(z["fine"] @ t["fine"].T + z["coarse"] @ t["up"].T + t["x"])),
            "coarse": jnp.tanh(z["coarse"] @ t["coarse"].T + z["fine"] @ t["down"].T),
        }

    guess = {"fine": np.zeros((batch, n)), "coarse": np.zeros((batch, n // 2))}
    return Problem("two resolutions", "pytree", f, guess, theta, newton(warm=500, damping=0.5))


def balanced(n: int = 60) -> Problem:
    """Rates of excitatory and inhibitory neurons under strong inhibition: eigenvalues far below -1
    (Wilson and Cowan, 1972; van Vreeswijk and Sompolinsky, 1996)."""
    rng = np.random.default_rng(3)
    strength = np.where(np.arange(n) < n * 3 // 4, 1.0, -5.0) * 8.0 / np.sqrt(n)
    W = strength * (rng.random((n, n)) < 0.3)
    f = lambda r, u: jax.nn.sigmoid(W @ r + u)
    return Problem("balanced neurons", "expanding", f, np.full(n, 0.1),
                   1 + 0.3 * rng.normal(size=n), newton(warm=3000, damping=0.1))  # fmt: skip


def hopfield(n: int = 100, patterns: int = 5) -> Problem:
    """A stored pattern recalled from a noisy cue (Hopfield, 1984)."""
    rng = np.random.default_rng(4)
    stored = rng.choice([-1.0, 1.0], size=(patterns, n))
    cue = stored[0] * np.where(rng.random(n) < 0.1, -1, 1)
    f = lambda s, t: jnp.tanh(t * (stored.T @ (stored @ s)) / n)
    return Problem("Hopfield's recall", "contractive", f, cue, np.asarray(1.6), newton(warm=300))


def feeder(load: float, n: int = 12) -> Problem:
    """The voltages of a distribution line, `V = 1 - Z conj(S / V)`, at a share of the load at which
    the two solutions meet; not holomorphic (Stott, 1974; Bolognani and Zampieri, 2016)."""
    upstream = np.tril(np.ones((n, n)))
    Z = upstream @ np.diag((0.02 + 0.03j) * np.linspace(1, 2, n)) @ upstream.T
    S = (0.04 + 0.02j) * (1 + 0.3 * np.cos(np.arange(n)))
    nose = 2.0170672  # of this line, found by halving
    f = lambda V, t: 1 - Z @ jnp.conj(t * S / V)
    kind = "slow" if load > 0.9 else "complex"
    return Problem(f"power flow, {load} of the nose", kind, f, np.ones(n, complex),
                   np.asarray(load * nose), newton(warm=600))  # fmt: skip


def belief(m: int = 6) -> Problem:
    """Loopy belief propagation on a torus of spins, the messages in atanh form (Pearl, 1988;
    Murphy, Weiss and Jordan, 1999)."""
    rng = np.random.default_rng(5)
    J = 0.45 * rng.normal(size=(2, m, m))  # to the right, and down
    couple = np.tanh(np.stack([J[0], np.roll(J[0], 1, 1), J[1], np.roll(J[1], 1, 0)]))

    def f(h: Array, field: Array) -> Array:
        # h[k]: what arrives from the neighbour on the right, left, below, above.
        total = field + jnp.sum(h, axis=0)
        sent = jnp.stack([total - h[k] for k in range(4)])  # without what came from there
        moved = jnp.stack([
            jnp.roll(sent[1], -1, 1), jnp.roll(sent[0], 1, 1),
            jnp.roll(sent[3], -1, 0), jnp.roll(sent[2], 1, 0),
        ])  # fmt: skip
        return jnp.arctanh(couple * jnp.tanh(moved))

    return Problem("loopy beliefs", "contractive", f, np.zeros((4, m, m)),
                   0.3 * rng.normal(size=(m, m)), newton(warm=500, damping=0.5))  # fmt: skip


def kuramoto(n: int = 40) -> Problem:
    """Phases of locked oscillators on a ring with long links, relaxed by steps of their own motion;
    a turn of all phases is free (Kuramoto, 1984)."""
    rng = np.random.default_rng(6)
    links = np.exp(-np.abs(np.arange(n)[:, None] - np.arange(n)) / 6)
    own = 0.3 * rng.normal(size=n)
    own -= own.mean()
    centred = lambda v: v - v.mean()

    def f(p: Array, t: Array) -> Array:
        return p + 0.15 * (t * own + jnp.sum(links * jnp.sin(p - p[:, None]), axis=1))

    return Problem("locked oscillators", "gauge", f, np.zeros(n), np.asarray(1.0),
                   newton(warm=500, singular=True), gauge=centred,
                   weights=centred(np.cos(np.arange(n))))  # fmt: skip
