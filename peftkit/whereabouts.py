"""Where a run is: in a forward, a backward, a forward run again, or an optimizer step; and in which module.

Modules are told by hooks on all modules' forward, and in backward by the number of the graph's node that runs: nodes
are numbered in the order in which the forward made them. So nothing is hooked to a tensor.
"""

from bisect import bisect_right
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

FORWARD, BACKWARD, AGAIN, STEP = "forward", "backward", "forward again", "optimizer step"


class Whereabouts:
    """Knows where the run is since it last was asked to `look`."""

    def __init__(self, model: nn.Module) -> None:
        self.phase = FORWARD
        self.path = ""
        """Of the module whose forward or backward it is; empty where it is none's."""
        self.task = -1
        """The run of the engine; -1 outside of backward."""
        self.node = -1
        """The number of the graph's node that runs, in backward."""
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._stack: list[str] = []
        self._made: list[tuple[int, str]] = []  # the number of the next node; whose forward makes it
        self._steps = 0
        self._handles: list[Any] = []

    def open(self) -> None:
        """Begin to follow modules and optimizers."""
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
            register_optimizer_step_pre_hook(self._begin_step),
            register_optimizer_step_post_hook(self._end_step),
        ]

    def close(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def look(self) -> None:
        """Find out where the run is now."""
        self.task = torch._C._current_graph_task_id()
        if self.task == -1:
            self.phase = STEP if self._steps else FORWARD
            self.node = -1
        else:
            self.phase = AGAIN if torch.is_grad_enabled() else BACKWARD
        if self.phase == BACKWARD:
            node: Any = torch._C._current_autograd_node()
            self.node = -1 if node is None else node._sequence_nr()
            at = bisect_right(self._made, self.node, key=lambda entry: entry[0]) - 1
            self.path = self._made[at][1] if at >= 0 else ""
        else:
            self.path = self._stack[-1] if self._stack and self.phase != STEP else ""

    def next_node(self) -> int:
        """The number that the graph's next node will have."""
        return int(torch._C._autograd._get_sequence_nr())

    def _enter(self, module: nn.Module, _: Any) -> None:
        path = self._paths.get(id(module))
        if path is not None:
            self._stack.append(path)
            self._note()

    def _leave(self, module: nn.Module, *_: Any) -> None:
        path = self._paths.get(id(module))
        if path is not None and path in self._stack:
            while self._stack.pop() != path:  # modules within it that an exception has left
                pass
            self._note()

    def _note(self) -> None:
        if torch.is_grad_enabled():
            self._made.append((self.next_node(), self._stack[-1] if self._stack else ""))

    def _begin_step(self, *_: Any) -> None:
        self._steps += 1

    def _end_step(self, *_: Any) -> None:
        self._steps = max(0, self._steps - 1)
