"""Random words, permutations, the split, batches and their augmentation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from sde_diffusion.data import Augmentation, Batches, epoch_order, held_out
from sde_diffusion.data.augment import shift_images
from sde_diffusion.data.order import permutation, random_words


def images(n: int = 10, height: int = 4, width: int = 5) -> torch.Tensor:
    values = torch.arange(n * height * width, dtype=torch.int64) % 251 + 1
    return values.to(torch.uint8).reshape(n, 1, height, width)


def test_random_words_are_a_function_of_the_key_alone():
    words = random_words(6, "x", 1, 2)
    assert words.dtype == np.uint64
    assert np.array_equal(words[:3], random_words(3, "x", 1, 2))
    for other in (random_words(6, "y", 1, 2), random_words(6, "x", 2, 1), random_words(6, "x", 12)):
        assert not np.array_equal(words, other)


def test_permutations_do_not_change_from_release_to_release():
    """Written down: a change here changes every split and every resumed run."""
    assert permutation(10, "x", 3).tolist() == [5, 2, 4, 8, 7, 1, 3, 9, 6, 0]
    assert epoch_order(8, 0, 0).tolist() == [6, 7, 2, 1, 5, 4, 3, 0]
    assert epoch_order(8, 0, 1).tolist() == [6, 5, 3, 4, 2, 0, 1, 7]


@pytest.mark.parametrize("n", [1, 2, 1437, 5000])
def test_epoch_order_is_a_permutation_of_its_own(n):
    orders = [epoch_order(n, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert order.dtype == torch.int64
        assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(orders[0], epoch_order(n, 0, 0))
    if n > 2:
        assert not torch.equal(orders[0], orders[1])
        assert not torch.equal(orders[0], orders[2])


def test_permutations_are_uniform():
    """The six orders of three things: chi-squared with 5 degrees of freedom, 99.9% below 20.5."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(1200):
        key = tuple(epoch_order(3, seed, 0).tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 6
    assert sum((c - 200) ** 2 / 200 for c in counts.values()) < 20.5


def test_held_out_parts_are_disjoint_and_complete():
    train, test = held_out(1000, 0.1, seed=3)
    assert (len(train), len(test)) == (900, 100)
    assert torch.equal(torch.cat((train, test)).sort().values, torch.arange(1000))
    assert torch.equal(test, held_out(1000, 0.1, seed=3)[1])
    assert not torch.equal(test, held_out(1000, 0.1, seed=4)[1])
    assert [len(part) for part in held_out(2, 0.01)] == [1, 1]
    assert [len(part) for part in held_out(3, 0.99)] == [1, 2]


@pytest.mark.parametrize("n, fraction", [(10, 0.0), (10, 1.0), (10, math.nan), (1, 0.1), (0, 0.1)])
def test_held_out_refuses(n, fraction):
    with pytest.raises(ValueError, match=r"test_fraction|cannot hold out"):
        held_out(n, fraction)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 7, 25])
def test_batches_lay_the_epochs_end_to_end(batch_size):
    stream = Batches(images(), batch_size, seed=5)
    seen = torch.cat([next(stream).indices for _ in range(60)])
    expected = torch.cat([epoch_order(10, 5, epoch) for epoch in range(60 * batch_size // 10 + 1)])
    assert torch.equal(seen, expected[: len(seen)])
    assert (stream.epoch, stream.position) == divmod(60 * batch_size, 10)


def test_a_batch_is_a_function_of_seed_and_number():
    x, y = images(), torch.arange(10)
    flips = Augmentation(flip=True, shift=2)
    stream = Batches(x, 4, labels=y, seed=1, augmentation=flips)
    in_turn = [next(stream) for _ in range(6)]
    fresh = Batches(x, 4, labels=y, seed=1, augmentation=flips)
    for k in (5, 0, 3):
        batch = fresh.batch(k)
        assert torch.equal(batch.x, in_turn[k].x)
        assert torch.equal(batch.y, y[batch.indices])
        assert torch.equal(batch.augmentation, in_turn[k].augmentation)
    assert fresh.state_dict()["batch"] == 0
    other = Batches(x, 4, labels=y, seed=2, augmentation=flips).batch(0)
    assert not torch.equal(other.indices, in_turn[0].indices)


def test_the_stream_continues_from_a_saved_position():
    stream = Batches(images(), 4, seed=1, augmentation=Augmentation(shift=1))
    for _ in range(7):
        next(stream)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = Batches(images(), 4, seed=1, augmentation=Augmentation(shift=1))
    resumed.load_state_dict(state)
    assert (resumed.epoch, resumed.position) == (stream.epoch, stream.position) == (2, 8)
    for _ in range(5):
        a, b = next(stream), next(resumed)
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.indices, b.indices)


def test_a_position_of_another_stream_is_refused():
    state = Batches(images(), 4, seed=1).state_dict()
    with pytest.raises(ValueError, match=r"another stream: seed 1 \(here 2\), batch_size 4 \(here 5\)"):
        Batches(images(), 5, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"size 10 \(here 9\)"):
        Batches(images(9), 4, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="has the keys"):
        Batches(images(), 4).load_state_dict({"batch": 1})
    with pytest.raises(ValueError, match="-1"):
        Batches(images(), 4, seed=1).load_state_dict({**state, "batch": -1})


def test_batches_without_labels_or_augmentation():
    x = torch.randn(10, 2)
    batch = next(Batches(x, 4))
    assert batch.y is None
    assert batch.augmentation.shape == (4, 0)
    assert torch.equal(batch.x, x[batch.indices])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"x": torch.zeros(0, 2), "batch_size": 1}, "no samples"),
        ({"x": torch.zeros(3, 2), "batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"x": torch.zeros(3, 2), "batch_size": 2.0}, "got 2.0"),
        ({"x": torch.zeros(3, 2), "batch_size": 2, "labels": torch.zeros(4)}, "3 samples but 4 labels"),
        (
            {"x": torch.zeros(3, 2), "batch_size": 2, "augmentation": Augmentation(flip=True)},
            r"shape \(3, 2\)",
        ),
    ],
)
def test_batches_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        Batches(**arguments)


def test_shifts_move_whole_pixels_and_fill_with_the_darkest():
    x = images(2, 3, 4)
    moved = shift_images(x, torch.tensor([[1, -2], [0, 0]]))
    expected = torch.zeros_like(x[0])
    expected[:, 1:, :2] = x[0, :, :2, 2:]
    assert torch.equal(moved[0], expected)
    assert torch.equal(moved[1], x[1])


def test_the_reported_augmentation_is_the_applied_one():
    x = images(50, 6, 6)
    stream = Batches(x, 500, augmentation=Augmentation(flip=True, shift=2))
    batch = next(stream)
    assert batch.x.dtype == torch.uint8
    assert batch.augmentation.dtype == torch.float32
    for sample, index, (flip, down, right) in zip(
        batch.x, batch.indices, batch.augmentation.tolist(), strict=True
    ):
        expected = x[index].flip(-1) if flip else x[index]
        by = torch.tensor([[round(2 * down), round(2 * right)]])
        assert torch.equal(sample, shift_images(expected[None], by)[0])


def test_augmentations_have_their_frequencies():
    """4,000 draws: standard error 0.008 for flips (p = 1/2), 0.0064 for each of five shifts (p = 1/5)."""
    x = images(10, 6, 6)
    _, applied = Augmentation(flip=True, shift=2)(
        x[torch.zeros(4000, dtype=torch.int64)], random_words(20000, "test").reshape(4000, 5)
    )
    assert abs(applied[:, 0].mean() - 0.5) < 0.032
    for column in (1, 2):
        values, counts = applied[:, column].unique(return_counts=True)
        assert values.tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
        assert (counts / 4000 - 0.2).abs().max() < 0.026
    assert abs(torch.corrcoef(applied.T) - torch.eye(3)).max() < 0.07


def test_augmentation_with_a_probability():
    """Flipped with 0.12 / 2 (standard error 0.004), shifted with 0.12 (8/9) (standard error 0.005)."""
    x = images(1, 6, 6).expand(4000, 1, 6, 6)
    words = random_words(20000, "test").reshape(4000, 5)
    moved, applied = Augmentation(flip=True, shift=1, probability=0.12)(x, words)
    assert abs(applied[:, 0].mean() - 0.06) < 0.016
    assert abs((applied[:, 1:] != 0).any(1).float().mean() - 0.12 * 8 / 9) < 0.02
    untouched = (applied == 0).all(1)
    assert torch.equal(moved[untouched], x[untouched])
    never, none = Augmentation(flip=True, shift=1, probability=0.0)(x, words)
    assert torch.equal(never, x)
    assert not none.any()


def test_switching_flips_on_leaves_the_shifts_alone():
    x, words = images(50, 6, 6), random_words(250, "test").reshape(50, 5)
    _, both = Augmentation(flip=True, shift=2)(x, words)
    _, shifts = Augmentation(shift=2)(x, words)
    assert torch.equal(both[:, 1:], shifts)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"shift": -1}, "got -1"),
        ({"shift": 1.5}, "1.5"),
        ({"flip": "yes"}, "'yes'"),
        ({"probability": 2}, "2"),
    ],
)
def test_augmentation_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**arguments)


def test_a_shift_as_large_as_the_image_is_refused():
    with pytest.raises(ValueError, match=r"smaller than the image \(4x5\), got 4"):
        next(Batches(images(), 2, augmentation=Augmentation(shift=4)))
