"""What tensors from outside have besides their contents, and how both are put back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbatch.capture.trees import is_strided, parts_of

# A tensor, all of the memory that it lies in, a copy of what was there, and the tensor's version.
Saved = tuple[Tensor, Tensor, Tensor, int]


@dataclass(frozen=True)
class TensorState:
    """What a tensor has besides its contents."""

    tensor: Tensor
    requires_grad: bool
    grad: Tensor | None
    data: Tensor
    hooks: dict[int, Any]
    later_hooks: dict[int, Any]
    is_leaf: bool

    @staticmethod
    def of(t: Tensor) -> TensorState:
        grad = t.grad if t.is_leaf else None
        hooks, later_hooks = t._backward_hooks, t._post_accumulate_grad_hooks
        return TensorState(
            t, t.requires_grad, grad, t.data, dict(hooks or {}), dict(later_hooks or {}), t.is_leaf
        )

    def restore(self) -> None:
        """Put all of it back; only what has changed is written to, which others may see."""
        t = self.tensor
        self.restore_memory()
        if self.is_leaf and not t.is_leaf and not t._is_view():
            t.detach_()  # something was added to it that has a history
        if t.is_leaf:
            if t.requires_grad != self.requires_grad:
                t.requires_grad_(self.requires_grad)
            if t.grad is not self.grad:
                t.grad = self.grad
        self.restore_hooks()

    def restore_memory(self) -> None:
        """Let the tensor lie where it lay."""
        if not self.lies_as(self.tensor):
            self.tensor.data = self.data

    def restore_hooks(self) -> None:
        """Put back what is called with its gradient."""
        _put_back_hooks(self.tensor._backward_hooks, self.hooks)
        _put_back_hooks(self.tensor._post_accumulate_grad_hooks, self.later_hooks)

    def lies_as(self, other: Tensor) -> bool:
        """Tell whether another tensor lies where this one did, and in the same way."""
        return _geometry(other) == _geometry(self.data)


def _put_back_hooks(hooks: dict[int, Any] | None, before: dict[int, Any]) -> None:
    if hooks is not None and dict(hooks) != before:
        hooks.clear()
        hooks.update(before)


def _geometry(t: Tensor) -> tuple[Any, ...]:
    """Return where in memory a tensor lies, and how."""
    if is_strided(t):
        return t.data_ptr(), t.shape, t.stride()
    if t.is_nested:
        return ()  # its data cannot be exchanged
    parts = parts_of(t)
    return t.shape, [part.data_ptr() for part in parts], [part.shape for part in parts]


def put_content(whole: Tensor, content: Tensor) -> None:
    """Write a content into the memory that it was copied from."""
    storage = whole.untyped_storage()
    if storage.nbytes() < content.nbytes:
        storage.resize_(content.nbytes)  # it has been freed
    with torch.inference_mode(whole.is_inference()):
        whole.copy_(content)


def set_version(tensor: Tensor, version: int) -> None:
    """Let autograd take a tensor for written to so often."""
    if not tensor.is_inference():
        torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
