"""What holds for every op with kernels for a GPU, by the samples that tests/ops has of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from biasloss_ext.ops.registry import OPS
from tests.gpu.gpu_inputs import assert_close_to_float64, assert_replays_on_new_values, run, skip_unless_it_runs
from tests.ops import samples

RUNS = [(name, backend) for name, op in OPS.items() for backend in op.backends if backend in ("cuda", "triton")]
with_every_op = pytest.mark.parametrize(("name", "backend"), RUNS)


@with_every_op
@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_agrees_with_float64(name: str, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    skip_unless_it_runs(backend, name, device)
    for call in samples.of(name, dtype):
        assert_close_to_float64(OPS[name], call.map(lambda t: t.to(device)), dtype, backend)


@with_every_op
def test_repeats_to_the_bit(name: str, backend: str, device: torch.device) -> None:
    skip_unless_it_runs(backend, name, device)
    for call in samples.of(name, torch.bfloat16):
        on_device = call.map(lambda t: t.to(device))
        first = run(OPS[name], on_device, backend)
        for _ in range(3):
            assert all(map(torch.equal, run(OPS[name], on_device, backend), first))


@with_every_op
def test_captured_in_a_graph(name: str, backend: str, gpu: torch.device) -> None:
    skip_unless_it_runs(backend, name, gpu)
    for call in samples.of(name):
        assert_replays_on_new_values(OPS[name], call.map(lambda t: t.to(gpu)), backend)


@pytest.mark.parametrize("name", [name for name, backend in RUNS if backend == "cuda"])
def test_a_tensor_left_on_the_cpu_is_refused(name: str, gpu: torch.device) -> None:
    """A kernel that reads it would take the process's context with it."""
    skip_unless_it_runs("cuda", name, gpu)
    call = samples.of(name)[0].map(lambda t: t.to(gpu))
    tensors = [position for position, value in enumerate(call.arguments) if isinstance(value, Tensor)]
    for position in tensors[1:]:
        moved = call.but({position: call.arguments[position].cpu()})
        with pytest.raises(RuntimeError, match=r"expected all tensors on one device, got .* on cuda:0 and .* on cpu"):
            moved(OPS[name].native)
    torch.cuda.synchronize()
