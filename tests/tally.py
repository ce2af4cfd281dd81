"""Adds up what an engine's steps report."""

from distaff.runtime.stats import FinishedStats, StepStats


class Tally:
    """A `StatLogger` with the totals of all steps."""

    def __init__(self) -> None:
        self.preemptions = 0
        self.cache_hits = 0
        self.compiles = 0

    def on_step(self, stats: StepStats) -> None:
        self.preemptions += stats.preemptions
        self.cache_hits += stats.prefix_cache_hits
        self.compiles = stats.compiles

    def on_first_token(self, seconds: float) -> None: ...

    def on_token_gap(self, seconds: float) -> None: ...

    def on_finished(self, stats: FinishedStats) -> None: ...
