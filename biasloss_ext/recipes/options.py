"""The options that commands share: what a run computes, and how."""

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
from biasloss_ext.recipes.recipe import CHOICES, Recipe

Data = Annotated[str, typer.Option(help=f"Data set: {', '.join(CHOICES['data'])}.", rich_help_panel="Data")]
Out = Annotated[
    Path, typer.Option(help="Folder for everything that the run writes; an unfinished run there is resumed.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel="Machine")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read image files.", rich_help_panel="Machine")]
SkipBroken = Annotated[
    bool,
    typer.Option("--skip-broken", help="Leave out image files that cannot be read.", rich_help_panel="Data"),
]
# Of how a run is computed, by the names of RunOptions: annotation, default.
_RUN_OPTIONS: dict[str, tuple[Any, Any]] = {
    "checkpoint_steps": (
        Annotated[int, typer.Option(min=0, help="Checkpoint after so many steps too, not only after every epoch.")],
        0,
    ),
    "fresh": (Annotated[bool, typer.Option("--fresh", help="Start over, whatever the folder holds.")], False),
    "skip_broken": (SkipBroken, False),
    "device": (Device, "auto"),
    "workers": (Workers, 4),
    "cuda_graphs": (
        Annotated[
            bool,
            typer.Option(
                "--cuda-graphs",
                help="Capture the steps in a CUDA graph; where that is impossible, say why and run them eagerly.",
                rich_help_panel="Machine",
            ),
        ],
        False,
    ),
}

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


def with_recipe_options(
    *without: str, run_options: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for every choice of the recipe; those not given are None, the default of the data set.

    The command takes them as ``**options``, and so those of :class:`RunOptions` where ``run_options``.
    """
    fields = {field.name: field for field in dataclasses.fields(Recipe)}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in signature(command, eval_str=True).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        options = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in _RUN_OPTIONS.items()
            if run_options
        ]
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
                given["milestones"] = whole_numbers("--milestones", given["milestones"])
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


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} takes whole numbers between commas, got {text!r}") from None
