"""Noise that belongs to a sample: the published generator, the right laws, and independence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.noise import DEQUANTIZATION, DIVERGENCE, SAMPLING, ChildNoise, philox

N = 100_000


def draw(seed: int = 0, n: int = N, stream: int = SAMPLING, kind: str = "normal") -> Tensor:
    noise = sd.SampleNoise(seed, range(4), (n // 4,), dtype=torch.float64, stream=stream)
    return getattr(noise, kind)().flatten()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_has_the_known_answers_of_random123(counter: tuple, key: tuple, expected: tuple) -> None:
    words = philox([torch.tensor([c]) for c in counter], key)
    assert tuple(int(w) for w in words) == expected


def test_philox_agrees_with_numpy_for_random_counters() -> None:
    """A second implementation: 64-bit arithmetic of arrays against Python's unbounded integers."""
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, (20, 4))
    words = philox([torch.from_numpy(counters[:, i].copy()) for i in range(4)], (0xDEADBEEF, 0x12345678))
    for row, counter in enumerate(counters):
        c, k = [int(v) for v in counter], [0xDEADBEEF, 0x12345678]
        for _ in range(10):
            p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        assert [int(w[row]) for w in words] == c


def test_normals_are_normal() -> None:
    x = draw().numpy()
    se = N**-0.5
    assert abs(x.mean()) < 4 * se
    assert abs(x.var() - 1) < 4 * 2**0.5 * se
    assert abs((x**3).mean()) < 4 * 15**0.5 * se
    assert abs((x**4).mean() - 3) < 4 * 96**0.5 * se
    assert stats.kstest(x, "norm").pvalue > 1e-3
    assert abs((np.abs(x) > 3).mean() / 0.0026998 - 1) < 4 / (N * 0.0027) ** 0.5


def test_uniforms_are_uniform_and_below_one() -> None:
    u = draw(kind="uniform").numpy()
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / N) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_uniforms_stay_below_one_in_every_type(dtype: torch.dtype) -> None:
    u = sd.SampleNoise(0, range(16), (8192,), dtype=dtype).uniform()
    assert u.dtype == dtype and float(u.min()) >= 0 and float(u.max()) < 1
    assert float(u.double().mean()) == pytest.approx(0.5, abs=4 * (1 / 12 / u.numel()) ** 0.5 + 2**-8)


def test_signs_are_fair_and_only_signs() -> None:
    z = draw(kind="rademacher")
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(z.mean())) < 4 / N**0.5


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) * a.numel() ** 0.5


def test_draws_streams_samples_and_seeds_are_independent() -> None:
    """Correlations between different draws are a standard normal over the root of n; of squares too."""

    def source(seed: int = 0, rows: range = range(2), stream: int = SAMPLING) -> sd.SampleNoise:
        return sd.SampleNoise(seed, rows, (N // 2,), dtype=torch.float64, stream=stream)

    noise = source()
    first, second = noise.normal(), noise.normal()
    others = {
        "next draw": second,
        "another stream": source(stream=DIVERGENCE).normal(),
        "a third stream": source(stream=DEQUANTIZATION).normal(),
        "another seed": source(seed=1).normal(),
        "a seed with other high bits": source(seed=2**32).normal(),
        "other samples": source(rows=range(2, 4)).normal(),
        "the other sample": first.flip(0),
        "the next element": first.roll(1, 1),
        "the second next element": first.roll(2, 1),
    }
    for name, other in others.items():
        assert abs(correlation(first, other)) < 4.5, name
        assert abs(correlation(first.square(), other.square())) < 4.5, name


def test_a_sample_is_the_same_in_every_batch() -> None:
    whole = sd.SampleNoise(7, range(10), (3, 5), dtype=torch.float64)
    parts = [
        sd.SampleNoise(7, indices, (3, 5), dtype=torch.float64)
        for indices in (range(4), range(4, 9), [9], torch.tensor([2]))
    ]
    for kind in ("normal", "rademacher", "uniform", "normal"):
        everything = getattr(whole, kind)()
        pieces = [getattr(p, kind)() for p in parts]
        assert torch.equal(torch.cat(pieces[:3]), everything)
        assert torch.equal(pieces[3][0], everything[2])
    assert whole.draws == 4


def test_elements_do_not_depend_on_how_many_follow() -> None:
    short, long = (sd.SampleNoise(0, [0], (n,)).normal()[0] for n in (5, 50))
    assert torch.equal(long[:5], short)


def test_types_agree_up_to_rounding() -> None:
    double = sd.SampleNoise(0, range(3), (7,), dtype=torch.float64).normal()
    single = sd.SampleNoise(0, range(3), (7,)).normal()
    assert single.dtype == torch.float32
    assert torch.equal(double.float(), single)


def test_calling_the_source_draws_normals() -> None:
    a, b = (sd.SampleNoise(0, range(2), (3,)) for _ in range(2))
    assert torch.equal(a(), b.normal())
    assert not torch.equal(a(), a())


def test_shapes_are_any() -> None:
    assert sd.SampleNoise(0, range(3), ()).normal().shape == (3,)
    assert sd.SampleNoise(0, [], (4,)).normal().shape == (0, 4)
    assert sd.SampleNoise(2**64 - 1, [2**32 - 1], (1, 2, 3)).normal().shape == (1, 1, 2, 3)


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, "0", None])
def test_seeds_out_of_range_are_refused(seed: object) -> None:
    with pytest.raises(ValueError, match="a seed must be an integer from 0 to"):
        sd.SampleNoise(seed, range(2), (3,))


@pytest.mark.parametrize("indices", [[-1], [2**32], [[0, 1]]])
def test_indices_out_of_range_are_refused(indices: object) -> None:
    with pytest.raises(ValueError, match="sample indices must be a vector of integers from 0 to"):
        sd.SampleNoise(0, indices, (3,))


@pytest.mark.gpu
def test_the_numbers_are_the_same_on_a_gpu() -> None:
    cpu = sd.SampleNoise(3, range(4), (1001,), dtype=torch.float64)
    gpu = sd.SampleNoise(3, range(4), (1001,), dtype=torch.float64, device="cuda")
    assert torch.equal(gpu.rademacher().cpu(), cpu.rademacher())
    assert torch.equal(gpu.uniform().cpu(), cpu.uniform())
    assert_close(gpu.normal().cpu(), cpu.normal(), rtol=1e-12, atol=1e-12)


def test_child_noise_belongs_to_the_sample_and_is_normal() -> None:
    parent = sd.SampleNoise(3, range(4000), (3,), dtype=torch.float64).normal()
    first, second = (ChildNoise(parent).normal(torch.full((4000,), k)) for k in (0, 1))
    for z in (first, second):
        assert z.shape == parent.shape and z.dtype == parent.dtype
        standard_error = 4000**-0.5
        assert float(z.mean(0).abs().max()) < 4 * standard_error
        assert float((z.T.cov() - torch.eye(3)).abs().max()) < 4 * 2**0.5 * standard_error
    # Nothing in common with its parent, its sibling and its neighbours.
    for other in (parent, second, first.roll(1, 0), first.roll(1, 1)):
        assert float((first * other).mean(0).abs().max()) < 4 * standard_error
    # Alone, in another type, and with its own number of draws, it is the same.
    alone = ChildNoise(parent[7:9].float()).normal(torch.tensor([1, 0]))
    torch.testing.assert_close(alone, torch.stack([second[7], first[8]]).float())
