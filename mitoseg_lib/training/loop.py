"""The loop: steps, epochs, checkpoints, and the way back to where a training was."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import astuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from mitoseg_lib.checkpoints import CheckpointFolder, State
from mitoseg_lib.inference import CHANNELS_LAST
from mitoseg_lib.interruptions import (
    StopRequest,
    random_states,
    require_same,
    seed_everything,
    set_random_states,
    training_identity,
)
from mitoseg_lib.metrics import Scores, scores
from mitoseg_lib.stacks import Stack
from mitoseg_lib.training.batches import Batches, patch_loader
from mitoseg_lib.training.evaluation import evaluate
from mitoseg_lib.training.history import Epoch, History
from mitoseg_lib.training.optimizer import (
    adam,
    averaged,
    learning_rate_schedule,
    like_parameters,
)
from mitoseg_lib.training.precision import autocast_dtype, depthwise_convolutions
from mitoseg_lib.training.settings import TrainingSettings


class NonFiniteError(ArithmeticError):
    """The loss or the weights became infinite or NaN, so that no further step can help."""


class TrainingInterrupted(KeyboardInterrupt):
    """A training that was stopped by Ctrl-C or SIGTERM after the end of a step; it is saved if it had a folder."""


class Training:
    """What moves in a training, and its place: so many whole epochs, and so many steps of the next."""

    def __init__(self, model: nn.Module, train: Dataset, validation: Stack, settings: TrainingSettings) -> None:
        # accelerate's own mixed precision would replace the model's forward, and be fixed for the process's life.
        self.accelerator = Accelerator(mixed_precision="no", cpu=settings.device == "cpu")
        self.settings, self.train_set, self.validation = settings, train, validation
        self.batches = Batches(train, settings.batch_size, self.accelerator)
        seed_everything(settings.seed + self.accelerator.process_index)
        self.model = model
        self.configuration = {
            **settings.identity(),
            **training_identity(model, train, validation),
            "processes": self.accelerator.num_processes,
        }
        self.wrapped = self.accelerator.prepare_model(_channels_last(model))
        self.averaged = averaged(model, settings.averaging)
        self.optimizer = adam(model, settings)
        self.scheduler = learning_rate_schedule(self.optimizer, settings, settings.epochs * len(self.batches))
        self.dtype = autocast_dtype(settings.precision, self.accelerator.device)
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=self.dtype == torch.float16)
        self.loader = patch_loader(train, self.batches, settings.workers, self.accelerator.device)
        self.history = History()
        self.epoch = self.step = 0
        self.parts = 1  # in how many pieces a batch is computed
        self.loss_sum, self.counts = 0.0, Scores(0, 0, 0, 0)

    def run(self, folder: CheckpointFolder | None, stop: StopRequest, bar: tqdm) -> None:
        """Train from where it stands to the end."""
        while self.epoch < self.settings.epochs:
            bar.set_description(f"epoch {self.epoch + 1}/{self.settings.epochs}")
            for images, masks in self.remaining_batches():
                stopping = self.take_step(images, masks, stop)
                bar.update()
                due = self.step % self.settings.checkpoint_every == 0 and self.step < len(self.batches)
                if due or stopping:
                    self._save(folder)
                if stopping:
                    self._interrupt(folder, stop)
            self._end_epoch(folder)
            bar.set_postfix(validation_iou=f"{self.history.epochs[-1].validation_iou:.3f}")
            if self._agree([stop.requested])[0]:
                self._interrupt(folder, stop)

    def remaining_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's share of the batches that the epoch still has, on the device."""
        if hasattr(self.train_set, "set_epoch"):
            self.train_set.set_epoch(self.epoch)
        self.wrapped.train()
        self.batches.first = self.step
        for pair in self.loader:
            images, masks = (tensor.to(self.accelerator.device, non_blocking=True) for tensor in pair)
            if images.ndim in CHANNELS_LAST:
                images = torch.empty_like(images, memory_format=CHANNELS_LAST[images.ndim]).copy_(images)
            yield images, masks

    def take_step(self, images: Tensor, masks: Tensor, stop: StopRequest) -> bool:
        """Take an optimizer step, and return whether a process was asked to stop."""
        loss, logits = self._gradients(images, masks)
        counts = scores(logits >= 0, masks > 0.5)
        loss, stopping, *counts = self._agree([loss.item(), stop.requested, *astuple(counts)])
        loss /= self.accelerator.num_processes
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"The loss is {loss} at step {self.step + 1} of epoch {self.epoch + 1}, but it must be finite: "
                "lower the learning_rate, or look at this step's patches. The checkpoints are as they were before."
            )
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # else the step was skipped, since its fp16 gradients were too large
            self.scheduler.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        self.step += 1
        self.loss_sum += loss
        self.counts += Scores(*map(int, counts))
        return bool(stopping)

    def _gradients(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the logits of a batch, and leave its gradients in the model."""
        while True:
            try:
                return self._accumulate(images, masks)
            except torch.OutOfMemoryError:
                if self.accelerator.num_processes > 1 or self.parts >= len(images):
                    raise
            # Not inside the except, where the traceback would keep the failed step's memory.
            self._halve(len(images))

    def _accumulate(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Compute a batch in `parts` pieces, each with a weight by its share of the patches."""
        self.optimizer.zero_grad(set_to_none=True)
        size = math.ceil(len(images) / self.parts)
        losses, all_logits = [], []
        for image, mask in zip(images.split(size), masks.split(size), strict=True):
            with (
                torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32),
                depthwise_convolutions(images.device, self.dtype),
            ):
                logits = self.wrapped(image)
                loss = self.settings.loss(logits, mask) * (len(image) / len(images))
            self.scaler.scale(loss).backward()
            losses.append(loss.detach())
            all_logits.append(logits.detach())
        return torch.stack(losses).sum(), torch.cat(all_logits)

    def _halve(self, batch_size: int) -> None:
        """Go on with pieces of half the size, and say what that changes."""
        self.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.parts = min(2 * self.parts, batch_size)
        warnings.warn(
            f"The GPU's memory is too small for step {self.step + 1} of epoch {self.epoch + 1}: from now on a batch of "
            f"{batch_size} is computed {math.ceil(batch_size / self.parts)} at a time, and the gradients are added up. "
            "A loss that is a mean over patches, such as cross-entropy, stays the same; BatchNorm and a Dice over the "
            "whole batch now see fewer patches at once, so the result differs from that of a larger GPU.",
            stacklevel=2,
        )

    def _end_epoch(self, folder: CheckpointFolder | None) -> None:
        """Validate, write the epoch down, and save."""
        loss, pooled = None, None
        if self.accelerator.is_main_process:
            precision = "bf16" if self.dtype == torch.bfloat16 else "fp32"
            loss, pooled = evaluate(self.measured, self.validation, loss=self.settings.loss, precision=precision)
        loss, pooled = broadcast_object_list([loss, pooled])
        best_before = max(self.history.column("validation_iou"), default=-1.0)
        self.epoch += 1
        self.history.epochs.append(
            Epoch(self.epoch, self.loss_sum / len(self.batches), loss, self.counts.iou, pooled.iou)
        )
        self.step, self.loss_sum, self.counts = 0, 0.0, Scores(0, 0, 0, 0)
        self._save(folder, best=pooled.iou > best_before)

    def _agree(self, numbers: Sequence[float]) -> list[float]:
        """Return each number summed over the processes: all of them must stop, or fail, at the same step."""
        if self.accelerator.num_processes == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(values, "sum").tolist()

    def _interrupt(self, folder: CheckpointFolder | None, stop: StopRequest) -> None:
        """Raise TrainingInterrupted."""
        saved = "nothing was saved, since it had no folder for checkpoints"
        if folder is not None:
            saved = f"it is saved in {folder.folder}: the same call goes on from there"
        raise TrainingInterrupted(
            f"The training was stopped by {stop.name} after {self.epoch} epochs and {self.step} steps; {saved}."
        )

    def _save(self, folder: CheckpointFolder | None, *, best: bool = False) -> None:
        """Write a checkpoint of the whole training, and of the best weights if these are."""
        if folder is None:
            return
        self._require_finite_weights()
        state = self._state()
        if self.accelerator.is_main_process:
            if best:
                folder.save_best(self.measured, (self.epoch, self.step))
            folder.save_last(state, (self.epoch, self.step))
        self.accelerator.wait_for_everyone()

    @property
    def measured(self) -> nn.Module:
        """The model that is validated and handed out: the average, where one is kept."""
        return self.model if self.averaged is None else self.averaged.module

    def _require_finite_weights(self) -> None:
        """Raise NonFiniteError: a finite loss can have infinite gradients, and such weights must not be saved."""
        for name, values in self.model.state_dict().items():
            if not values.isfinite().all():
                raise NonFiniteError(
                    f"{name} isn't finite after {self.epoch} epochs and {self.step} steps, but all weights should be; "
                    "lower the learning_rate. Checkpoints are as they were before."
                )

    def _state(self) -> State:
        """Return everything that moves."""
        return {
            "model": self.model.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": gather_object([random_states()]),  # of each process
            "place": [self.epoch, self.step],
            "parts": self.parts,
            "loss_sum": self.loss_sum,
            "counts": list(astuple(self.counts)),
            "history": self.history.as_rows(),
            "configuration": self.configuration,
        }

    def resume(self, folder: CheckpointFolder) -> None:
        """Go to the last whole checkpoint of a folder, if it has one."""
        found = folder.load_last()
        self.accelerator.wait_for_everyone()  # each has read what the first process tidies up next
        if found is None:
            return
        state, place = found
        require_same(self.configuration, state["configuration"], str(folder.folder))
        self._restore(state)
        if self.accelerator.is_main_process:
            folder.remove_after(place)
        self.accelerator.wait_for_everyone()

    def _restore(self, state: State) -> None:
        """Become what `_state` described."""
        self.model.load_state_dict(state["model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        like_parameters(self.optimizer)
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        set_random_states(state["random"][self.accelerator.process_index])
        self.epoch, self.step = state["place"]
        self.parts, self.loss_sum, self.counts = state["parts"], state["loss_sum"], Scores(*state["counts"])
        self.history = History([Epoch(**row) for row in state["history"]])

    def bar(self, progress: bool | None) -> tqdm:
        """Return a progress bar over all steps, in the first process only; None: only on a terminal."""
        hidden = None if progress is None else not progress
        n_steps = len(self.batches)
        return tqdm(
            total=self.settings.epochs * n_steps,
            initial=self.epoch * n_steps + self.step,
            unit="step",
            disable=hidden if self.accelerator.is_main_process else True,
        )


def _channels_last(model: nn.Module) -> nn.Module:
    """Lay out a model's weights for a fifth to two thirds more steps a second on a CPU.

    A model that mixes 2D and 3D stays as it is, since torch has no order for both.
    """
    tensors = [*model.parameters(), *model.buffers()]
    n_axes = {tensor.ndim for tensor in tensors} & CHANNELS_LAST.keys()
    return model.to(memory_format=CHANNELS_LAST[n_axes.pop()]) if len(n_axes) == 1 else model
