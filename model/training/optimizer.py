"""The optimizer of the whole model: groups, averaging over processes, clipping, Muon and AdamW.

    matrices      Muon    every matrix inside the blocks
    embeddings    AdamW   tables that are read by row (and the tied output head)
    scalars       AdamW   scalars, vectors and the small projections of the embeddings

(`model.network.parameter_roles` has the group of each parameter). Gradients are averaged over the
processes first and clipped then, by the one norm of all parameters: each process knows the averaged
gradients of the matrices it owns, so their squared norms are summed over the processes. The clip
factor stays a tensor, so that the host never synchronizes with the device.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.network.gpt import GPT
from model.runtime.distributed import Group
from model.training.config import TrainConfig
from model.training.muon import Muon, StateTensor
from model.training.newton_schulz import orthogonalize


def param_groups(model: GPT) -> dict[str, dict[str, nn.Parameter]]:
    """Every parameter of the model by group (`matrices`, `embeddings`, `scalars`) and name."""
    groups: dict[str, dict[str, nn.Parameter]] = {"matrices": {}, "embeddings": {}, "scalars": {}}
    for name, parameter in model.named_parameters():
        groups[model.roles[name].optimizer][name] = parameter
    return groups


class Optimizer:
    """Muon and AdamW over the parameters of `model`, for the processes of `group`.

    `backward` may be called any number of times between `zero_grad` and `step`, which uses the sum
    of all gradients over all processes; so losses must be divided beforehand. The
    parameters' gradients are views of a few large buffers: never set them to None.
    """

    def __init__(self, model: GPT, params: TrainConfig, group: Group) -> None:
        self.params, self.group = params, group
        groups = param_groups(model)
        orthogonal = partial(
            orthogonalize,
            iterations=params.newton_schulz_steps,
            coefficients=params.newton_schulz_coefficients,
            row_norm=params.muon_row_norm,
        )
        self.muon = Muon(groups["matrices"], group, orthogonal)
        self.rest = groups["embeddings"] | groups["scalars"]
        self.rest_gradients = _flat_gradients(list(self.rest.values()))
        self.base_lr = [params.embedding_lr, params.scalar_lr]
        self.adamw = torch.optim.AdamW(
            [
                {"params": list(groups[kind].values()), "lr": lr}
                for kind, lr in zip(("embeddings", "scalars"), self.base_lr, strict=True)
            ],
            betas=(params.adam_beta1, params.adam_beta2),
            eps=params.adam_epsilon,
            fused=True,
        )
        # Created here, not by the first step, so that the state always has the same tensors.
        for parameter in self.rest.values():
            self.adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        self.muon.zero_grad()
        self.rest_gradients.zero_()

    def step(self, multiplier: float, momentum: float, weight_decay: float) -> None:
        """Update all weights.

        multiplier: of every learning rate; momentum: Muon's; weight_decay: of all groups.
        """
        params = self.params
        self.muon.start_reduction()
        work = None
        if self.group.size > 1:
            work = dist.all_reduce(self.rest_gradients, async_op=True)
        clip = self._clip_factor(work)
        if clip is not None:
            self.rest_gradients.mul_(clip)
        self.muon.start_update(clip, momentum)
        for settings, lr in zip(self.adamw.param_groups, self.base_lr, strict=True):
            settings.update(lr=lr * multiplier, weight_decay=weight_decay)
        self.adamw.step()
        self.muon.finish_update(params.matrix_lr * multiplier, weight_decay)

    def _clip_factor(self, work: "dist.Work | None") -> Tensor | None:
        """Wait for the averaged gradients; the factor that clips their global norm, None if off."""
        owned = self.muon.owned_gradients()
        if work is not None:
            work.wait()
        if self.params.gradient_clip is None:
            return None
        norms = torch.stack(torch._foreach_norm(owned))
        squared = self.group.all_reduce(norms.square().sum())
        norm = (squared + self.rest_gradients.square().sum()).sqrt()
        return (self.params.gradient_clip / (norm + 1e-6)).clamp(max=1.0)

    def state_tensors(self) -> dict[str, StateTensor]:
        """The state's tensors: momentum/…, first/…, second/… by name of the parameter."""
        found = {f"momentum/{name}": entry for name, entry in self.muon.state_tensors().items()}
        for name, parameter in self.rest.items():
            state = self.adamw.state[parameter]
            for key, label in (("exp_avg", "first"), ("exp_avg_sq", "second")):
                found[f"{label}/{name}"] = StateTensor(None, parameter.shape, state[key])
        return found

    def set_step(self, step: int) -> None:
        """Continue as if `step` steps had been taken (AdamW's bias correction)."""
        for parameter in self.rest.values():
            self.adamw.state[parameter]["step"].fill_(step)


def _flat_gradients(parameters: list[nn.Parameter]) -> Tensor:
    """Make the gradients of `parameters` views of one new buffer and return it.

    Largest first, so that scalars do not break the alignment of larger ones.
    """
    flat = parameters[0].new_zeros(sum(parameter.numel() for parameter in parameters))
    start = 0
    for parameter in sorted(parameters, key=lambda p: -p.numel()):
        end = start + parameter.numel()
        parameter.grad = flat[start:end].view_as(parameter)
        start = end
    return flat
