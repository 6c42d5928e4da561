"""Workers of one machine share memory instead of sending: nothing is copied that the other can read where it lies.

Between processes of one machine gloo goes through the loopback network, at about a gigabyte a second and at the cost
of processor time on both sides. Here all parameters are one mapping: each rank's masters are its slice of it, so a
gather moves nothing. Gradients are written to buffers that the owner of a slice reads in place. What is left are
signals of one byte on Unix sockets, which block without polling, order memory, and break when a neighbour dies. On
GPUs NCCL does the like by itself.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastserve.stages.train.group import Group

FOLDER = Path("/dev/shm")
"""Files here are memory."""

TIMEOUT_SECONDS = 1800.0
"""As long as torch lets a collective take; a neighbour that has died is noticed at once."""

_ALIGN_BYTES = 4096
_TOKEN_BYTES = 16


class Channel:
    """Signals of one kind: the n-th of one rank means the same as the n-th of every other."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        self._sockets = sockets
        self._heard = [0] * len(sockets)
        self.sent = 0

    def __del__(self) -> None:
        for one in self._sockets:
            one.close()

    def signal(self) -> int:
        """Tell all neighbours; returns the signal's number, from 1 on."""
        self.sent += 1
        try:
            for one in self._sockets:
                one.sendall(b"1")
        except OSError as error:
            raise RuntimeError(f"Connection to a neighbour lost: {error}") from error
        return self.sent

    def wait(self, number: int) -> None:
        """Until every neighbour has sent its signal `number`. Raises RuntimeError when one is gone."""
        for place, one in enumerate(self._sockets):
            while self._heard[place] < number:
                try:
                    heard = len(one.recv(256))
                except OSError as error:
                    raise RuntimeError(f"Connection to a neighbour lost: {error}") from error
                if not heard:
                    raise RuntimeError("Connection closed by a neighbour")
                self._heard[place] += heard


class Neighbours:
    """Memory that all ranks of a machine see."""

    def __init__(self, group: Group, memory: Any, whole_bytes: int, sockets: Sequence[Sequence[socket.socket]]) -> None:
        self._group = group
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._slots_begin = whole_bytes
        self._slots_bytes = (len(self._memory) - whole_bytes) // group.size
        self._taken = 0
        self._sums = 0
        self.ready = Channel(sockets[0])
        self.read = Channel(sockets[1])
        self._last_reads: dict[int, int] = {}
        self._numbers: torch.Tensor | None = None
        self._turn = 0

    def whole(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory common to all ranks, shape [numel]; ranks ask for the same in the same order."""
        begin = self._taken
        self._taken += padded(numel * dtype.itemsize)
        return self._memory[begin : begin + numel * dtype.itemsize].view(dtype)

    def buffer(self, rank: int, begin_bytes: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory that `rank` writes and all read, shape [numel], at a place among this rank's gradients."""
        begin = self._slots_begin + rank * self._slots_bytes + begin_bytes
        return self._memory[begin : begin + numel * dtype.itemsize].view(dtype)

    def own_buffer(self, begin_bytes: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """This rank's, once no neighbour reads what it held before."""
        self.read.wait(self._last_reads.get(begin_bytes, 0))
        return self.buffer(self._group.rank, begin_bytes, numel, dtype)

    def add_up(self, number: float) -> float:
        """Sum of every rank's `number`, in the order of the ranks, the same on all. Collective; a barrier too."""
        if self._numbers is None:
            self._numbers = self.whole(2 * self._group.size, torch.float64).view(2, -1)
        # Two rows in turn: who writes a row again has heard all ranks at the other one, so all have read this one.
        self._turn = 1 - self._turn
        row = self._numbers[self._turn]
        row[self._group.rank] = number
        self.ready.wait(self.ready.signal())
        return float(sum(row.tolist()))

    def is_in_use(self, begin_bytes: int) -> bool:
        """Whether this rank itself has not yet taken its part of the sum that lies there."""
        return self._last_reads.get(begin_bytes, 0) > self.read.sent

    def begin_sum(self, begin_bytes: int) -> int:
        """Say that the own buffer holds a gradient; returns the signal to wait for. Sums are taken in this order."""
        self._sums += 1
        self._last_reads[begin_bytes] = self._sums
        return self.ready.signal()


def numbers_bytes(size: int) -> int:
    """Bytes of `whole` that `Neighbours.add_up` takes among `size` ranks."""
    return padded(2 * size * torch.float64.itemsize)


def padded(size_bytes: int) -> int:
    """`size_bytes` up to the next page."""
    return -(-size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


def meet(group: Group, whole_bytes: int, slots_bytes: int) -> Neighbours | None:
    """Shared memory for all ranks of `group`; None where they do not all live on one machine. Collective.

    whole_bytes: for what is common to all. slots_bytes: for each rank's own gradients. Also None on a GPU, or when the
    machine grants too little shared memory (containers often have 64 MB of it).
    """
    if group.size == 1 or group.device.type != "cpu":
        return None
    place = _Place(whole_bytes + group.size * slots_bytes)
    try:
        offers: list[Any] = [None] * group.size
        dist.all_gather_object(offers, place.offer(group.rank))
        joined = place.join(offers, group)
        answers: list[Any] = [None] * group.size
        dist.all_gather_object(answers, joined)
        if not all(answers):
            return None
        return Neighbours(group, place.memory, whole_bytes, place.accept(group))
    finally:
        place.close()


class _Place:
    """Where the ranks meet: a file that is memory, and a socket each; both without a name as soon as all are there."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._path = ""
        self._token = b""
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sockets: list[dict[int, socket.socket]] = [{}, {}]
        self.memory: Any = None

    def offer(self, rank: int) -> tuple[str, str, bytes, bytes]:
        """Machine, file, socket, and what who connects must say."""
        token = secrets.token_bytes(_TOKEN_BYTES)
        name = b"\0fastserve-" + secrets.token_hex(8).encode()
        self._token = token
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            self._listening.bind(name)
            self._listening.listen(1024)
            if rank == 0:
                handle, self._path = tempfile.mkstemp(prefix="fastserve-", dir=FOLDER)
                try:
                    # Reserved now: a mapping without memory behind it would end in a SIGBUS later.
                    os.posix_fallocate(handle, 0, self._size_bytes)
                finally:
                    os.close(handle)
        except OSError:
            boot = f"none of rank {rank}"
        return boot, self._path, name, token

    def join(self, offers: Sequence[tuple[str, str, bytes, bytes]], group: Group) -> bool:
        """Map the first rank's file and connect to all lower ranks; whether that worked."""
        if len({boot for boot, *_ in offers}) > 1 or not offers[0][1]:
            return False
        try:
            handle = os.open(offers[0][1], os.O_RDWR)
            try:
                self.memory = mmap.mmap(handle, self._size_bytes)
            finally:
                os.close(handle)
            for lower in range(group.rank):
                for kind, sockets in enumerate(self._sockets):
                    sockets[lower] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                    sockets[lower].connect(offers[lower][2])
                    sockets[lower].sendall(offers[lower][3] + bytes([kind]) + group.rank.to_bytes(4, "big"))
        except (OSError, ValueError):
            return False
        return True

    def accept(self, group: Group) -> list[list[socket.socket]]:
        """Sockets of each kind to all neighbours, by rank."""
        while any(len(sockets) < group.size - 1 for sockets in self._sockets):
            self._listening.settimeout(TIMEOUT_SECONDS)
            fresh, _ = self._listening.accept()
            fresh.settimeout(TIMEOUT_SECONDS)
            said = fresh.recv(_TOKEN_BYTES + 5, socket.MSG_WAITALL)
            if len(said) == _TOKEN_BYTES + 5 and secrets.compare_digest(said[:_TOKEN_BYTES], self._token):
                self._sockets[said[_TOKEN_BYTES]][int.from_bytes(said[_TOKEN_BYTES + 1 :], "big")] = fresh
            else:
                fresh.close()
        found = [[sockets[rank] for rank in sorted(sockets)] for sockets in self._sockets]
        for one in (one for kind in found for one in kind):
            one.settimeout(TIMEOUT_SECONDS)
        self._sockets = [{}, {}]
        return found

    def close(self) -> None:
        """Take the names away; what is mapped and connected stays."""
        self._listening.close()
        for one in (one for sockets in self._sockets for one in sockets.values()):
            one.close()
        if self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
