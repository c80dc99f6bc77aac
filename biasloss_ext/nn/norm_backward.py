"""One batch normalisation on the way back, for the fused layers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from biasloss_ext.nn import batch_norm


class NormBackward(NamedTuple):
    """What the backward pass of a normalisation needs besides the sums of its gradient (see `ops.maps`).

    Attributes:
        moments, affine: (2, C), of the forward pass.
        eps: of the module.
        positions: how many the moments were taken over.
        constant: whether the moments were given rather than taken from this batch.
        backend: of the op.
    """

    moments: Tensor
    affine: Tensor
    eps: float
    positions: int
    constant: bool
    backend: str

    def __call__(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients (4, C) from the gradient behind the normalisation to the one before it, and the gradients of the
        module's weight and bias, (2, C)."""
        return batch_norm.coefficients(
            sums, self.affine, self.moments, self.eps, self.positions, self.constant, backend=self.backend
        )
