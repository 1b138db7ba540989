"""TorchRL's own Trainer, observed by a hook."""

import copy

import pytest
import torch
from tensordict import TensorDict
from torchrl.trainers import BatchSubSampler, OptimizationStepper, Trainer

from tdhook_train import At, Every, Observer
from tdhook_train.errors import KeyMissingError, NetworkError, SettingsError
from tdhook_train.health import EffectiveRank
from tdhook_train.latent import RidgeProbe
from tdhook_train.rl import ObserverHook
from tdhook_train.rl.ppo import make_ppo

FRAMES, PER_BATCH, STEPS = 600, 200, 3


class Apart(OptimizationStepper):
    """Calls a loss in parts, as TD3's trainer does."""

    def step(self, trainer, sub_batch):
        losses = TensorDict({"loss_critic": trainer.loss_module.loss_critic(sub_batch.copy())[0]})
        losses["loss_critic"].mean().backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return losses.detach()

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        pass

    def register(self, trainer, name="stepper"):
        trainer.register_module(name, self)


def make_trainer(**options):
    ppo = make_ppo("CartPole-v1", frames=FRAMES, seed=0, frames_per_batch=PER_BATCH)
    trainer = Trainer(
        collector=ppo.collector,
        total_frames=FRAMES,
        frame_skip=1,
        optim_steps_per_batch=STEPS,
        loss_module=ppo.loss,
        optimizer=ppo.optimizer,
        progress_bar=False,
        save_trainer_file=None,
        **options,
    )
    trainer.register_op("batch_process", ppo.advantage)
    BatchSubSampler(batch_size=64).register(trainer)
    return trainer


def state(trainer):
    weights = [value.clone() for value in trainer.loss_module.parameters()]
    moments = [v for entry in trainer.optimizer.state_dict()["state"].values() for v in entry.values()]
    return [*weights, *moments, torch.get_rng_state()]


@pytest.fixture
def observer(tmp_path):
    methods = {"rank": EffectiveRank()}
    with Observer(methods, when=At(0) | Every(optim_steps=2), into=tmp_path / "run", on="collected") as observer:
        yield observer


def test_training_ends_in_the_same_bits_and_every_due_step_has_a_row(observer):
    torch.manual_seed(1)
    bare = make_trainer()
    bare.train()
    expected = state(bare)
    torch.manual_seed(1)
    trainer = make_trainer()
    ObserverHook(observer).register(trainer)
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(state(trainer), expected, strict=True))
    rows = observer.buffer["rank"]
    assert rows.steps.tolist() == [0, 2, 4, 6, 8, 9]  # and the last weights
    assert rows.series(("meta", "frames")).tolist() == [200, 200, 400, 600, 600, 600]
    data = rows.series(("meta", "data")).tolist()
    assert data[0] == data[1] != data[2] != data[3] == data[4] == data[5]  # one fingerprint a collected batch


def test_scalars_go_to_the_trainers_logger(observer):
    class Told:
        def __init__(self):
            self.lines = []

        def log_scalar(self, name, value, step):
            self.lines.append((name, value, step))

    trainer = make_trainer(logger=Told(), log_interval=1)
    ObserverHook(observer).register(trainer)
    trainer.train()
    told = [(value, step) for name, value, step in trainer.logger.lines if name == "rank/effective_rank/actor_network"]
    rows = observer.buffer["rank"]
    own = [i for i, layer in enumerate(rows.coords["layer"]) if layer.startswith("actor_network.")]
    ranks = rows.series("effective_rank")[:, own].mean(1).tolist()
    assert told == [(pytest.approx(ranks[row]), step) for row, step in ((1, 200), (2, 400), (4, 600))]


def test_a_loss_that_is_called_in_parts_is_observed_too(observer):
    trainer = make_trainer(optimization_stepper=Apart())
    ObserverHook(observer).register(trainer)
    trainer.train()
    assert observer.buffer["rank"].steps.tolist() == [0, 2, 4, 6, 8, 9]


def test_a_trainer_that_is_restored_goes_on_where_it_was(tmp_path):
    def observed(path, **options):
        observer = Observer({"rank": EffectiveRank()}, when=Every(optim_steps=2), into=path, on="collected", **options)
        trainer = make_trainer()
        ObserverHook(observer).register(trainer)
        return observer, trainer

    observer, trainer = observed(tmp_path)
    saved = []
    trainer.register_op("post_steps", lambda: saved.append(copy.deepcopy(trainer.state_dict())))
    trainer.train()
    assert observer.buffer["rank"].steps.tolist() == [2, 4, 6, 8, 9]
    observer.close()
    observer, trainer = observed(tmp_path, resume=True)
    trainer.load_state_dict(saved[1])
    assert observer.buffer["rank"].steps.tolist() == [2, 4]
    assert observer.steps_taken == 2 * STEPS
    assert observer.clock.frames == 2 * PER_BATCH
    trainer.train()
    assert observer.buffer["rank"].steps.tolist() == [2, 4, 6, 8, 9]
    assert observer.buffer["rank"].series(("meta", "attempt")).tolist() == [0, 0, 1, 1, 1]
    observer.close()


def test_what_was_collected_is_in_the_order_of_time_and_a_minibatch_is_not(tmp_path):
    ppo = make_ppo("CartPole-v1", frames=FRAMES, seed=0, frames_per_batch=FRAMES)
    probe = {"probe": RidgeProbe(layers="**", target="state_value")}
    with Observer(probe, when=At(0), into=tmp_path, on={"now": "collected", "mini": "batch"}) as observer:
        data = next(iter(ppo.collector))
        ppo.advantage(data)
        observer.collected(data)
        assert observer.clock.frames == FRAMES
        shuffled = data.reshape(-1)[torch.randperm(FRAMES)]
        data["state_value"].zero_()  # what was told is kept as it was
        observer.step(ppo.loss, shuffled, step=0)
        now, mini = observer.buffer["probe.now"], observer.buffer["probe.mini"].at(0)
        assert not now.at(0)["r2_null"].isnan().any()
        assert mini["r2_null"].isnan().all()
        assert now.legend["null_reason"][int(mini["null_reason"].unique())].startswith("rows are not whole")
        last = now.coords["layer"].index("critic_network.module.12")
        assert now.at(0)["r2"][last] > 0.95  # from what gives it, the value can be read, up to the penalty
    ppo.close()


def test_what_was_never_collected_is_said(observer):
    ppo = make_ppo("CartPole-v1", frames=FRAMES, seed=0, frames_per_batch=PER_BATCH)
    with pytest.raises(KeyMissingError, match=r"observer\.collected\(batch\)"):
        observer.step(ppo.loss, step=0)
    ppo.close()


def test_a_hook_is_for_one_trainer_and_a_trainer_is_torchrls(observer):
    hook, trainer = ObserverHook(observer), make_trainer()
    with pytest.raises(NetworkError, match="expected a TorchRL Trainer, got dict"):
        hook.register({})
    hook.register(trainer)
    with pytest.raises(SettingsError, match="on a trainer already"):
        hook.register(trainer)
    trainer.collector.shutdown()
