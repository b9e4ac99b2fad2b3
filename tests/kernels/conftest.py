"""The interpreter without its search for builtins in every call, a third of the time of these tests."""

from __future__ import annotations

import importlib.util
import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def builtins_are_looked_up_once():
    """Triton looks through all names of its language in every call of a device function; which are builtins is fixed.

    Where Triton has no such function any more, nothing is changed.
    """
    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0") or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    own = getattr(interpreter, "_patch_builtin", None)
    patch = getattr(interpreter, "_patch_attr", None)
    if own is None or patch is None:
        yield
        return
    is_builtin, known = interpreter.tl.core.is_builtin, {}

    def looked_up_once(package, *arguments):
        if package not in known:  # nothing is replaced yet
            known[package] = [name for name, member in interpreter.inspect.getmembers(package) if is_builtin(member)]
        for name in known[package]:
            member = getattr(package, name)
            if is_builtin(member):
                patch(package, name, member, *arguments)

    interpreter._patch_builtin = looked_up_once
    yield
    interpreter._patch_builtin = own
