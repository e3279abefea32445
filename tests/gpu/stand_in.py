"""The emulator in the place of a GPU, on PyTorch's CPU tensors: checks the programs around the
kernels where there is no GPU. It has a GPU's results, but no streams and no times.
"""

import torch

from device import numpy_type
from emulated import Emulator


def array(tensor):
    """A NumPy array that shares the tensor's memory."""
    numbers = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return numbers.numpy().view(numpy_type(tensor))


def cuda_tuning():
    """As `_kernels.cuda_tuning`; empty if the emulated kernels have no launch constants."""
    emulator = Emulator()
    return emulator.tuning() if hasattr(emulator, "tuning") else {}


class CudaStep:
    """As `_kernels.CudaStep`."""

    def __init__(self, batch, dim, dtype="float32", *, atomic=False, tuning=None, phases=False):
        self._emulator, self._atomic = Emulator(), atomic
        unknown = (tuning or {}).keys() - cuda_tuning().keys()
        if unknown:
            raise ValueError(f"tuning: unknown names {sorted(unknown)}")
        # The emulated kernels need neither.
        options = {"tuning": tuning} if tuning else {}
        if phases and hasattr(self._emulator, "phases"):
            options["phases"] = True
        self._workspace = self._emulator.workspace(batch, dim, dtype, atomic, **options)
        self._phases = "phases" in options
        self.workspace = self._emulator.memory_of(self._workspace)

    def phases(self):
        """(name, first µs, last µs) of the last launch; none if the kernels have no phase clock."""
        return self._emulator.phases(self._workspace) if self._phases else []

    def __call__(
        self,
        features,
        labels,
        centers,
        loss=None,
        residual=None,
        squared_distance=None,
        *,
        alpha=0.5,
        loss_weight=1.0,
        sample_weight=None,
        stream=0,
        **options,
    ):
        del stream
        options["numbers_in_memory"] = isinstance(alpha, torch.Tensor)
        if sample_weight is not None:
            options["sample_weight"] = array(sample_weight)
        results = self._emulator.center_loss_step(
            *map(array, (features, labels, centers)),
            alpha=float(alpha),
            loss_weight=float(loss_weight),
            atomic=self._atomic,
            workspace=self._workspace,
            **options,
        )
        for output, result in zip((loss, residual, squared_distance), results, strict=True):
            if output is not None:
                array(output)[...] = result


def cuda_backward(upstream, residual, gradient, *, stream=0):
    """As `_kernels.cuda_backward`."""
    del stream
    in_place = gradient.data_ptr() == residual.data_ptr()
    result = Emulator().backward(array(upstream), array(residual), array(gradient).dtype, in_place)
    array(gradient)[...] = result
