"""A trained model as an ONNX file, which other programs and browsers can run.

ONNX (https://onnx.ai) describes a network as a graph of operations. What each of them does is defined for a version of
the set of operations, the opset. Programs that run such a file know nothing of PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mitoseg_lib.errors import FilePath
from mitoseg_lib.files import write_whole
from mitoseg_lib.models import EncoderUNet, for_single_slices
from mitoseg_lib.weights import WeightsError, load_weights

if TYPE_CHECKING:
    import onnx

__all__ = ["INPUT", "OPSET", "OUTPUT", "OnnxNetwork", "export_onnx", "halve_onnx", "quantise_onnx"]

OPSET = 18
INPUT, OUTPUT = "slices", "logits"
SMALLEST_HALVED = 1000  # numbers of a tensor; for fewer the bytes aren't worth an operation more


def export_onnx(target: FilePath, weights: FilePath | None = None, *, single_slices: bool = False) -> None:
    """Write a trained U-Net with an encoder as an ONNX file.

    Its input, ``slices``, are float32 grey levels in [0, 1], (n, channels, y, x), with 3 channels for a model that sees
    neighbours and else 1; its output, ``logits``, float32 (n, 1, y, x). n, y and x are free; y and x must be multiples
    of 32, as for the model itself. Normalisations are merged into the convolutions before them; the numbers are the
    model's own within 1e-4.

    Parameters
    ----------
    target
        Path of the file; an existing one is replaced.
    weights
        See `mitoseg_lib.weights.load_weights`; None is the model that comes with the library.
    single_slices
        A model that sees neighbours is given one channel, a slice that stands in for them, too.

    Raises
    ------
    WeightsError
        If the weights can't be used, or are those of another kind of network.
    ModuleNotFoundError
        If the packages of the extra "onnx" aren't installed.
    """
    import onnx

    model, _ = load_weights(weights)
    if not isinstance(model, EncoderUNet):
        raise WeightsError(
            f"{Path(weights or '').name} holds a {type(model).__name__}, but a U-Net with an encoder was expected; use"
            " another file."
        )
    exported = onnx.load_from_string(_exported(for_single_slices(model) if single_slices else model))
    _forget_origins(exported)
    onnx.checker.check_model(exported, full_check=True)
    write_whole(Path(target), exported.SerializeToString())


def halve_onnx(source: FilePath, target: FilePath) -> None:
    """Write an ONNX file of half the size, whose weights are kept in 16 bits; it still computes with 32.

    Parameters
    ----------
    source
        A file that `export_onnx` wrote.
    target
        Path of the new file; an existing one is replaced.

    Raises
    ------
    WeightsError
        If a weight is too large for 16 bits.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(os.fspath(source))
    large = [one for one in model.graph.initializer if math.prod(one.dims) >= SMALLEST_HALVED]
    for tensor in [one for one in large if one.data_type == TensorProto.FLOAT]:
        with np.errstate(over="ignore"):  # asked for below
            narrow = numpy_helper.to_array(tensor).astype(np.float16)
        if not np.isfinite(narrow).all():
            raise WeightsError(f"{tensor.name} holds numbers that 16 bits can't; keep the file with 32 bits.")
        widen = helper.make_node("Cast", [f"{tensor.name}.half"], [tensor.name], to=TensorProto.FLOAT)
        model.graph.node.insert(0, widen)
        model.graph.initializer.remove(tensor)
        model.graph.initializer.append(numpy_helper.from_array(narrow, f"{tensor.name}.half"))
    onnx.checker.check_model(model, full_check=True)
    write_whole(Path(target), model.SerializeToString())


def quantise_onnx(source: FilePath, target: FilePath, slices: NDArray[np.uint8]) -> None:
    """Write an ONNX file whose convolutions compute with 8-bit integers.

    Weights get a scale for each channel. What flows between layers gets one for each tensor, from the least and the
    largest value that occur in some example slices ("static quantisation", of ONNX Runtime).

    Parameters
    ----------
    source
        A file that `export_onnx` wrote.
    target
        Path of the new file; an existing one is replaced.
    slices
        Examples, uint8 (n, channels, y, x); sides are multiples of 32.
    """
    from tempfile import TemporaryDirectory

    from onnxruntime import quantization

    with TemporaryDirectory() as name, _silence():
        prepared, quantised = Path(name, "prepared.onnx"), Path(name, "quantised.onnx")
        quantization.quant_pre_process(os.fspath(source), os.fspath(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            os.fspath(prepared),
            os.fspath(quantised),
            _Examples(slices),
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8,
        )
        write_whole(Path(target), quantised.read_bytes())


class OnnxNetwork(nn.Module):
    """A network in an ONNX file, run by ONNX Runtime on the CPU; for `mitoseg_lib.inference.predict_stack`.

    Parameters
    ----------
    path
        Of a file that `export_onnx`, `halve_onnx` or `quantise_onnx` wrote.
    threads
        Of the processor.
    """

    ndim, size_multiple = 2, 32

    def __init__(self, path: FilePath, *, threads: int = 1) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        self.n_slices = self.session.get_inputs()[0].shape[1]

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits (n, 1, y, x) of grey levels in [0, 1]."""
        (found,) = self.session.run([OUTPUT], {INPUT: image.numpy(force=True)})
        return torch.from_numpy(found)


class _Graph(nn.Module):
    """What is exported of a model: its forward without the checks of shapes, which would fix them."""

    def __init__(self, model: EncoderUNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, slices: Tensor) -> Tensor:
        colour = (slices - self.model.mean) / self.model.sd
        return self.model.segmentation_head(self.model.decoder(self.model.encoder(colour)))


class _Examples:
    """Hands example slices to ONNX Runtime one at a time."""

    def __init__(self, slices: NDArray[np.uint8]) -> None:
        self.slices = iter(slices)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        one = next(self.slices, None)
        return None if one is None else {INPUT: one[np.newaxis].astype(np.float32) / 255}


def _exported(model: EncoderUNet) -> bytes:
    """Return the bytes of a model's graph, with 32-bit weights."""
    free = torch.export.Dim
    shape = {0: free("n"), 2: 32 * free("rows"), 3: 32 * free("columns")}
    example = torch.zeros(2, model.n_slices, 64, 96)
    with _silence():
        program = torch.onnx.export(
            _Graph(_with_fixed_padding(model)).eval(),
            (example,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=(shape,),
            verbose=False,
        )
        stream = io.BytesIO()
        program.save(stream)
    return stream.getvalue()


def _forget_origins(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes of the Python code that each operation comes from: the paths of this machine."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""


def _with_fixed_padding(model: EncoderUNet) -> EncoderUNet:
    """Return a copy in which paddings that depend on an image's size are those of sides that are multiples of 32.

    TensorFlow's convolutions pad so that the output has the input's side over the stride, rounded up. While every side
    is a multiple of the stride, that is the same everywhere; computed anew for free sides, it makes the export take
    minutes.
    """
    from timm.layers import Conv2dSame

    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Conv2dSame):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _padded_by_constants(layer))
    return model


def _padded_by_constants(layer: nn.Conv2d) -> nn.Sequential:
    around = []
    for kernel, stride, dilation in zip(layer.kernel_size, layer.stride, layer.dilation, strict=True):
        total = max(0, (kernel - 1) * dilation + 1 - stride)
        around = [total // 2, total - total // 2, *around]  # the last axis comes first
    plain = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        dilation=layer.dilation,
        groups=layer.groups,
        bias=layer.bias is not None,
    )
    plain.load_state_dict(layer.state_dict())
    return nn.Sequential(nn.ZeroPad2d(tuple(around)), plain)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep what exporters print and warn of from the reader."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
