"""Progress on the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from biasloss_ext.recipes.history import Row, accuracy_of

T = TypeVar("T")
QUIET_SECONDS = 10.0


class Display:
    """Live bars for steps and, in a comparison, runs; one line for every epoch, which stays. A context manager.

    A file or a pipe gets no bars, but a line whenever ten seconds pass without one.

    Args:
        shown: False for the processes that do not lead.
    """

    def __init__(self, shown: bool = True) -> None:
        console = Console(quiet=not shown)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,  # a file or a pipe gets the lines alone
        )
        self._all: TaskID | None = None
        self._run: TaskID | None = None
        self._title = ""
        self._said = time.monotonic()

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._said = time.monotonic()
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def counted(self, title: str, items: Iterable[T], total: int) -> Iterator[T]:
        """The items, with a bar that counts them."""
        task = self._progress.add_task(title, total=total)
        try:
            for item in items:
                yield item
                self._progress.advance(task)
        finally:
            self._progress.refresh()
            self._progress.remove_task(task)

    def begin_all(self, title: str, runs: int) -> None:
        """Announces several runs."""
        self._all = self._progress.add_task(title, total=runs)

    def begin_run(self, title: str, steps: int, done: int) -> None:
        """A run of ``steps`` optimizer steps of which ``done`` were done earlier."""
        self._title = title
        self._run = self._progress.add_task(title, total=steps, completed=done)

    def step(self) -> None:
        """One optimizer step is done."""
        if self._run is None:
            return
        self._progress.advance(self._run)
        if self._progress.disable and time.monotonic() - self._said >= QUIET_SECONDS:
            task = self._progress.tasks[self._progress.task_ids.index(self._run)]
            self.say(f"{self._title}  step {task.completed:.0f}/{task.total:.0f}")

    def epoch(self, row: Row, epochs: int) -> None:
        """One epoch is done."""
        test = ""
        if "test_loss" in row:
            test = f"  test loss {row['test_loss']:.4f}  test accuracy {accuracy_of(row):.2%}"
        self.say(
            f"{self._title}  epoch {row['epoch']}/{epochs}  train loss {row['train_loss']:.4f}{test}"
            f"  {row['seconds']:.1f} s"
        )

    def end_run(self) -> None:
        """The run is over."""
        if self._run is not None:
            self._progress.remove_task(self._run)
            self._run = None
        if self._all is not None:
            self._progress.advance(self._all)
