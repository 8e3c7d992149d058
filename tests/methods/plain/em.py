"""EM without an engine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from methods.em import COMPONENTS, LEAST_VARIANCE, first_guess, make_phase
from methods.plain.given import Curves, begin, minibatch, tensors


def plain(seed: int, steps: int) -> tuple[dict[str, Tensor], Curves]:
    phase = make_phase()
    begin(phase, seed)
    guess = first_guess()
    weights, means, covariances = guess.share, guess.mean, guess.covariance
    curves: Curves = {"log-likelihood": []}

    for step in range(steps):
        x = minibatch(phase, seed, step)["x"]

        # E-step
        log_joint = torch.log(weights) + MultivariateNormal(means, covariances).log_prob(x.unsqueeze(1))
        curves["log-likelihood"].append((step + 1, torch.logsumexp(log_joint, dim=1).mean().item()))
        responsibility = torch.softmax(log_joint, dim=1)

        # M-step
        total = responsibility.sum(dim=0)
        weights = total / x.shape[0]
        means = torch.matmul(responsibility.t(), x) / total.unsqueeze(1)
        difference = x.unsqueeze(1) - means
        scatter = torch.einsum("nk,nki,nkj->kij", responsibility, difference, difference)
        covariances = scatter / total.reshape(COMPONENTS, 1, 1) + LEAST_VARIANCE * torch.eye(2)

    return tensors(share=weights, mean=means, covariance=covariances), curves
