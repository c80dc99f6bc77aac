"""Feature diversity: the variance of a sample's activations, layer by layer."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from biasloss_ext.features import similar_names
from biasloss_ext.functional import feature_variance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}


@dataclass(frozen=True)
class LayerDiversity:
    """The distribution over a data set of the variance of a sample's activations in one layer.

    Attributes:
        model: name of the model.
        layer: name of the layer.
        samples: number of samples.
        mean: mean of the variance over the samples.
        quantiles: "q05", "q25", "median", "q75" and "q95" of the variance, interpolated linearly.
        threshold: threshold of the variance.
        below: share of the samples with a variance below the threshold, in [0, 1].
    """

    model: str
    layer: str
    samples: int
    mean: float
    quantiles: Mapping[str, float]
    threshold: float
    below: float


def default_layers(model: nn.Module) -> list[str]:
    """The blocks of a model, in the order of their definition. `layer_variances` takes them by default.

    A block is an outermost module with weights (parameters of two or more dimensions) that is not just a sequence of blocks:
    a residual block of a ResNet, an inverted residual of a MobileNet, a first convolution with its normalization.
    """
    return [name for name, _ in _blocks(model, "")]


def layer_variances(model: nn.Module, batches: Iterable[Any], layers: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The variance of every sample's activations in every layer.

    The model runs in evaluation mode, without gradients, on the device of its parameters. Afterwards it is in the mode it was
    in before. If a layer runs several times per pass, the last output counts.

    Args:
        model: any module that takes one batch of images.
        batches: tensors (n, *), or tuples or lists that begin with one, as data loaders return them.
        layers: names as in ``model.named_modules()``. None takes the `default_layers` whose output is a feature map, a tensor
            (n, c, *) with at least one more dimension.

    Returns:
        The unbiased variances of each layer, in the order given: (samples,), on the CPU, float32 (float64 for float64 outputs);
            see `feature_variance`.

    Raises:
        ValueError: a layer does not exist (the message lists similar names), did not run, or returned no floating-point tensor
            with one entry per sample; or there are no samples.
    """
    modules = dict(model.named_modules())
    names = default_layers(model) if layers is None else list(layers)
    for name in names:
        if not name or name not in modules:
            raise ValueError(f"the model has no layer {name!r}; {similar_names(name, list(modules))}")
    variances: dict[str, list[Tensor]] = {}
    outputs: dict[str, Any] = {}
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    training = model.training
    handles = [modules[name].register_forward_hook(_keep(outputs, name)) for name in names]
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                images = batch[0] if isinstance(batch, (tuple, list)) else batch
                outputs.clear()
                model(images.to(device))
                if not variances:  # the first batch shows which outputs are maps
                    variances = {name: [] for name in names if layers is not None or _is_map(outputs.get(name))}
                for name, values in variances.items():
                    values.append(_variance(name, outputs.get(name), len(images)))
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    if not variances:
        raise ValueError("there is nothing to measure: no samples, or no layer whose output is a feature map")
    return {name: torch.cat(values) for name, values in variances.items()}


def summarize(variances: Mapping[str, Mapping[str, Tensor]], threshold: float | None = None) -> list[LayerDiversity]:
    """Mean, quantiles and the share of samples below a threshold, per model and layer; computed in float64.

    Args:
        variances: the result of `layer_variances` for each model, by name.
        threshold: one threshold for all layers. None takes half the median over the samples of all models with a layer of that
            name, since layers differ in scale.
    """
    pooled: dict[str, list[Tensor]] = {}
    for of_model in variances.values():
        for layer, values in of_model.items():
            pooled.setdefault(layer, []).append(values.double())
    thresholds = {
        layer: float(_quantiles(torch.cat(parts), [0.5])[0]) / 2 if threshold is None else threshold
        for layer, parts in pooled.items()
    }
    return [
        _summary(model, layer, values.double(), thresholds[layer])
        for model, of_model in variances.items()
        for layer, values in of_model.items()
    ]


def diversity_csv(rows: Sequence[LayerDiversity]) -> str:
    """CSV with a header and one line per model and layer."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "layer", "samples", "mean", *QUANTILES, "threshold", "below"])
    for row in rows:
        figures = (row.mean, *row.quantiles.values(), row.threshold, row.below)
        writer.writerow([row.model, row.layer, row.samples, *(f"{figure:.6g}" for figure in figures)])
    return text.getvalue()


def diversity_table(rows: Sequence[LayerDiversity]) -> str:
    """A Markdown table, with layers of the same name below each other."""
    layers = list(dict.fromkeys(row.layer for row in rows))
    lines = [
        f"| layer | model | mean | {' | '.join(QUANTILES)} | threshold | below it |",
        "| --- " * (5 + len(QUANTILES)) + "|",
    ]
    for row in sorted(rows, key=lambda row: layers.index(row.layer)):
        figures = " | ".join(f"{figure:.3g}" for figure in (row.mean, *row.quantiles.values(), row.threshold))
        lines.append(f"| {row.layer} | {row.model} | {figures} | {row.below:.1%} |")
    return "\n".join(lines) + "\n"


def diversity_plot(rows: Sequence[LayerDiversity]) -> Figure:
    """Plot the median and the band from 5% to 95% of the samples over the layers, one color per model.

    Requires matplotlib. If all models have the same layers, the axis shows the names of the layers. Otherwise each model is
    drawn from its first to its last layer over the same width.
    """
    from matplotlib.figure import Figure

    models = {model: [row for row in rows if row.model == model] for model in dict.fromkeys(r.model for r in rows)}
    names = [row.layer for row in next(iter(models.values()))]
    same = all([row.layer for row in of_model] == names for of_model in models.values())
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for model, of_model in models.items():
        last = max(len(of_model) - 1, 1)
        places = [index if same else index / last for index in range(len(of_model))]
        low, middle, high = ([row.quantiles[q] for row in of_model] for q in ("q05", "median", "q95"))
        (line,) = axes.plot(places, middle, marker=".", label=model)
        axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    if same:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axes.set_xlabel("layer")
    else:
        axes.set_xlabel("position between the first and the last layer")
    # A layer that is constant for a sample has variance zero, which a logarithmic axis cannot show.
    axes.set(
        ylabel="variance of a sample's activations",
        yscale="log" if all(row.quantiles["q05"] > 0 for row in rows) else "linear",
    )
    axes.legend(title="median, 5% to 95%")
    return figure


def _blocks(module: nn.Module, prefix: str) -> Iterable[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if not any(parameter.dim() >= 2 for parameter in child.parameters()):
            continue
        nested = any(True for part in child.children() for _ in part.children())
        if isinstance(child, nn.ModuleList) or (type(child) is nn.Sequential and nested):
            yield from _blocks(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _keep(outputs: dict[str, Any], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[name] = output

    return hook


def _is_map(output: Any) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.dim() >= 3


def _variance(name: str, output: Any, samples: int) -> Tensor:
    if output is None:
        raise ValueError(f"the layer {name!r} did not run, or returned nothing")
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() < 1 or len(output) != samples:
        given = f"{output.dtype} {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the output of the layer {name!r} must be a floating-point tensor ({samples}, *), got {given}"
        )
    return feature_variance(output).cpu()


def _summary(model: str, layer: str, values: Tensor, threshold: float) -> LayerDiversity:
    quantiles = dict(zip(QUANTILES, _quantiles(values, list(QUANTILES.values())).tolist(), strict=True))
    below = float((values < threshold).double().mean())
    return LayerDiversity(model, layer, len(values), float(values.mean()), quantiles, threshold, below)


def _quantiles(values: Tensor, levels: Sequence[float]) -> Tensor:
    """Like torch.quantile, which accepts at most 16 million values."""
    ordered = values.sort().values
    places = torch.tensor(levels, dtype=torch.float64) * (len(ordered) - 1)
    low = places.floor().long()
    return torch.lerp(ordered[low], ordered[places.ceil().long()], places - low)
