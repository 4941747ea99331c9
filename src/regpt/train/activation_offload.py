"""What forward keeps for backward, in the host's memory meanwhile: from outside the model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LEAST_BYTES = 2**20  # smaller tensors stay: a copy costs more than their memory


class OnHost(torch.autograd.graph.saved_tensors_hooks):
    """A context: the tensors that are saved for backward in it go to the host, and come back when backward needs them.

    Weights stay, and so do small tensors. On a CUDA device the copies are made by a stream of their own, to page-locked
    memory, while the forward continues; backward waits for the copy that it needs. With activation checkpointing only
    the inputs of blocks are saved, and so moved.

    Args:
        weights: never moved.
        device: where the model computes.
    """

    def __init__(self, weights: Sequence[Tensor], device: torch.device):
        self.weights = {w.untyped_storage()._cdata for w in weights}
        self.cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        super().__init__(self.to_host, self.to_device)

    def to_host(self, tensor: Tensor) -> Any:
        memory = tensor.untyped_storage()
        expanded = tensor.nbytes > memory.nbytes()  # of which a copy would take more
        if tensor.nbytes < LEAST_BYTES or memory._cdata in self.weights or expanded:
            return tensor
        copy = torch.empty_like(tensor, device="cpu", pin_memory=self.cuda)
        if self.stream is None:
            copy.copy_(tensor)
            return tensor.device, copy, None
        self.stream.wait_stream(torch.cuda.current_stream(tensor.device))  # which computes the tensor
        with torch.cuda.stream(self.stream):
            copy.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self.stream)  # its memory is free for others only after the copy
        return tensor.device, copy, self.stream.record_event()

    def to_device(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, copy, copied = packed
        if copied is not None:
            torch.cuda.current_stream(device).wait_event(copied)
        return copy.to(device, non_blocking=True, copy=True)  # on the stream that reads it
