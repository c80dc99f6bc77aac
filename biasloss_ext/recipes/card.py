"""What a finished run leaves for others: its weights as safetensors, config.json for our models, and a model card.

The folder then has the layout of a model on the Hugging Face Hub.
"""

from __future__ import annotations

import json
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from biasloss_ext.features import FeatureTap
from biasloss_ext.models import SkipblockNet
from biasloss_ext.recipes import checkpoint
from biasloss_ext.recipes.files import whole_file, write_text
from biasloss_ext.recipes.models import ALIASES
from biasloss_ext.recipes.outcome import Outcome
from biasloss_ext.recipes.report import NAME as REPORT_NAME
from biasloss_ext.recipes.report import PLOT_NAME, recipe_table
from biasloss_ext.version import __version__

NAME = "README.md"
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


def publish(outcome: Outcome, model: nn.Module, described: dict[str, Any]) -> None:
    """Write model.safetensors, README.md and, for models of this package, config.json into the folder of the run.

    Args:
        outcome: the finished run.
        model: the one whose accuracy the run reports.
        described: what :func:`biasloss_ext.recipes.checkpoint.describe` says of the data.
    """
    # Copies: the file format has no tied weights.
    tensors = {name: _plain(value) for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    bare = model.model if isinstance(model, FeatureTap) else model
    with whole_file(outcome.folder / WEIGHTS_NAME) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    if isinstance(bare, SkipblockNet):
        write_text(outcome.folder / CONFIG_NAME, json.dumps(bare.config(), indent=2) + "\n")
    write_text(outcome.folder / NAME, card(outcome, isinstance(bare, SkipblockNet), described))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def card(outcome: Outcome, ours: bool, described: dict[str, Any]) -> str:
    """The model card in Markdown, with the Hub's metadata at its top."""
    recipe = outcome.recipe
    classes, preprocessing = described["class_names"], described["preprocessing"]
    return "\n".join(
        [
            *_metadata(outcome),
            f"# {recipe.model} on {recipe.data}",
            "",
            f"An image classifier of {len(classes)} classes, trained with {_LOSSES[recipe.loss]} by `biasloss train`"
            f" (biasloss_ext {__version__}). Its accuracy is **{outcome.accuracy:.2%}** on {outcome.test_images} test images"
            f"{', with the moving average of the weights' if recipe.ema_decay > 0 else ''}.",
            f"[{REPORT_NAME}]({REPORT_NAME}) has the figures of the last epoch.",
            "",
            f"![loss and accuracy over the epochs]({PLOT_NAME})",
            "",
            "## Use",
            "",
            *_use(outcome, ours),
            "",
            "## Images and classes",
            "",
            *(f"- {name.replace('_', ' ')}: {value}" for name, value in preprocessing.items()),
            f"- classes, in the order of the scores: {', '.join(classes)}",
            "",
            "Pixels in [0, 1] have the mean subtracted, and are divided by the deviation.",
            "",
            "## Training",
            "",
            *recipe_table(recipe, without=("data_dir",)),  # a folder of one machine
            "",
        ]
    )


_LOSSES = {
    "bias": "[Bias Loss](https://arxiv.org/abs/2107.11170)",
    "ce": "cross-entropy",
    "focal": "the focal loss",
}


def _metadata(outcome: Outcome) -> list[str]:
    """YAML; strings in JSON's quotes are YAML's."""
    recipe = outcome.recipe
    name = json.dumps(f"{recipe.model} on {recipe.data}")
    return [
        "---",
        "library_name: biasloss_ext",
        "pipeline_tag: image-classification",
        "tags: [image-classification, biasloss_ext]",
        "metrics: [accuracy]",
        "model-index:",
        f"- name: {name}",
        "  results:",
        "  - task: {type: image-classification}",
        f"    dataset: {{type: {json.dumps(recipe.data)}, name: {json.dumps(recipe.data)}}}",
        f"    metrics: [{{type: accuracy, value: {outcome.accuracy:.6g}}}]",
        "---",
        "",
    ]


def _use(outcome: Outcome, ours: bool) -> list[str]:
    source, _, name = ALIASES.get(outcome.recipe.model, outcome.recipe.model).partition(":")
    lines = ["With class names and preprocessing, from this folder:", "", "```python"]
    lines += [
        "from biasloss_ext.recipes.trained import load_trained",
        "",
        'model = load_trained(".")',
        'scores = model(model.preprocessing.read("image.png")[None])',
        "print(model.class_names[scores.argmax()])",
        "```",
        "",
    ]
    if ours:
        lines += ["The network alone, also from the Hub:", "", "```python"]
        lines += [
            "from biasloss_ext.models import SkipblockNet",
            "",
            'model = SkipblockNet.from_pretrained(".").eval()',
            "```",
        ]
    else:
        lines += [f"`{WEIGHTS_NAME}` holds the state_dict of {name or source}{f' of {source}' if name else ''}."]
    return [
        *lines,
        "",
        "On the command line, `biasloss predict --run . image.png` classifies, and `biasloss export .` writes ONNX.",
        f"`{checkpoint.NAME}` also holds what a training needs to resume.",
    ]
