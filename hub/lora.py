"""The LoRA layer that ECCL trains with: that of peft, computed in fewer and faster operations."""

from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import nn

from ..modeling_eccl import autocast_dtype


class LoraLinear(Linear):
    """A linear layer with LoRA of peft that takes less time while it trains.

    peft adds `s (x A^T) B^T` to the output of the frozen layer, and autograd computes the gradients operation by
    operation. On a CPU this takes about a third of a training step: it goes over the whole output four times, and
    multiplies tall and narrow matrices in the slow order. This class adds the narrow products in place, and computes
    the gradients in the fast order. It does so for one active adapter without dropout; for all else peft's code runs.

    The frozen weight may have a lower precision than the input, see [`lower_base`]. Training then computes in the
    weight's dtype, and evaluation in the input's dtype, as the merged model does. Under autocast both compute in the
    dtype of autocast.
    """

    # That of the frozen weight before `lower_base`.
    whole_dtype: torch.dtype | None = None

    def lower_base(self, dtype: torch.dtype) -> None:
        """Keeps the frozen weight in a dtype of lower precision. Merging and unloading give it its own dtype again."""
        base = self.get_base_layer()
        self.whole_dtype = cast(torch.dtype, base.weight.dtype)
        base.to(dtype)

    def restore_base(self) -> None:
        """Gives the frozen weight its own dtype again; its values stay rounded."""
        if self.whole_dtype is not None:
            self.get_base_layer().to(self.whole_dtype)
            self.whole_dtype = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges as peft does, in the weight's own dtype: a lower precision would round the small products away."""
        self.restore_base()
        super().merge(safe_merge, adapter_names)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = self.get_base_layer()
        # Offloading brings a weight only when its layer is called.
        if type(base) is not nn.Linear or args or kwargs or base.weight.device != x.device:
            return super().forward(x, *args, **kwargs)
        lowered = self.training and self.whole_dtype is not None
        x = x.to(autocast_dtype(x.device) or (base.weight.dtype if lowered else x.dtype))
        if self._is_usual(x):
            (name,) = self.active_adapters
            down, up = self.lora_A[name].weight, self.lora_B[name].weight
            return _LoraProduct.apply(x, base.weight, base.bias, down, up, self.scaling[name])
        if self.disable_adapters and not self.merged:
            bias = None if base.bias is None else base.bias.to(x.dtype)
            return nn.functional.linear(x, base.weight.to(x.dtype), bias)
        return super().forward(x if self.whole_dtype is None else x.to(base.weight.dtype))

    def _is_usual(self, x: torch.Tensor) -> bool:
        """Whether one active adapter without peft's variants is trained on a frozen layer with a bias."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1 or x.dim() < 2:
            return False
        (name,) = self.active_adapters
        base = self.get_base_layer()
        is_plain = name in self.lora_A and name not in self.lora_variant and not self.lora_bias[name]
        is_frozen = base.bias is not None and not base.bias.requires_grad and not base.weight.requires_grad
        return is_plain and is_frozen and isinstance(self.lora_dropout[name], nn.Identity)


class _LoraProduct(torch.autograd.Function):
    """Computes `x W^T + b + s (x A^T) B^T` for a frozen `W` and `b`, in the dtype of `x`."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, down, up, scaling):
        dtype = x.dtype
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
