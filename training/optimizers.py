"""The denoiser's optimizer: Muon for its matrices, AdamW for the rest."""

from typing import Any

import torch
from torch import nn

WEIGHT_DECAY = 1e-2
MOMENTUM = 0.95
ROUNDS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Muon's polynomial, which brings singular values near 1 in five rounds


def orthogonalized(matrices: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """Roughly the nearest semi-orthogonal matrices to [k, m, n], by Newton-Schulz with the coefficients of Muon."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).to(precision)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).float()


class MatrixOptimizer:
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for linear and convolution layers, whose
    kernels it treats as [out, in * height * width]; AdamW for embeddings, norms, biases, and the first and last layer.

    The rate is AdamW's: Muon's steps are scaled to the same size. Muon moves a matrix by as much in its rare
    directions as in its common ones, which helps when each of many words must find its own picture.
    It does the same as ``torch.optim.Muon``, but on all matrices of one shape at once: one by one, the 159 matrices of
    this network would keep a GPU waiting for longer than the rest of a step takes. Where bfloat16 would be emulated,
    it computes in float32.
    """

    def __init__(self, model: nn.Module, rate: float, precision: torch.dtype):
        self.parameters, self.precision = list(model.parameters()), precision
        matrices = [parameter for name, parameter in model.named_parameters() if _is_inner_matrix(name, parameter)]
        chosen = {id(parameter) for parameter in matrices}
        rest = [parameter for parameter in self.parameters if id(parameter) not in chosen]
        self._groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in matrices:
            self._groups.setdefault(tuple(parameter.flatten(1).shape), []).append(parameter)
        self._momenta = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self._groups.items()
        }
        self._adamw = torch.optim.AdamW(rest, lr=rate, weight_decay=WEIGHT_DECAY, fused=True)

    @torch.no_grad()
    def _muon_step(self, rate: float) -> None:
        """Update the matrices of each shape together, as [k, out, in * height * width]."""
        for shape, group in self._groups.items():
            gradients = torch.stack([parameter.grad.flatten(1) for parameter in group])
            momentum = self._momenta[shape]
            momentum.lerp_(gradients, 1 - MOMENTUM)
            update = orthogonalized(gradients.lerp(momentum, MOMENTUM), self.precision)
            update *= -rate * 0.2 * max(shape) ** 0.5  # the size of AdamW's (Liu et al. 2025, arXiv 2502.16982)
            torch._foreach_mul_(group, 1 - rate * WEIGHT_DECAY)
            torch._foreach_add_(group, [one.view_as(parameter) for one, parameter in zip(update, group, strict=True)])

    def step(self, loss: torch.Tensor, rate: float) -> None:
        """One step down the gradient of ``loss``, whose norm is clipped to 1."""
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._muon_step(rate)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": list(self._momenta.values()), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for momentum, kept in zip(self._momenta.values(), state["muon"], strict=True):
            momentum.copy_(kept)
        self._adamw.load_state_dict(state["adamw"])


def _is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    ends = ("token_embedding", "position_embedding", "conv_in", "conv_out")
    return parameter.ndim >= 2 and not any(end in name for end in ends)
