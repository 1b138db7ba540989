"""Quadrature, fingerprints, joins, targets and activations as rows."""

import pytest
import torch
from tensordict import TensorDict

from tdhook_train.errors import KeyMissingError, SchemaError, SettingsError, TargetError
from tdhook_train.keys import split_key
from tdhook_train.ops.fingerprint import fingerprint
from tdhook_train.ops.join import Measured, join, merge
from tdhook_train.ops.quadrature import gauss_legendre
from tdhook_train.ops.targets import columns, given_by, label_of, named, read
from tdhook_train.ops.units import as_rows, evenly_spaced, padded

NAN = float("nan")


@pytest.mark.parametrize("n", [1, 2, 5, 16, 50])
def test_quadrature_is_exact_for_polynomials_up_to_twice_its_points(n):
    x, w = gauss_legendre(n)
    for degree in range(min(2 * n, 60)):
        assert abs(float((w * x**degree).sum()) - 1 / (degree + 1)) < 1e-12
    assert abs(float((w * x ** (2 * n)).sum()) - 1 / (2 * n + 1)) > 1e-12 or n > 8
    assert (x > 0).all()
    assert (x < 1).all()
    assert (w > 0).all()


# ---------------------------------------------------------------------- fingerprints


def content():
    return TensorDict(
        {"a": torch.arange(6.0).view(2, 3), "b": {"c": torch.tensor([1, 2]), "d": torch.tensor([True, False])}}, [2]
    )


def test_equal_content_has_one_fingerprint_whatever_the_order_or_the_memory():
    td = content()
    turned = TensorDict({"b": {"d": td["b", "d"], "c": td["b", "c"]}, "a": td["a"].t().contiguous().t()}, [2])
    assert fingerprint(td) == fingerprint(turned) == fingerprint(td.clone())


@pytest.mark.parametrize(
    "change",
    [
        lambda td: td["a"].add_(torch.eye(2, 3) * 1e-6),
        lambda td: td.set("a", td["a"].double()),
        lambda td: td.set("a", td["a"].view(2, 3, 1)),
        lambda td: td.set("a", td["a"].flip(0)),
        lambda td: td.rename_key_("a", "z"),
        lambda td: td.set("e", torch.zeros(2, 0)),
        lambda td: td.set(("b", "c"), torch.tensor([2, 1])),
        lambda td: td["b"].del_("d"),
    ],
)
def test_any_change_of_names_shapes_types_or_numbers_changes_it(change):
    td = content()
    before = fingerprint(td)
    change(td)
    assert fingerprint(td) != before


def test_a_fingerprint_is_a_signed_64_bit_number_and_the_same_everywhere():
    # from hashlib.blake2b of b"a(2,)torch.int64" and the bytes of [1, 2]
    assert fingerprint(TensorDict({"a": torch.tensor([1, 2])}, [2])) == -2568029805669163803
    values = {fingerprint(TensorDict({"a": torch.tensor([i])}, [1])) for i in range(500)}
    assert len(values) == 500
    assert all(-(2**63) <= value < 2**63 for value in values)
    assert min(values) < 0 < max(values)
    torch.tensor(max(values))


def test_every_dtype_a_scalar_and_a_parameter_have_one():
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64):
        fingerprint(TensorDict({"a": torch.ones(2, dtype=dtype)}, []))
    p = torch.nn.Parameter(torch.ones(()))
    assert fingerprint(TensorDict({"a": p}, [])) == fingerprint(TensorDict({"a": torch.ones(())}, []))


# ---------------------------------------------------------------------- joins


def measured(values, dims, **labels):
    return Measured({k: torch.tensor(v) for k, v in values.items()}, dims, labels)


def test_one_network_without_a_name_is_left_as_it_is():
    one = measured({"r2": [1.0]}, {"r2": ("layer",)}, layer=["0"])
    assert join({"": one}) is one


def test_layers_of_all_networks_stand_in_one_artifact_aligned_by_label():
    actor = measured(
        {"r2": [[1.0, 2.0], [3.0, 4.0]]}, {"r2": ("layer", "target")}, layer=["0", "1"], layer_type=["A", "B"],
        target=["x", "y"],
    )  # fmt: skip
    critic = measured(
        {"r2": [[5.0, 6.0]]}, {"r2": ("layer", "target")}, layer=["0"], layer_type=["C"], target=["z", "x"]
    )
    both = join({"actor": actor, "critic": critic})
    expected = torch.tensor([[1.0, 2.0, NAN], [3.0, 4.0, NAN], [6.0, NAN, 5.0]])
    torch.testing.assert_close(both.values["r2"], expected, equal_nan=True)
    assert both.dims == {"r2": ("layer", "target")}
    assert both.labels == {
        "layer": ["actor.0", "actor.1", "critic.0"],
        "layer_type": ["A", "B", "C"],
        "target": ["x", "y", "z"],
    }


def test_dimensions_without_labels_are_aligned_by_place():
    wide = measured({"unit": [[1.0, 2.0, 3.0]]}, {"unit": ("layer", "unit")}, layer=["0"])
    narrow = measured({"unit": [[4.0], [5.0]]}, {"unit": ("layer", "unit")}, layer=["0", "1"])
    both = join({"a": wide, "b": narrow})
    expected = torch.tensor([[1.0, 2.0, 3.0], [4.0, NAN, NAN], [5.0, NAN, NAN]])
    torch.testing.assert_close(both.values["unit"], expected, equal_nan=True)


def test_the_layer_axis_may_stand_anywhere():
    a = measured({"m": [[1.0], [2.0]]}, {"m": ("target", "layer")}, layer=["0"], target=["x", "y"])
    b = measured({"m": [[3.0]]}, {"m": ("target", "layer")}, layer=["0"], target=["y"])
    expected = torch.tensor([[1.0, NAN], [2.0, 3.0]])
    torch.testing.assert_close(join({"a": a, "b": b}).values["m"], expected, equal_nan=True)


def test_other_artifacts_nest_under_their_network_and_labels_that_differ_take_its_name():
    dims = {("attr", "x"): ("batch", "target")}
    a = measured({("attr", "x"): [[1.0, 2.0]]}, dims, target=["loc", "scale"])
    b = measured({("attr", "x"): [[3.0]]}, dims, target=["value"])
    both = join({"actor": a, "critic": b})
    assert set(both.values) == {("actor", "attr", "x"), ("critic", "attr", "x")}
    assert both.values["critic", "attr", "x"].tolist() == [[3.0]]
    assert both.dims["actor", "attr", "x"] == ("batch", "actor.target")
    assert both.labels["actor.target"] == ["loc", "scale"]
    assert both.labels["critic.target"] == ["value"]
    same = join({"actor": a, "critic": a})
    assert same.dims["actor", "attr", "x"] == ("batch", "target")
    assert set(same.labels) == {"target"}


def test_a_network_may_lack_an_artifact_of_the_others():
    a = measured({"r2": [1.0], "extra": [2.0]}, {"r2": ("layer",), "extra": ("other",)}, layer=["0"])
    b = measured({"extra": [3.0]}, {"extra": ("other",)})
    both = join({"a": a, "b": b})
    assert set(both.values) == {"r2", ("a", "extra"), ("b", "extra")}
    assert both.values["r2"].tolist() == [1.0]


def test_rows_of_several_methods_are_merged_or_refused():
    a = measured({"x": [1.0]}, {"x": ("layer",)}, layer=["0"])
    b = measured({"y": [2.0]}, {"y": ("layer",)}, layer=["0"])
    row = merge([a, b])
    assert set(row.values) == {"x", "y"}
    assert row.tensordict()["y"].tolist() == [2.0]
    with pytest.raises(SchemaError, match="two methods of one row write 'x'"):
        merge([a, a])
    with pytest.raises(SchemaError, match="label dimension 'layer' differently"):
        merge([a, measured({"y": [2.0]}, {"y": ("layer",)}, layer=["1"])])


# ---------------------------------------------------------------------- targets


def test_keys_and_their_features():
    assert split_key("a") == ("a", ())
    assert split_key(("a", 5)) == ("a", (5,))
    assert split_key(("a", "b", 5, 2)) == (("a", "b"), (5, 2))
    assert label_of(("a", "b", 5)) == "a.b.5"
    for bad in ((5,), (5, "a"), ("a", 5, "b"), ("a", 1.5)):
        with pytest.raises(SettingsError, match="is no key: names first, then feature indices"):
            split_key(bad)


def test_targets_are_read_by_key_by_feature_and_by_function():
    td = TensorDict({"obs": torch.arange(12.0).view(4, 3), "n": {"q": torch.arange(4.0)}}, [4])
    assert torch.equal(read(td, ("obs", 2)), td["obs"][:, 2])
    assert torch.equal(read(td, ("obs", -1)), td["obs"][:, 2])
    assert torch.equal(read(td, ("n", "q")), td["n", "q"])
    assert torch.equal(read(td, lambda t: t["obs"].sum(1)), td["obs"].sum(1))
    with pytest.raises(KeyMissingError, match="target 'ob' is not in the batch; did you mean 'obs'"):
        read(td, "ob")
    with pytest.raises(TargetError, match=r"target 'obs' has features \(3,\), not number 3"):
        read(td, ("obs", 3))
    with pytest.raises(TargetError, match="gave float, not a tensor"):
        read(td, lambda t: 1.0)


def test_many_targets_become_columns():
    td = TensorDict({"obs": torch.arange(12.0).view(4, 3), "v": torch.ones(4, 1)}, [4])
    found = columns(td, named(["obs", "v", ("obs", 1)]), 4)
    assert list(found) == ["obs.0", "obs.1", "obs.2", "v"]
    assert list(columns(td, named({"speed": ("obs", 1)}), 4)) == ["speed"]
    with pytest.raises(SettingsError, match="two targets share the name"):
        named([lambda t: t, lambda t: t])
    with pytest.raises(TargetError, match=r"target 'total' has \(\); its first dimension must be the 4 rows"):
        columns(td, {"total": lambda t: t["v"].sum()}, 4)
    with pytest.raises(TargetError, match="target 'wide' has 65 features; name those wanted"):
        columns(td, {"wide": lambda t: torch.ones(4, 65)}, 4)


def test_a_network_keeps_the_targets_it_gives_out():
    targets = {"a": "loc", "b": ("loc", 1), "c": "state_value", "d": len}
    targets |= {"e": ("agents", "q", 0), "f": ("out", "logits")}
    assert set(given_by(targets, ["loc", ("agents", "q")])) == {"a", "b", "d", "e"}
    assert set(given_by(targets, ["out"])) == {"d", "f"}  # what a mapping gives out lies below its key


# ---------------------------------------------------------------------- units


def test_activations_as_rows_and_units():
    image = torch.randn(2, 3, 4, 5)
    places = [image[b, :, h, w] for b in range(2) for h in range(4) for w in range(5)]
    assert torch.equal(as_rows(image, 1), torch.stack(places))
    assert torch.equal(as_rows(torch.arange(12.0).view(2, 2, 3)), torch.arange(12.0).view(4, 3))
    assert as_rows(torch.ones(5)).shape == (5, 1)
    assert as_rows(torch.tensor(1.0)).shape == (1, 1)


def test_short_ones_are_padded():
    torch.testing.assert_close(
        padded([torch.ones(1), torch.zeros(2)]), torch.tensor([[1.0, NAN], [0.0, 0.0]]), equal_nan=True
    )


def test_rows_spread_evenly():
    assert evenly_spaced(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert evenly_spaced(7, 3).tolist() == [0, 2, 4]
    assert evenly_spaced(3, 9).tolist() == evenly_spaced(3, None).tolist() == [0, 1, 2]
