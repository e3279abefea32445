"""The kernels on a GPU, on NumPy arrays: what tests/emulated.py is for the emulator.

PyTorch brings the arrays there and back. Nothing here needs TensorFlow.
"""

import functools
import importlib.util
import sysconfig
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def module_path():
    """The kernel module that `make gpu` builds; None where it has not."""
    path = ROOT / "build" / "gpu" / f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    return path if path.exists() else None


def why_not():
    """Why the kernels cannot run on a GPU here, None where they can."""
    if importlib.util.find_spec("torch") is None:
        return "no PyTorch, which brings arrays to a GPU"
    import torch

    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    if module_path() is None:
        return "no kernel module in build/gpu, which `make gpu` builds"
    if not hasattr(load_kernels(), "CudaStep"):
        return "the kernel module in build/gpu was built without CUDA"
    return None


@functools.cache
def load_kernels():
    """The kernel module, by path: the package around it would import TensorFlow."""
    spec = importlib.util.spec_from_file_location("_kernels", module_path())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Device:
    """Calls as `emulated.Emulator` takes them. `place` is where PyTorch puts the arrays."""

    def __init__(self, kernels, place="cuda"):
        self.kernels, self.place = kernels, place

    def workspace(self, batch, dim, dtype=np.float32, atomic=False, tuning=None, phases=False):
        """The steps of one stream, for batches up to this size."""
        options = {"atomic": atomic, "tuning": tuning or {}, "phases": phases}
        # What is not asked for is not passed: an older kernel module does not know it.
        options = {name: value for name, value in options.items() if value}
        return self.kernels.CudaStep(batch, dim, np.dtype(dtype).name, **options)

    def tuning(self):
        """{name: default} of the launch constants that the kernels let callers choose."""
        return self.kernels.cuda_tuning() if hasattr(self.kernels, "cuda_tuning") else {}

    def phases(self, workspace):
        """(name, first, last) of the points that the last launch passed."""
        return workspace.phases()

    def memory_of(self, workspace):
        """A copy of its bytes, as a launch has left them."""
        import torch

        return to_host(torch.as_tensor(workspace.workspace, device=self.place))

    def tensor(self, array):
        """The array there, as far behind a multiple of 16 bytes as it lies here."""
        import torch

        array = np.asarray(array, order="C")
        offset = array.ctypes.data % 16
        memory = torch.empty(array.nbytes + 16, dtype=torch.uint8, device=self.place)
        part = memory[offset : offset + array.nbytes]
        part.copy_(torch.from_numpy(array.reshape(-1).view(np.uint8).copy()))
        return part.view(getattr(torch, array.dtype.name)).view(array.shape)

    def unwritten(self, shape, dtype):
        """An array there, full of a number that no step writes."""
        return self.tensor(np.full(shape, -77, dtype))

    @property
    def stream(self):
        """PyTorch's stream, as the kernels take it."""
        import torch

        return torch.cuda.current_stream().cuda_stream if self.place == "cuda" else 0

    def center_loss_step(
        self,
        features,
        labels,
        centers,
        *,
        alpha=0.5,
        loss_weight=1.0,
        reduction="mean",
        sample_weight=None,
        numbers_in_memory=False,
        atomic=False,
        workspace=None,
        **options,
    ):
        """One step; centers move in place. Returns loss, residual and squared distances."""
        batch, dim = features.shape
        dtype = centers.dtype
        step = workspace or self.workspace(batch, dim, dtype, atomic)
        # The table lies between rows that no step may touch.
        memory = np.full([len(centers) + 2, dim], -77, dtype)
        memory[1:-1] = centers
        memory = self.tensor(memory)
        outputs = [
            self.unwritten([batch] if reduction == "none" else [], dtype),
            self.unwritten([batch, dim], dtype),
            self.unwritten([batch], dtype),
        ]
        # The module refuses such a number; of one on the device it cannot know.
        if numbers_in_memory or not 0 <= alpha < np.inf:
            alpha, loss_weight = (
                self.tensor(np.array(number, dtype)) for number in (alpha, loss_weight)
            )
        if sample_weight is not None:
            sample_weight = self.tensor(np.asarray(sample_weight, dtype))
        step(
            self.tensor(features),
            self.tensor(labels),
            memory[1:-1],
            *outputs,
            alpha=alpha,
            loss_weight=loss_weight,
            reduction=reduction,
            sample_weight=sample_weight,
            stream=self.stream,
            **options,
        )
        memory = to_host(memory)
        assert (memory[[0, -1]] == -77).all(), "outside the table"
        centers[...] = memory[1:-1]
        return tuple(map(to_host, outputs))

    def backward(self, upstream, residual, dtype, in_place=False):
        """upstream times residual, rounded to dtype."""
        given = self.tensor(residual)
        gradient = given if in_place else self.unwritten(residual.shape, dtype)
        self.kernels.cuda_backward(self.tensor(upstream), given, gradient, stream=self.stream)
        return to_host(gradient)


def to_host(tensor):
    """A NumPy copy."""
    import torch

    numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return numbers.view(numpy_type(tensor)).reshape(tuple(tensor.shape))


def numpy_type(tensor):
    """The type of the tensor's numbers in NumPy."""
    name = str(tensor.dtype).removeprefix("torch.")
    return np.dtype(getattr(ml_dtypes, name, name))
