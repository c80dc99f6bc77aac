"""The runs of the study: every part is a few settings, each with the same variants over the same seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.recipe import Recipe, make_recipe

DATA = "fashion_mnist"
ALL_IMAGES = 60_000
LOSSES: dict[str, dict[str, Any]] = {
    "bias": {"loss": "bias"},
    "ce": {"loss": "ce"},
    "focal": {"loss": "focal"},
    "bias, mean weight 1": {"loss": "bias", "mean_weight_one": True},
}
LOSS_PAIRS = (("bias", "ce"), ("bias", "focal"), ("bias, mean weight 1", "ce"), ("bias, mean weight 1", "bias"))


@dataclass(frozen=True)
class Setting:
    """Runs that are compared with each other.

    Attributes:
        name: of its folder of results.
        title: for tables.
        options: choices of the recipe that all of its runs share.
        variants: choices in which the runs differ, by name.
        pairs: the differences to report, each of two variants, the first minus the second.
        seeds: of every variant.
    """

    name: str
    title: str
    options: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    pairs: Sequence[tuple[str, str]]
    seeds: Sequence[int]


@dataclass(frozen=True)
class Part:
    """One question.

    Attributes:
        letter: what ``--part`` takes.
        title: the question.
        text: how it is asked, for the report.
        settings: in the order in which they are run.
    """

    letter: str
    title: str
    text: str
    settings: Sequence[Setting] = field(default_factory=tuple)


@dataclass(frozen=True)
class Run:
    """One training run of a part."""

    part: Part
    setting: Setting
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """The path of its results below the folder of results, without the suffix."""
        variant = self.variant.replace(", ", "-").replace(" ", "-")
        return f"{self.part.letter}/{self.setting.name}/{variant}-seed{self.seed}"

    def recipe(self, data_dir: str | None = None) -> Recipe:
        options = {**self.setting.options, **self.setting.variants[self.variant]}
        return make_recipe(DATA, data_dir=data_dir, seed=self.seed, **options)


FEW = {"train_images": 2_000, "epochs": 12, "batch_size": 64, "test_every": 6}
MORE = {"train_images": 10_000, "epochs": 4, "batch_size": 64, "test_every": 2}
NOISE = {"label_noise": 0.2}
SGD = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-4}
FIVE, THREE = range(5), range(3)
WHOLE_RUN = "60000-ten-epochs"  # the setting whose one run the page on training describes

# The weights of Bias Loss average about 0.75 in the runs of (b). A loss times that is, for SGD, this rate and decay.
SMALLER_STEPS = {"loss": "ce", "lr": 0.075, "weight_decay": 1e-4 / 0.75}
STEP_LOSSES = {name: LOSSES[name] for name in ("bias", "ce", "bias, mean weight 1")} | {
    "ce, steps x 0.75": SMALLER_STEPS
}
STEP_PAIRS = (("bias", "ce"), ("bias, mean weight 1", "ce"), ("ce, steps x 0.75", "ce"), ("bias", "ce, steps x 0.75"))


def _losses(name: str, title: str, options: Mapping[str, Any]) -> Setting:
    return Setting(name, title, options, LOSSES, LOSS_PAIRS, FIVE)


def _all_images() -> Setting:
    """Without the scaled loss: these runs are the longest, and (b) and (s) answer for it."""
    losses = {name: LOSSES[name] for name in ("bias", "ce", "focal")}
    pairs = [pair for pair in LOSS_PAIRS if set(pair) <= losses.keys()]
    return Setting("60000", "60,000 images", {"epochs": 5}, losses, pairs, FIVE)


def _whole_run() -> Setting:
    return Setting(WHOLE_RUN, "60,000 images, ten epochs", {"epochs": 10}, {"bias": LOSSES["bias"]}, (), range(1))


def _models() -> Setting:
    networks = {"SkipblockNet-M": "skipblocknet_m", "MobileNetV3-Large": "mobilenet_v3_large"}
    variants = {
        f"{title}, {loss}": {"model": model, "loss": loss}
        for title, model in networks.items()
        for loss in ("ce", "bias")
    }
    skip, mobile = networks
    pairs = (
        (f"{skip}, ce", f"{mobile}, ce"),
        (f"{skip}, bias", f"{mobile}, bias"),
        (f"{skip}, bias", f"{skip}, ce"),
        (f"{mobile}, bias", f"{mobile}, ce"),
    )
    return Setting("2000", "2,000 images", FEW, variants, pairs, THREE)


def _grid(mode: str) -> Setting:
    """The defaults come first: the others are compared with them."""
    pairs = [(0.3, 0.3), *((a, b) for a in (0.1, 0.3, 1.0) for b in (0.0, 0.3, 0.7) if (a, b) != (0.3, 0.3))]
    variants: dict[str, Mapping[str, Any]] = {
        f"alpha {alpha:g}, beta {beta:g}": {"alpha": alpha, "beta": beta, "normalisation_mode": mode}
        for alpha, beta in pairs
    }
    default, *others = variants
    options = {**FEW, **NOISE, "loss": "bias"}
    title = f"{mode}, 2,000 images, 20% wrong labels"
    return Setting(f"2000-noise20-{mode}", title, options, variants, [(other, default) for other in others], THREE)


PARTS = (
    Part(
        "a",
        "Bias Loss on all of Fashion-MNIST",
        "SkipblockNet-XS at 32 x 32 on all 60,000 images, five epochs, otherwise the default recipe (AdamW); once for ten.",
        (_all_images(), _whole_run()),
    ),
    Part(
        "b",
        "Bias Loss with few images and with wrong labels",
        "SkipblockNet-XS with AdamW, batches of 64; 12 epochs on 2,000 images, 4 epochs on 10,000.",
        (
            _losses("2000-noise20", "2,000 images, 20% wrong labels", {**FEW, **NOISE}),
            _losses("2000", "2,000 images", FEW),
            _losses("10000-noise20", "10,000 images, 20% wrong labels", {**MORE, **NOISE}),
            _losses("10000", "10,000 images", MORE),
        ),
    ),
    Part(
        "s",
        "Is Bias Loss only a smaller learning rate?",
        "The weights of Bias Loss average below 1. AdamW divides gradients by their size, so a constant factor in the loss "
        "changes almost nothing there; with SGD it scales the steps. SkipblockNet-XS on 2,000 images, 12 epochs, with the "
        "paper's constants of SGD: learning rate 0.1, momentum 0.9, weight decay 1e-4.",
        tuple(
            Setting(name, title, {**FEW, **SGD, **noise}, STEP_LOSSES, STEP_PAIRS, FIVE)
            for name, title, noise in (
                ("2000-noise20", "2,000 images, 20% wrong labels, SGD", NOISE),
                ("2000", "2,000 images, SGD", {}),
            )
        ),
    ),
    Part(
        "c",
        "SkipblockNet-M and MobileNetV3-Large",
        "Both at 32 x 32 with a first convolution of stride 1, AdamW, batches of 64, 12 epochs on 2,000 images. "
        "MobileNetV3-Large is torchvision's.",
        (_models(),),
    ),
    Part(
        "d",
        "alpha, beta and the normalization",
        "SkipblockNet-XS as in (b), 2,000 images with 20% wrong labels. The differences are from alpha 0.3, beta 0.3.",
        (_grid("global"), _grid("local")),
    ),
)


def training_images(run: Run) -> int:
    """How many images the run trains on, those of every epoch counted."""
    recipe = run.recipe()
    return recipe.epochs * (recipe.train_images or ALL_IMAGES)


def runs(
    letters: Sequence[str] = (),
    settings: Sequence[str] = (),
    variants: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> Iterator[Run]:
    """The runs of these parts, settings, variants and seeds, all where none are named; a whole seed before the next.

    Raises:
        UserError: no part, setting or variant of that name.
    """
    known = [part.letter for part in PARTS]
    for letter in letters:
        if letter not in known:
            raise UserError(f"unknown part {letter!r}: there are {', '.join(known)}")
    chosen = [part for part in PARTS if not letters or part.letter in letters]
    names = dict.fromkeys(setting.name for part in chosen for setting in part.settings)
    for name in settings:
        if name not in names:
            raise UserError(f"unknown setting {name!r}: there are {', '.join(names)}")
    listed = [(part, s) for part in chosen for s in part.settings if not settings or s.name in settings]
    variant_names = dict.fromkeys(variant for _, setting in listed for variant in setting.variants)
    for variant in variants:
        if variant not in variant_names:
            raise UserError(f"unknown variant {variant!r}: there are {'; '.join(variant_names)}")
    for part, setting in listed:
        for seed in setting.seeds:
            if not seeds or seed in seeds:
                for variant in setting.variants:
                    if not variants or variant in variants:
                        yield Run(part, setting, variant, seed)
