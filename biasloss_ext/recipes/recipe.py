"""What a training run is: every choice that its result depends on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from biasloss_ext.errors import UserError


class DataSet(NamedTuple):
    """A data set of ``biasloss train --data``.

    Attributes:
        loader: module in ``biasloss_ext/recipes/data`` and function in it, which is called with a recipe, the device of the
            batches and the number of processes that read files, and returns a :class:`biasloss_ext.recipes.data.base.Data`.
        defaults: choices of the recipe that are not :class:`Recipe`'s own defaults.
    """

    loader: str
    defaults: dict[str, Any] = {}


_MNIST_FAMILY = DataSet(
    "idx:load_idx",
    {
        "model": "skipblocknet_xs",
        "epochs": 15,
        "optimizer": "adamw",
        "lr": 3e-3,
        "weight_decay": 0.05,
        "schedule": "cosine",
        "warmup_epochs": 1,
        "channels_last": True,
    },
)
_IMAGES: dict[str, Any] = {
    "image_size": 224,
    "small_input": False,
    "epochs": 100,
    "batch_size": 256,
    "schedule": "cosine",
    "warmup_epochs": 5,
}
EMNIST_SPLITS = ("balanced", "byclass", "bymerge", "digits", "letters", "mnist")
DATA_SETS = {
    "digits": DataSet(
        "digits:load_digits",
        {
            "model": "skipblocknet_xs",
            "epochs": 12,
            "batch_size": 64,
            "optimizer": "adamw",  # in so few steps SGD leaves some seeds behind
            "lr": 3e-3,
            "weight_decay": 0.05,
            "schedule": "cosine",
            "warmup_epochs": 2,
            "channels_last": True,  # on a CPU the step takes half the time
        },
    ),
    "cifar10": DataSet("cifar:load_cifar"),
    "cifar100": DataSet("cifar:load_cifar"),
    **dict.fromkeys(
        ("mnist", "fashion_mnist", "kmnist", *(f"emnist_{split}" for split in EMNIST_SPLITS)), _MNIST_FAMILY
    ),
    "imagefolder": DataSet("folder:load_folder", _IMAGES),
    "packed": DataSet("packed:load_packed", _IMAGES),
}
LOSSES = ("bias", "ce", "focal")
CHOICES = {
    "data": tuple(DATA_SETS),
    "loss": LOSSES,
    "normalisation_mode": ("global", "local"),
    "optimizer": ("sgd", "adamw", "rmsprop"),
    "schedule": ("step", "cosine"),
    "amp": ("none", "bf16", "fp16"),
    "fused": ("auto", "on", "off"),
}


@dataclass(frozen=True)
class Recipe:
    """One training run. The defaults here are the paper's for CIFAR; :func:`make_recipe` has those of each data set.

    Attributes:
        data: one of ``DATA_SETS``.
        data_dir: where the data are; not used by digits.
        image_size: height and width of the images; always 32 for CIFAR and the data sets of MNIST's family.
        train_images: size of a fixed subset of the training images, every class in its proportion; 0 takes all.
        label_noise: share of the training labels, in [0, 1), that are replaced by another class.
        model: one of ours, "timm:NAME", "torchvision:NAME" or "mobilenet_v3_large", which is torchvision's.
        small_input: the first convolution has stride 1, for images of about 32 x 32.
        features_from: module whose output are the features of Bias Loss; None takes the model's last feature map.
        weights: file with weights to begin from.
        loss: "bias", "ce" or "focal".
        alpha, beta, normalisation_mode: of Bias Loss.
        mean_weight_one: Bias Loss is divided by the mean of its weights in the batch, so that the step is as large as with
            the cross-entropy.
        focal_gamma: exponent of the focal loss.
        label_smoothing: in [0, 1], for every loss.
        bce: "bias" and "ce" take the binary cross-entropy, mean over the classes, in place of the cross-entropy.
        teacher: folder of a training run whose model teaches this one; None for no distillation.
        distill_weight: share of the teacher's term in the loss, in (0, 1].
        distill_temperature: what the scores of both are divided by in the teacher's term.
        epochs: passes over the training images.
        test_every: the test images are looked at after every so many epochs, and after the last.
        batch_size: images of one optimizer step, over all processes and accumulated parts.
        accumulate: parts in which a batch is computed, one after the other.
        optimizer, lr, momentum, weight_decay: "sgd", "adamw" (which takes no momentum) or "rmsprop", and its constants.
        rms_decay: decay of the mean of squared gradients in RMSprop.
        epsilon: what AdamW and RMSprop add to the root of that mean.
        schedule: "step" multiplies the rate by ``gamma`` at the ``milestones`` (epochs), "cosine" lowers it to 0.
        warmup_epochs: epochs in which the rate rises linearly from 0, in either schedule.
        rand_augment: magnitude of RandAugment's two operations, up to 30; 0 for none; through torchvision.
        random_erasing: share of the training images in which a rectangle is erased, in [0, 1]; through torchvision.
        mixup, cutmix: parameter of the Beta distribution, 0 for none; through torchvision.
        ema_decay: decay of the moving average of the weights, 0 for none.
        amp: "none", "bf16", or "fp16" with a gradient scaler.
        fused: blocks on fused kernels, in models of timm and torchvision too (:func:`biasloss_ext.accelerate`): "auto" where
            they can run, "on" or an error, "off". Checkpoints are the same.
        channels_last, compile: memory format; ``torch.compile``.
        sync_batchnorm: batch normalization over all processes; on GPUs only, as in torch.
        seed: of the initial weights, the order of the images and their augmentation.
    """

    data: str = "cifar100"
    data_dir: str | None = None
    image_size: int = 32
    train_images: int = 0
    label_noise: float = 0.0
    model: str = "skipblocknet_m"
    small_input: bool = True
    features_from: str | None = None
    weights: str | None = None
    loss: str = "bias"
    alpha: float = 0.3
    beta: float = 0.3
    normalisation_mode: str = "global"
    mean_weight_one: bool = False
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0
    bce: bool = False
    teacher: str | None = None
    distill_weight: float = 0.5
    distill_temperature: float = 4.0
    epochs: int = 160
    test_every: int = 1
    batch_size: int = 128
    accumulate: int = 1
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    rms_decay: float = 0.9
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    schedule: str = "step"
    milestones: tuple[int, ...] = (80, 122)
    gamma: float = 0.1
    warmup_epochs: int = 0
    rand_augment: int = 0
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema_decay: float = 0.0
    amp: str = "none"
    fused: str = "auto"
    channels_last: bool = False
    compile: bool = False
    sync_batchnorm: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"unknown {_spoken(name)} {getattr(self, name)!r}: there are {', '.join(choices)}")
        for name in ("epochs", "test_every", "batch_size", "accumulate", "image_size"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("momentum", "label_smoothing", "random_erasing"):
            self._require(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name in ("label_noise", "rms_decay", "ema_decay"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in (
            "train_images",
            "alpha",
            "focal_gamma",
            "weight_decay",
            "warmup_epochs",
            "mixup",
            "cutmix",
            "seed",
        ):
            self._require(name, 0 <= getattr(self, name) < float("inf"), "at least 0")
        self._require("beta", -float("inf") < self.beta < 1, "below 1")
        for name in ("lr", "gamma", "epsilon", "distill_temperature"):
            self._require(name, 0 < getattr(self, name) < float("inf"), "above 0")
        self._require("rand_augment", 0 <= self.rand_augment <= 30, "in [0, 30]")
        self._require("distill_weight", 0 < self.distill_weight <= 1, "in (0, 1]")
        if self.bce and self.loss == "focal":
            raise UserError("--bce goes with --loss bias or ce: the focal loss is defined on the softmax here")
        if self.mean_weight_one and self.loss != "bias":
            raise UserError(f"--mean-weight-one goes with --loss bias: {self.loss} has no weights")
        self._require("milestones", all(epoch >= 0 for epoch in self.milestones), "epochs from 0 on")
        self._require("seed", self.seed < 2**63, "below 2^63")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(f"{_spoken(name)} must be {expected}, got {getattr(self, name)}")

    def as_dict(self) -> dict[str, Any]:
        """All attributes by name, in plain types."""
        return dataclasses.asdict(self)


def make_recipe(data: str, **options: Any) -> Recipe:
    """The recipe of a data set with some of its choices replaced; an option that is None keeps the default.

    Where ``epochs`` is replaced and ``milestones`` is not, the milestones keep their place in proportion.

    Raises:
        UserError: a choice that does not exist or a number out of range.
    """
    if data not in DATA_SETS:
        raise UserError(f"unknown data {data!r}: there are {', '.join(DATA_SETS)}")
    defaults = DATA_SETS[data].defaults
    chosen = {name: value for name, value in options.items() if value is not None}
    recipe = Recipe(**{"data": data, **defaults, **chosen})
    if "milestones" not in chosen:
        default = defaults.get("epochs", Recipe.epochs)
        milestones = tuple(round(epoch * recipe.epochs / default) for epoch in recipe.milestones)
        recipe = dataclasses.replace(recipe, milestones=milestones)
    return recipe


def from_dict(values: dict[str, Any]) -> Recipe:
    """The inverse of :meth:`Recipe.as_dict`."""
    return Recipe(**{**values, "milestones": tuple(values["milestones"])})


def differences(there: Recipe, asked: Recipe) -> str:
    """What differs between two recipes, as text; empty where nothing does. Data may have moved to another folder."""
    pairs = [(name, getattr(there, name), value) for name, value in asked.as_dict().items() if name != "data_dir"]
    return ", ".join(f"{_spoken(name)} {old} there, {new} here" for name, old, new in pairs if old != new)


def _spoken(name: str) -> str:
    return name.replace("_", " ")
