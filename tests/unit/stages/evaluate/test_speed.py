import pytest

from fastserve.stages.evaluate.speed import alone, interleaved


class Machine:
    """Slows down with every round, as a machine that gets busier."""

    def __init__(self):
        self.pace = 1.0
        self.order = []

    def round_of(self, name, speed):
        def timed():
            self.order.append(name)
            self.pace *= 0.97
            return speed * self.pace

        return timed


def test_rounds_alternate_and_a_slowing_machine_favours_nobody():
    machine = Machine()
    found = interleaved(machine.round_of("parent", 100), machine.round_of("candidate", 120), rounds=4)
    assert machine.order[2:6] == ["parent", "candidate", "candidate", "parent"]
    assert found.speedup.value == pytest.approx(1.2, rel=1e-6)
    assert found.speedup.low < 1.2 < found.speedup.high


def test_the_first_round_of_each_is_not_counted():
    speeds = iter([1.0, 100.0, 100.0])
    found = interleaved(lambda: next(speeds), lambda: 50.0, rounds=2)
    assert list(found.parent) == [100.0, 100.0]


def test_every_round_is_reported():
    seen = []
    interleaved(lambda: 1.0, lambda: 1.0, rounds=5, done=lambda: seen.append(1))
    assert len(seen) == 12


def test_a_model_without_a_parent_is_timed_alone():
    speeds = iter([1.0, 10.0, 30.0, 20.0])
    assert alone(lambda: next(speeds), rounds=3) == 20.0
