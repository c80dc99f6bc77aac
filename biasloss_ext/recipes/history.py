"""What a run reports: one row an epoch as CSV, and TensorBoard."""

from __future__ import annotations

import csv
import io
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from biasloss_ext.recipes.files import write_text, writing

CSV_NAME = "metrics.csv"
TENSORBOARD_FOLDER = "tensorboard"
QUANTILES = {"min": 0.0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}

Row = dict[str, Any]


def weight_quantiles(weights: Tensor) -> dict[str, float]:
    """Quantiles of the Bias Loss weights w_i of an epoch, "weight_min" to "weight_max", and "weight_mean"; those that are
    not finite are left out (a gradient scaler skips their steps)."""
    finite = weights[weights.isfinite()].double().sort().values
    if len(finite) == 0:
        return {f"weight_{name}": float("nan") for name in (*QUANTILES, "mean")}
    # By rank: torch.quantile refuses more than 16 million values.
    ranks = [round(share * (len(finite) - 1)) for share in QUANTILES.values()]
    values = finite[torch.tensor(ranks, device=finite.device)].tolist()
    quantiles = dict(zip((f"weight_{name}" for name in QUANTILES), values, strict=True))
    return {**quantiles, "weight_mean": float(finite.mean())}


def accuracy_of(row: Row) -> float:
    """The test accuracy of an epoch, in [0, 1]: that of the moving average where there is one."""
    return float(row["ema_test_accuracy" if "ema_test_accuracy" in row else "test_accuracy"])


def tested(rows: list[Row]) -> list[Row]:
    """The epochs after which the test images were looked at."""
    return [row for row in rows if "test_loss" in row]


def as_csv(rows: list[Row]) -> str:
    """The rows under one header."""
    text = io.StringIO()
    if rows:
        columns = max(rows, key=len)  # not every epoch is tested
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def write_csv(folder: Path, rows: list[Row]) -> None:
    """Write all rows again: after a resume no row is missing or doubled."""
    write_text(folder / CSV_NAME, as_csv(rows))


class TensorBoard:
    """Losses of every step and figures of every epoch; steps after ``first_step``, of a killed run, are hidden."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder = folder / TENSORBOARD_FOLDER
        self._hook, threading.excepthook = threading.excepthook, self._leave_to_the_writer
        with writing(self._folder):
            self._writer = SummaryWriter(self._folder, purge_step=first_step or None)

    def epoch(self, row: Row, step_losses: list[float], steps_done: int) -> None:
        """Adds an epoch that ended after ``steps_done`` steps."""
        first = steps_done - len(step_losses)
        with writing(self._folder):
            for number, loss in enumerate(step_losses):
                self._writer.add_scalar("step/train_loss", loss, first + number)
            for name, value in row.items():
                if name != "epoch":
                    self._writer.add_scalar(f"epoch/{name}", value, steps_done - 1)
            self._writer.flush()

    def close(self) -> None:
        with suppress(OSError):  # after an error this would hide it
            self._writer.close()
        threading.excepthook = self._hook

    def _leave_to_the_writer(self, failed: threading.ExceptHookArgs) -> None:
        """A full disk stops TensorBoard's thread; the next call here says so, and a traceback would be one too many."""
        if not (isinstance(failed.thread, _AsyncWriterThread) and isinstance(failed.exc_value, OSError)):
            self._hook(failed)
