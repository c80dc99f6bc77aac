"""Bias Loss as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from biasloss_ext import checks
from biasloss_ext.ops import backends
from biasloss_ext.weighting import weighted_cross_entropy


class FusedBiasLoss(nn.Module):
    """Bias Loss: cross-entropy weighted per sample by the variance of its feature maps (feature-variance weighting).

        v_i = (var_i - low) / (max_j var_j - min_j var_j)
        w_i = exp(alpha * v_i) - beta
        L   = mean_i w_i * CE(output_i, target_i)

    ``var_i`` is the unbiased variance over all activations of a sample. ``low`` is the smallest variance of the batch
    ("local") or the smallest seen in training so far ("global"). Source: Abrahamyan, Ziatchin, Chen and Deligiannis,
    "Bias Loss for Mobile Neural Networks", ICCV 2021, with the constants of the authors' current code. Their first
    version, ``exp(b * v) - 1 + a``, is the same family: pass ``alpha=b, beta=1 - a``.

    The first three parameters and the call keep the authors' names and order.

    Args:
        alpha: at least 0.
        beta: below 1.
        normalisation_mode: "global" or "local".
        weight: (K,) class weights, as in `torch.nn.CrossEntropyLoss`; a buffer.
        ignore_index: class targets with this value do not count. It must be negative for probability targets.
        reduction: "mean" (divides by the number of counted targets, or by the sum of their class weights, never by the
            sum of w), "sum" or "none".
        label_smoothing: in [0, 1].
        process_group: in training mode, the smallest and the largest variance are taken over all its ranks, by one
            all-reduce of two floats without a GPU sync.
        backend: "auto" takes the fastest backend that can run. "reference", "cpu", "cuda" and "triton" run or raise.

    Shape:
        - features: (N, *), float16, bfloat16, float32 or float64. Contiguous, channels_last and all other layouts with
          dense samples are read in place. Treated as a constant: no gradient flows to it. None if ``variance`` is given.
        - output: (N, K) or (N, K, *d) scores of the same dtypes, any strides; never overwritten.
        - target: (N, *d) classes in int64, int32 or uint8, or probabilities of the shape of ``output``. A gradient
          flows to probabilities only with ``backend="reference"``; the other backends raise if one is required.
        - variance: (N,), from a model that has computed it already.
        - Returns the loss, 0-d or (N, *d), in float32 (float64 for float64 scores). With ``return_weights=True``, also
          returns the w_i, (N,), detached.

    The buffer ``running_min`` (0-d float32, initially infinity) is part of the state_dict and changes only in training
    mode. A batch whose variances are not all finite does not change it; the loss of such a batch is NaN, so that a
    gradient scaler skips it. The buffer follows the scores to their device. If all variances are equal, v is 0;
    ``alpha * v`` is capped at 60.

    The loss is deterministic. It works under ``torch.compile(fullgraph=True)``, ``torch.export``, autocast and CUDA graph
    capture. It has no second derivative, except with ``backend="reference"``.

    Raises:
        TypeError: an argument of another type; the message has what was given and what is expected.
        ValueError: an argument of another shape or value.
        IndexError: a class out of range, on a CPU; in the backward pass too, if the classes have changed since. On a GPU
            the loss of that sample is NaN, see `check_targets`.
        RuntimeError: a named backend cannot run on this device; the message has the cause.

    Example:
        ```python
        loss_fn = FusedBiasLoss()
        features, output = model(images)
        loss_fn(features, output, target).backward()
        ```
    """

    running_min: Tensor
    weight: Tensor | None

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.3,
        normalisation_mode: str = "global",
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        process_group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.normalisation_mode = normalisation_mode
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.process_group = process_group
        self.backend = backend
        self.register_buffer("weight", weight)
        self.register_buffer("running_min", torch.full((), torch.inf, dtype=torch.float32))

    def __setattr__(self, name: str, value: Any) -> None:
        # A misspelled mode or a negative alpha raises where it is set and cannot silently change the loss.
        if name == "backend" and value != "auto" and value not in backends.BACKENDS:
            raise ValueError(f"unknown backend {value!r}; there are: auto, {', '.join(backends.BACKENDS)}")
        super().__setattr__(name, checks.hyperparameter(name, value))

    def forward(
        self,
        features: Tensor | None,
        output: Tensor,
        target: Tensor,
        *,
        variance: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        # self.running_min and self.weight, without a search through the module's attributes at every step.
        running_min, weight = self._buffers["running_min"], self._buffers["weight"]
        assert running_min is not None
        if type(output) is not Tensor:
            checks.floating("output", output)
        if running_min.device != output.device or running_min.dtype is not torch.float32:
            running_min = self._running_min_for(output.device)
        results = weighted_cross_entropy(
            features,
            output,
            target,
            running_min if self.normalisation_mode == "global" else None,
            variance=variance,
            alpha=self.alpha,
            beta=self.beta,
            update_running_min=self.training,
            weight=weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            process_group=self.process_group if self.training else None,
            backend=self.backend,
            want_weight=return_weights,
        )
        return (results[0], results[1]) if return_weights else results[0]

    def reset_running_min(self) -> None:
        """Forget the variances seen so far: set ``running_min`` to infinity."""
        self.running_min.fill_(torch.inf)

    def reset_parameters(self) -> None:
        """Reset ``running_min``; deferred initialization calls this name. Class weights do not change."""
        self.reset_running_min()

    def _running_min_for(self, device: torch.device) -> Tensor:
        """The running minimum on the device of the scores, since users build losses without moving them.

        For scores on the meta device the state stays where it is, as they hold no values that could change it.
        """
        exact = self.running_min
        if exact.is_meta and device.type != "meta":
            exact = torch.full((), torch.inf, device=device)
        moved = exact.to(device, torch.float32)
        if device.type != "meta":
            self.running_min = moved
        return moved

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedBiasLoss:
        # model.half() and the like convert every floating buffer; the running minimum stays float32.
        exact = self.running_min
        super()._apply(fn, recurse)
        if exact.is_meta and not self.running_min.is_meta:  # to_empty() of a loss that was built without memory
            self.running_min = torch.full((), torch.inf, device=self.running_min.device)
        elif self.running_min.dtype != torch.float32:
            self.running_min = exact.to(self.running_min.device)
        return self

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        # load_state_dict(assign=True) accepts a tensor of any dtype.
        if self.running_min.dtype != torch.float32:
            self.running_min = self.running_min.to(torch.float32)

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {
            "alpha": self.alpha,
            "beta": self.beta,
            "normalisation_mode": self.normalisation_mode,
            "reduction": self.reduction,
        }
        if self.label_smoothing:
            shown["label_smoothing"] = self.label_smoothing
        if self.backend != "auto":
            shown["backend"] = self.backend
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
