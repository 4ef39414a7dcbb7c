"""Linear layers whose weights are laid out once for the CPU's matrix kernels.

A decode step multiplies a handful of rows with every weight of the model. PyTorch's float32 path leaves the weights as
they are and reads them in an order that suits large products; oneDNN can reorder them once for its own blocked kernels.
Measured on 2 cores (AVX-512, float32, SmolLM2-135M's shapes, this against `torch.nn.functional.linear`): 1.5 to 3 times
faster for 1 to 32 rows, never slower above; bfloat16 1.5 to 2 times. The results differ by rounding only.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

LAYOUT_ROWS: Final = 64
"""Rows of input the layout is chosen for; layouts for 64 were good for 1 to 512 rows, those for 1 or 16 were not."""


class PackedLinear(nn.Linear):
    """An `nn.Linear` that keeps its weights in oneDNN's layout only, for inference on a CPU.

    `weight` keeps shape and type but no values: whoever needs the values must not pack. The layer stays an `nn.Linear`
    so that peft can wrap it.

    Args:
        linear: The layer to replace.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, LAYOUT_ROWS)
        self.bias = linear.bias
        # One number seen as a whole matrix: peft asks it for shape, type and device.
        self.weight = nn.Parameter(weight.new_full((), float("nan")).expand(weight.shape), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Shape (..., in_features) to (..., out_features)."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(input, self._packed, self.bias, "none", [], "")
        return out


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this build of PyTorch packs and multiplies weights of this type; tried out, since no flag says so."""
    if device.type != "cpu":
        return False
    # Powers of two: exact in every type, so the product must be too.
    linear = nn.Linear(32, 8, dtype=dtype)
    with torch.inference_mode():
        linear.weight.copy_(2.0 ** (torch.arange(256).reshape(8, 32) % 5 - 2))
        x = (2.0 ** (torch.arange(64).reshape(2, 32) % 3 - 1)).to(dtype)
        expected = x.float() @ linear.weight.float().T + linear.bias.float()
        try:
            seen = PackedLinear(linear)(x).float()
        except (AttributeError, RuntimeError):
            return False
    return torch.allclose(seen, expected, rtol=1e-2, atol=1e-2)


def pack(model: nn.Module) -> int:
    """Replaces every plain linear layer of `model`, freeing the old weights one by one.

    The other weights are copied: while one of them still lies in the mapped file, all of the file stays mapped.

    Returns:
        How many layers were replaced.
    """
    replaced = 0
    with torch.inference_mode():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, PackedLinear(child))
                    replaced += 1
        for parameter in model.parameters():
            if parameter.is_contiguous():  # not one number seen as a matrix
                parameter.data = parameter.data.clone()
    return replaced
