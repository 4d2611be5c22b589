"""Transformers: a callback of its ``Trainer`` that hands the inputs of each step to a monitor."""

from __future__ import annotations

from typing import Any

from torch import nn

from unbatch.capture.program import name_of
from unbatch.errors import (
    MSG_EXTRA,
    MSG_MONITOR_TRAINER,
    MSG_MONITOR_UNSEEN,
    InputError,
    MonitorWarning,
    warn,
)
from unbatch.monitoring.monitor import Monitor

NOT_OF_SAMPLES = (
    "num_items_in_batch",
)  # what the trainer says about all batches of an optimizer step


def monitor_callback(monitor: Monitor) -> Any:
    """A ``transformers.TrainerCallback`` for ``Trainer(callbacks=[monitor_callback(monitor)])``.

    The monitor watches a model that computes its own loss, and is asked before each optimizer step, about the last
    inputs that the model was trained on, numbered by ``state.global_step``; with several processes the first one asks,
    about its own share. The trainer tells a callback no inputs, so they are taken where the model is called; the loss
    is that of these inputs alone, whatever else is accumulated. A ``MonitorWarning`` says so where the model is never
    called, because another one is trained.

    Raises ``ImportError`` where Transformers is missing, ``InputError`` for a monitor with a loss.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        message = MSG_EXTRA.format(
            what="A callback of the Trainer", package="transformers", extra="transformers"
        )
        raise ImportError(message) from error
    if monitor.loss is not None:
        raise InputError(MSG_MONITOR_TRAINER.format(loss=name_of(monitor.loss)))

    class MonitorCallback(TrainerCallback):
        """Asks before an optimizer step, when parameters still are those that the gradient was taken at."""

        def __init__(self) -> None:
            self.inputs: dict[str, Any] | None = None
            self.hook: Any = None
            self.asking = self.warned = False

        def seen(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if model.training and not self.asking:
                self.inputs = {k: v for k, v in kwargs.items() if k not in NOT_OF_SAMPLES}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.release()
            self.hook = monitor.model.register_forward_pre_hook(self.seen, with_kwargs=True)  # type: ignore[attr-defined]

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not state.is_world_process_zero:
                return
            if self.inputs is None:
                self.unseen()
                return
            self.asking = True
            try:
                monitor.step(self.inputs, step=state.global_step)
            finally:
                self.asking = False

        def unseen(self) -> None:
            if not self.warned:
                warn(MSG_MONITOR_UNSEEN, MonitorWarning)
            self.warned = True

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.release()
            monitor.close()

        def release(self) -> None:
            if self.hook is not None:
                self.hook.remove()
            self.hook = self.inputs = None

    return MonitorCallback()
