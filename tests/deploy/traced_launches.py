"""Trace a small backbone as for a GPU, without one, and print how often its graph has each kernel.

Run by test_launches.py in a process of its own, since a graph takes no kernel that is interpreted.
"""

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'tools'))

import export_aoti
import torch
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode

from mmvig.backbones import ViGH

GPU = {
    'torch.cuda.get_device_capability': (9, 0),
    'torch.cuda.get_device_properties': SimpleNamespace(multi_processor_count=132),
    'torch.cuda.amp.common.amp_definitely_not_available': False,
}


def name_of(kernel) -> str:
    while hasattr(kernel, 'fn') and not hasattr(kernel, '__name__'):  # tuned, with some arguments fixed
        kernel = kernel.fn
    return f'{kernel.fn.__module__.split(".")[2]}.{kernel.__name__}'


def main() -> None:
    for name, value in GPU.items():
        mock.patch(name, lambda *_, value=value: value).start()
    arch = dict(embed_dims=32, depths=[1, 1], num_heads=[1, 2])
    model = ViGH(arch, out_indices=(0, 1)).eval().requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = export_aoti.Autocast(model.to('cuda'), torch.float16)
        if sys.argv[1:] == ['hooked']:
            model.model.stages[0].blocks[0].mlp.register_forward_hook(lambda *_: None)
        program = export_aoti.trace(model, (64, 96), 2)
    nodes = [node for graph in export_aoti.graphs_of(program) for node in graph.nodes]
    kernels = [
        name_of(kernel_side_table.get_kernel(node.kwargs['kernel_idx']))
        for node in nodes
        if 'kernel_idx' in node.kwargs
    ]
    for name, count in sorted(Counter(kernels).items()):
        print(name, count)
    sizes = [node.meta['val'].shape for node in nodes if node.op == 'placeholder' and node.name == 'images']
    print(all(isinstance(sizes[0][i], torch.SymInt) for i in (0, 2, 3)))


if __name__ == '__main__':
    main()
