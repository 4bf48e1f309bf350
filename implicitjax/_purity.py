"""Whether a map can be known by its pytree alone, so that no call has to trace it again.

An Equinox module is a pytree: its arrays and its static fields say what it computes, if its
methods read nothing else. But a method may read a global, and in a notebook globals
change. A certificate is a proof, by inspection of the bytecode, that everything that the
methods of a map read is either immutable or a name whose binding can be checked at each
call for a microsecond. Where there is no proof the map is traced at each call, which costs
a millisecond and is always right.
"""

import dataclasses
import dis
import sys
import types
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer

# Libraries whose functions are trusted to depend on their arguments alone.
_TRUSTED = {"builtins", "equinox", "implicitjax", "jax", "jaxlib", "jaxtyping", "math", "numpy"}
_SCALARS = (bool, int, float, complex, str, bytes, type(None), types.EllipsisType)
_READS_NAMES = {"LOAD_GLOBAL", "LOAD_NAME"}
_REFUSED_OPS = {"IMPORT_NAME", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "LOAD_BUILD_CLASS"}
_BUILTINS = set(
    "abs all any bool complex dict divmod enumerate float int isinstance len list map max min "
    "pow print range repr reversed round set slice sorted str sum super tuple zip "
    "ArithmeticError AssertionError NotImplementedError RuntimeError TypeError ValueError".split()
)
# Methods that `dataclasses` and Equinox write, or that run before a map is called.
_GENERATED = set(
    "__init__ __post_init__ __check_init__ __repr__ __eq__ __hash__ __setattr__ __delattr__ "
    "__replace__ __match_args__".split()
)

Guard = tuple[Callable[[], Any], Any]


class Certificate:
    """The bindings that a map reads; it holds as long as each is what it was."""

    def __init__(self, guards: list[Guard]):
        self._guards = guards

    def holds(self) -> bool:
        """Whether every name still means the same object."""
        return all(read() is value for read, value in self._guards)


class _NoProofError(Exception):
    pass


def certify(tree: Any) -> Certificate | None:
    """A certificate for all modules and callables within `tree`, or `None`."""
    inspector = _Inspector()
    try:
        inspector.visit(tree)
    except _NoProofError:
        return None
    return Certificate(inspector.guards)


class _Inspector:
    def __init__(self) -> None:
        self.guards: list[Guard] = []
        self._seen: dict[int, Any] = {}  # by identity; holds the objects, so none is reused

    def _first_time(self, value: Any) -> bool:
        fresh = id(value) not in self._seen
        self._seen[id(value)] = value
        return fresh

    def visit(self, value: Any) -> None:
        """A part of the map or of its arguments: data, module, container or callable."""
        if isinstance(value, (*_SCALARS, np.ndarray, np.generic, jax.Array)):
            return
        if type(value) in (tuple, list):
            for item in value:
                self.visit(item)
        elif type(value) is dict:
            for item in value.values():
                self.visit(item)
        elif isinstance(value, eqx.Module):
            self._module(value)
        else:
            self._callable(value)

    def _module(self, module: eqx.Module) -> None:
        if not self._first_time(module):
            return
        self._class(type(module))
        for field in dataclasses.fields(module):  # pyright: ignore[reportArgumentType]
            value = getattr(module, field.name, None)
            if field.metadata.get("static", False):
                self._read(value)
            else:
                self.visit(value)

    def _class(self, cls: type) -> None:
        if not self._first_time(cls):
            return
        for base in cls.__mro__:
            if _trusted(base):
                continue
            self.guards.append((lambda base=base: len(vars(base)), len(vars(base))))
            fields = getattr(base, "__dataclass_fields__", {})
            for name in list(vars(base)):
                method = isinstance(getattr(base, name, None), types.FunctionType)
                data = name.startswith("__") and not method
                if not (name in fields or name in _GENERATED or data or name.startswith("_abc_")):
                    self._member(base, name)

    def _member(self, base: type, name: str) -> None:
        raw = vars(base)[name]
        self.guards.append((lambda: vars(base).get(name), raw))
        if isinstance(raw, property):
            for function in (raw.fget, raw.fset):
                if function is not None:
                    self._callable(function)
        elif name != "__class__":
            self._read(getattr(base, name))

    def _read(self, value: Any) -> None:
        """Something that code reads by name, and that must not change under that name."""
        if isinstance(value, Tracer):
            raise _NoProofError
        if isinstance(value, (*_SCALARS, jax.Array, np.dtype)):
            return
        if type(value) is tuple:
            for item in value:
                self._read(item)
        elif isinstance(value, types.ModuleType):
            if value.__name__.partition(".")[0] not in _TRUSTED:
                raise _NoProofError
        else:
            self._callable(value)

    def _callable(self, value: Any) -> None:
        if _trusted(value):
            return
        if isinstance(value, types.MethodType):
            if id(value.__self__) not in self._seen:  # a class method of a class at hand
                self.visit(value.__self__)
            self._callable(value.__func__)
        elif isinstance(value, types.FunctionType):
            if self._first_time(value):
                self._function(value)
        else:
            raise _NoProofError

    def _function(self, function: types.FunctionType) -> None:
        if function.__dict__.keys() - {"__wrapped__"}:
            raise _NoProofError
        self.guards += [
            (lambda: function.__code__, function.__code__),
            (lambda: function.__defaults__, function.__defaults__),
            (lambda: function.__kwdefaults__, function.__kwdefaults__),
            (lambda: len(function.__dict__), len(function.__dict__)),
        ]
        self._read(function.__defaults__)
        self._read(tuple((function.__kwdefaults__ or {}).values()))
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:
                raise _NoProofError from None
            self.guards.append((lambda cell=cell: cell.cell_contents, content))
            if not _is_enclosing_class(content):
                self._read(content)
        self._code(function.__code__, function.__globals__)

    def _code(self, code: types.CodeType, namespace: dict[str, Any]) -> None:
        for instruction in dis.get_instructions(code):
            if instruction.opname in _REFUSED_OPS:
                raise _NoProofError
            if instruction.opname in _READS_NAMES:
                self._global(instruction.argval, namespace)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, namespace)

    def _global(self, name: str, namespace: dict[str, Any]) -> None:
        if name in namespace:
            value = namespace[name]
            self.guards.append((lambda: namespace.get(name), value))
            self._read(value)
        elif name in _BUILTINS:
            # As long as no global of that name hides it.
            self.guards.append((lambda: namespace.get(name), None))
        else:
            raise _NoProofError


def _is_enclosing_class(value: Any) -> bool:
    """The cell `__class__` of a method that calls `super()`."""
    return isinstance(value, type) and issubclass(value, eqx.Module)


def _trusted(value: Any) -> bool:
    """Whether this very object is what a trusted library calls by its name.

    The name alone proves nothing: `functools.wraps` copies it, and an instance has the
    `__module__` of its class.
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    name = name or getattr(value, "__name__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return False
    if module.partition(".")[0] not in _TRUSTED:
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value
