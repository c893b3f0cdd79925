"""Grey levels to model space and back, and the checks of a data set."""

from __future__ import annotations

import hashlib

import pytest
import torch

from sde_diffusion.data import DataSet, from_model, load_dataset, to_model


@pytest.mark.parametrize("levels", [2, 3, 16, 17, 100, 255, 256])
def test_levels_come_back_exactly(levels):
    x = torch.arange(levels).to(torch.uint8).repeat(2000, 1)
    almost_one = torch.full(x.shape, 1 - 2.0**-24)
    for uniforms in (None, torch.zeros(x.shape), almost_one, torch.rand(x.shape)):
        y = to_model(x, levels, uniforms)
        assert y.dtype == torch.float32
        assert y.abs().max() < 1
        assert torch.equal(from_model(y, levels), x)


def test_many_levels_come_back_exactly():
    x = torch.arange(65536, dtype=torch.int32)
    for uniforms in (None, torch.zeros(x.shape), torch.full(x.shape, 1 - 2.0**-24)):
        assert torch.equal(from_model(to_model(x, 65536, uniforms), 65536), x)


def test_dequantized_levels_fill_the_interval_uniformly():
    """Uniform on [-1, 1]: mean 0 and variance 1/3 (standard errors 0.0013, 0.0007)."""
    x = torch.arange(17, dtype=torch.uint8).repeat(12000)
    y = to_model(x, 17, torch.rand(len(x))).double()
    assert abs(y.mean()) < 0.005
    assert abs(y.square().mean() - 1 / 3) < 0.003
    assert torch.histc(y, 17, -1, 1).tolist() == [12000] * 17


def test_known_values():
    x = torch.tensor([0, 8, 16], dtype=torch.uint8)
    torch.testing.assert_close(to_model(x, 17), torch.tensor([-16 / 17, 0.0, 16 / 17]))
    torch.testing.assert_close(
        to_model(torch.tensor([[128]]), 256, torch.tensor([[0.25]])), torch.tensor([[0.25 / 128]])
    )


def test_values_beyond_the_interval_go_to_the_ends():
    assert from_model(torch.tensor([-7.0, -1.0, 1.0, 7.0]), 17).tolist() == [0, 0, 16, 16]


@pytest.mark.parametrize(
    "x, levels, uniforms, message",
    [
        (torch.zeros(2), 17, None, "integer levels 0 .. 16, got dtype torch.float32"),
        (torch.tensor([17]), 17, None, "0 .. 16, got values from 17 to 17"),
        (torch.tensor([-1]), 17, None, "from -1"),
        (torch.tensor([0]), 1, None, "levels must be an integer >= 2, got 1"),
        (torch.tensor([0]), 17.0, None, "got 17.0"),
        (torch.tensor([0]), 17, torch.zeros(2), r"shape of x, \(1,\), got \(2,\)"),
    ],
)
def test_to_model_refuses(x, levels, uniforms, message):
    with pytest.raises(ValueError, match=message):
        to_model(x, levels, uniforms)


def test_from_model_refuses():
    with pytest.raises(ValueError, match="not finite"):
        from_model(torch.tensor([0.0, float("nan")]), 17)
    with pytest.raises(ValueError, match=r"floating-point, got dtype torch\.uint8"):
        from_model(torch.zeros(2, dtype=torch.uint8), 17)


def test_digits():
    digits = load_dataset("digits")
    assert (digits.sample_shape, digits.levels, digits.num_classes) == ((1, 8, 8), 17, 10)
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert (digits.train.dtype, digits.train_labels.dtype) == (torch.uint8, torch.int64)
    assert digits.train.max() == digits.test.max() == 16
    assert digits.is_image
    assert digits.density is None
    everything = torch.cat((digits.train, digits.test)).flatten(1)
    from sklearn.datasets import load_digits

    raw = torch.from_numpy(load_digits().data).to(torch.uint8)
    assert torch.equal(everything.unique(dim=0), raw.unique(dim=0))
    assert torch.cat((digits.train_labels, digits.test_labels)).bincount().tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip
    assert digits.test_labels.bincount().tolist() == [49, 35, 27, 36, 34, 41, 30, 35, 37, 36]


def test_the_split_of_the_digits_is_fixed():
    """Figures measured on this split are only comparable as long as it does not change."""
    digits = load_dataset("digits")
    sha = hashlib.sha256(digits.test.numpy().tobytes()).hexdigest()
    assert sha == "c62e62939e8bc72276c4fcc88bbaae536a0f0c434b2f22486a47e0e28e38d185"


def x_(n: int, *shape: int) -> torch.Tensor:
    return torch.zeros(n, *shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"train": x_(0, 1, 2, 2), "test": x_(1, 1, 2, 2), "levels": 2}, "train part: no samples"),
        ({"train": x_(1, 1, 2, 2), "test": x_(1, 1, 2, 3), "levels": 2}, r"\(1, 2, 2\) and \(1, 2, 3\)"),
        ({"train": x_(1, 2, 2), "test": x_(1, 2, 2), "levels": 2}, r"uint8 \(N, C, H, W\), got"),
        ({"train": x_(1, 1, 2, 2) + 2, "test": x_(1, 1, 2, 2), "levels": 2}, r"0 .. 1, got 2"),
        ({"train": x_(1, 2), "test": x_(1, 2)}, r"float32 \(N, D\), got torch.uint8"),
        ({"train": torch.tensor([[torch.inf]]), "test": torch.zeros(1, 1)}, "not finite"),
        (
            {"train": torch.zeros(1, 1), "test": torch.zeros(1, 1), "train_labels": torch.tensor([0])},
            "has none",
        ),
    ],
)
def test_a_data_set_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataSet("mine", **arguments)


@pytest.mark.parametrize(
    "labels, names, message",
    [
        (torch.tensor([0.0, 1.0]), None, r"int64 \(2,\), got torch.float32"),
        (torch.tensor([0, 1, 2]), None, r"got torch.int64 \(3,\)"),
        (torch.tensor([0, -1]), None, "got -1"),
        (torch.tensor([0, 2]), ("a", "b"), "label 2, but 2 class names"),
    ],
)
def test_a_data_set_refuses_labels(labels, names, message):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        DataSet("mine", x, x, labels, torch.tensor([0, 1]), class_names=names)
