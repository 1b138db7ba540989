"""Saliency against captum, where it is installed: `make peers`."""

import pytest
import torch
from method_cases import measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train.attribution import Saliency


@pytest.fixture
def captum():
    return pytest.importorskip("captum.attr", reason="captum is not installed; `make peers` runs this where it is")


def cnn():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2))


@pytest.mark.parametrize("score", ["signed", "absolute"])
@pytest.mark.parametrize(("model", "shape"), [(mlp(4, 16, 16, 2), (12, 4)), (cnn(), (5, 2, 6, 6))])
def test_the_values_of_captum(captum, model, shape, score):
    x = torch.randn(shape)
    td = TensorDict({"input": x}, [len(x)])
    both = measured(Saliency(targets=[("output", 0), ("output", 1)], score=score), model, td)
    for target in (0, 1):
        expected = captum.Saliency(model).attribute(x.clone().requires_grad_(), target=target, abs=score == "absolute")
        one = measured(Saliency(targets=("output", target), score=score), model, td)
        assert expected.any()
        assert_close(one["attr", "input"], expected)
        assert_close(both["attr", "input"][:, target], expected)
