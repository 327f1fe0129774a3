"""The LoRA layer that ECCL trains with: that of peft, computed in fewer and faster operations."""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn


class LoraLinear(Linear):
    """A linear layer with LoRA of peft that takes less time while it trains.

    peft adds `s (x A^T) B^T` to the output of the frozen layer, and autograd computes the gradients operation by
    operation. On a CPU this takes about a third of a training step: it goes over the whole output four times, and
    multiplies tall and narrow matrices in the slow order. This class adds the narrow products in place, and computes
    the gradients in the fast order. It does so for one active adapter without dropout; for all else peft's code runs.

    The frozen weight may have a lower precision than the input. Training then computes in that of the weight, and
    evaluation in that of the input, as the merged model does. Under autocast both compute in its dtype.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base, device = self.get_base_layer(), x.device.type
        if type(base) is not nn.Linear or args or kwargs:
            return super().forward(x, *args, **kwargs)
        names = [] if self.disable_adapters or self.merged else list(self.active_adapters)
        is_usual = len(names) == 1 and names[0] in self.lora_A and isinstance(self.lora_dropout[names[0]], nn.Identity)
        # Offloading brings a weight only when its layer is called.
        if not is_usual or base.weight.requires_grad or base.weight.device != x.device:
            return super().forward(x.to(base.weight.dtype))
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        elif self.training:
            x = x.to(base.weight.dtype)
        down, up = self.lora_A[names[0]].weight, self.lora_B[names[0]].weight
        return _LoraProduct.apply(x, base.weight, base.bias, down, up, self.scaling[names[0]])


class _LoraProduct(torch.autograd.Function):
    """Computes `x W^T + b + s (x A^T) B^T` for a frozen `W` and `b`, in the dtype of `x`."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, down, up, scaling):
        dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            weight, narrow = weight.to(dtype), x.flatten(0, -2) @ down.to(dtype).T
            output = nn.functional.linear(x, weight, bias.to(dtype))
            output.flatten(0, -2).addmm_(narrow, up.to(dtype).T, alpha=scaling)
        ctx.save_for_backward(x, weight, down, up, narrow)
        ctx.scaling = scaling
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient):
        x, weight, down, up, narrow = ctx.saved_tensors
        rows, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
        # A CPU multiplies a tall and a narrow matrix up to ten times as fast if the narrow one is transposed.
        narrow_gradient = nn.functional.linear(gradient, up.to(x.dtype).T.contiguous()) * ctx.scaling
        down_gradient = (narrow_gradient.T @ rows).to(down.dtype)
        up_gradient = (narrow.T @ gradient).T.to(up.dtype) * ctx.scaling
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (gradient @ weight).addmm_(narrow_gradient, down.to(x.dtype)).view_as(x)
        return x_gradient, None, None, down_gradient, up_gradient, None


__all__ = ["LoraLinear"]
