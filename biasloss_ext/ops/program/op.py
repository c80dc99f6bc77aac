"""``biasloss_ext::program``: declaration.

program: the result of the last instruction of ``code``, which `biasloss_ext.ops.program.code` describes, on x, a map, and on the
    constants. They have the accumulation dtype of x and the layouts that the ops of the instructions take. x is channels_last
    unless a CONVOLUTION alone reads it. Deterministic, whatever the number of threads; the same bits as the ops one by one.
"""

from __future__ import annotations

from torch import Tensor

from biasloss_ext.ops.program import reference
from biasloss_ext.ops.registry import OPS, declare


@declare(reference.program, "(Tensor x, Tensor[] constants, int[] code) -> Tensor")
def program(x: Tensor, constants: list[Tensor], code: list[int]) -> Tensor:
    return reference.interpret(x, constants, code, lambda name: OPS[name].fake)
