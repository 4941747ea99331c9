"""Choices of kernels that the configuration knows."""

from typing import Literal

KernelsName = Literal["auto", "plain", "fused"]
FP8_MULTIPLE = 16  # of both dimensions of each operand, for the tensor cores
