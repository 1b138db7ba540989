"""An artifact is a TorchRL replay buffer, and leaves the global generator alone."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers import PrioritizedSampler, RandomSampler, SamplerWithoutReplacement, SliceSampler
from torchrl.envs.transforms import DoubleToFloat, RenameTransform

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.errors import ClosedError, SettingsError


@pytest.fixture
def artifact(buffer):
    for step in range(60):
        row = {"x": torch.full((3,), float(step), dtype=torch.float64), "episode": torch.tensor(step // 12)}
        buffer.append("a", row, step=step)
    return buffer["a"]


def whole(rows):
    return torch.equal(rows["x"], rows["meta", "step"].double()[..., None].expand_as(rows["x"]))


def test_it_is_what_torchrl_users_know(artifact):
    assert isinstance(artifact, TensorDictReplayBuffer)
    assert isinstance(artifact.storage, LazyMemmapStorage)
    assert len(artifact) == 60
    assert "Artifact" in repr(artifact)
    assert artifact[3]["x"].tolist() == [3, 3, 3]
    assert artifact[-1]["x"].tolist() == [59, 59, 59]
    for index in (slice(2, 5), [4, 1], torch.tensor([7, 0]), torch.arange(60) > 50, range(3)):
        assert torch.equal(artifact[index]["x"][:, 0], torch.arange(60.0, dtype=torch.float64)[index])
    assert torch.equal(artifact["meta", "step"], torch.arange(60))
    with pytest.raises(IndexError):
        artifact[60]
    with pytest.raises(IndexError):
        artifact[[60]]


def test_random_samples_are_whole_rows(artifact):
    rows = artifact.sample(500)
    assert whole(rows)
    assert torch.equal(rows["index"], rows["meta", "step"])
    assert len(rows["index"].unique()) == 60


def test_sampling_without_replacement_sees_each_row_once(artifact):
    artifact.set_sampler(SamplerWithoutReplacement())
    rows = torch.cat([artifact.sample(20) for _ in range(3)])
    assert sorted(rows["meta", "step"].tolist()) == list(range(60))


def test_slices_stay_within_their_trajectory(artifact):
    artifact.set_sampler(SliceSampler(slice_len=4, traj_key="episode"))
    for _ in range(20):
        rows = artifact.sample(16).reshape(4, 4)
        assert (rows["episode"] == rows["episode"][:, :1]).all()
        assert (rows["meta", "step"].diff(dim=1) == 1).all()
        assert whole(rows)


@pytest.fixture
def prioritized():
    try:
        return PrioritizedSampler(100, alpha=1.0, beta=1.0)
    except RuntimeError as error:
        pytest.skip(f"bare TorchRL cannot make one either: {error}")


def test_priorities_decide_what_is_drawn(artifact, prioritized):
    artifact.set_sampler(prioritized)
    artifact.update_priority(torch.arange(60), torch.where(torch.arange(60) == 7, 1000.0, 1e-6))
    assert (artifact.sample(50)["meta", "step"] == 7).float().mean() > 0.9


def test_a_sampler_is_told_of_the_rows_that_are_there_already(artifact):
    class Told(RandomSampler):
        def extend(self, index):
            self.index = index.tolist()

    for sampler, give in ((Told(), artifact.set_sampler), (Told(), lambda s: artifact.replay(sampler=s))):
        give(sampler)
        assert sampler.index == list(range(60))


def test_transforms_change_what_is_read_and_nothing_that_is_stored(artifact):
    artifact.append_transform(DoubleToFloat(in_keys=["x"]))
    artifact.append_transform(RenameTransform(["episode"], ["traj"]))
    rows = artifact.sample(5)
    assert rows["x"].dtype == torch.float32
    assert rows["traj"].shape == (5,)
    assert artifact.series("x").dtype == torch.float64


def test_another_replay_buffer_reads_the_same_storage_with_prefetch(artifact):
    other = TensorDictReplayBuffer(storage=artifact.storage, batch_size=8, prefetch=2, sampler=RandomSampler())
    assert all(whole(other.sample()) for _ in range(10))
    other.shutdown()


def test_samples_repeat_with_the_seed_and_differ_between_artifacts(tmp_path):
    def draw(run, seed):
        with ArtifactBuffer(tmp_path / run, seed=seed) as buffer:
            for name in ("a", "b"):
                for step in range(50):
                    buffer.append(name, {"x": 1.0}, step=step)
            return [tuple(buffer[name].sample(20)["index"].tolist()) for name in ("a", "b")]

    first, again, other = draw("1", 0), draw("2", 0), draw("3", 1)
    assert first == again
    assert len({*first, *other}) == 4


def slices():
    return SliceSampler(num_slices=2, traj_key="episode")


@pytest.mark.parametrize("sampler", [RandomSampler, SamplerWithoutReplacement, slices])
def test_nothing_touches_the_global_generator(path, sampler):
    state, legacy = torch.get_rng_state(), torch.initial_seed()
    with ArtifactBuffer(path) as buffer:
        for step in range(300):
            buffer.append("a", {"x": torch.ones(3), "episode": torch.tensor(step // 50)}, step=step)
        artifact = buffer["a"]
        artifact.set_sampler(sampler())
        for _ in range(3):
            artifact.sample(10)
        artifact.extend(artifact[:4])
        artifact.add(artifact[0])
        buffer.truncate(10)
        artifact.between(), artifact.to_xarray(), artifact.to_pandas("x")
        buffer.note("mark")
    ArtifactBuffer.open(path)["a"].sample(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.initial_seed() == legacy


def test_rows_are_never_changed(artifact):
    row = artifact[0]
    for change in (
        lambda: artifact.__setitem__(0, row),
        lambda: artifact.set_("x", torch.zeros(60, 3)),
        lambda: artifact.set_at_("x", torch.zeros(3), 0),
        lambda: artifact.update_(artifact[:] * 0),
        lambda: artifact.write_all(artifact[:]),
        lambda: artifact.update_if_present(torch.tensor([0]), {"x": torch.zeros(1, 3)}, torch.tensor([0])),
        lambda: artifact.storage.set(0, row),
        lambda: artifact.storage.__setitem__(0, row),
        lambda: artifact.storage.load_state_dict({}),
    ):
        with pytest.raises(SettingsError, match=r"written once|open the run"):
            change()
    assert whole(artifact[:])


def test_the_storage_takes_rows_behind_the_last(artifact):
    rows = artifact[:2]
    artifact.storage.set(60, rows[0])
    artifact.storage.set(range(61, 63), rows)
    artifact.storage.set(slice(63, 65), rows)
    assert len(artifact) == 65


def test_emptying_holds_on_disk_too(path, artifact):
    artifact.empty()
    assert len(artifact) == 0
    assert len(ArtifactBuffer.open(path)["a"]) == 0


def test_a_reader_writes_nothing(path, artifact):
    reader = ArtifactBuffer.open(path)["a"]
    rows = reader[:1]
    for write in (lambda: reader.extend(rows), lambda: reader.add(rows[0]), reader.empty):
        with pytest.raises(ClosedError, match="mode='a'"):
            write()
    reader.storage[:]["x"].zero_()  # a view of the mapping, which is private to the reader
    assert whole(artifact[:])
    assert len(artifact) == 60


def test_trajectories_are_found_again_after_more_rows(artifact, buffer):
    artifact.set_sampler(SliceSampler(slice_len=2, traj_key="episode", cache_values=True))
    artifact.sample(4)
    row = {"x": torch.ones(3, dtype=torch.float64), "episode": torch.tensor(9)}
    for step in range(60, 200):
        buffer.append("a", row, step=step)
    assert (artifact.sample(400)["episode"] == 9).any()


def test_extending_with_a_lazy_stack(artifact):
    rows = [artifact[i] for i in range(3)]
    artifact.extend(TensorDict.lazy_stack(rows))
    assert artifact[60:63]["x"][:, 0].tolist() == [0, 1, 2]
