"""Fused kernels that pass hooks or gradients by are left out while a pass runs, and only then."""

import pytest
import torch
from hooks_models import rows
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train import HookedModel


class Padded(nn.Module):
    """An encoder that torch runs on nested tensors, in one kernel a layer, where it may."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
        self.seen = []

    def forward(self, x, padding):
        self.seen.append(torch.backends.mha.get_fastpath_enabled())
        return self.encoder(x, src_key_padding_mask=padding)


def test_every_module_of_torchs_transformer_is_reached_whatever_is_read():
    model, x, padding = Padded().eval(), torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    expected = model(x, padding).detach()  # with gradients torch goes layer by layer of its own
    hooked, td = HookedModel(model, ["input", "padding"]), TensorDict({"input": x, "padding": padding}, [3])
    with hooked.run(td) as run:
        every, attended = run.get("**"), run.get("encoder.layers.*.self_attn:0")
    assert_close(run.output["output"], expected)
    assert {site.split(".")[-1] for site in every.resolve()} > {"linear1", "linear2", "norm1", "norm2"}
    assert len(attended.resolve()) == 2
    with hooked.run(td) as run:
        run.get("encoder.layers.0")
    assert_close(run.output["output"], expected)
    hooked.trace(td)
    assert model.seen == [True, False, False, False]
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("differentiate", [False, True])
def test_cudnns_recurrent_layers_are_left_out_where_they_would_refuse_a_backward_pass(differentiate):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.seen = nn.GRU(3, 4, batch_first=True), []

        def forward(self, x):
            self.seen.append(torch.backends.cudnn.enabled)
            return self.gru(x)[0]

    model, x = Recurrent().eval(), torch.randn(2, 5, 3)
    with HookedModel(model).run(rows(x)) as run:
        state = run.get("gru:1")
        if differentiate:
            grad = run.get_input_grad("gru")
            run.backward("output")
    assert model.seen == [not differentiate]
    assert torch.backends.cudnn.enabled
    assert_close(state.resolve()[0], run.output["output"][:, -1])
    if differentiate:
        moved = x.clone().requires_grad_()
        assert_close(grad.resolve(), torch.autograd.grad(model(moved).sum(), moved)[0])
