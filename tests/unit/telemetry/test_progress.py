"""Progress: a rate and an ETA out of counts, written no oftener than asked."""

from fastserve.telemetry.progress import Progress, Reporter


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_rate_and_eta_follow_from_the_counts() -> None:
    clock, written = Clock(), []
    reporter = Reporter(written.append, min_interval_seconds=0, now=clock)
    reporter.update(0, 40, "steps")
    clock.seconds += 10
    progress = reporter.update(20, 40, "steps", loss=2.5)
    assert (progress.rate_per_second, progress.eta_seconds) == (2.0, 10.0)
    assert written[-1] == progress.to_json()
    assert Progress.from_json(written[-1]) == progress


def test_updates_in_between_are_held_back_and_the_last_one_is_not_lost() -> None:
    clock, written = Clock(), []
    reporter = Reporter(written.append, min_interval_seconds=1.0, now=clock)
    for step in range(10):
        clock.seconds += 0.1
        reporter.update(step, 100, "steps")
    assert len(written) == 1
    reporter.close()
    assert written[-1]["done"] == 9
    reporter.close()
    assert len(written) == 2


def test_the_end_is_always_written() -> None:
    clock, written = Clock(), []
    reporter = Reporter(written.append, min_interval_seconds=1000, now=clock)
    reporter.update(0, 2, "rows")
    clock.seconds += 0.01
    reporter.update(2, 2, "rows")
    assert written[-1]["done"] == 2


def test_another_unit_begins_a_new_rate() -> None:
    clock = Clock()
    reporter = Reporter(lambda _: None, now=clock)
    reporter.update(0, 1000, "bytes")
    clock.seconds += 1
    reporter.update(900, 1000, "bytes")
    clock.seconds += 1
    assert reporter.update(0, 10, "layers").rate_per_second is None
    clock.seconds += 2
    assert reporter.update(4, 10, "layers").rate_per_second == 2.0


def test_metrics_are_kept_until_they_are_given_anew() -> None:
    reporter = Reporter(lambda _: None, now=Clock())
    reporter.update(1, 10, "steps", loss=3.0)
    assert reporter.update(2, 10, "steps", rate=1.0).metrics == {"loss": 3.0, "rate": 1.0}
