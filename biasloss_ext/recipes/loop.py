"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from biasloss_ext.errors import UserError
from biasloss_ext.recipes import checkpoint, interrupts
from biasloss_ext.recipes.card import publish
from biasloss_ext.recipes.display import Display
from biasloss_ext.recipes.distillation import Teacher
from biasloss_ext.recipes.evaluation import evaluate
from biasloss_ext.recipes.files import make_folder
from biasloss_ext.recipes.graphs import CapturedSteps, Compute, CudaCapture, why_not_captured
from biasloss_ext.recipes.history import Row, TensorBoard, weight_quantiles, write_csv
from biasloss_ext.recipes.losses import build_loss
from biasloss_ext.recipes.mixing import Mixing
from biasloss_ext.recipes.models import build_model, scores_of, synchronized
from biasloss_ext.recipes.order import Order
from biasloss_ext.recipes.outcome import Outcome
from biasloss_ext.recipes.processes import Processes, processes
from biasloss_ext.recipes.recipe import Recipe
from biasloss_ext.recipes.report import write_report
from biasloss_ext.recipes.run_data import RunData, open_data
from biasloss_ext.recipes.run_options import RunOptions
from biasloss_ext.recipes.schedule import build_optimizer, build_schedule, restore_optimizer


def train(
    recipe: Recipe,
    out: Path,
    *,
    display: Display | None = None,
    title: str = "training",
    **options: Any,
) -> Outcome:
    """Train, or resume the run whose checkpoint is in ``out``, or do nothing if that run is finished.

    After a kill at any moment, the same call resumes from the last checkpoint; on one CPU it ends with the same bits as a run
    that was never stopped. Under torchrun all processes call this; see docs/training.md.

    Args:
        out: folder for checkpoint.pt, metrics.csv, tensorboard/, report.md and its plots; made when all is checked.
        display: shows progress there; one of its own by default.
        options: fields of :class:`biasloss_ext.recipes.run_options.RunOptions`.

    Raises:
        UserError: for errors that the user can correct; ``out`` is then as before.
    """
    how = RunOptions(**options)
    with (
        processes(how.device) as here,
        interrupts.watched(),
        Display(shown=here.leads) if display is None else nullcontext(display) as shown,
    ):
        opened = open_data(recipe, here, how.workers, how.skip_broken, shown)
        run = Run(recipe, opened, here)
        if not how.fresh:
            state = checkpoint.load(out, recipe)
            checkpoint.check_data(out, state, opened.described)
            run.restore(state)
        for note in (*opened.notes, *run.notes):
            shown.say(note)
        if how.cuda_graphs:
            run.capture_steps(shown)
        return run.train(out, how.checkpoint_steps, shown, title)


def check(
    recipe: Recipe,
    device: str = "auto",
    workers: int = 0,
    skip_broken: bool = False,
    display: Display | None = None,
) -> dict[str, Any]:
    """Raises what :func:`train` would raise before its first step, and writes nothing.

    Returns:
        What :func:`biasloss_ext.recipes.checkpoint.describe` says of the data.
    """
    with processes(device) as here:
        opened = open_data(recipe, here, workers, skip_broken, display)
        Run(recipe, opened, here)
        return opened.described


class Run:
    """Everything that changes during training, and where in the run it is."""

    def __init__(self, recipe: Recipe, opened: RunData, here: Processes) -> None:
        self.recipe, self.opened, self.here = recipe, opened, here
        self.data = data = opened.data
        if recipe.sync_batchnorm and here.device.type != "cuda":
            raise UserError("batch normalization over all processes (--sync-batchnorm) runs on GPUs only")
        self.order = Order(
            data.train_images, recipe.batch_size, recipe.seed, recipe.accumulate, here.count, here.number
        )
        self.mixing = Mixing(recipe, data.classes, here.number)
        torch.manual_seed(recipe.seed)
        self.notes: list[str] = []  # what the user should know before the first step
        model = build_model(recipe, data.classes, data.channels, data.image_size, self.notes).to(here.device)
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if recipe.sync_batchnorm:
            model = synchronized(model, recipe)
        self.model = model
        self.ema: AveragedModel | None = None
        if recipe.ema_decay > 0:
            self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay), use_buffers=True)
        if recipe.compile:
            model.compile()  # in place: names in the state_dict stay
        self.parallel: nn.Module = DistributedDataParallel(model) if here.count > 1 else model
        self.teacher = None if recipe.teacher is None else Teacher(Path(recipe.teacher), recipe, data, here.device)
        self.loss = build_loss(recipe, here.group).to(here.device)
        self.optimizer = build_optimizer(recipe, model)
        self.schedule = build_schedule(recipe, self.optimizer, self.order.steps)
        self.scaler = torch.amp.GradScaler(here.device.type, enabled=recipe.amp == "fp16")
        self.autocast = torch.autocast(
            here.device.type,
            torch.float16 if recipe.amp == "fp16" else torch.bfloat16,
            enabled=recipe.amp != "none",
        )
        self.compute: Compute = self._compute
        # From here on every process has random numbers of its own, for dropout.
        checkpoint.seed_random_state(recipe.seed + here.number)

        self.epoch, self.step = 0, 0  # whole epochs done, and steps of the next
        self.seconds = 0.0  # of that epoch, in this and earlier processes
        self.losses: list[Tensor] = []  # of every part of it; on the device, since to look at them would wait for it
        self.weights: list[Tensor] = []
        self.history: list[Row] = []

    def capture_steps(self, display: Display) -> None:
        """Let steps be captured in a CUDA graph where that is possible."""
        reason = why_not_captured(self.recipe, self.here)
        if reason is not None:
            display.say(f"--cuda-graphs: steps run eagerly: {reason}")
            return
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.compute = CapturedSteps(self._compute, parameters, CudaCapture(), display.say)

    def train(self, out: Path, checkpoint_steps: int, display: Display, title: str) -> Outcome:
        """The rest of the run."""
        outcome = Outcome(self.recipe, out, self.history, self.data.test_images, self.opened.left_out)
        log = None
        done = self.epoch * self.order.steps + self.step
        if self.here.leads:
            make_folder(out)
            write_csv(out, self.history)
            models = [self.model] if self.ema is None else [self.model, self.ema.module]
            checkpoint.check_space(out, models, self.optimizer)
            log = TensorBoard(out, done - self.step)
        display.begin_run(title, self.recipe.epochs * self.order.steps, done)
        try:
            while self.epoch < self.recipe.epochs:
                self._train_epoch(out, checkpoint_steps, display)
                self._end_epoch(out, log, display)
        finally:
            display.end_run()
            if log is not None:
                log.close()
        if self.here.leads:
            write_report(outcome)
            publish(outcome, self.model if self.ema is None else self.ema.module, self.opened.described)
        self.here.wait()
        return outcome

    def _train_epoch(self, out: Path, checkpoint_steps: int, display: Display) -> None:
        began = time.perf_counter() - self.seconds
        self.parallel.train()
        batches = iter(self.data.train_batches(self.epoch, self.order.batches(self.epoch, self.step)))
        while self.step < self.order.steps:
            self.take_step(batches)
            interrupts.check()
            self.seconds = time.perf_counter() - began
            display.step()
            if checkpoint_steps and self.step % checkpoint_steps == 0 and self.step < self.order.steps:
                self._save(out)

    def take_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One step of the optimizer, on as many of ``batches`` as the recipe has parts."""
        for part in range(1, self.recipe.accumulate + 1):
            self._backward(*next(batches), part)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.step += 1

    def _backward(self, images: Tensor, target: Tensor, part: int) -> None:
        images, target = self.mixing(images, target, (self.epoch, self.step, part))
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        # Gradients are summed over the processes once a step, after the last part.
        waits = isinstance(self.parallel, DistributedDataParallel) and part < self.recipe.accumulate
        with self.parallel.no_sync() if waits else nullcontext():  # type: ignore[operator]
            loss, weights = self.compute(images, target)
        self.losses.append(loss)
        if weights is not None:
            self.weights.append(weights)

    def _compute(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """Leaves gradients in the parameters."""
        with self.autocast:
            outputs = self.parallel(images)
            loss, weights = self.loss(outputs, target)
            if self.teacher is not None:
                loss = self.teacher.share_in(loss, images, scores_of(outputs))
        self.scaler.scale(loss / self.recipe.accumulate).backward()
        return loss.detach(), weights

    def _end_epoch(self, out: Path, log: TensorBoard | None, display: Display) -> None:
        step_losses = self.here.sum(torch.stack(self.losses) / self.here.count)
        step_losses = step_losses.view(-1, self.recipe.accumulate).mean(1)
        # A gradient scaler skips steps whose gradients are not finite; without one such a loss is the end of the run.
        counted = step_losses[step_losses.isfinite()] if self.scaler.is_enabled() else step_losses
        train_loss = float(counted.mean())
        if train_loss != train_loss or train_loss == float("inf"):
            raise UserError(f"the training loss of epoch {self.epoch + 1} is not finite: try a lower --lr")
        self.here.share_buffers(self.model)
        row: Row = {"epoch": self.epoch + 1, "lr": self.schedule.get_last_lr()[0], "train_loss": train_loss}
        now_tested = (self.epoch + 1) % self.recipe.test_every == 0 or self.epoch + 1 == self.recipe.epochs
        for prefix, model in (("", self.model), ("ema_", self.ema)):
            if model is not None and now_tested:
                figures = evaluate(model, self.data, 2 * self.recipe.batch_size, self.here, self.autocast)
                row |= {f"{prefix}test_{name}": value for name, value in figures.items()}
        if self.weights:
            row |= weight_quantiles(self.here.gather(torch.cat(self.weights)))
        row["seconds"] = round(self.seconds, 3)
        self.history.append(row)
        self.epoch, self.step, self.seconds, self.losses, self.weights = self.epoch + 1, 0, 0.0, [], []
        if log is not None:
            log.epoch(row, step_losses.tolist(), self.epoch * self.order.steps)
        self._save(out)
        if self.here.leads:
            write_csv(out, self.history)
        display.epoch(row, self.recipe.epochs)

    def _save(self, out: Path) -> None:
        random_states = self.here.gather_objects(checkpoint.random_state())
        if self.here.leads:
            checkpoint.save(
                out,
                {
                    "recipe": self.recipe.as_dict(),
                    "data": self.opened.described,
                    "model": self.model.state_dict(),
                    "ema": None if self.ema is None else self.ema.module.state_dict(),
                    "ema_updates": 0 if self.ema is None else int(self.ema.n_averaged),
                    "optimizer": self.optimizer.state_dict(),
                    "schedule": self.schedule.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "loss": self.loss.state_dict(),
                    "teacher": None if self.teacher is None else self.teacher.digest,
                    "random_states": random_states,
                    "epoch": self.epoch,
                    "step": self.step,
                    "seconds": self.seconds,
                    "losses": self.losses,
                    "weights": self.weights,
                    "history": self.history,
                },
            )
        self.here.wait()

    def restore(self, state: dict[str, Any] | None) -> None:
        """Takes up the state of a checkpoint; None leaves the run at its beginning."""
        if state is None:
            return
        if self.teacher is not None:
            self.teacher.check_digest(state)
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.n_averaged.fill_(state["ema_updates"])
        restore_optimizer(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.loss.load_state_dict(state["loss"])
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        # Of a broken epoch the first process's losses and weights stand for those of the others, which are lost.
        self.losses = [loss.to(self.here.device) for loss in state["losses"]]
        self.weights = [weights.to(self.here.device) for weights in state["weights"]]
        self.history[:] = state["history"]
        if self.here.number < len(state["random_states"]):
            checkpoint.restore_random_state(state["random_states"][self.here.number])
