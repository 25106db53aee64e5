"""Schedules against torch's, and parameter groups."""

import pytest
import torch

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.contracts import Network
from braindecode_vis.base.roles import complete
from braindecode_vis.training.loop import make_optimiser
from braindecode_vis.training.optimisation import (
    OptimiserConfig,
    ScheduleConfig,
    compute_first_beta,
    compute_lr_factor,
)


@pytest.mark.parametrize(
    "n_updates, warmup, division",
    [(50, 0.1, 1e4), (7, 0.3, 1e4), (100, 0.25, 1e4), (1500, 2 / 150, 1e3)],  # the last one is MindEye2's
)
def test_one_cycle_is_torchs(n_updates, warmup, division):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.Adam([parameter], lr=2.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=2.0, total_steps=n_updates, pct_start=warmup, final_div_factor=division
    )
    config = ScheduleConfig(kind="one_cycle", warmup=warmup, final_division=division)
    assert compute_lr_factor(config, 0, n_updates) == pytest.approx(1 / 25)
    assert compute_first_beta(config, 0, n_updates) is None
    cycled = config.model_copy(update={"cycle_momentum": True})
    for update in range(n_updates):
        expected = schedule.get_last_lr()[0] / 2.0
        assert compute_lr_factor(config, update, n_updates) == pytest.approx(expected, rel=1e-6)
        beta = optimiser.param_groups[0]["betas"][0]
        assert compute_first_beta(cycled, update, n_updates) == pytest.approx(beta, rel=1e-6)
        optimiser.step()
        if update < n_updates - 1:
            schedule.step()


def test_cosine_warms_up_and_ends_where_it_should():
    config = ScheduleConfig(kind="cosine", warmup=0.1, final=0.2)
    rates = [compute_lr_factor(config, update, 100) for update in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[0] > 0
    assert rates[10] == 1.0 == max(rates)
    assert rates[-1] == pytest.approx(0.2)
    assert compute_lr_factor(ScheduleConfig(), 7, 10) == 1.0


def test_what_a_schedule_does_not_look_at_is_refused():
    assert not {"final_division", "cycle_momentum"} & set(ScheduleConfig().hashed_fields())
    with pytest.raises(ValueError, match="cycle_momentum is a setting of the schedule one_cycle"):
        ScheduleConfig(cycle_momentum=True)
    with pytest.raises(ValueError, match="final_division is a setting of the schedule one_cycle"):
        ScheduleConfig(kind="cosine", final_division=10)
    with pytest.raises(ValueError, match="final is a setting of the schedule cosine"):
        ScheduleConfig(kind="one_cycle", final=0.1)


class Model(torch.nn.Module):
    def __init__(self, groups=None):
        super().__init__()
        self.network = torch.nn.Linear(2, 2)
        self.objectives = torch.nn.ModuleList([torch.nn.ParameterList([torch.zeros(1)])])
        if groups is not None:
            self.network.parameter_groups = lambda: groups(self.network)
        self.fusion = self.tower = self.shared_projector = None

    @property
    def whole_network(self):
        return complete(Network, self.network)


def test_temperatures_are_not_decayed_and_groups_of_the_network_count():
    config = OptimiserConfig(lr=0.1, weight_decay=0.5)
    plain = make_optimiser(config, Model()).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in plain] == [(2, 0.5), (1, 0.0)]
    own = make_optimiser(
        config, Model(lambda n: [{"params": [n.bias], "lr_scale": 0.5, "weight_decay": 0.0}])
    )
    found = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in own.param_groups]
    assert found == [(1, 0.05, 0.0), (1, 0.1, 0.5), (1, 0.1, 0.0)]
    with pytest.raises(ConfigError, match="must hold params"):
        make_optimiser(config, Model(lambda n: [{"params": [n.bias], "momentum": 1}]))
    frozen = Model().requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter to train"):
        make_optimiser(config, frozen)
