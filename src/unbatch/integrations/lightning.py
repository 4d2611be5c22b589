"""Lightning: a callback that hands each training batch to a monitor.

Lightning goes by two names (``lightning.pytorch`` and ``pytorch_lightning``); either will do.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from unbatch.errors import MSG_EXTRA, MSG_MONITOR_SPLIT, InputError
from unbatch.monitoring.monitor import Monitor, in_short

Split = Callable[[Any], tuple[Any, Any]]


def monitor_callback(monitor: Monitor, split: Split | None = None) -> Any:
    """Return a ``lightning.pytorch.Callback``, for ``Trainer(callbacks=[..])``.

    The monitor runs before each batch is trained on, in the precision of the trainer, and numbers
    its lines by ``trainer.global_step``; with several processes the first one does so, for its own
    share of the batch. ``split``: from a batch to ``(X, y)`` as the monitor takes them; by default
    the batch is such a pair, or, without a loss, all inputs. A batch that is neither, and what
    ``monitor.step`` refuses, stops the training with an ``InputError``.

    Raises ``ImportError`` where Lightning is missing.
    """
    by_loss = _all_inputs if monitor.loss is None else _pair
    split_batch = split or by_loss

    class MonitorCallback(_callback_class()):  # type: ignore[misc]
        """What the trainer calls in the course of a run."""

        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            # At the start of a batch the parameters are those that its gradient is taken at.
            if not trainer.is_global_zero:
                return
            # The precision plugin casts as it does for the training step.
            with trainer.precision_plugin.train_step_context():
                X, y = split_batch(batch)
                monitor.step(X, y, step=trainer.global_step)

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if stage == "fit":
                monitor.close()

    return MonitorCallback()


def _all_inputs(batch: Any) -> tuple[Any, Any]:
    """Return a batch for a model that computes its own loss."""
    return batch, None


def _pair(batch: Any) -> tuple[Any, Any]:
    """Return inputs and targets. Raises ``InputError`` where the batch is no such pair."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise InputError(MSG_MONITOR_SPLIT.format(given=in_short(batch)))
    X, y = batch
    return X, y


def _callback_class() -> Any:
    """Return Lightning's base class. Raises ``ImportError`` with the extra that installs it."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return import_module(name).Callback
        except ImportError as error:
            missing = error
    message = MSG_EXTRA.format(what="A Lightning callback", package="lightning", extra="lightning")
    raise ImportError(message) from missing
