"""The denoiser's optimizer: Muon for its matrices, AdamW for the rest."""

from typing import Any

import torch
from torch import nn

WEIGHT_DECAY = 1e-2


class MatrixOptimizer:
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for linear and convolution layers, whose
    kernels it sees as [out, in * height * width]; AdamW for embeddings, norms, biases, and the first and last layer.

    The rate is AdamW's: Muon's steps are scaled to the same size. Muon moves a matrix by as much in its rare
    directions as in its common ones, which helps where each of many words must find its own picture.
    """

    def __init__(self, model: nn.Module, rate: float):
        self.parameters = list(model.parameters())
        matrices = [parameter for name, parameter in model.named_parameters() if _is_inner_matrix(name, parameter)]
        # Muon takes matrices only: these share their memory with the layers' weights.
        self._flat = [(parameter, nn.Parameter(parameter.data.flatten(1))) for parameter in matrices]
        chosen = {id(parameter) for parameter in matrices}
        rest = [parameter for parameter in self.parameters if id(parameter) not in chosen]
        self._muon = torch.optim.Muon(
            [flat for _, flat in self._flat], lr=rate, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(rest, lr=rate, weight_decay=WEIGHT_DECAY, fused=True)

    def step(self, loss: torch.Tensor, rate: float) -> None:
        """One step down the gradient of ``loss``, whose norm is clipped to 1."""
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for parameter, flat in self._flat:
            flat.grad = parameter.grad.flatten(1)
        for optimizer in (self._muon, self._adamw):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._muon.load_state_dict(state["muon"])
        self._adamw.load_state_dict(state["adamw"])


def _is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    ends = ("token_embedding", "position_embedding", "conv_in", "conv_out")
    return parameter.ndim >= 2 and not any(end in name for end in ends)
