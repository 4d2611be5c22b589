"""Transformers: a callback of its ``Trainer`` that hands the inputs of each step to a monitor.

The trainer tells a callback neither inputs nor loss. So a hook on the model keeps the inputs of
its last training call, and the monitor runs on these.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

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

# Arguments by which the trainer describes all batches of an optimizer step: they are no samples.
NOT_OF_SAMPLES = ("num_items_in_batch",)


def monitor_callback(monitor: Monitor) -> Any:
    """Return a ``transformers.TrainerCallback`` for ``Trainer(callbacks=[..])``.

    The monitor watches a model that computes its own loss. It runs before each optimizer step, on
    the last inputs that the model was trained on, and numbers its lines by ``state.global_step``;
    with several processes the first one does so, for its own share of the batch. The trainer tells
    a callback no inputs, so they are taken where the model is called; the loss is that of these
    inputs alone, whatever else is accumulated. A ``MonitorWarning`` says so where the model is
    never called, because another one is trained.

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
        """What the trainer calls in the course of a run."""

        def __init__(self) -> None:
            self.last = _LastInputs(monitor)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.last.watch()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # Here the parameters still are those that the gradient was taken at.
            if state.is_world_process_zero:
                self.last.step(state)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.last.release()
            monitor.close()

    return MonitorCallback()


class _LastInputs:
    """The inputs of the model's last training call, for a monitor."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._inputs: dict[str, Any] | None = None
        self._hook: RemovableHandle | None = None
        self._in_step = False
        self._warned = False

    def watch(self) -> None:
        """Keep the inputs of every training call from now on."""
        self.release()
        model: Any = self._monitor.model
        self._hook = model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def release(self) -> None:
        """Take the hook off the model, and let the inputs go."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        self._inputs = None

    def step(self, state: Any) -> None:
        """Run the monitor on the last inputs, with the trainer's state; warn once without any."""
        if self._inputs is None:
            if not self._warned:
                warn(MSG_MONITOR_UNSEEN, MonitorWarning)
            self._warned = True
            return
        # The monitor calls the model as well, on parts of the batch.
        self._in_step = True
        try:
            self._monitor.step(self._inputs, step=state.global_step)
        finally:
            self._in_step = False

    def _keep(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Evaluation in between does not count.
        if model.training and not self._in_step:
            self._inputs = {k: v for k, v in kwargs.items() if k not in NOT_OF_SAMPLES}
