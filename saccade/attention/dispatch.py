"""Who can run where, and why not: the table of backends of every operator, and the ways to choose among them.

An operator lists its backends in order of preference. Each has a pure predicate that looks at the facts of a call and
says yes or no with a reason. ``"auto"`` takes the first that can; a name given as the ``backend`` argument, else by
:func:`use_backend`, else in the environment variable ``SACCADE_ATTENTION_BACKEND`` is taken or refused with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from saccade.errors import BackendError, suggest

__all__ = ["Backend", "Decision", "Explanation", "Operator", "explain", "operators", "register", "use_backend"]

VARIABLE = "SACCADE_ATTENTION_BACKEND"


class Decision(NamedTuple):
    """Whether a backend can run a call, why (or how), and whether ``"auto"`` may take it."""

    ok: bool
    reason: str
    automatic: bool = True


@dataclass(frozen=True)
class Backend:
    """One way to compute an operator.

    Args:
        name: Word by which users choose it: ``triton``, ``sdpa`` (torch's fused kernels) or ``reference``.
        can_run: Looks at the problem, raises nothing, touches no device.
        run: Takes the operator's arguments, all positional, without ``backend``.
    """

    name: str
    can_run: Callable[[Any], Decision]
    run: Callable[..., Any]


@dataclass(frozen=True)
class Operator:
    """A public function and its backends.

    Args:
        function: The public function; its name is the operator's.
        summary: One line for ``saccade list ops``.
        backends: In order of preference; the last is ``reference``, which can always run.
        describe: Takes the function's arguments but ``backend``; checks them and returns the problem.
        example: Takes ``(B, H, N, D)``, dtype, device and seed; returns the function's positional arguments.
    """

    function: Callable[..., Any]
    summary: str
    backends: tuple[Backend, ...]
    describe: Callable[..., Any]
    example: Callable[[tuple[int, int, int, int], torch.dtype, str, int], tuple[Any, ...]]

    @property
    def name(self) -> str:
        """The public function's name."""
        return self.function.__name__

    def call(self, positional: tuple[Any, ...], options: dict[str, Any], backend: str) -> Any:  # noqa: ANN401
        """Check the arguments, choose a backend and run it; what a public function does.

        Args:
            positional: Its positional arguments; the first is a tensor.
            options: Its keyword arguments but ``backend``, in the order of its signature.
            backend: Its argument of that name.
        """
        arguments = (*positional, *options.values())
        if has_torch_function(arguments):  # torch.fx records the public function as one node
            return handle_torch_function(self.function, arguments, *positional, **options, backend=backend)
        device = positional[0].device.type
        # Under autocast inputs are lowered as for SDPA, and what happens inside keeps the precision it asks for.
        if device != "meta" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            lowered = tuple(lower(argument, dtype) for argument in positional)
            with torch.autocast(device, enabled=False):
                return self.call(lowered, options, backend)
        chosen = self.choose(self.describe(*positional, **options), backend)
        if chosen.name == "triton" and device == "cuda" and not torch.compiler.is_compiling():
            with torch.cuda.device(positional[0].device):  # Triton launches on the current device, wherever tensors are
                return chosen.run(*arguments)
        return chosen.run(*arguments)

    def choose(self, problem: Any, backend: str) -> Backend:  # noqa: ANN401 (each operator has its own problem)
        """Return the backend that runs this problem.

        Args:
            problem: What ``describe`` returned.
            backend: The public function's argument of that name.

        Raises:
            BackendError: If a backend was asked for by name that does not exist or cannot run the problem.
        """
        name, origin = requested(backend)
        if name == "auto":
            decisions = ((candidate, candidate.can_run(problem)) for candidate in self.backends)
            return next(candidate for candidate, decision in decisions if decision.ok and decision.automatic)
        names = [candidate.name for candidate in self.backends]
        if name not in names:
            raise BackendError(
                f"{self.name} has no backend {name!r} (asked for by {origin}); it has auto, {', '.join(names)}."
                + suggest(name, names)
            )
        candidate = self.backends[names.index(name)]
        decision = candidate.can_run(problem)
        if not decision.ok:
            raise BackendError(
                f"{self.name} cannot run on backend {name!r} (asked for by {origin}): {decision.reason}. "
                "Use 'auto' to take the best one that can."
            )
        return candidate

    def explain(self) -> Explanation:
        """Explain the choice for a small example on this machine's GPU, or on its CPU where it has none."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return explain(self.function, *self.example((1, 2, 16, 8), torch.float32, device, 0))


class Row(NamedTuple):
    """One line of an explanation."""

    backend: str
    ok: bool
    reason: str
    automatic: bool = True


@dataclass(frozen=True)
class Explanation:
    """Which backend runs one call, and what every backend says about it; ``str()`` gives a table.

    Args:
        operator: Name of the operator.
        problem: The call in words.
        chosen: Backend that runs it, or ``None`` if the one asked for cannot.
        requested: Backend asked for, ``"auto"`` if none.
        rows: Every backend in order of preference.
    """

    operator: str
    problem: str
    chosen: str | None
    requested: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.problem}"]
        for row in self.rows:
            mark = "->" if row.backend == self.chosen else "  "
            lines.append(f"{mark} {row.backend:<10} {'yes' if row.ok else 'no':<4} {row.reason}")
        if self.chosen is None:
            lines.append(f"   {self.requested!r} was asked for and cannot run this call")
        return "\n".join(lines)


def lower(argument: Any, dtype: torch.dtype) -> Any:  # noqa: ANN401 (an argument of any operator)
    """Return a floating-point tensor below float64 in ``dtype``, anything else as it is."""
    is_lowered = isinstance(argument, Tensor) and argument.is_floating_point() and argument.dtype != torch.float64
    return argument.to(dtype) if is_lowered else argument


registry: dict[str, Operator] = {}
override = "auto"  # set by use_backend


def register(operator: Operator) -> Operator:
    """Add an operator to the registry that ``explain``, ``saccade list ops`` and ``saccade bench`` walk."""
    registry[operator.name] = operator
    return operator


def operators() -> tuple[Operator, ...]:
    """Return every registered operator, sorted by name."""
    return tuple(registry[name] for name in sorted(registry))


def requested(backend: str) -> tuple[str, str]:
    """Return the backend in force and who asked for it: argument, then :func:`use_backend`, then the environment."""
    if backend != "auto":
        return backend, "backend="
    if override != "auto":
        return override, "use_backend"
    return os.environ.get(VARIABLE) or "auto", VARIABLE


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operators called inside with one backend, wherever they are not given one as an argument.

    Holds for the whole process, the threads of autograd included, until the block ends.

    Args:
        name: A backend that at least one operator has, or ``"auto"``, under which the environment variable counts.

    Raises:
        BackendError: If no operator has a backend of that name; inside, by an operator that cannot run on it.

    Example:
        >>> with use_backend("reference"):
        ...     str(explain(attention, *[torch.ones(1, 1, 2, 4)] * 3).chosen)
        'reference'
    """
    global override
    known = sorted({backend.name for operator in registry.values() for backend in operator.backends})
    if name not in ("auto", *known):
        raise BackendError(
            f"unknown attention backend {name!r}; known: auto, {', '.join(known)}.{suggest(name, known)}"
        )
    previous, override = override, name
    try:
        yield
    finally:
        override = previous


def explain(function: Callable[..., Any], /, *args: Any, backend: str = "auto", **options: Any) -> Explanation:  # noqa: ANN401
    """Say which backend would run ``function(*args, **options)``, and what speaks against the others.

    Args:
        function: A public operator, e.g. ``saccade.attention.attention``.
        args: Its positional arguments.
        backend: As in the call.
        options: Its other keyword arguments.

    Raises:
        ShapeError: If the operator would refuse the arguments.
        BackendError: If ``function`` is not an operator.
    """
    operator = registry.get(function.__name__)
    if operator is None or operator.function is not function:
        raise BackendError(
            f"{function.__name__} is not an attention operator; these are: {', '.join(sorted(registry))}."
        )
    problem = operator.describe(*args, **options)
    rows = tuple(Row(candidate.name, *candidate.can_run(problem)) for candidate in operator.backends)
    name, _ = requested(backend)
    usable = [row.backend for row in rows if row.ok and (row.automatic if name == "auto" else row.backend == name)]
    return Explanation(operator.name, str(problem), usable[0] if usable else None, name, rows)
