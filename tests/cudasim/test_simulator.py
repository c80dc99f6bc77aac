"""The simulator itself: right kernels run right in every schedule, and each kind of mistake is seen and named."""

from __future__ import annotations

from types import ModuleType

import numpy
import pytest


def ramp(count: int) -> numpy.ndarray:
    return numpy.arange(count, dtype=numpy.float32)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("resident_blocks", [1, 3])
def test_right_kernels(simulator: ModuleType, seed: int, resident_blocks: int) -> None:
    schedule = simulator.Schedule(seed=seed, resident_blocks=resident_blocks)
    x = ramp(3000)
    assert simulator.sum(x, blocks=7, threads=96, schedule=schedule) == x.sum(dtype=numpy.float64)
    y = ramp(4 * 96)
    simulator.rotate(y, blocks=4, threads=96, schedule=schedule)
    assert (y == numpy.roll(ramp(4 * 96).reshape(4, 96), -1, axis=1).ravel()).all()
    z = ramp(64)
    simulator.rotate_in_warp(z, threads=64, schedule=schedule)
    rolled = numpy.roll(ramp(64).reshape(2, 32), -1, axis=1)
    assert (z == (rolled + rolled[:, :1]).ravel()).all()


def test_tickets_wrap(simulator: ModuleType) -> None:
    """The ticket counter is back at zero after a launch: the next grid, of another size, finds its last block too."""
    for blocks in (3, 1, 8):
        assert simulator.sum(ramp(100), blocks=blocks, threads=32) == 4950


def test_same_seed_same_schedule(simulator: ModuleType) -> None:
    """A race that one seed shows is shown again by the same seed, at the same place."""

    def report(seed: int) -> str:
        with pytest.raises(simulator.Violation) as caught:
            simulator.missing_barrier(ramp(64), threads=64, schedule=simulator.Schedule(seed=seed))
        return str(caught.value)

    reports = [report(seed) for seed in range(1, 6)]
    assert reports == [report(seed) for seed in range(1, 6)]
    assert len(set(reports)) > 1


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (
            "deadlock",
            r"deadlock:\n.*__shfl_xor_sync wait threads.*\n.*__syncthreads self_test_kernels.h:\d+ wait threads",
        ),
        ("divergent_barrier", r"divergent barrier: some threads wait in __syncthreads self_test_kernels.h:\d+, others"),
        ("uninitialized", r"uninitialized shared memory read: row \(self_test_kernels.h:\d+\)\[5\]"),
        ("out_of_range", r"shared memory out of range: row .*\[63\] of 63 elements .*thread \(63,0,0\)"),
        ("write_race", r"race: cell .*\[0\] is written here and by thread"),
        ("left_lane", r"lane 7 of the mask has left"),
        ("misaligned", r"misaligned access of 16 bytes"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mistakes_are_named(simulator: ModuleType, kernel: str, message: str, seed: int) -> None:
    if kernel == "left_lane" and seed != 0:
        message += r"|deadlock"  # the others were there before it left
    with pytest.raises(simulator.Violation, match=f"(?s){message}"):
        getattr(simulator, kernel)(ramp(64), threads=64, schedule=simulator.Schedule(seed=seed))


def test_missing_barrier_is_a_race_or_an_unwritten_read(simulator: ModuleType) -> None:
    for seed in range(5):
        with pytest.raises(simulator.Violation, match=r"race: row|uninitialized shared memory read: row"):
            simulator.missing_barrier(ramp(64), threads=64, schedule=simulator.Schedule(seed=seed))


def test_a_skipped_barrier_is_caught(simulator: ModuleType) -> None:
    """The same switch that the kernel tests use to take barriers away one by one."""
    simulator.take_barriers_met()
    simulator.rotate(ramp(64), threads=64)
    (barrier,) = simulator.take_barriers_met()
    with pytest.raises(simulator.Violation):
        simulator.rotate(ramp(64), threads=64, schedule=simulator.Schedule(seed=1, skipped_barrier=barrier))


def test_a_violation_leaves_the_simulator_usable(simulator: ModuleType) -> None:
    with pytest.raises(simulator.Violation):
        simulator.deadlock(ramp(64), threads=64)
    assert simulator.sum(ramp(100), blocks=3, threads=32) == 4950


def test_deep_stack(simulator: ModuleType) -> None:
    x = ramp(64)
    simulator.deep_stack(x, threads=64)
    assert (x == 100 * ramp(64)).all()


def test_float16_conversions(simulator: ModuleType) -> None:
    """Every float16 there is, and every rounding between two neighbors, against numpy."""
    bits = numpy.arange(1 << 16, dtype=numpy.uint16)
    halves = bits.view(numpy.float16)
    exact = halves.astype(numpy.float32)
    assert numpy.array_equal(simulator.float_of_float16(bits), exact, equal_nan=True)
    finite = numpy.sort(exact[numpy.isfinite(exact)])
    between = (finite[1:].astype(numpy.float64) + finite[:-1]) / 2
    samples = [finite, between, numpy.nextafter(between.astype(numpy.float32), numpy.float32(numpy.inf))]
    values = numpy.concatenate([*samples, [65519.9, 65520, 1e9, -1e9, numpy.inf, -numpy.inf]]).astype(numpy.float32)
    with numpy.errstate(over="ignore"):
        want = values.astype(numpy.float16)
    assert numpy.array_equal(simulator.float16_of(values).view(numpy.float16), want)


def test_bfloat16_conversions(simulator: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    bits = numpy.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=numpy.uint32)
    edges = numpy.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0x00000001], numpy.uint32)
    values = numpy.concatenate([bits, edges]).view(numpy.float32)
    values = values[~numpy.isnan(values)]
    want = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert numpy.array_equal(simulator.bfloat16_of(values), want)
    nan = numpy.array([numpy.nan], numpy.float32)
    assert torch.from_numpy(simulator.bfloat16_of(nan)).view(torch.bfloat16).isnan().all()
