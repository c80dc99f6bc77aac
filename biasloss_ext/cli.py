"""The command ``biasloss``, also ``python -m biasloss_ext``."""

from __future__ import annotations

import sys

from biasloss_ext.errors import UserError


def main() -> None:
    """Run the command line; what the user got wrong is told in one sentence, with exit code 2."""
    try:
        app = _app()
    except ModuleNotFoundError as error:
        sys.exit(f"biasloss needs {error.name}: pip install 'biasloss_ext[train]'")
    try:
        app()
    except UserError as error:
        print(f"biasloss: {error}", file=sys.stderr)
        sys.exit(2)


def _app():  # type: ignore[no-untyped-def]
    import typer

    from biasloss_ext.benchmarks.command import bench
    from biasloss_ext.info import info
    from biasloss_ext.recipes.commands import compare, diversity, train

    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
    app.command()(info)
    app.command()(train)
    app.command()(compare)
    app.command()(diversity)
    app.command()(bench)

    @app.callback()
    def _commands() -> None:
        """Bias Loss and compact CNNs for PyTorch."""

    return app
