"""Networks optimized for inference run as programs: the same values, whatever is done with them."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from biasloss_ext import optimize_for_inference
from biasloss_ext.ops import backends
from biasloss_ext.ops.program.code import instructions
from tests.networks import MODELS, network
from tests.nn import lookalikes
from tests.nn.blocks import randomize

HAS_KERNELS = backends.why_not("cpu", torch.device("cpu"), "program") is None
pytestmark = pytest.mark.skipif(not HAS_KERNELS, reason="programs run on the compiled kernels alone")


def images(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def layers(model: nn.Module, x: Tensor) -> Tensor:
    """What the layers compute, without a program."""
    result: Tensor = type(model).forward(model, x)
    return result


def programs_in(run: Callable[[], Any]) -> int:
    """How many programs a call runs."""
    from biasloss_ext.ops.program.op import program

    calls, native = [], program.native

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return native(*arguments)

    program.native = counted  # type: ignore[assignment]
    try:
        run()
    finally:
        program.native = native
    return len(calls)


def assert_close(ours: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_a_network_computes_what_its_layers_do(name: str, dtype: torch.dtype) -> None:
    """At sizes that vary, in both memory formats."""
    model = MODELS[name]().to(dtype)
    optimized, exact = optimize_for_inference(model), copy.deepcopy(model).double()
    for size in ((1, 3, 64, 64), (3, 3, 75, 50), (2, 3, 33, 97)):
        x = images(*size, dtype=dtype)
        assert programs_in(lambda x=x: optimized(x)) > 0  # type: ignore[misc]
        for given in (
            x,
            x.contiguous(memory_format=torch.channels_last),
            x.transpose(2, 3).contiguous().transpose(2, 3),
        ):
            assert_close(optimized(given), exact(x.double()).to(dtype), 1e-4 if dtype is torch.float32 else 1e-10)
            assert_close(optimized(given), layers(optimized, given), 1e-5)


def test_a_whole_network_is_one_program() -> None:
    optimized = optimize_for_inference(network())
    assert programs_in(lambda: optimized(images(1, 3, 64, 64))) == 1


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_nothing(name: str) -> None:
    optimized = optimize_for_inference(MODELS[name]())
    assert optimized(images(0, 3, 64, 64)).shape == layers(optimized, images(0, 3, 64, 64)).shape


@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_for_any_number_of_threads(name: str) -> None:
    optimized, threads = optimize_for_inference(MODELS[name]()), torch.get_num_threads()
    x, results = images(3, 3, 96, 80), []
    try:
        for count in (1, 2, 3, 5, 2):
            torch.set_num_threads(count)
            results += [optimized(x) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_threads_that_call_at_once() -> None:
    """One of them has the team at a time."""
    optimized = optimize_for_inference(network())
    x = [images(1, 3, 64, 64) * scale for scale in (0.5, 1.0, 1.5)]
    expected = [optimized(each) for each in x]
    wrong = []

    def call(index: int) -> None:
        with torch.no_grad():
            wrong.extend(index for _ in range(20) if not torch.equal(optimized(x[index]), expected[index]))

    callers = [threading.Thread(target=call, args=(index,)) for index in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def _in_a_child(optimized: nn.Module, x: Tensor, expected: Tensor, answers: Any) -> None:
    torch.set_num_threads(1)  # torch's own threads do not survive a fork
    with torch.no_grad():
        first = torch.equal(optimized(x), expected)
        torch.set_num_threads(2)
        answers.put(first and torch.equal(optimized(x), expected))


def test_a_forked_process() -> None:
    optimized, x = optimize_for_inference(network()), images(1, 3, 64, 64)
    expected = optimized(x)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_in_a_child, args=(optimized, x, expected, answers))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert answers.get()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_stands_alone(copied: Callable[[Any], Any]) -> None:
    original: Any = optimize_for_inference(network())
    x = images(1, 3, 64, 64)
    expected = original(x)
    twin = copied(original)
    original.classifier[3] = nn.Identity()
    assert torch.equal(twin(x), expected)
    assert programs_in(lambda: twin(x)) == 1


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a layer exchanged": lambda model: model.classifier.__setitem__(1, nn.ReLU()),
    "a layer removed": lambda model: model.reset_classifier(0),
    "a weight exchanged": lambda model: setattr(model.classifier[3], "weight", nn.Parameter(torch.ones(10, 1024))),
    "a weight moved in place": lambda model: model.classifier[3].weight.data.mul_(2),
    "what is returned": lambda model: setattr(model, "return_features", "features"),
    "converted and back": lambda model: model.double().float(),
    "a hook on a layer": lambda model: model.classifier[1].register_forward_hook(lambda *given: 2 * given[-1]),
    "a hook on a block": lambda model: model.blocks[1].register_forward_hook(lambda *given: 2 * given[-1]),
    "a forward method": lambda model: setattr(model.classifier[0], "forward", lambda x: x[:, :1].expand(-1, 1024)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str) -> None:
    optimized: Any = optimize_for_inference(network())
    x = images(2, 3, 64, 64)
    before = optimized(x)
    CHANGES[change](optimized)
    after, expected = optimized(x), layers(optimized, x)
    pairs = zip(after, expected, strict=True) if isinstance(after, tuple) else [(after, expected)]
    for ours, theirs in pairs:
        assert_close(ours, theirs, 1e-5)
    if change not in ("converted and back", "what is returned"):
        assert before.shape != after.shape or not torch.allclose(before, after)


def test_hooks_see_every_layer() -> None:
    optimized: Any = optimize_for_inference(network())
    x = images(1, 3, 64, 64)
    optimized(x)
    called = []
    handles = [
        m.register_forward_hook(lambda m, *_: called.append(m)) for m in (optimized, *optimized.blocks, optimized.conv)
    ]
    optimized(x)
    assert called == [*optimized.blocks, optimized.conv, optimized]
    for handle in handles:
        handle.remove()
    assert programs_in(lambda: optimized(x)) == 1


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function._opname)
        return function(*args, **(kwargs or {}))


def test_what_records_or_needs_gradients_gets_the_layers() -> None:
    optimized = optimize_for_inference(network())
    x = images(1, 3, 64, 64)
    with Ops() as ops:
        optimized(x)
    assert "pointwise" in ops.names
    assert "program" not in ops.names
    with torch.enable_grad():
        assert optimized(x).requires_grad
        assert programs_in(lambda: optimized(x)) == 0
        optimized.requires_grad_(False)
        assert programs_in(lambda: optimized(x)) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert programs_in(lambda: optimized(x)) == 0
    assert torch.func.vmap(optimized)(x[None]).shape == (1, 1, 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_take_the_layers(dtype: torch.dtype) -> None:
    optimized = optimize_for_inference(network()).to(dtype)
    x = images(1, 3, 64, 64, dtype=dtype)
    assert torch.equal(optimized(x), layers(optimized, x))


class Around(nn.Module):
    """A network with layers that no program has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = lookalikes.network()[:4]
        self.middle = nn.Sequential(nn.PReLU(), nn.MaxPool2d(2))
        self.rest = nn.Sequential(*(lookalikes.TorchvisionV3(channels, 32, channels) for channels in (24, 24)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x))
        y: Tensor = self.rest(x)
        return torch.cat((y, x.neg()), 1)


def test_layers_between_programs() -> None:
    model = Around()
    randomize(model, torch.Generator().manual_seed(2))
    model = model.float().eval()
    optimized, x = optimize_for_inference(model), images(2, 3, 64, 48)
    assert_close(optimized(x), model(x))
    assert programs_in(lambda: optimized(x)) == 2


def test_errors_are_those_of_the_layers() -> None:
    optimized = optimize_for_inference(network())
    for wrong in (images(1, 4, 64, 64), images(1, 3, 16, 16), images(3, 64, 64)):
        with pytest.raises(ValueError, match="images must be of shape"):
            optimized(wrong)


def test_what_pytorch_computes_faster_is_left_to_it() -> None:
    """Dense convolutions of many channels, and GELU."""
    layers = (
        *(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1)),
    )
    network = nn.Sequential(*layers).eval()
    optimized = optimize_for_inference(network)
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        assert programs_in(lambda: optimized(x)) == 1
        torch.testing.assert_close(optimized(x), network(x))
    (segment,) = optimized.forward._made.segments
    assert len(instructions(segment.code)) == 4, "two layers, and the release of their inputs"


def test_a_scripted_layer_stays_as_it_is() -> None:
    torch.manual_seed(0)
    blocks = [lookalikes.TimmInvertedResidual(8, 16, 8) for _ in range(2)]
    model = nn.Sequential(blocks[0], torch.jit.script(nn.Conv2d(8, 8, 1)), blocks[1]).eval()
    optimized, x = optimize_for_inference(model), torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-5)
