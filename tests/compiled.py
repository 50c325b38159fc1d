"""torch.compile, and which of this project's operators the compiled graphs have."""

from collections.abc import Callable

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd


def compile_and_see(function: Callable) -> tuple[Callable, list[str]]:
    """The function compiled in one piece, and a list that grows with each graph by the operators in it."""
    seen = []

    def note(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        targets = [str(node.target) for node in graph.graph.nodes]
        seen.extend(target for target in targets if target.startswith('mmvig.'))
        return make_boxed_func(graph)

    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=note)), seen
