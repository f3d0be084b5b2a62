"""``kdkernels export``: a trained model for torch.export and ONNX, checked against PyTorch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.train.checkpoints import write
from kdkernels.train.errors import TrainError, require

TOLERANCE = 1e-4  # of logits, relative to the largest: float32 in another order


def export(model: nn.Module, shape: list[int], folder: Path) -> dict[str, float]:
    """Write ``model.pt2`` and ``model.onnx``: images (N, *shape) in [0, 1] to logits, for any N.

    Returns:
        The largest difference to PyTorch's logits of each, relative to the largest of these.

    Raises:
        TrainError: the model cannot be exported, or a difference is above 1e-4.
        SetupError: a package is missing.
    """
    onnxruntime = require("onnxruntime", "onnxruntime", "export")
    require("onnxscript", "onnxscript", "export")
    images, buffer = torch.rand(2, *shape), io.BytesIO()
    batch = torch.export.Dim("batch", min=1)
    try:
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
        torch.export.save(program, buffer)
        onnx = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"],
                                 output_names=["logits"])  # fmt: skip
    except Exception as error:  # a model may do what neither of the two can say
        reason = str(error).partition("\n")[0]
        raise TrainError(f"the model cannot be exported: {reason}") from error
    assert onnx is not None
    write(folder / "model.pt2", buffer.getvalue())
    write(folder / "model.onnx", onnx.model_proto.SerializeToString())
    loaded = torch.export.load(io.BytesIO((folder / "model.pt2").read_bytes())).module()
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )

    def by_onnx(images: Tensor) -> Any:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    differences = {}
    for name, run in (("model.pt2", loaded), ("model.onnx", by_onnx)):
        differences[name] = max(_difference(model, run, torch.rand(n, *shape)) for n in (1, 3, 64))
        if not differences[name] <= TOLERANCE:
            raise TrainError(
                f"{name} differs from PyTorch by {differences[name]:.1e} of the logits"
            )
    return differences


@torch.no_grad()
def _difference(model: nn.Module, run: Any, images: Tensor) -> float:
    expected = model(images)
    return float((run(images) - expected).abs().max() / expected.abs().max())
