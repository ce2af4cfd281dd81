"""Metrics over batches: ``update`` adds a batch, ``compute`` gives the value so far, ``reset`` forgets."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from distaff.frontend import struct
from distaff.frontend.nnx.filters import Filter
from distaff.frontend.nnx.graph_functions import split
from distaff.frontend.nnx.pytrees import Pytree
from distaff.frontend.nnx.variables import Variable


class MetricState(Variable[jax.Array]):
    """What a metric has accumulated."""


class Metric(Pytree):
    """The base class of metrics: define ``reset``, ``update`` and ``compute``."""

    def reset(self) -> None:
        """Forget all batches."""
        raise NotImplementedError("A metric must implement `reset()`.")

    def update(self, **kwargs: Any) -> None:
        """Add a batch."""
        raise NotImplementedError("A metric must implement `update(**kwargs)`.")

    def compute(self) -> Any:
        """The value over all batches since the last ``reset``."""
        raise NotImplementedError("A metric must implement `compute()`.")

    def split(self, *filters: Filter) -> Any:
        """``nnx.split`` of this object."""
        return split(self, *filters)


def _argument(name: str, kwargs: dict[str, Any], mask: jax.Array | None) -> jax.Array:
    if name not in kwargs:
        raise TypeError(f"Expected keyword argument {name!r}, got {sorted(kwargs)}.")
    if mask is not None and isinstance(kwargs[name], int | float):
        raise ValueError(f"With a mask, {name} should be a jax array, got {kwargs[name]!r}.")
    return jnp.asarray(kwargs[name])


def _weights(values: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The mask at each of the values, and how many of them it lets pass, int32."""
    if mask is None:
        return jnp.ones((), values.dtype), jnp.asarray(values.size, jnp.int32)
    mask = jnp.broadcast_to(mask, values.shape)
    return mask, jnp.sum(mask).astype(jnp.int32)


class Average(Metric):
    """The mean of all values.

    >>> metric = nnx.metrics.Average("loss")
    >>> metric.update(loss=batch_loss)
    >>> metric.compute()
    """

    def __init__(self, argname: str = "values") -> None:
        """Average the keyword argument ``argname`` of ``update``."""
        self.argname = argname
        self.total = MetricState(jnp.array(0, jnp.float32))
        self.count = MetricState(jnp.array(0, jnp.int32))

    def reset(self) -> None:
        """Forget all batches."""
        self.total[...] = jnp.array(0, jnp.float32)
        self.count[...] = jnp.array(0, jnp.int32)

    def update(self, mask: jax.Array | None = None, **kwargs: Any) -> None:
        """Add the values of the argument ``argname``.

        Args:
            mask: which of them count; broadcast to their shape.

        Raises:
            TypeError: there is no such argument.
            ValueError: there is a mask, but the value is a Python number.
        """
        self._add(_argument(self.argname, kwargs, mask), mask)

    def _add(self, values: jax.Array, mask: jax.Array | None) -> None:
        weights, count = _weights(values, mask)
        self.total[...] += (values * weights).sum()
        self.count[...] += count

    def compute(self) -> jax.Array:
        """The mean; nan of no values."""
        return self.total[...] / self.count[...]  # type: ignore[no-any-return]


@struct.dataclass
class Statistics:
    """The mean of a stream of values, how far it may be off, and how far the values scatter (of the population)."""

    mean: jax.Array
    standard_error_of_mean: jax.Array
    standard_deviation: jax.Array


class Welford(Metric):
    """Mean and variance of all values, batches joined by the method of Welford and Chan, which does not cancel."""

    def __init__(self, argname: str = "values") -> None:
        """Take the values from the keyword argument ``argname`` of ``update``."""
        self.argname = argname
        self.count = MetricState(jnp.array(0, jnp.int32))
        self.mean = MetricState(jnp.array(0, jnp.float32))
        self.m2 = MetricState(jnp.array(0, jnp.float32))

    def reset(self) -> None:
        """Forget all batches."""
        self.count[...] = jnp.array(0, jnp.int32)
        self.mean[...] = jnp.array(0, jnp.float32)
        self.m2[...] = jnp.array(0, jnp.float32)

    def update(self, mask: jax.Array | None = None, **kwargs: Any) -> None:
        """Add the values of the argument ``argname``, or those of them that ``mask`` lets pass."""
        values = _argument(self.argname, kwargs, mask).astype(jnp.float32)
        weights, count = _weights(values, mask)
        mean = (values * weights).sum() / jnp.maximum(count, 1)
        m2 = (weights * (values - mean) ** 2).sum()
        before = self.count[...]
        total = jnp.maximum(before + count, 1)
        delta = mean - self.mean[...]
        self.mean[...] += delta * count / total
        self.m2[...] += m2 + delta * delta * count * before / total
        self.count[...] = before + count

    def compute(self) -> Statistics:
        """The ``Statistics``; their deviations are nan of no values."""
        count = self.count[...]
        deviation = jnp.sqrt(self.m2[...] / count)
        return Statistics(self.mean[...], deviation / jnp.sqrt(count), deviation)


class Accuracy(Average):
    """The share of predictions that equal their labels."""

    def __init__(self, threshold: float | None = None, *args: Any, **kwargs: Any) -> None:
        """Compare the largest of the logits of each class, or with ``threshold`` one logit a label, with the labels."""
        if threshold is not None and not isinstance(threshold, float):
            raise TypeError(f"Expected threshold to be a float, got {type(threshold)}.")
        self.threshold = threshold
        super().__init__(*args, **kwargs)

    def update(  # type: ignore[override]
        self, *, logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None, **_: Any
    ) -> None:
        """Add a batch.

        Args:
            logits: ``[..., classes]``; with a threshold, of the shape of the labels.
            labels: integers.
            mask: which labels count; broadcast to their shape.

        Raises:
            ValueError: the shapes do not fit, or the labels are no integers.
        """
        logits, labels = jnp.asarray(logits), jnp.asarray(labels)
        more = 1 if self.threshold is None else 0
        if logits.ndim != labels.ndim + more:
            kind = "multi-class" if more else "binary"
            raise ValueError(
                f"For {kind} classification, expected logits.ndim == labels.ndim{' + 1' if more else ''}, got "
                f"logits of shape {logits.shape} and labels of shape {labels.shape}."
            )
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(f"Expected integer labels, got {labels.dtype}.")
        predicted = logits.argmax(axis=-1) if self.threshold is None else logits >= self.threshold
        self._add(predicted == labels, mask)


class MultiMetric(Metric):
    """Several metrics, updated by one call.

    >>> metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
    >>> metrics.update(logits=logits, labels=labels, loss=loss)
    >>> metrics.compute()  # {"accuracy": ..., "loss": ...}
    """

    def __init__(self, **metrics: Metric) -> None:
        """Metrics by name; each becomes an attribute."""
        reserved = sorted(name for name in metrics if hasattr(MultiMetric, name))
        if reserved:
            raise ValueError(f"A metric can't be named {reserved[0]!r}, which is a method of MultiMetric.")
        self._metric_names = tuple(metrics)
        for name, metric in metrics.items():
            setattr(self, name, metric)

    def reset(self) -> None:
        """Reset all metrics."""
        for name in self._metric_names:
            getattr(self, name).reset()

    def update(self, **updates: Any) -> None:
        """Pass the arguments to all metrics; of a ``mask`` that is a dict, to each its own by name."""
        masks = updates.pop("mask", None)
        for name in self._metric_names:
            mask = masks.get(name) if isinstance(masks, dict) else masks
            getattr(self, name).update(**updates, **({} if mask is None else {"mask": mask}))

    def compute(self) -> dict[str, Any]:
        """The values by name."""
        return {name: getattr(self, name).compute() for name in self._metric_names}
