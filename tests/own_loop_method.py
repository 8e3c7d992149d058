"""A method of two phases with loops of their own, for the tests of engine and tools: a WGAN-GP, then PPO."""

from collections.abc import Mapping
from pathlib import Path

import torch
from methods.ppo import PPO
from methods.wgan_gp import NOISE, WGAN
from pydantic import PositiveInt

from repro.config import RunConfig, Section
from repro.method import Evaluation, Method
from repro.phases import Networks, Phase
from repro.randomness import generator
from repro.runtime import Runtime


class Adversarial(Section):
    generator_iterations: PositiveInt


class Rollouts(Section):
    rounds: PositiveInt


class Phases(Section):
    wgan: Adversarial
    ppo: Rollouts


class Config(RunConfig):
    phases: Phases


CONFIG = {
    "experiment": "toy",
    "phases": {"wgan": {"generator_iterations": 7}, "ppo": {"rounds": 2}},
    "pace": {"log_every": 2, "checkpoint_every": 3},
}


def make_phases(config: Config, runtime: Runtime) -> list[Phase]:
    wgan, ppo = WGAN(), PPO()
    wgan.steps, ppo.steps = config.phases.wgan.generator_iterations, config.phases.ppo.rounds * ppo.collect_every
    return [wgan, ppo]


def evaluate(config: Config, models: Mapping[str, Networks], seed: int, runtime: Runtime) -> Evaluation:
    points = models["wgan"]["generator"](torch.randn(64, NOISE, generator=generator(seed, "noise")))
    policy = models["ppo"]["actor"](torch.zeros(1, 4)).softmax(1)
    return Evaluation({"radius": float(points.norm(dim=1).mean()), "constant.value": float(policy[0, 0])})


def report_sections(judgements, records, runs: Path, reports: Path) -> str:
    return ""


METHOD = Method("own loops", Config, make_phases, evaluate, report_sections, tiny=["phases.ppo.rounds=1"])
