"""The predictions as a linear map of the parameters: one forward pass, kept; tangents pushed forward, cotangents pulled
back through it as often as one likes.

A tangent goes through the recorded steps with what each op had as its arguments: through an op that is linear in one of
them by the op itself, through any other by forward mode of that op alone. So no value is computed twice but those of
elementwise ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map

from unbatch import live
from unbatch.compositions import SPELLED_OUT
from unbatch.derivatives import forward_mode, gradients, held, laid_out, norm_held, solid, unmoved
from unbatch.errors import MSG_NO_TANGENT, StructureError
from unbatch.graph import Graph, Ref, Step, flat, is_ref
from unbatch.purity import HIDDEN_WRITES, untouched
from unbatch.route import Route
from unbatch.setting import Setting
from unbatch.tangents import RULES, Ran, Tangents, through_op

NEEDS_OUTPUTS = ("tanh", "sigmoid", "_softmax", "native_layer_norm", "native_batch_norm")


class Window(NamedTuple):
    """Where a value lies in its memory, of which ``whole`` is the number of entries."""

    whole: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass
class _Tangents:
    """By value; those that share a memory which is written to share that of their tangents as well."""

    graph: Graph
    windows: Mapping[int, Window]
    values: dict[int, Tensor] = field(default_factory=dict)
    memories: dict[int, Tensor] = field(default_factory=dict)

    def get(self, i: int) -> Tensor | None:
        if i not in self.windows:
            return self.values.get(i)
        memory = self.memories.get(self.graph.values[i].storage)
        return None if memory is None else memory.as_strided(*self.windows[i][1:]).clone()

    def put(self, new: Ref | None, old: Ref | None, t: Tensor | None) -> None:
        """``old``: what lies where ``new`` does, if that was written to."""
        if new is None or old is None:
            return
        window, storage = self.windows.get(new.index, self.windows.get(old.index)), self.graph.values[new.index].storage
        if window is not None and storage in self.memories:
            self.memories[storage].as_strided(*window[1:]).copy_(t if t is not None else torch.zeros(()))
        elif window is not None and t is not None:
            self.memories[storage] = t.new_zeros(window.whole)
            self.memories[storage].as_strided(*window[1:]).copy_(t)
        elif t is not None:
            self.values[new.index] = t


@dataclass
class Linearised:
    """``J`` at the parameters of this moment. ``predictions``: their values, by number in the graph.

    ``watched``: values in the middle, whose places in the graph of derivatives are kept in ``edges``.
    """

    setting: Setting
    parameters: Mapping[str, Tensor]
    frozen: bool = False
    watched: Sequence[int] = ()
    edges: dict[int, GradientEdge] = field(default_factory=dict)
    leaves: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    inner: dict[int, Tensor] = field(default_factory=dict)
    steps: list[Ran] = field(default_factory=list)
    windows: dict[int, Window] = field(default_factory=dict)  # of values whose memory is written through others
    _at_once: bool = False

    def __post_init__(self) -> None:
        setting, graph = self.setting, self.setting.graph
        self.route: Route = setting.route(self.parameters, "frozen" if self.frozen else "component")
        self.flow = self.route.flow
        self.leaves = {n: p.detach().requires_grad_() for n, p in self.parameters.items()}
        live = {i: self.leaves[name] for i, name in self.flow.parameters.items()}
        read = graph.read_by_loss(self.flow.predictions)
        wanted = list(dict.fromkeys([*self.flow.predictions, *read, *(r.index for r in graph.predictions)]))
        with torch.enable_grad():
            found = graph.run(
                setting.data | live, wanted, visit=self._visit, instead=self._instead(), steps=graph.forward_steps
            )
        at = dict(zip(wanted, found, strict=True))
        self.outputs = {i: t for i, t in at.items() if i in self.flow.predictions}
        self.inner = {i: at[i].detach() for i in read}
        self.all_outputs = {r.index: at[r.index].detach() for r in graph.predictions}

    def _visit(self, i: int, value: Tensor) -> None:
        if self.setting.graph.values[i].storage in self._shared:
            whole = value.untyped_storage().nbytes() // value.element_size()
            self.windows[i] = Window(whole, tuple(value.shape), value.stride(), int(value.storage_offset()))
        if i in self.watched and i not in self.edges and value.requires_grad:
            self.edges[i] = get_gradient_edge(value)

    @property
    def predictions(self) -> dict[int, Tensor]:
        return {i: t.detach() for i, t in self.outputs.items()}

    def _instead(self) -> dict[int, Callable[..., Any]]:
        """Every step through which derivatives go keeps its arguments."""
        graph = self.setting.graph
        cut = {s.index for s in self.route.cut_off}
        out: dict[int, Callable[..., Any]] = {}
        for step in graph.forward_steps:
            frozen_norm = step.index in self.flow.frozen_norms
            if step.index in cut and not frozen_norm:
                out[step.index] = held(step.op)
            elif step.grad and self._moves(step):
                out[step.index] = partial(self._kept, step, norm_held(step) if frozen_norm else step.op)
        return out

    def _moves(self, step: Step) -> bool:
        made = [r.index for r in [*step.outs, *(new for _, new in step.writes)] if r is not None]
        return any(i in self.flow.theta for i in made) and any(r.index in self.flow.theta for r in step.refs())

    def _kept(self, step: Step, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        spoiled = {r.index for r in step.refs() if self.setting.graph.written(r.index)}

        def one(a: Any) -> Any:
            return (a.detach().clone() if spoiled else a.detach()) if isinstance(a, Tensor) else a

        kept_args, kept_kwargs = tree_map(one, (args, kwargs))
        result = op(*args, **kwargs)
        outs = tuple(o.detach() if isinstance(o, Tensor) else o for o in flat(result))
        self.steps.append(Ran(step, kept_args, kept_kwargs, outs if step.name in NEEDS_OUTPUTS else ()))
        return result

    # -- Jᵀ u --

    def pull(self, cotangents: Mapping[int, Tensor], names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """``Jᵀ u``, by parameter (some of them, by name)."""
        ends = [self.outputs[i] for i in cotangents]
        leaves = self.leaves if names is None else {n: self.leaves[n] for n in names}
        return gradients(ends, leaves, list(cotangents.values()), retain=True)

    # -- J v --

    def push(self, tangents: Mapping[str, Tensor], at: Sequence[int] = ()) -> dict[int, Tensor]:
        """``J v``, by prediction; or the tangents of the values ``at``, all of them watched.

        Raises ``StructureError`` where an op has neither a forward mode nor a second derivative.
        """
        key = ("tangents", tuple(self.parameters), self.frozen)
        if key not in self.setting.trust:
            self._try()
            self.setting.trust[key] = self._at_once
        self._at_once = self.setting.trust[key]
        return (self._push_at_once if self._at_once else self._push_by_steps)(tangents, at)

    def _try(self) -> None:
        """``⟨u, J v⟩ = ⟨Jᵀu, v⟩`` for random u and v, or the rules for single ops are not believed."""
        generator = torch.Generator().manual_seed(0)
        random = lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)  # noqa: E731
        v = {n: random(p) for n, p in self.parameters.items()}
        u = {i: random(t) for i, t in self.outputs.items() if t.requires_grad}
        pulled = self.pull(u)
        expected = sum(float((pulled[n] * v[n]).sum()) for n in v)
        # Where J is zero (a bias below a batch norm), both are what is left of larger numbers.
        least = sum(1e3 * torch.finfo(t.dtype).eps * float(u[i].norm() * t.norm()) for i, t in self.predictions.items()
                    if i in u)  # fmt: skip
        for at_once in (False, True):
            pushed = self._push_at_once(v) if at_once else self._push_by_steps(v)
            size = sum(float(u[i].norm() * pushed[i].norm()) for i in u)
            found = sum(float((u[i] * pushed[i]).sum()) for i in u)
            if abs(found - expected) <= self.setting.rounding * size + least:
                self._at_once = at_once
                return
        raise StructureError(MSG_NO_TANGENT.format(place="the model", error="its rules contradict its backward pass"))

    def _push_by_steps(self, tangents: Mapping[str, Tensor], wanted: Sequence[int] = ()) -> dict[int, Tensor]:
        at = _Tangents(self.setting.graph, self.windows)
        at.values |= {i: tangents[name] for i, name in self.flow.parameters.items() if name in tangents}
        with torch.no_grad():
            for ran in self.steps:
                step = ran.step
                here = {r.index: t for r in step.refs() if (t := at.get(r.index)) is not None}
                if here:
                    outs = self._through(ran, here)
                    for ref, t in zip(step.outs, outs, strict=False):
                        at.put(ref, ref, t)
                    for old, new in step.writes if step.name not in HIDDEN_WRITES else ():
                        at.put(new, old, outs[0])
        return {i: self._zero(i) if (t := at.get(i)) is None else t for i in wanted or self.outputs}

    def _zero(self, i: int) -> Tensor:
        value, like = self.setting.graph.values[i], next(iter(self.outputs.values())).detach()
        return like.new_zeros(value.shape, dtype=value.dtype)

    def _through(self, ran: Ran, here: Mapping[int, Tensor]) -> Tangents:
        step, held_ = ran.step, ran.step.index in self.flow.frozen_norms
        if step.name in RULES and not held_:
            moving = {n: tree_map(lambda r: here.get(r.index) if is_ref(r) else None, a, is_leaf=is_ref)
                      for n, a in step.named.items()}  # fmt: skip
            outs = RULES[step.name](ran, moving)
            if outs is not None:
                return outs
        return through_op(ran, norm_held(step) if held_ else step.op, here)

    @cached_property
    def _shared(self) -> frozenset[int]:
        """Memories that are written to, and read through a window that was there before."""
        graph, shared = self.setting.graph, set()
        last = {r.index: s.index for s in graph.forward_steps for r in s.refs()}
        windows: dict[int, list[int]] = {}
        for i, v in enumerate(graph.values):
            windows.setdefault(v.storage, []).append(i)
        for step in graph.forward_steps:
            for old, new in step.writes if step.name not in HIDDEN_WRITES else ():
                storage = graph.values[new.index].storage
                others = [i for i in windows[storage] if i not in (old.index, new.index) and self._before(i, step)]
                if any(last.get(i, -1) > step.index or i in self.flow.predictions for i in others):
                    shared.add(storage)
        return frozenset(shared)

    def _before(self, i: int, step: Step) -> bool:
        made = self.setting.graph.values[i].step
        return made is None or made < step.index

    def _push_at_once(self, tangents: Mapping[str, Tensor], wanted: Sequence[int] = ()) -> dict[int, Tensor]:
        """Forward mode of the whole computation, which knows about memory."""
        setting, graph = self.setting, self.setting.graph
        instead: dict[int, Callable[..., Any]] = {s.index: unmoved(s.op) for s in graph.forward_steps if not s.grad}
        instead |= {s.index: self._spelled_out(s) for s in graph.forward_steps if s.name in SPELLED_OUT}
        instead |= {s.index: held(s.op) for s in self.route.cut_off}
        instead |= {i: norm_held(graph.steps[i]) for i in self.flow.frozen_norms}
        with torch.no_grad(), forward_mode():
            values = {i: self.parameters[n].detach() for i, n in self.flow.parameters.items()}
            names = self.flow.parameters
            live = {i: forward_ad.make_dual(p, tangents[names[i]].contiguous()) if names[i] in tangents else p
                    for i, p in values.items()}  # fmt: skip
            try:
                feed, which = setting.data | live, list(wanted or self.outputs)
                found = graph.run(feed, which, instead=instead, steps=graph.forward_steps)
            except (NotImplementedError, RuntimeError) as error:
                raise StructureError(MSG_NO_TANGENT.format(place="the model", error=error)) from error
            pushed = [forward_ad.unpack_dual(t).tangent for t in found]
        return {i: torch.zeros_like(t) if v is None else solid(v) for i, t, v in zip(which, found, pushed, strict=True)}

    def _spelled_out(self, step: Step) -> Callable[..., Any]:
        """An op without forward mode by ops that have one; its result lies in memory as before."""
        (out, *_), values = step.outs, self.setting.graph.values
        assert out is not None

        def run(*args: Any, **kwargs: Any) -> Any:
            first, *others = flat(SPELLED_OUT[step.name](*args, **kwargs))
            return laid_out(first, values[out.index].stride), *others

        return run


class LinearisedModel(Linearised):
    """The same for the model itself, where its recording has other derivatives: double backward pushes tangents."""

    def __post_init__(self) -> None:
        ran = live.run(self.setting, self.parameters, twice=True)
        self.leaves, self.outputs, self.inner = dict(self.parameters), ran.predictions, ran.inner
        self.all_outputs, self._draws = {i: t.detach() for i, t in ran.values.items()}, ran.state

    def _untouched(self) -> Any:
        """Hooks in the model may do anything, and backward passes may draw random numbers."""
        return untouched(self.setting.program.modules, self._draws)

    def pull(self, cotangents: Mapping[int, Tensor], names: Iterable[str] | None = None) -> dict[str, Tensor]:
        with self._untouched():
            return super().pull(cotangents, names)

    @cached_property
    def _backward(self) -> tuple[list[Tensor], list[Tensor]]:
        """``Jᵀ w`` as a function of ``w``, at zero."""
        ws = [torch.zeros_like(t, requires_grad=True) for t in self.outputs.values()]
        with self._untouched(), torch.enable_grad():
            ends, by = list(self.outputs.values()), list(self.leaves.values())
            found = torch.autograd.grad(ends, by, ws, create_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, by, strict=True)], ws

    def push(self, tangents: Mapping[str, Tensor], at: Sequence[int] = ()) -> dict[int, Tensor]:
        assert not at, "the model itself is not watched"
        try:
            back, ws = self._backward
            pairs = [
                (g, tangents[n]) for g, n in zip(back, self.leaves, strict=True) if g.requires_grad and n in tangents
            ]
            ends, vs = [g for g, _ in pairs], [v for _, v in pairs]
            with self._untouched():
                found = (
                    torch.autograd.grad(ends, ws, vs, retain_graph=True, allow_unused=True)
                    if pairs
                    else [None] * len(ws)
                )
        except (NotImplementedError, RuntimeError) as error:
            raise StructureError(MSG_NO_TANGENT.format(place="the model", error=error)) from error
        return {
            i: torch.zeros_like(t.detach()) if v is None else v
            for (i, t), v in zip(self.outputs.items(), found, strict=True)
        }
