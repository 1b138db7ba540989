"""What a training puts around a model is looked through, or refused with a reason."""

import pytest
import torch
import torch.distributed as dist
from hooks_models import Mlp, Thrice, rows
from lightning.fabric import Fabric
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.testing import assert_close

from tdhook_train import HookedModel
from tdhook_train.errors import NetworkError, PathError, SetterError


@pytest.fixture(scope="module")
def _one_process(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def values(model, x):
    with HookedModel(model).run(rows(x)) as run:
        hidden, grad = run.get("1"), run.get_grad("2")
        run.set("0", lambda h: h + 1)
        run.backward("output")
    return hidden.resolve(), grad.resolve(), run.output["output"]


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": lambda model: nn.parallel.DistributedDataParallel(model),
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "compiled DistributedDataParallel": lambda model: torch.compile(
        nn.parallel.DistributedDataParallel(model), backend="eager"
    ),
    "Fabric": lambda model: Fabric(accelerator="cpu", devices=1).setup(model),
    "Fabric of compiled": lambda model: Fabric(accelerator="cpu", devices=1).setup(
        torch.compile(model, backend="eager")
    ),
}


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_paths_and_values_are_those_of_the_model_inside(wrap):
    model, x = Mlp(), torch.randn(4, 3)
    expected = values(model, x)
    hooked = HookedModel(wrap(model))
    assert hooked.module is model
    assert hooked.modules == ["", "0", "1", "2", "3", "4"]
    for found, value in zip(values(wrap(model), x), expected, strict=True):
        assert torch.equal(found, value)
    assert all(p.grad is None for p in model.parameters())


def test_the_precision_of_fabric_is_kept():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), torch.randn(4, 3)
    wrapped = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed").setup(model)
    with HookedModel(wrapped).run(rows(x)) as run:
        hidden = run.get("0")
    assert hidden.resolve().dtype == torch.bfloat16
    assert torch.equal(run.output["output"], wrapped(x).detach())
    assert run.output["output"].dtype == torch.float32


@pytest.mark.usefixtures("_one_process")
def test_sharded_weights_are_refused():
    mesh = init_device_mesh("cpu", (1,))
    whole = fully_shard(nn.Sequential(nn.Linear(3, 3)), mesh=mesh)
    part = nn.Sequential(nn.Linear(3, 3), fully_shard(nn.Linear(3, 3), mesh=mesh))
    older = FullyShardedDataParallel(nn.Linear(3, 3), device_id=torch.device("cpu"))
    for model, where in ((whole, "FSDPSequential is"), (part, "Sequential at '1' is"), (older, "is sharded")):
        with pytest.raises(NetworkError, match=rf"{where}.* \(FSDP\).*get_model_state_dict"):
            HookedModel(model)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_model_is_refused_and_a_scripted_part_takes_no_hooks():
    x = torch.randn(4, 3)
    for scripted in (torch.jit.script(Mlp()), torch.jit.trace(Mlp(), x)):
        with pytest.raises(NetworkError, match=r"scripted \(TorchScript\): hooks do not fire inside"):
            HookedModel(scripted)
    model = nn.Sequential(nn.Linear(3, 3), torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.ReLU())))
    hooked = HookedModel(model)
    with hooked.run(rows(x)) as run:
        every = run.get("**")
        for path in ("1", "1.0"):
            with pytest.raises(PathError, match=rf"path '{path}' leads to a scripted module"):
                run.get(path)
    assert tuple(every.resolve()) == ("0",)
    assert_close(run.output["output"], model(x).detach())


def test_what_is_no_module_is_refused():
    with pytest.raises(NetworkError, match="expected a torch module, got function"):
        HookedModel(values)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Thrice()

    def forward(self, x):
        return self.body(x)


def _part(model, backend):
    model.body = torch.compile(model.body, backend=backend)


def _part_of_a_part(model, backend):
    model.body.cell = torch.compile(model.body.cell, backend=backend)


# how it is compiled, and what state_dict then calls the layer "body.cell"
COMPILED = {
    "torch.compile": (lambda model, backend: torch.compile(model, backend=backend), "_orig_mod.body.cell"),
    "compile": (lambda model, backend: model.compile(backend=backend), "body.cell"),
    "a part": (_part, "body._orig_mod.cell"),
    "a part by compile": (lambda model, backend: model.body.compile(backend=backend), "body.cell"),
    "a part of a part": (_part_of_a_part, "body.cell._orig_mod"),
}


@pytest.mark.parametrize(("compile_it", "prefixed"), COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize("named", ["as in the model", "as in state_dict"])
def test_compiled_code_is_passed_by_and_not_compiled_again(compile_it, prefixed, named):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    model, x = Body(), torch.randn(4, 3)
    expected = model.body.cell(x).detach()
    compiled = compile_it(model, backend)
    model = model if compiled is None else compiled
    plain = model(x)
    before = len(graphs)
    hooked, path = HookedModel(model), "body.cell" if named == "as in the model" else prefixed
    with hooked.run(rows(x)) as run:
        value, every = run.get(path), run.get("**")
        run.set(path, lambda h: h * 0, call=2)
    hooked.trace(rows(x))
    assert not run.output["output"].any()
    assert_close(value.resolve(), expected)
    assert tuple(every.resolve()) == hooked.sites("**") == ("body.cell",)
    assert torch.equal(model(x), plain)
    assert len(graphs) == before > 0


def test_a_setting_inside_a_compiled_part_that_never_runs_is_loud():
    class Idle(Thrice):
        def __init__(self):
            super().__init__()
            self.idle = torch.compile(nn.Linear(3, 3), backend="eager")

    with (
        pytest.raises(SetterError, match="set at 'idle' was never used"),
        HookedModel(Idle()).run(rows(torch.randn(4, 3))) as run,
    ):
        run.set("idle", torch.zeros(4, 3))
