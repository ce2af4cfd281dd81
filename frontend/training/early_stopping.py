"""Early stopping: when a metric that should fall has not fallen for a while."""

from __future__ import annotations

import math
from typing import Any, Self

from distaff.frontend import struct


class EarlyStopping(struct.PyTreeNode):
    """Watches a metric, such as the loss of each epoch; make a new one from each value with ``update``.

    >>> early_stop = EarlyStopping(min_delta=1e-3, patience=2)
    >>> for epoch in range(10):
    ...     early_stop = early_stop.update(train_epoch())
    ...     if early_stop.should_stop:
    ...         break

    Attributes: a fall by more than ``min_delta`` below ``best_metric`` is an improvement (``has_improved``, of the last
    update); ``should_stop`` after more than ``patience`` updates in a row (``patience_count``) without one.
    """

    min_delta: float = 0
    patience: int = 0
    best_metric: Any = math.inf
    patience_count: int = 0
    should_stop: bool = False
    has_improved: bool = False

    def reset(self) -> Self:
        """The state before any update."""
        return self.replace(best_metric=math.inf, patience_count=0, should_stop=False, has_improved=False)

    def update(self, metric: Any) -> Self:
        """The state after one more value of the metric."""
        if math.isinf(self.best_metric) or self.best_metric - metric > self.min_delta:
            return self.replace(best_metric=metric, patience_count=0, has_improved=True)
        return self.replace(
            patience_count=self.patience_count + 1,
            should_stop=self.patience_count >= self.patience or self.should_stop,
            has_improved=False,
        )
