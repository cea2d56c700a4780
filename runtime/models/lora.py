"""Low-rank adapters (LoRA, arXiv 2106.09685) for the linear layers of a frozen model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from runtime.kernels.packed_weight import smallest_exact_dtype


class LoraLinear(nn.Module):
    """Computes up (down x). `up` begins at zero, so an untrained adapter changes nothing."""

    def __init__(self, inner: int, outer: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, inner) * inner**-0.5)
        self.up = nn.Parameter(torch.zeros(outer, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x.to(self.down.dtype), self.down), self.up)

    def delta_weight(self) -> torch.Tensor:
        """Return the product as one matrix (outer, inner)."""
        return self.up @ self.down


def make_adapter(layers: Sequence[nn.Module], rank: int) -> nn.ModuleList:
    """Create a LoraLinear for each linear layer of each layer."""
    return nn.ModuleList(
        nn.ModuleDict(
            {
                name: LoraLinear(linear.in_features, linear.out_features, rank)
                for name, linear in linear_layers(layer).items()
            }
        )
        for layer in layers
    )


def linear_layers(layer: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers by name: q_proj, up_proj, and so on."""
    return {
        name.rpartition(".")[2]: part
        for name, part in layer.named_modules()
        if isinstance(part, nn.Linear)
    }


@contextmanager
def adapter_applied(layers: Sequence[nn.Module], learned: nn.ModuleList) -> Iterator[None]:
    """Apply the adapter to the layers inside the block. Gradients flow to the adapter."""
    with ExitStack() as stack:
        for layer, part in zip(layers, learned, strict=True):
            for name, linear in linear_layers(layer).items():
                stack.callback(
                    linear.register_forward_hook(lora_hook(lora_by_name(part)[name])).remove
                )
        yield


def lora_by_name(learned: nn.Module) -> dict[str, LoraLinear]:
    """Return the LoraLinears of one layer's part of an adapter."""
    return {name: pair for name, pair in learned.named_children() if isinstance(pair, LoraLinear)}


def lora_hook(
    learned: LoraLinear,
) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
    def add(_: nn.Module, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> torch.Tensor:
        more: torch.Tensor = learned(given[0])
        return result + more.to(result.dtype)

    return add


def merge(layers: Sequence[nn.Module], learned: nn.ModuleList) -> None:
    """Add the adapter to the weights permanently, so that it costs nothing.

    Weights that fit a 16-bit type are rounded to it again; otherwise products would read twice as
    much.
    """
    with torch.no_grad():
        for layer, part in zip(layers, learned, strict=True):
            for name, linear in linear_layers(layer).items():
                changed = linear.weight.float() + lora_by_name(part)[name].delta_weight().to(
                    linear.weight.device
                )
                linear.weight.copy_(changed.to(smallest_exact_dtype(linear.weight)))
