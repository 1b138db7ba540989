"""New weights from a seed of their own."""

import pytest
import torch
from torch import nn

from tdhook_train.isolation import redraw

MODULES = {
    "linear": lambda: nn.Linear(5, 4),
    "convolution": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.PReLU()),
    "recurrent": lambda: nn.GRU(3, 4),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "embedding": lambda: nn.Embedding(5, 3),
}


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("name", MODULES)
def test_it_is_what_making_the_module_with_that_seed_draws_and_the_global_state_stays(name):
    module = MODULES[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7.0)
    before = torch.get_rng_state()
    assert redraw(module, 3) == []
    one = weights(module)
    assert (one != 7.0).all()
    redraw(module, 4)
    two = weights(module)
    redraw(module, 3)
    assert torch.equal(weights(module), one)
    assert not torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_linear_layer_is_drawn_as_torch_draws_it():
    module = nn.Linear(5, 4)
    redraw(module, 3)
    torch.manual_seed(3)
    assert torch.equal(weights(module), weights(nn.Linear(5, 4)))


def test_a_whole_draws_after_its_parts_and_what_nobody_draws_is_named():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(3, 2)
            self.reset_parameters()

        def reset_parameters(self):
            nn.init.constant_(self.part.weight, 0.25)

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole, self.own = Whole(), nn.Parameter(torch.ones(2))

    module = Holder()
    nn.init.zeros_(module.whole.part.weight)
    assert redraw(module, 0) == ["own"]
    assert (module.whole.part.weight == 0.25).all()
    assert (module.own == 1).all()
