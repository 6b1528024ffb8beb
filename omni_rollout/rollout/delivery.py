"""What every engine, here or behind a server, does with the results of one call of `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from omni_rollout.types import RolloutRequest, Trajectory

OnError = Callable[[RolloutRequest, Exception], None]
Result = tuple[RolloutRequest, Trajectory | Exception]


def delivered(results: Iterable[Result], asked: int, on_error: OnError | None) -> Iterator[Trajectory]:
    """The trajectories as they come; a request that fails does not touch the others.

    Raises:
        ExceptionGroup: of all failures, after the last of the `asked` results, where no `on_error` was told of them.
    """
    failures: list[Exception] = []
    for request, result in results:
        if not isinstance(result, Exception):
            yield result
        elif on_error is None:
            failures.append(result)
        else:
            on_error(request, result)
    if failures:
        raise ExceptionGroup(f"{len(failures)} of {asked} rollout requests failed", failures)
