"""Faster equivalents of transformers' code: tried out, installed, removed, switched off as a whole.

A fast path gives the numbers of the plain code but for rounding. It is tried out once per model, on
rows of usual lengths, on the model's device and in its precision. Where the trial fails, or the
fast path raises later, the plain code runs instead, and the log says once which fast path is off,
why, and what is lost.

    PATH = FastPath("rows without padding", "padding tokens are computed", trial)
    hidden = PATH.run(model, lambda: fast(model, rows), lambda: plain(model, rows))

`switched(False)` turns all of them off (`resources.fast_paths`); `patched` is the one way in which
a model's code is replaced.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rlhf_core.errors import RLHFError
from rlhf_core.nn.probe_model import difference, once, probing, tolerance
from rlhf_core.system.host_memory import is_out_of_memory

logger = logging.getLogger("rlhf_core.fast_paths")

T = TypeVar("T")
Pairs = list[tuple[Tensor, Tensor]]  # (fast, plain): what a trial compares
Trial = Callable[..., Pairs]

# What code that does not fit a model raises.
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)

_on = True
_logged: set[tuple[str, str, str]] = set()
_in_step: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Unsuited(ValueError):
    """A model that a fast path is not made for; the text says why."""


# ------------------------------------------------------------------------------- the switch


def switched_on() -> bool:
    """Whether this process uses fast paths at all."""
    return _on


@contextlib.contextmanager
def switched(on: bool) -> Iterator[None]:
    """Fast paths on or off inside the block, for the whole process; as before after it."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def keep_in_step(model: nn.Module) -> None:
    """Fast paths of this model that fail after their trial raise, instead of falling back: other
    ranks take part in every one of its passes, and would wait for one that was run twice."""
    _in_step.add(model)


# ----------------------------------------------------------------------------- installation


@contextlib.contextmanager
def patched(*patches: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes replaced inside the block; after it, also by an exception, all is as before.

    Args:
        patches: object, attribute's name, value. An attribute that an object has from its class,
            such as a module's `forward`, is the class's again after the block.
    """
    with contextlib.ExitStack() as stack:
        for target, name, value in patches:
            own = name in vars(target) or _is_property(type(target), name)
            if own:
                stack.callback(setattr, target, name, getattr(target, name))
            setattr(target, name, value)
            if not own:
                stack.callback(delattr, target, name)
        yield


def _is_property(kind: type, name: str) -> bool:
    return inspect.isdatadescriptor(inspect.getattr_static(kind, name, None))


# -------------------------------------------------------------------------------- fast paths


class FastPath:
    """One fast path.

    Args:
        name: what it makes faster, for the log.
        lost: what the plain code costs, for the log.
        trial: runs a model both ways; returns pairs (fast, plain) of what must be equal. May raise
            `Unsuited`, or whatever a model raises that does not fit.
    """

    def __init__(self, name: str, lost: str, trial: Trial) -> None:
        self.name, self.lost = name, lost
        self._trial = trial
        self._passes = once(self.try_out)
        self._turned_off: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def works(self, model: Any) -> bool:
        """Whether a model may use it; tried out at the first call for this model."""
        return _on and model not in self._turned_off and self._passes(model)

    def forget(self, model: Any) -> None:
        """Try it out again the next time that it is asked about this model."""
        self._passes.forget(model)

    def run(self, model: Any, fast: Callable[[], T], plain: Callable[[], T]) -> T:
        """The result of `fast`, or of `plain` where this fast path is off or fails."""
        return run([self] if self.works(model) else [], model, fast, plain)

    def try_out(self, model: Any, *args: Any) -> bool:
        """Run the trial now, and log why it fails. Out of memory is raised, not logged."""
        try:
            with probing(model):
                for fast, plain in self._trial(model, *args):
                    _check(fast, plain)
        except FAILURES as error:
            if _must_propagate(error):
                raise
            self.log_off(model, error)
            return False
        return True

    def turn_off(self, model: nn.Module, reason: str | Exception) -> None:
        """Off for this model from now on; logged."""
        self._turned_off.add(model)
        self.log_off(model, reason)

    def log_off(self, model: nn.Module, reason: str | Exception) -> None:
        """Say which fast path is off, why and what is lost: once per reason and kind of model."""
        if isinstance(reason, Exception) and not isinstance(reason, Unsuited):
            reason = f"{type(reason).__name__}: {reason}"
        text, kind = str(reason), type(model).__name__
        if (self.name, kind, text) not in _logged:
            _logged.add((self.name, kind, text))
            logger.warning(
                "fast path off for %s: %s (%s). Lost: %s.", kind, self.name, text, self.lost
            )


def run(
    paths: Sequence[FastPath], model: nn.Module, fast: Callable[[], T], plain: Callable[[], T]
) -> T:
    """The result of `fast`, or of `plain` where there are no paths or `fast` raises.

    After that the paths are off for this model: which of them failed is not known.

    Raises:
        Whatever `plain` raises; out of memory and lost ranks also from `fast`, and everything for
        a model of `keep_in_step`.
    """
    if not paths:
        return plain()
    try:
        return fast()
    except FAILURES as error:
        if _must_propagate(error):
            raise
        if model in _in_step:
            names = ", ".join(path.name for path in paths)
            error.add_note(f"with fast paths ({names}): try resources.fast_paths false")
            raise
        result = plain()  # where it raises too, the fast path is not at fault
        for path in paths:
            path.turn_off(model, error)
        return result


def _check(fast: Tensor, plain: Tensor) -> None:
    share, allowed = difference(fast, plain), tolerance(plain)
    if not share <= allowed:
        raise Unsuited(
            f"its numbers differ by {share:.2g} of the largest, more than {allowed:.2g} for "
            f"{str(plain.dtype).removeprefix('torch.')}"
        )


def _must_propagate(error: Exception) -> bool:
    """Whether plain code could not go on either: no memory, another rank lost, a user's mistake."""
    return isinstance(error, (torch.distributed.DistError, RLHFError)) or is_out_of_memory(error)
