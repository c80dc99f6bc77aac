"""The commands ``train``, ``compare``, ``predict`` and ``diversity``: options, and nothing else."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from biasloss_ext.errors import SaidElsewhere, UserError
from biasloss_ext.recipes.recipe import CHOICES, Recipe, make_recipe

Data = Annotated[str, typer.Option(help=f"Data set: {', '.join(CHOICES['data'])}.", rich_help_panel="Data")]
Out = Annotated[
    Path, typer.Option(help="Folder for everything that the run writes; it goes on with a run begun there.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel="Machine")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read image files.", rich_help_panel="Machine")]
CheckpointSteps = Annotated[
    int, typer.Option(min=0, help="Checkpoint after so many steps too, not only after every epoch.")
]
SkipBroken = Annotated[
    bool,
    typer.Option("--skip-broken", help="Leave out image files that cannot be read.", rich_help_panel="Data"),
]
CudaGraphs = Annotated[
    bool,
    typer.Option(
        "--cuda-graphs",
        help="Capture the steps in a CUDA graph; where that is impossible, say why and run them eagerly.",
        rich_help_panel="Machine",
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Begin anew, whatever the folder holds.")]

# Options of the recipe: panel, help.
_HELP = {
    "data_dir": ("Data", "Folder of the data; digits need none."),
    "image_size": ("Data", "Height and width of the images."),
    "train_images": ("Data", "Train on a fixed subset of so many images, every class in its proportion; 0 for all."),
    "label_noise": ("Data", "Replace this share of the training labels by another class, in [0, 1)."),
    "rand_augment": ("Data", "RandAugment of this magnitude, 1 to 30 (usually 9); 0 for none; needs torchvision."),
    "random_erasing": ("Data", "Erase a rectangle in this share of the training images; needs torchvision."),
    "mixup": ("Data", "Mixup with this parameter of the Beta distribution; needs torchvision."),
    "cutmix": ("Data", "CutMix likewise."),
    "model": ("Model", "skipblocknet_xs, _s, _m or _l, timm:NAME, torchvision:NAME, or mobilenet_v3_large."),
    "small_input": ("Model", "First convolution of stride 1, for images of about 32 x 32."),
    "features_from": ("Model", "Module whose output are the features of Bias Loss, by its name in the model."),
    "weights": ("Model", "File with weights to begin from."),
    "loss": ("Loss", "bias, ce or focal."),
    "alpha": ("Loss", "alpha of Bias Loss."),
    "beta": ("Loss", "beta of Bias Loss."),
    "normalisation_mode": ("Loss", "global or local, of Bias Loss."),
    "mean_weight_one": ("Loss", "Divide Bias Loss by the mean of its weights in the batch."),
    "focal_gamma": ("Loss", "Exponent of the focal loss."),
    "label_smoothing": ("Loss", "Label smoothing, in [0, 1]."),
    "bce": ("Loss", "Binary cross-entropy in place of the cross-entropy in bias and ce."),
    "teacher": ("Loss", "Learn from the model of another run too: its folder."),
    "distill_weight": ("Loss", "Share of the teacher's term in the loss, in (0, 1]."),
    "distill_temperature": ("Loss", "Temperature of the teacher's term."),
    "epochs": ("Schedule", "Passes over the training images."),
    "test_every": ("Schedule", "Look at the test images after every so many epochs, and after the last."),
    "batch_size": ("Schedule", "Images of one step, over all processes and accumulated parts."),
    "accumulate": ("Schedule", "Compute a batch in so many parts."),
    "optimizer": ("Schedule", "sgd, adamw or rmsprop."),
    "lr": ("Schedule", "Learning rate."),
    "momentum": ("Schedule", "Momentum of sgd and rmsprop."),
    "rms_decay": ("Schedule", "Decay of the mean of squared gradients in rmsprop."),
    "epsilon": ("Schedule", "Epsilon of adamw and rmsprop."),
    "weight_decay": ("Schedule", "Weight decay."),
    "schedule": ("Schedule", "step or cosine."),
    "milestones": ("Schedule", "Epochs at which the rate is multiplied by gamma, as 80,122."),
    "gamma": ("Schedule", "See milestones."),
    "warmup_epochs": ("Schedule", "Epochs of linear warm-up."),
    "ema_decay": ("Schedule", "Decay of the moving average of the weights; 0 for none."),
    "amp": ("Machine", "Mixed precision: none, bf16 or fp16."),
    "fused": ("Machine", "Blocks on fused kernels: auto (where they can run), on or off."),
    "channels_last": ("Machine", "Memory format channels_last."),
    "compile": ("Machine", "torch.compile."),
    "sync_batchnorm": ("Machine", "Batch normalization over all processes; GPUs only."),
    "seed": ("Schedule", "Of weights, order and augmentation."),
}


def with_recipe_options(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for every choice of the recipe; those not given are None, the default of the data set.

    The command takes them as ``**options``.
    """
    fields = {field.name: field for field in dataclasses.fields(Recipe)}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in signature(command, eval_str=True).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        options = []
        for name, (panel, text) in _HELP.items():
            if name in without:
                continue
            default = fields[name].default
            kind: Any = str if default is None or isinstance(default, tuple) else type(default)
            option = typer.Option(help=text, rich_help_panel=panel, show_default=False)
            options.append(
                Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])
            )

        @wraps(command)
        def run(**given: Any) -> None:
            if given.get("milestones") is not None:
                given["milestones"] = _whole_numbers("--milestones", given["milestones"])
            try:
                command(**given)
            except UserError as error:
                others_say_it = int(os.environ.get("RANK", "0")) > 0 and not error.of_one_process
                if others_say_it or isinstance(error, SaidElsewhere):
                    sys.exit(2)
                raise

        run.__signature__ = signature(command).replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *options)}
        del run.__wrapped__  # type: ignore[attr-defined]  # typer would look through to the command's own signature
        return run

    return decorate


def _names(option: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UserError(f"{option} takes names between commas, got {text!r}")
    return names


def _whole_numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} takes whole numbers between commas, got {text!r}") from None


@with_recipe_options()
def train(
    *,
    data: Data = "digits",
    out: Out = Path("runs/train"),
    checkpoint_steps: CheckpointSteps = 0,
    fresh: Fresh = False,
    skip_broken: SkipBroken = False,
    device: Device = "auto",
    workers: Workers = 4,
    cuda_graphs: CudaGraphs = False,
    **options: Any,
) -> None:
    """Train a classifier; killed, it goes on where it was when called again. Also under torchrun."""
    recipe = make_recipe(data, **options)
    from biasloss_ext.recipes.loop import train as run

    outcome = run(
        recipe,
        out,
        device=device,
        workers=workers,
        checkpoint_steps=checkpoint_steps,
        fresh=fresh,
        skip_broken=skip_broken,
        cuda_graphs=cuda_graphs,
        title=recipe.loss,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        typer.echo(f"test accuracy {outcome.accuracy:.2%}; report in {out / 'report.md'}")


@with_recipe_options("model", "loss", "seed")
def compare(
    *,
    data: Data = "digits",
    models: Annotated[
        str | None,
        typer.Option(
            help="Models between commas; the data set's default and mobilenet_v3_large if not given.",
            show_default=False,
        ),
    ] = None,
    losses: Annotated[str, typer.Option(help="Losses between commas.")] = "bias,ce",
    seeds: Annotated[str, typer.Option(help="Seeds between commas.")] = "0,1,2",
    out: Out = Path("runs/compare"),
    checkpoint_steps: CheckpointSteps = 0,
    fresh: Fresh = False,
    skip_broken: SkipBroken = False,
    device: Device = "auto",
    workers: Workers = 4,
    cuda_graphs: CudaGraphs = False,
    **options: Any,
) -> None:
    """Train with several losses or models over several seeds, and say whether they differ; goes on when called again."""
    from biasloss_ext.recipes.compare import compare as run

    found = run(
        out,
        data=data,
        models=None if models is None else _names("--models", models),
        losses=_names("--losses", losses),
        seeds=_whole_numbers("--seeds", seeds),
        device=device,
        workers=workers,
        checkpoint_steps=checkpoint_steps,
        fresh=fresh,
        skip_broken=skip_broken,
        cuda_graphs=cuda_graphs,
        **options,
    )
    for difference in found.differences:
        typer.echo(f"{difference.first} minus {difference.second}: {100 * difference.mean:+.2f}, {difference.verdict}")
    typer.echo(f"report in {out / 'report.md'}")


def predict(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGES...", help="Image files, and folders of them.", show_default=False)
    ],
    run: Annotated[Path, typer.Option(help="Folder of a training run.", show_default=False)],
    top_k: Annotated[int, typer.Option(min=1, help="Classes to name for each image.")] = 1,
    csv: Annotated[Path | None, typer.Option(help="Write a CSV file instead of a table.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one pass.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Threads that read image files.")] = 4,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out image files that cannot be read.")
    ] = False,
) -> None:
    """Classify image files with the model of a training run."""
    from biasloss_ext.recipes.predict import as_table, write_csv
    from biasloss_ext.recipes.predict import predict as classify

    if csv is not None and not csv.parent.is_dir():
        raise UserError(f"there is no folder {csv.parent} to write {csv.name} into")
    predictions = classify(
        run, images, top_k=top_k, batch_size=batch_size, device=device, workers=workers, skip_broken=skip_broken
    )
    for sentence in predictions.left_out:
        typer.echo(f"left out: {sentence}", err=True)
    if csv is None:
        typer.echo(as_table(predictions.found))
        return
    write_csv(csv, predictions.found)
    typer.echo(f"{len(predictions.found)} images classified, in {csv}")


def diversity(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Folders of training runs, or models as for train, MODEL@FILE with weights or MODEL untrained.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(help=f"Data set, {', '.join(CHOICES['data'])}; by default that of the runs.", show_default=False),
    ] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder of the data.", show_default=False)] = None,
    image_size: Annotated[int | None, typer.Option(help="Height and width of the images.", show_default=False)] = None,
    small_input: Annotated[
        bool | None, typer.Option(help="As for train, for models given by name.", show_default=False)
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Modules between commas, the same in every model; by default its blocks.", show_default=False
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Report the share of images with a variance below this; by default half the median of each layer.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one pass.")] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for report.md, diversity.csv and diversity.png.")] = Path(
        "runs/diversity"
    ),
) -> None:
    """Report how much the activations of an image vary, layer by layer, for several models side by side."""
    from biasloss_ext.recipes.diversity import measure_diversity

    measure_diversity(
        sources,
        out,
        data=data,
        data_dir=data_dir,
        image_size=image_size,
        small_input=small_input,
        layers=None if layers is None else _names("--layers", layers),
        threshold=threshold,
        batch_size=batch_size,
        device=device,
    )
    typer.echo(f"report in {out / 'report.md'}")
