"""Losses that TRL does not have (any more), as pure functions of log-probabilities. Shapes (B,), float32, in nats."""

import torch
from torch.nn.functional import logsigmoid


def kto_pair(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, beta: float, detach: bool = False
) -> torch.Tensor:
    """Pairwise KTO, which UltraMedical's released code ran as "KTO" through TRL, which dropped it in 2024. Returns (2B,).

    logratios: policy minus reference log-probability of the completion. The reference point of the chosen half is the
    micro-batch's mean rejected ratio, and the other way round, each at least zero:
    1 - sigmoid(beta * (chosen - KL_rejected)), 1 - sigmoid(beta * (KL_chosen - rejected)).
    TRL 0.9, with which the paper's code ran, let the gradient flow through the reference points, so that all replies of one
    half also push those of the other. `detach` stops it there, as KTO is meant (Ethayarajh et al. 2024, section 4.1).
    """
    chosen_kl = chosen_logratios.mean().clamp(min=0)
    rejected_kl = rejected_logratios.mean().clamp(min=0)
    if detach:
        chosen_kl, rejected_kl = chosen_kl.detach(), rejected_kl.detach()
    return torch.cat(
        [1 - torch.sigmoid(beta * (chosen_logratios - rejected_kl)), 1 - torch.sigmoid(beta * (chosen_kl - rejected_logratios))]
    )


def bradley_terry(chosen: torch.Tensor, rejected: torch.Tensor, centre: float = 0.0) -> torch.Tensor:
    """Mean of -log sigmoid(chosen - rejected) over pairs of rewards; `centre` times the mean squared sum keeps rewards
    near zero (Eisenstein et al. 2023, as in TRL's `center_rewards_coefficient`)."""
    loss = -logsigmoid(chosen - rejected).mean()
    return loss + centre * (chosen + rejected).square().mean() if centre else loss
