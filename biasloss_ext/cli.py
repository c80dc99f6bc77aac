"""The command ``biasloss``, also ``python -m biasloss_ext``."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from biasloss_ext.errors import UserError

# The extra that installs a missing package.
_EXTRAS = {
    "train": ("typer", "rich", "sklearn", "scipy", "matplotlib", "tensorboard", "torchmetrics", "PIL"),
    "bench": ("pytest_benchmark", "openvino"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "models": ("timm", "torchvision"),
}
INTERRUPTED = 130
_NO_MEMORY = ("can't allocate memory", "out of memory", "bad allocation")


def main() -> None:
    """Run the command line. A mistake of the user is reported in one sentence, with exit code 2."""
    try:
        status = _run()
    except KeyboardInterrupt:  # while packages are imported
        status = INTERRUPTED
    except UserError as error:
        _fail(str(error))
    except ImportError as error:
        _fail_without_package(error)
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        _fail(f"{error.filename}: {error.strerror}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in _NO_MEMORY):
            raise
        _fail("out of memory: try a smaller --batch-size or --image-size")
    if status == INTERRUPTED:
        print(
            "biasloss: interrupted; to resume a training from its last checkpoint, run the same command again",
            file=sys.stderr,
        )
    sys.exit(status)


def _run() -> int:
    app = _app()
    import typer

    # Older versions of typer use click, newer ones hold a copy of it.
    usage_error: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    try:
        status = app(standalone_mode=False)
    except usage_error as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            return 2
        message = error.format_message()  # type: ignore[attr-defined]
        raise UserError(" ".join(message.split()).rstrip(".")) from None
    return status if isinstance(status, int) else 0


def _fail(sentence: str) -> NoReturn:
    sentence = f"biasloss: {' '.join(sentence.split())}"
    print(sentence, file=sys.stderr)
    summary = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if summary:  # torchrun prints its content
        Path(summary).write_text(json.dumps({"message": sentence, "timestamp": int(time.time())}))
    sys.exit(2)


def _fail_without_package(error: ImportError) -> NoReturn:
    package = (error.name or "").partition(".")[0]
    extra = next((extra for extra, packages in _EXTRAS.items() if package in packages), None)
    if extra is None:
        raise error
    what = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({error})"
    _fail(f"this command needs the extra [{extra}], of which {package} {what}: pip install 'biasloss_ext[{extra}]'")


def _app() -> Any:
    import typer

    from biasloss_ext.accelerate_command import accelerate
    from biasloss_ext.benchmarks.command import bench
    from biasloss_ext.info import info
    from biasloss_ext.recipes.check_command import check
    from biasloss_ext.recipes.commands import compare, diversity, predict, train
    from biasloss_ext.recipes.export_command import export
    from biasloss_ext.recipes.pack_command import pack
    from biasloss_ext.recipes.speed_command import speed

    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
    for command in (info, train, predict, export, compare, diversity, accelerate, bench):
        app.command()(command)
    data = typer.Typer(no_args_is_help=True, help="Look at data before a training, or pack them for it.")
    data.command()(check)
    data.command()(pack)
    data.command()(speed)
    app.add_typer(data, name="data")

    @app.callback()
    def _commands() -> None:
        """Bias Loss and compact CNNs for PyTorch."""

    return app
