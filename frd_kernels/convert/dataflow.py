"""Finds out which module's output is which module's input: `fold` needs it to move a batch norm into a convolution.

`torch.fx` traces the forward of each module separately, with its children as leaves, once for every combination of
its optional and boolean arguments. What cannot be traced stays unknown.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import fx, nn

from .._inner import has_hooks
from .report import one_line

_MAX_PATHS = 16
_PROXY = object()


def is_inlined(module: nn.Module) -> bool:
    """Whether the module is a plain Sequential, which only calls its children in their order."""
    return type(module).forward is nn.Sequential.forward and not has_hooks(module)


def _is_container(module: nn.Module) -> bool:
    return is_inlined(module) or isinstance(module, (nn.ModuleList, nn.ModuleDict))


class _Tracer(fx.Tracer):
    """Treats children as leaves; records the tensors that the traced forward reads, even if the trace fails."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: set[int] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_inlined(m)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, torch.Tensor):
            self.fetched.add(id(attr_val))
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class Dataflow:
    """The calls among the modules of a model.

    Attributes:
        problems: id(owner) -> why its forward could not be traced.
        fetched: ids of the tensors that a forward reads itself, instead of calling the module they belong to.
    """

    def __init__(self, model: nn.Module, is_relevant: Callable[[nn.Module], bool]) -> None:
        """Traces the forward of each module that contains a relevant one; relevant modules are leaves."""
        self.problems: dict[int, str] = {}
        self.fetched: set[int] = set()
        self._fetched: set[int] = set()
        self._untraced: dict[nn.Module, list[nn.Module]] = {}
        self._calls: dict[int, list[fx.Node]] = {}
        self._called: dict[fx.Node, nn.Module] = {}
        # A traced forward may store proxies and counters in its module, so a copy is traced.
        twin = copy.deepcopy(model)
        self._original = dict(zip(map(id, twin.modules()), model.modules(), strict=True))
        for owner in twin.modules():
            leaf = is_relevant(owner) or (owner is not twin and _is_container(owner))
            if not leaf and any(is_relevant(below) for below in owner.modules()):
                self._trace(owner)
        for tensors in (nn.Module.parameters, nn.Module.buffers):
            pairs = zip(tensors(twin), tensors(model), strict=True)
            self.fetched |= {id(ours) for theirs, ours in pairs if id(theirs) in self._fetched}
        unknown = {id(module) for children in self._untraced.values() for module in children}
        self._calls = {called: nodes for called, nodes in self._calls.items() if called not in unknown}

    def _trace(self, owner: nn.Module) -> None:
        original = self._original[id(owner)]
        try:
            graphs = [self._graph(owner, arguments) for arguments in _paths(owner)]
        except Exception as error:
            # The forward is code of any kind, and may fail under a trace in any way.
            self.problems[id(original)] = one_line(error)
            self._untraced[original] = list(_children(original))
            return
        for node in (node for graph in graphs for node in graph.nodes if node.op == "call_module"):
            module = original.get_submodule(node.target)
            self._called[node] = module
            self._calls.setdefault(id(module), []).append(node)

    def _graph(self, owner: nn.Module, arguments: dict[str, Any]) -> fx.Graph:
        tracer = _Tracer()
        try:
            return tracer.trace(owner, concrete_args=arguments)
        finally:
            self._fetched |= tracer.fetched

    def untraced(self) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
        """Each owner that could not be traced, with the modules it may call."""
        yield from self._untraced.items()

    def calls(self, module: nn.Module) -> int:
        """How many calls of the module were traced."""
        return len(self._calls.get(id(module), []))

    def source(self, module: nn.Module) -> nn.Module | None:
        """The one module whose output is the input of every call of `module`, and of nothing else."""
        sources = {self._input(node) for node in self._calls.get(id(module), [])}
        if len(sources) != 1:
            return None
        found = sources.pop()
        return found if found is not None and self._feeds_only(found, module) else None

    def sink(self, module: nn.Module) -> nn.Module | None:
        """The one module that takes every output of `module`, and no other input."""
        users = {self._called.get(user) for node in self._calls.get(id(module), []) for user in node.users}
        if len(users) != 1:
            return None
        found = users.pop()
        return found if found is not None and self.source(found) is module else None

    def _input(self, node: fx.Node) -> nn.Module | None:
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return None
        return self._called.get(node.args[0])

    def _feeds_only(self, source: nn.Module, sink: nn.Module) -> bool:
        nodes = self._calls.get(id(source), [])
        users = [self._called.get(user) for node in nodes for user in node.users]
        return 0 < len(nodes) == len(users) and all(user is sink for user in users)


def _paths(owner: nn.Module) -> Iterator[dict[str, Any]]:
    """The `concrete_args` of each trace: optional arguments are None or a proxy, boolean ones False or True."""
    if "forward" in vars(owner):
        raise ValueError("its forward was replaced on the object")
    choices: dict[str, list[Any]] = {}
    for name, parameter in inspect.signature(owner.forward).parameters.items():
        if parameter.default is None:
            choices[name] = [None, _PROXY]
        elif isinstance(parameter.default, bool):
            choices[name] = [False, True]
    if 2 ** len(choices) > _MAX_PATHS:
        raise ValueError("its forward has too many optional arguments to follow each")
    for values in itertools.product(*choices.values()):
        given = zip(choices, values, strict=True)
        yield {name: value for name, value in given if value is not _PROXY}


def _children(owner: nn.Module) -> Iterator[nn.Module]:
    """The children of the owner, with those in its containers in place of the containers."""
    for child in owner.children():
        if _is_container(child):
            yield from _children(child)
        else:
            yield child


def may_read_weights(owner: nn.Module) -> bool:
    """Whether the forward of the owner, or a method that it calls, has the name `weight` in its code."""
    names: set[str] = set()
    methods = {"forward"}
    while methods:
        code = getattr(inspect.unwrap(getattr(type(owner), methods.pop())), "__code__", None)
        new = _names(code) - names if code is not None else set()
        names |= new
        methods |= {n for n in new if callable(getattr(type(owner), n, None)) and not hasattr(nn.Module, n)}
    return "weight" in names


def _names(code: CodeType) -> set[str]:
    """The names of globals and attributes in a function's code, its comprehensions and lambdas included."""
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*(_names(inner) for inner in nested))
