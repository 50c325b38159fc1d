"""BiGLA's kernels on small shapes, forward and backward, for compute-sanitizer on a GPU.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/ops/sanitize_bigla.py
"""

import torch
from test_bigla_triton import make_inputs, run

for num_tokens in (1, 50, 200, 1100):  # one chunk, walks, a scan
    for key, value in ((16, 32), (32, 64), (24, 48)):
        for gates in ('normal', 'mixed'):
            run(make_inputs(num_tokens, key, value, heads=2, gates=gates, dtype=torch.bfloat16), 'triton')
for dtype in (torch.float16, torch.float32):
    run(make_inputs(200, heads=2, gates='mixed', dtype=dtype), 'triton')
torch.cuda.synchronize()
print('done')
