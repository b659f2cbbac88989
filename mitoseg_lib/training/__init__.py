"""Training: one loop for a laptop, Colab's GPU and several processes, which can be stopped and goes on as if it wasn't.

`fit` trains a model on patches and measures it on whole slices after every epoch. With a folder for checkpoints, a
training that was stopped or killed goes on from its last checkpoint; on the CPU, bit for bit as the run that nobody
stopped. This holds because nothing is left to chance: patch i of epoch e is a pure function of the seed
(`mitoseg_lib.patches.PatchDataset`), so (epoch, step) is the sampler's whole state, and everything else that moves is
in the checkpoint.

Inside, `settings` says how to train and `history` what was measured; `evaluation` measures; `batches` loads patches,
`optimizer` takes steps, and `loop` is what `fit` runs.
"""

import os

from torch import Tensor, nn
from torch.utils.data import Dataset

from mitoseg_lib.checkpoints import CheckpointError, CheckpointFolder
from mitoseg_lib.interruptions import deferred_signals, own_random_states
from mitoseg_lib.stacks import Stack
from mitoseg_lib.training.evaluation import evaluate, mean_slice_loss
from mitoseg_lib.training.history import Epoch, History
from mitoseg_lib.training.loop import NonFiniteError, Training, TrainingInterrupted
from mitoseg_lib.training.settings import TrainingSettings

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
    "mean_slice_loss",
]


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
    ``eval()`` (or with their moving average, if ``settings.averaging`` asks for one);
    ``CheckpointFolder(checkpoints).load_best(model)`` gives it those of the best. Under ``accelerate
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
        training = Training(model, train, validation, settings)
        folder = None if checkpoints is None else CheckpointFolder(checkpoints)
        if folder is not None:
            training.resume(folder)
        with training.bar(progress) as bar:
            training.run(folder, stop, bar)
        if training.measured is not model:
            model.load_state_dict(training.measured.state_dict())
    model.eval()
    return training.history
