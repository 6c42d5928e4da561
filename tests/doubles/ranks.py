"""Several real ranks on this machine: forked processes that talk through gloo on loopback.

Forked, not spawned: the imports of torch and transformers are done once, in the parent (a test of three ranks took 12
CPU seconds against 36 with spawn). Each rank computes with one thread, since a forked process has no thread pool.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import transformers  # noqa: F401 - imported before forking, so that no rank does it again

from fastserve.cluster.processes import free_port

GRACE_SECONDS = 0.5
"""After a failure, how long the other ranks may still answer: the one heard first need not be the cause."""


class RankFailed(AssertionError):
    """A rank raised, died or came to no end; the message holds its traceback."""


def run_ranks(function: Callable[..., Any], size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(*args)` in `size` processes that form one gloo group; returns the results by rank.

    function: may be a closure; asks torch.distributed (or `Group.current()`) for its rank. Its result is pickled.
    timeout: seconds for all ranks together; also the time-out of each collective.

    Raises RankFailed with the traceback of the first rank that raised. Whatever happens, no process is left behind.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    ranks: list[tuple[Any, Connection]] = []
    try:
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(rank, size, port, function, args, theirs, timeout))
            with warnings.catch_warnings():
                # Python warns of forking with threads; ours are idle, and a rank uses none of them.
                warnings.filterwarnings("ignore", message=".*multi-threaded.*", category=DeprecationWarning)
                process.start()
            theirs.close()
            ranks.append((process, ours))
        return _results([connection for _, connection in ranks], timeout)
    finally:
        for process, connection in ranks:
            connection.close()
            process.join(timeout=0.1 if sys.exc_info()[0] else 5)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()


def _rank(
    rank: int,
    size: int,
    port: int,
    function: Callable[..., Any],
    args: Sequence[Any],
    results: Connection,
    timeout: float,
) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    code = 0
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        answer = (True, function(*args))
        results.send_bytes(pickle.dumps(answer))
    except BaseException:  # noqa: BLE001 - told to the test, whatever it is
        code = 1
        results.send_bytes(pickle.dumps((False, traceback.format_exc())))
    results.close()
    if code == 0 and dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # nothing of the parent's (atexit, pytest's capture) runs in a rank


def _results(connections: Sequence[Connection], timeout: float) -> list[Any]:
    """What each rank answered. The first failure ends it all: the others may wait for that rank for ever."""
    found: dict[int, Any] = {}
    failures: list[str] = []
    end = time.monotonic() + timeout
    while len(found) < len(connections):
        waiting: dict[Any, int] = {c: rank for rank, c in enumerate(connections) if rank not in found}
        ready: list[Any] = wait(list(waiting), timeout=GRACE_SECONDS if failures else max(0.0, end - time.monotonic()))
        if not ready and not failures:
            failures.append(f"after {timeout:g} s no answer from ranks {sorted(waiting.values())}")
        if not ready:
            break
        for connection in ready:
            rank = waiting[connection]
            try:
                fine, found[rank] = pickle.loads(connection.recv_bytes())
            except EOFError:
                fine, found[rank] = False, "died without an answer"
            if not fine:
                failures.append(f"rank {rank}: {found[rank]}")
    if failures:
        # A rank whose neighbour is gone complains of its connection; the cause is the other complaint.
        raise RankFailed("\n".join(sorted(failures, key=lambda text: "Connection " in text)))
    return [found[rank] for rank in range(len(connections))]
