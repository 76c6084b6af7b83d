"""A function over many items on a Ray cluster: whoever dies, no item is lost and none is done wrongly.

A worker is an actor that holds what is dear to build (a model) and works on ``LANES`` items at a time. It gets items
only once it is up, so that nodes may come late. When it dies, a new one takes its place and its items go back into the
queue; an item that was there at two deaths waits until all others are done and is then tried by itself, so that it is
known to be the cause if it fails again.
"""

from __future__ import annotations

import os
import platform
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from saccade import __version__
from saccade.errors import ConfigError, DataError, MissingResourceError, SaccadeError, require

__all__ = ["Fleet"]

T = TypeVar("T")
R = TypeVar("R")
LANES = 2  # items a worker has at a time: one can be prepared while another is computed
DEATHS = 2  # after so many an item is tried by itself
CONNECTING_S = 10.0
FAILED_STARTS = 3  # in a row: then nothing is going to start


@dataclass
class Desk(Generic[T, R]):
    """What runs in a worker process.

    Args:
        build: Makes the function, once for each process.
        version: Of saccade, where the run was started.
    """

    build: Callable[[], Callable[[T], R]]
    version: str

    def start(self) -> None:
        """Build the function.

        Raises:
            ConfigError: If this node has another version of saccade.
        """
        if self.version != __version__:
            raise ConfigError(
                f"Node {platform.node()} has saccade {__version__}, the run was started with {self.version}. "
                "Install one version on all nodes."
            )
        self.function = self.build()

    def work(self, item: T) -> R:
        """Return the function's result."""
        return self.function(item)


class Fleet:
    """A connection to a Ray cluster; use it as a context manager.

    Args:
        address: ``"local"`` starts a cluster on this machine for as long as the connection lasts; ``"auto"``,
            ``HOST:PORT`` or ``ray://HOST:PORT`` joins one; ``None`` means ``RAY_ADDRESS``, and ``"local"`` without it.

    Raises:
        MissingDependencyError: If Ray is not installed.
        MissingResourceError: On entry, if the cluster cannot be reached.
    """

    def __init__(self, address: str | None = None) -> None:
        self.ray: Any = require("ray", extra="ray", purpose="Working on a Ray cluster")
        self.address = address or os.environ.get("RAY_ADDRESS") or "local"
        self.is_guest = False

    def __enter__(self) -> Self:
        self.is_guest = self.ray.is_initialized()  # a program that has connected itself keeps its connection
        if not self.is_guest:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a local cluster reports to nobody
            os.environ.setdefault(
                "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
            )  # what Ray will do anyway, without its warning
            try:
                check_port(self.address)
                self.ray.init(
                    address=self.address,
                    log_to_driver=False,
                    logging_level="error",
                    **({"include_dashboard": False} if self.address == "local" else {}),
                )
            except (OSError, ValueError, RuntimeError) as error:
                raise MissingResourceError(
                    f"The Ray cluster {self.address!r} cannot be reached ({' '.join(str(error).split())}). Check "
                    "--ray-address or RAY_ADDRESS; `ray status` on a node tells whether it runs."
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.is_guest:
            self.ray.shutdown()

    def nodes(self) -> list[dict[str, float]]:
        """Return the resources of each node (``"CPU"``, ``"GPU"``, ...)."""
        return [dict(node["Resources"]) for node in self.ray.nodes() if node["Alive"]]

    def has_gpus(self) -> bool:
        """Whether any node has a GPU."""
        return any(node.get("GPU", 0) >= 1 for node in self.nodes())

    @property
    def largest_node(self) -> int:
        """Cores of the largest node."""
        return max((int(node.get("CPU", 0)) for node in self.nodes()), default=0)

    def room(self, cpus: int, gpus: int) -> int:
        """Return how many workers fit on the cluster.

        Args:
            cpus: Cores of a worker, at least 1.
            gpus: GPUs of a worker.

        Raises:
            ConfigError: If not even one does.
        """
        nodes = self.nodes()
        fitting = [
            min([int(node.get("CPU", 0) // cpus), *([int(node.get("GPU", 0) // gpus)] if gpus else [])])
            for node in nodes
        ]
        if not sum(fitting):
            raise ConfigError(
                f"No node of the Ray cluster has {cpus} CPUs{f' and {gpus} GPU' if gpus else ''} for a worker; the "
                f"largest of its {len(nodes)} nodes has {self.largest_node} CPUs. Lower -j, or choose another --device."
            )
        return sum(fitting)

    def call(self, function: Callable[..., R], *arguments: object, gpus: int = 0) -> R:
        """Return what a function says on some node.

        Args:
            function: Anything that can be pickled.
            arguments: Its arguments.
            gpus: GPUs that the node must have.
        """
        result: R = self.ray.get(self.ray.remote(num_cpus=1, num_gpus=gpus)(apply).remote(function, *arguments))
        return result

    def map(
        self,
        build: Callable[[], Callable[[T], R]],
        items: Sequence[T],
        *,
        cpus: int = 1,
        gpus: int = 0,
        say: Callable[[str], None] = lambda line: None,
    ) -> Iterator[tuple[T, R | DataError]]:
        """Yield each item with the function's result, as they finish.

        Args:
            build: Makes the function on a worker, which may be called from ``LANES`` threads.
            items: Hashable, and different from each other.
            cpus: Cores of a worker.
            gpus: GPUs of a worker.
            say: Told about workers that died.

        Yields:
            ``(item, result)``; instead of a result a ``DataError`` with the reason ``"worker_died"`` for an item that
            no worker survived.

        Raises:
            SaccadeError: What ``build`` or the function raised.
            ConfigError: If workers cannot start.
        """
        if not items:
            return
        crew: Crew[T, R] = Crew(self.ray, self.ray.put(build), {"num_cpus": cpus, "num_gpus": gpus}, say)
        try:
            for _ in range(min(self.room(cpus, gpus), len(items))):
                crew.hire()
            yield from crew.work(items)
        finally:
            crew.dismiss()


def check_port(address: str) -> None:
    """Connect to ``HOST:PORT`` once; Ray itself tries for minutes.

    Raises:
        OSError: If nobody listens there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECTING_S).close()


def apply(function: Callable[..., R], *arguments: object) -> R:
    """Return what a function says; a task of Ray's must be a plain function."""
    return function(*arguments)


class Crew(Generic[T, R]):
    """The workers of one ``Fleet.map`` and what they have in hand."""

    def __init__(self, ray: Any, build: object, resources: dict[str, int], say: Callable[[str], None]) -> None:  # noqa: ANN401
        self.ray, self.build, self.say = ray, build, say
        self.actor = ray.remote(**resources, max_restarts=0, max_concurrency=LANES)(Desk)
        self.starting: dict[Any, Any] = {}  # desks by the reference that says they are up
        self.busy: dict[Any, tuple[Any, T]] = {}  # desk and item by the reference to the result
        self.up: list[Any] = []
        self.failed_starts = 0

    def hire(self) -> None:
        """Ask for one more worker."""
        desk = self.actor.remote(self.build, __version__)
        self.starting[desk.start.remote()] = desk

    def dismiss(self) -> None:
        """End all workers."""
        for desk in (*self.starting.values(), *self.up):
            self.ray.kill(desk)

    def work(self, items: Sequence[T]) -> Iterator[tuple[T, R | DataError]]:
        """Yield each item with its result."""
        waiting, suspects = deque(items), deque[T]()
        deaths: Counter[T] = Counter()
        while waiting or suspects or self.busy:
            alone = not waiting and not self.busy
            self.hand_out(suspects if alone else waiting, 1 if alone else LANES * len(self.up))
            (reference,), _ = self.ray.wait([*self.starting, *self.busy], num_returns=1)
            if reference in self.starting:
                self.welcome(reference)
                continue
            desk, item = self.busy.pop(reference)
            result = self.result(reference)
            if not isinstance(result, DataError):
                yield item, result
                continue
            self.replace(desk)
            deaths[item] += 1
            if deaths[item] > DEATHS:
                yield item, result
            else:
                (waiting if deaths[item] < DEATHS else suspects).append(item)
                self.say(f"{result} Its items are tried again.")

    def hand_out(self, queue: deque[T], most: int) -> None:
        """Give items to workers that are up and have a lane free, until ``most`` are in hand."""
        for _ in range(LANES):
            for desk in self.up:
                load = sum(owner is desk for owner, _ in self.busy.values())
                if queue and load < LANES and len(self.busy) < most:
                    item = queue.popleft()
                    self.busy[desk.work.remote(item)] = (desk, item)

    def result(self, reference: Any) -> R | DataError:  # noqa: ANN401
        """Return a result, or what to say of a worker that died.

        Raises:
            SaccadeError: What was raised on the worker.
        """
        errors = self.ray.exceptions
        try:
            value: R = self.ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, SaccadeError):
                raise error.cause from None
            raise
        except (errors.RayActorError, errors.OutOfMemoryError, errors.NodeDiedError) as error:
            return DataError(f"A worker died ({first_line(error)}).", reason="worker_died")
        return value

    def welcome(self, reference: Any) -> None:  # noqa: ANN401
        """Count a worker that is up; replace one that died on the way.

        Raises:
            ConfigError: If several in a row did.
        """
        desk = self.starting.pop(reference)
        result = self.result(reference)
        if not isinstance(result, DataError):
            self.failed_starts = 0
            self.up.append(desk)
            return
        self.failed_starts += 1
        if self.failed_starts >= FAILED_STARTS:
            raise ConfigError(f"{result} None starts: every node of the Ray cluster needs the same saccade and Python.")
        self.hire()

    def replace(self, desk: Any) -> None:  # noqa: ANN401
        """Have a new worker for one that died."""
        if desk in self.up:
            self.up.remove(desk)
            self.hire()


def first_line(error: Exception) -> str:
    """Return the first line of an error of Ray's, without a full stop."""
    return str(error).strip().splitlines()[0].strip().rstrip(".")
