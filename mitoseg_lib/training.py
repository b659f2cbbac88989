"""Training: one loop for a laptop, Colab's GPU and several processes, which can be stopped and goes on as if it wasn't.

`fit` trains a model on patches and measures it on whole slices after every epoch. With a folder for checkpoints, a
training that was stopped or killed goes on from its last checkpoint; on the CPU, bit for bit as the run that nobody
stopped. This holds because nothing is left to chance: patch i of epoch e is a pure function of the seed
(`mitoseg_lib.patches.PatchDataset`), so (epoch, step) is the sampler's whole state, and everything else that moves is
in the checkpoint.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from mitoseg_lib.checkpoints import CheckpointError, CheckpointFolder, State, load_weights
from mitoseg_lib.inference import is_bf16_native, predict_stack
from mitoseg_lib.interruptions import (
    StopRequest,
    deferred_signals,
    leave_signals_to_the_main_process,
    own_random_states,
    random_states,
    require_same,
    seed_everything,
    set_random_states,
    training_identity,
)
from mitoseg_lib.losses import DiceBCELoss
from mitoseg_lib.metrics import Scores, scores
from mitoseg_lib.stacks import Stack

__all__ = [
    "CheckpointError",
    "CheckpointFolder",
    "Epoch",
    "History",
    "NonFiniteError",
    "TrainingInterrupted",
    "TrainingSettings",
    "evaluate",
    "fit",
    "load_weights",
    "mean_slice_loss",
]

Loss = Callable[[Tensor, Tensor], Tensor]
SCHEDULES = ("one-cycle", "constant")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
THRESHOLD = 0.5
SMALLEST_PROBABILITY = 2.0**-23  # the spacing of float32 below 1


class NonFiniteError(ArithmeticError):
    """The loss or the weights became infinite or NaN, so that no further step can help."""


class TrainingInterrupted(KeyboardInterrupt):
    """A training that was stopped by Ctrl-C or SIGTERM after the end of a step; it is saved if it had a folder."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; the defaults suit a U-Net with BatchNorm.

    Attributes
    ----------
    epochs : int
        Passes over the patches of an epoch, each followed by a validation.
    batch_size : int
        Patches a step, over all processes together.
    learning_rate : float
        Of Adam: the peak of the one-cycle schedule, or the constant rate.
    schedule : {"one-cycle", "constant"}
        One-cycle rises from 1/25 of the rate to the rate in the first 30 % of the steps, and falls to nearly 0 in the
        rest (torch's ``OneCycleLR``; L. N. Smith, N. Topin: Super-Convergence, https://arxiv.org/abs/1708.07120).
    loss : callable
        Takes logits and masks, float32 (n, 1, y, x), and returns a scalar.
    seed : int
        Of every random number that is drawn while training (dropout, say). The patches have a seed of their own, and
        the model's first weights were drawn before.
    precision : {"auto", "fp32", "bf16", "fp16"}
        ``auto`` is mixed precision on a GPU (bf16 where the hardware has it, else fp16), and fp32 on a CPU.
    checkpoint_every : int
        Steps between checkpoints within an epoch; there is always one at its end.
    workers : int, optional
        Processes that prepare patches; by default none on a CPU, and up to 8 for a GPU. Results don't depend on it.
    """

    epochs: int
    batch_size: int = 6
    learning_rate: float = 2e-3
    schedule: str = "one-cycle"
    loss: Loss = field(default_factory=DiceBCELoss)
    seed: int = 0
    precision: str = "auto"
    checkpoint_every: int = 500
    workers: int | None = None

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        for name, lowest in (("epochs", 1), ("batch_size", 1), ("seed", 0), ("checkpoint_every", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be {lowest} or more; correct it.")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers is {self.workers}, but it must be 0 or more; correct it.")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate is {self.learning_rate}, but it must be above 0; use for example 0.002.")
        for name, choices in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but it must be one of {', '.join(choices)}; choose one."
                )

    def identity(self) -> dict[str, Any]:
        """Return what must be equal for a training to go on from a checkpoint as the same one."""
        names = ["batch_size", "learning_rate", "schedule", "seed", "precision"]
        if self.schedule == "one-cycle":  # a constant rate can go on for longer, a cycle can't
            names.append("epochs")
        is_module = isinstance(self.loss, nn.Module)
        loss = repr(self.loss) if is_module else getattr(self.loss, "__qualname__", type(self.loss).__name__)
        return {name: getattr(self, name) for name in names} | {"loss": " ".join(loss.split())}


@dataclass(frozen=True)
class Epoch:
    """What was measured in one epoch; `fit` says how.

    Attributes
    ----------
    epoch : int
        From 1.
    train_loss, validation_loss, train_iou, validation_iou : float
    """

    epoch: int
    train_loss: float
    validation_loss: float
    train_iou: float
    validation_iou: float


@dataclass
class History:
    """The epochs of a training, oldest first.

    Attributes
    ----------
    epochs : list of Epoch
    """

    epochs: list[Epoch] = field(default_factory=list)

    def as_rows(self) -> list[dict[str, float]]:
        """Return one dict an epoch: epoch, train_loss, validation_loss, train_iou, validation_iou."""
        return [asdict(epoch) for epoch in self.epochs]

    def column(self, name: str) -> list[float]:
        """Return one number of every epoch, for example ``history.column("validation_iou")`` for a curve."""
        return [getattr(epoch, name) for epoch in self.epochs]

    @property
    def best(self) -> Epoch:
        """The epoch with the highest validation IoU, the first of equals: the weights that are kept as the best."""
        return max(self.epochs, key=lambda epoch: epoch.validation_iou)


def fit(
    model: nn.Module,
    train: Dataset[tuple[Tensor, Tensor]],
    *,
    validation: Stack,
    settings: TrainingSettings,
    checkpoints: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> History:
    """Train a model with Adam, and measure it on whole slices after each epoch.

    The model is trained in place, on the GPU if there is one, and comes back with the weights of the last epoch, in
    ``eval()``; ``CheckpointFolder(checkpoints).load_best(model)`` gives it those of the best. Under ``accelerate
    launch`` every step's batch is shared out among the processes; with BatchNorm or a Dice summed over the batch, each
    process then computes them over its share, which is not quite the same.

    In the history, `train_loss` is the mean over the epoch's steps and `train_iou` is pooled over its patches, both as
    the model, still changing, saw them in ``train()`` (batch statistics, dropout, augmentation). The validation is
    seen as it is, in ``eval()``: `validation_loss` is the mean over the slices of each one's loss, `validation_iou` is
    pooled over all of its voxels, with the threshold 0.5.

    Parameters
    ----------
    model : nn.Module
        Takes images float32 (n, 1, y, x) in [0, 1] and returns logits of the same shape. Its ``train()`` is respected,
        so an encoder that stays frozen stays so; parameters without ``requires_grad`` aren't trained.
    train : PatchDataset
        Its length must be a multiple of the batch size. A dataset without ``set_epoch`` gives the same patches in each
        epoch.
    validation : Stack
        With labels.
    settings : TrainingSettings
    checkpoints : path, optional
        A folder for this training's checkpoints. If it holds some, the training goes on from the last; a damaged last
        one is a warning, and the one before it is taken. Without a folder nothing is saved.
    progress : bool, optional
        Show a progress bar on stderr; by default where that is a terminal.

    Returns
    -------
    History
        Of all epochs, those before a resumption too.

    Raises
    ------
    TrainingInterrupted
        After Ctrl-C or SIGTERM, at the end of the step and once the checkpoint is written. It is a KeyboardInterrupt,
        so that a script doesn't go on with half a training. A second Ctrl-C doesn't wait.
    NonFiniteError
        When the loss is NaN or infinite. The step isn't taken, and checkpoints stay as they are.
    CheckpointError
        If the folder is another training's, or none of its checkpoints is whole.
    StackError
        If the validation has no labels, or labels of one class only.
    ValueError
        If the patches can't be shared out in equal batches, or nothing in the model can be trained.
    torch.OutOfMemoryError
        If not even one patch fits on the GPU. Before that, a step is computed in halves, quarters and so on, whose
        gradients are added up: a warning says so, and what it changes.
    """
    validation.require_labels()
    with own_random_states(), deferred_signals() as stop:
        training = _Training(model, train, validation, settings)
        folder = None if checkpoints is None else CheckpointFolder(checkpoints)
        if folder is not None:
            training.resume(folder)
        with training.bar(progress) as bar:
            training.run(folder, stop, bar)
    model.eval()
    return training.history


def evaluate(model: nn.Module, stack: Stack, *, loss: Loss, precision: str = "fp32") -> tuple[float, Scores]:
    """Measure a model on the whole slices of a labelled stack, as `fit` does after each epoch.

    Parameters
    ----------
    model : nn.Module
        As for `fit`; left as it was found.
    stack : Stack
        With labels.
    loss : callable
        Takes logits and masks, as in `TrainingSettings`.
    precision : {"auto", "fp32", "bf16"}
        As in `predict_stack`.

    Returns
    -------
    loss : float
        As `mean_slice_loss` gives it.
    scores : Scores
        Of the mask at threshold 0.5, counts pooled over all slices.

    Raises
    ------
    StackError
        If the stack has no labels, or labels of one class only.
    """
    labels = stack.require_labels()
    probabilities = predict_stack(model, stack.image, precision=precision)
    return mean_slice_loss(probabilities, labels, loss=loss), scores(probabilities >= THRESHOLD, labels)


def mean_slice_loss(probabilities: NDArray[np.float32], labels: NDArray[np.bool_], *, loss: Loss) -> float:
    """Return the mean over the slices of the loss of each slice.

    The loss is that of logits found from the probabilities. These are rounded near 1, so logits count as at most 15.9
    either way: a voxel that is utterly wrong costs a cross-entropy of 15.9 and not more.

    Parameters
    ----------
    probabilities : ndarray
        float32 in [0, 1], (z, y, x).
    labels : ndarray
        bool, same shape.
    loss : callable
        Takes logits and masks, as in `TrainingSettings`.
    """
    losses = []
    for slice_probabilities, mask in zip(probabilities, labels, strict=True):
        logits = torch.logit(torch.from_numpy(slice_probabilities)[None, None], eps=SMALLEST_PROBABILITY)
        losses.append(float(loss(logits, torch.from_numpy(mask)[None, None].float())))
    return float(np.mean(losses))


class _Training:
    """What moves in a training, and its place: so many whole epochs, and so many steps of the next."""

    def __init__(self, model: nn.Module, train: Dataset, validation: Stack, settings: TrainingSettings) -> None:
        # accelerate's own mixed precision would replace the model's forward, and be fixed for the process's life.
        self.accelerator = Accelerator(mixed_precision="no")
        self.settings, self.train_set, self.validation = settings, train, validation
        self.batches = _Batches(train, settings.batch_size, self.accelerator)
        seed_everything(settings.seed + self.accelerator.process_index)
        self.model = model
        self.configuration = {
            **settings.identity(),
            **training_identity(model, train, validation),
            "processes": self.accelerator.num_processes,
        }
        # The order of memory in which 2D convolutions are fastest: a fifth to a third more steps a second on a CPU.
        self.wrapped = self.accelerator.prepare_model(model.to(memory_format=torch.channels_last))
        self.optimizer = _adam(model, settings.learning_rate)
        self.scheduler = _scheduler(self.optimizer, settings, settings.epochs * len(self.batches))
        self.dtype = _autocast_dtype(settings.precision, self.accelerator.device)
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=self.dtype == torch.float16)
        self.loader = _loader(train, self.batches, settings.workers, self.accelerator.device)
        self.history = History()
        self.epoch = self.step = 0
        self.parts = 1  # in how many pieces a batch is computed
        self.loss_sum, self.counts = 0.0, Scores(0, 0, 0, 0)

    def run(self, folder: CheckpointFolder | None, stop: StopRequest, bar: tqdm) -> None:
        """Train from where it stands to the end."""
        while self.epoch < self.settings.epochs:
            bar.set_description(f"epoch {self.epoch + 1}/{self.settings.epochs}")
            for images, masks in self._remaining_batches():
                stopping = self._take_step(images, masks, stop)
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

    def _remaining_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's share of the batches that the epoch still has, on the device."""
        if hasattr(self.train_set, "set_epoch"):
            self.train_set.set_epoch(self.epoch)
        self.wrapped.train()
        self.batches.first = self.step
        for pair in self.loader:
            images, masks = (tensor.to(self.accelerator.device, non_blocking=True) for tensor in pair)
            if images.ndim == 4:
                images = torch.empty_like(images, memory_format=torch.channels_last).copy_(images)
            yield images, masks

    def _take_step(self, images: Tensor, masks: Tensor, stop: StopRequest) -> bool:
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
            with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
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
            loss, pooled = evaluate(self.model, self.validation, loss=self.settings.loss, precision=precision)
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
                folder.save_best(self.model, (self.epoch, self.step))
            folder.save_last(state, (self.epoch, self.step))
        self.accelerator.wait_for_everyone()

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
        self.optimizer.load_state_dict(state["optimizer"])
        _like_parameters(self.optimizer)
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


class _Batches(Sampler[list[int]]):
    """The patch numbers of this process's share of each batch of an epoch, from batch `first` on.

    In order, since the patches are random already.
    """

    def __init__(self, train: Dataset, batch_size: int, accelerator: Accelerator) -> None:
        n_patches, processes = len(train), accelerator.num_processes
        if n_patches == 0 or n_patches % batch_size or batch_size % processes:
            raise ValueError(
                f"There are {n_patches} patches in an epoch, in batches of {batch_size}, for {processes} process(es), "
                "but each must be a multiple of the next, so that all steps are alike; change patches_per_epoch or "
                "batch_size."
            )
        self.n_batches, self.batch_size, self.share = n_patches // batch_size, batch_size, batch_size // processes
        self.offset = accelerator.process_index * self.share
        self.first = 0

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        return self.n_batches

    def __iter__(self) -> Iterator[list[int]]:
        """Yield lists of patch numbers."""
        for batch in range(self.first, self.n_batches):
            start = batch * self.batch_size + self.offset
            yield list(range(start, start + self.share))


def _adam(model: nn.Module, learning_rate: float) -> torch.optim.Adam:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            f"{type(model).__name__} has no parameter with requires_grad, but some must be trained; thaw a part of it."
        )
    return torch.optim.Adam(trainable, lr=learning_rate)


def _like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Lay out what an optimizer remembers as its parameters are, since a file doesn't keep the order of memory.

    Adam takes twice as long a step with another order, and nothing promises that it rounds the same.
    """
    for parameter, memory in optimizer.state.items():
        for name, values in memory.items():
            if isinstance(values, Tensor) and values.shape == parameter.shape:
                memory[name] = torch.empty_like(parameter).copy_(values)


def _scheduler(optimizer: torch.optim.Optimizer, settings: TrainingSettings, n_steps: int) -> LRScheduler:
    if settings.schedule == "constant":
        return ConstantLR(optimizer, factor=1.0, total_iters=0)
    return OneCycleLR(optimizer, settings.learning_rate, total_steps=n_steps)


def _autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of convolutions; float32 means no mixed precision."""
    if precision == "auto":
        precision = "fp32"
        if device.type == "cuda":
            precision = "bf16" if is_bf16_native(device) else "fp16"  # a T4 has fp16 only
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _loader(train: Dataset, batches: _Batches, workers: int | None, device: torch.device) -> DataLoader:
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
    return DataLoader(
        train,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_main_process,
        # Its own: a loader draws a number from the global one at each start, also at that after a resumption.
        generator=torch.Generator(),
    )
