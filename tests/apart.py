"""Work in processes of its own."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

T = TypeVar("T")


def apart(plan: Callable[[Any], T], *arguments: Any) -> list[T]:
    """What `plan` makes of each argument, in a process for each: torch keeps meshes of an earlier
    plan.

    They are not forked from this process, where other tests have loaded libraries with threads:
    such a child may crash before it begins.

    Raises:
        BrokenProcessPool: a process died.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["pretrain.dry_run.plan"])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        return list(pool.map(plan, arguments))
