"""What a training worker holds, part by part: by its share of the state, and whatever its share.

The parts are those of the engine (`stages.train.shard`): state is cut; what computes is gathered for a while; of
gradients there is as much as is on its way.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.plan.facts import TrainingFacts

TOGETHER_BYTES = 256 * 2**20
"""Most bytes, in fp32, of trained numbers beside frozen ones that stay gathered: many small exchanges cost more."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one worker. Those by share are of a worker that would have all of the state."""

    process: int
    frozen: int
    """Frozen weights that every worker keeps whole."""

    together: int
    """Trained weights that every worker keeps gathered, and their gradient."""

    gathered: int
    """Most that is gathered at once, within a step: the root and two blocks, one that computes and one that arrives."""

    gradients: int
    """Most gradient that is there before it is cut: the root's, a block's that is summed and one's that is computed."""

    loaded: int
    """The whole model, before it is cut: nothing else is there then but the process and the state."""

    cut: int
    """By share: state, and frozen weights where they are cut."""

    copy: int
    """By share: what checkpoints are written from."""

    received: int
    """By share: a worker's slice of the largest gradient, from every worker."""

    @property
    def fixed(self) -> int:
        """Bytes of a worker with no share, without activations."""
        return self.process + self.frozen + self.together + self.gathered + self.gradients

    @property
    def by_share(self) -> int:
        """Bytes that come on top for one with all of the state."""
        return self.cut + self.copy + self.received

    def peak(self, share: float, activations: float) -> int:
        """Most bytes at any time: in a step, or at the start."""
        step = self.fixed + round(share * self.by_share + activations)
        return max(step, self.at_start(share))

    def at_start(self, share: float) -> int:
        """Bytes when the state is cut out of the loaded model."""
        return self.process + self.loaded + round(share * self.cut)

    def kept(self, share: float) -> int:
        """Bytes of state and weights that a worker keeps between steps."""
        return round(share * self.cut) + self.frozen + self.together


def footprint(facts: TrainingFacts, workers: int, frozen_whole: bool) -> Footprint:
    """The parts of each of `workers` workers."""
    alone = workers == 1
    frozen_whole = frozen_whole or alone
    cut = facts.state_bytes + (0 if frozen_whole else facts.frozen_bytes)
    gathered = 0 if frozen_whole else facts.frozen_root_bytes + 2 * facts.frozen_unit_bytes
    frozen = facts.frozen_bytes if frozen_whole else 0
    numbers_bytes = facts.state_bytes // 4
    if alone or (facts.frozen_bytes and numbers_bytes <= TOGETHER_BYTES):
        # One worker adds gradients to its slices at once, and in fp32 computes on the masters themselves.
        masters = alone and facts.working_bytes == numbers_bytes
        together = (0 if masters else facts.working_bytes) + (0 if alone else numbers_bytes)
        received = 0 if alone else workers * numbers_bytes
        return Footprint(
            facts.process_bytes, frozen, together, gathered, 0, facts.loaded_bytes, cut, facts.copy_bytes, received
        )
    return Footprint(
        process=facts.process_bytes,
        frozen=frozen,
        together=0,
        gathered=gathered + facts.root_bytes + 2 * facts.unit_bytes,
        gradients=facts.root_bytes + 2 * facts.unit_bytes,
        loaded=facts.loaded_bytes,
        cut=cut,
        copy=facts.copy_bytes,
        received=workers * max(facts.root_bytes, facts.unit_bytes),
    )
