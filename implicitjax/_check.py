"""Checks of what the user passes: a clear error at once, at the call that is wrong."""

from typing import Any

import jax
import numpy as np


def positive_int_or_none(name: str, value: Any) -> None:
    """Raises unless `value` is `None` or a Python integer of at least 1."""
    if value is not None:
        positive_int(name, value)


def positive_int(name: str, value: Any) -> None:
    """Raises unless `value` is a Python integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a Python integer, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def nonnegative(name: str, value: Any) -> None:
    """Raises unless `value` is a number, and not below 0 or NaN if it is one of Python's."""
    if value is None:
        return
    number = isinstance(value, (int, float, np.ndarray, np.generic, jax.Array))
    if not number or isinstance(value, bool):
        raise TypeError(f"{name} must be a real number, got {value!r}.")
    if np.ndim(value) != 0:
        raise ValueError(f"{name} must be a number, got an array of shape {np.shape(value)}.")
    if isinstance(value, (int, float)) and not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value!r}.")


def damping_factor(name: str, value: Any) -> None:
    """Raises if `value` is a Python number outside (0, 1]; arrays are taken as they are."""
    if isinstance(value, bool) or isinstance(value, (str, complex)):
        raise TypeError(f"{name} must be a real number, got {value!r}.")
    if isinstance(value, (int, float)) and not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value!r}.")
