"""Machines that training and serving share: which training run gives up how many workers for which replicas.

A machine that a run gives up is a loan to one replica: the n-th of a model on a profile. The loan lasts while the model
wants n replicas there, and a while longer, so that a load that comes and goes does not move machines each time. Loans
stand in the run's wish, and the next decision reads them there: nothing is kept in mind between two of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

SHORT_SECONDS = 5.0
"""A replica waits so long for a machine before a run gives one up."""

GIVE_BACK_SECONDS = 60.0
"""A machine goes back to training when its replica has not been wanted for so long."""

RENEW_SECONDS = 10.0
"""How exactly is kept when a loan was last needed: each change of a wish is written to the store."""

SETTLE_SECONDS = 30.0
"""A run is left alone for so long after its wish has changed: each change starts its workers anew."""


@dataclass(frozen=True, slots=True)
class Loan:
    """One machine that went from training to serving."""

    model: str
    """The model that serves on it."""

    profile: str
    replica: int
    """It is for this one of the model's replicas on the profile, counted from 1."""

    needed_at: float
    """Unix seconds at which that replica was last wanted or there."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a training run is asked to keep to."""

    workers: Mapping[str, int] | None
    """Most workers by profile; None: as many as the manifest lists."""

    because: str
    at: float
    """Unix seconds at which `workers` was last changed."""

    loans: tuple[Loan, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values with the manifest's kind of keys."""
        return {
            "workers": None if self.workers is None else dict(self.workers),
            "because": self.because,
            "at": self.at,
            "loans": [
                {"model": loan.model, "profile": loan.profile, "replica": loan.replica, "neededAt": loan.needed_at}
                for loan in self.loans
            ],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Back from plain values. Raises KeyError, TypeError or ValueError for what is none."""
        workers = value["workers"]
        loans = (
            Loan(str(loan["model"]), str(loan["profile"]), int(loan["replica"]), float(loan["neededAt"]))
            for loan in value["loans"]
        )
        return cls(
            None if workers is None else {str(profile): int(count) for profile, count in workers.items()},
            str(value["because"]),
            float(value["at"]),
            tuple(loans),
        )


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """A training attempt that runs."""

    model: str
    priority: int
    """train.priority"""

    workers: Mapping[str, int]
    """What train.workers lists, by profile."""

    min_workers: int | None
    """train.elastic.minWorkers; None: the run keeps its size."""

    wish: Wish | None = None
    """What it was last asked for."""

    @property
    def loans(self) -> tuple[Loan, ...]:
        """Machines that it has given up."""
        return () if self.wish is None else self.wish.loans


@dataclass(frozen=True, slots=True)
class Need:
    """What a model that serves wants of a profile."""

    model: str
    profile: str
    replicas: int
    """Replicas that hold a machine now, those that start or end included."""

    waiting: int = 0
    """Replicas that are wanted and find no machine."""

    since: float | None = None
    """Unix seconds since when some have been waiting without a break."""

    priority: int = 0
    """serve.priority"""


def share(runs: Sequence[TrainingRun], needs: Sequence[Need], now: float) -> list[Wish | None]:
    """What each run shall keep to from now on; its old wish itself where nothing changes, None where there never was
    one.

    A replica that has found no machine for SHORT_SECONDS gets one of its own profile: from an elastic run with a
    smaller priority, the smallest first, then the one that is farthest above its minWorkers. Never is a run asked to
    go below minWorkers, and never more than are waiting. All loans end in time when nobody serves any more.
    """
    wanted = {(need.model, need.profile): need for need in needs}
    kept = [[loan for loan in _renewed(run, wanted, now) if _lasts(run, loan, wanted, now)] for run in runs]
    for number, run in enumerate(runs):
        if run.wish is not None and len(kept[number]) < len(run.loans) and not _settled(run, now):
            kept[number] = _renewed(run, wanted, now)
    for need in sorted(needs, key=lambda need: (-need.priority, need.since or now, need.model, need.profile)):
        for replica in _without_machine(need, [loan for loans in kept for loan in loans], now):
            giver = _giver(runs, kept, need, now)
            if giver is None:
                break
            kept[giver].append(Loan(need.model, need.profile, replica, now))
    return [_wish(run, tuple(loans), now) for run, loans in zip(runs, kept, strict=True)]


def kept_to(listed: Mapping[str, int], min_workers: int | None, wish: Wish | None) -> Mapping[str, int]:
    """Workers by profile that a run wants: what the manifest lists, or what it is asked to keep to.

    A wish that would take it below min_workers is not followed; it was made for another manifest.
    """
    if wish is None or wish.workers is None or min_workers is None:
        return listed
    asked = {profile: min(count, max(0, wish.workers.get(profile, count))) for profile, count in listed.items()}
    return asked if sum(asked.values()) >= min_workers else listed


def room_for(wanted: Mapping[str, int], usable: Mapping[str, int] | None, min_workers: int | None) -> Mapping[str, int]:
    """Workers by profile to start a run with now.

    wanted: by its wish, or as the manifest lists. usable: places of each profile that nobody else has taken; None when
    that is not known. A run of a fixed size, and one that would fall below min_workers, is started as it is wanted, and
    waits for its machines.
    """
    if usable is None or min_workers is None:
        return wanted
    size = {profile: min(count, max(0, usable.get(profile, 0))) for profile, count in wanted.items()}
    return size if sum(size.values()) >= min_workers else wanted


def _renewed(run: TrainingRun, wanted: Mapping[tuple[str, str], Need], now: float) -> list[Loan]:
    """The run's loans; those whose replica is still wanted or there are needed now."""
    found = []
    for loan in run.loans:
        need = wanted.get((loan.model, loan.profile))
        needed = need is not None and need.replicas + need.waiting >= loan.replica
        stale = now - loan.needed_at >= RENEW_SECONDS
        found.append(replace(loan, needed_at=now) if needed and stale else loan)
    return found


def _lasts(run: TrainingRun, loan: Loan, wanted: Mapping[tuple[str, str], Need], now: float) -> bool:
    need = wanted.get((loan.model, loan.profile))
    outranked = need is None or need.priority > run.priority
    return run.min_workers is not None and outranked and now - loan.needed_at < GIVE_BACK_SECONDS


def _settled(run: TrainingRun, now: float) -> bool:
    return run.wish is None or now - run.wish.at >= SETTLE_SECONDS


def _without_machine(need: Need, loans: Sequence[Loan], now: float) -> list[int]:
    """The model's replicas on this profile, by number, that wait and that no loan is for yet."""
    if need.since is None or now - need.since < SHORT_SECONDS:
        return []
    lent = {loan.replica for loan in loans if (loan.model, loan.profile) == (need.model, need.profile)}
    first = need.replicas + 1
    return [replica for replica in range(first, first + need.waiting) if replica not in lent]


def _giver(runs: Sequence[TrainingRun], kept: Sequence[Sequence[Loan]], need: Need, now: float) -> int | None:
    """Place in `runs` of the one that gives a machine up; None when none may."""
    found = []
    for number, (run, loans) in enumerate(zip(runs, kept, strict=True)):
        if run.min_workers is None or run.priority >= need.priority or not _settled(run, now):
            continue
        here = sum(loan.profile == need.profile for loan in loans)
        above = sum(run.workers.values()) - len(loans) - run.min_workers
        if above > 0 and run.workers.get(need.profile, 0) > here:
            found.append((run.priority, -above, run.model, number))
    return min(found)[-1] if found else None


def _wish(run: TrainingRun, loans: tuple[Loan, ...], now: float) -> Wish | None:
    """The wish for these loans; the old one where it says the same."""
    if loans == run.loans:
        return run.wish
    workers = {
        profile: count - sum(loan.profile == profile for loan in loans) for profile, count in run.workers.items()
    }
    new = Wish(workers if loans else None, _because(run, loans), now, loans)
    if run.wish is not None and run.wish.workers == new.workers:
        return replace(new, at=run.wish.at)
    return new


def _because(run: TrainingRun, loans: Sequence[Loan]) -> str:
    if not loans:
        return "the machines lent to serving are free again, so training takes them back"
    lent: dict[tuple[str, str], int] = {}
    for loan in loans:
        lent[loan.model, loan.profile] = lent.get((loan.model, loan.profile), 0) + 1
    said = [
        f"{count} machine{'s' if count > 1 else ''} of profile {profile} to {model}"
        for (model, profile), count in sorted(lent.items())
    ]
    return f"training lends {' and '.join(said)}, whose serve.priority is above train.priority {run.priority}"
