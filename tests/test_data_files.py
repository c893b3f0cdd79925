"""Folders of images, arrays, IDX files and CIFAR-10's archive: what is read, and what is refused."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sde_diffusion.data import load_dataset
from sde_diffusion.data.arrays import image_layout
from sde_diffusion.data.cifar import CLASSES, read_python_batch
from sde_diffusion.data.idx import read_idx
from shared_data import shared_path


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, array: np.ndarray, **options: object) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return array


def every(data) -> torch.Tensor:
    return torch.cat((data.train, data.test))


# Folders of images


def test_a_folder_of_images_is_read_in_sorted_order(tmp_path):
    """Twenty images whose pixels tell their place in the order; two are held out, the same ones each time."""
    for i, name in enumerate(sorted(f"{i}.png" for i in range(20))):
        save(tmp_path / name, np.full((4, 6), i, np.uint8))
    (tmp_path / "notes.txt").write_text("not an image")
    save(tmp_path / ".hidden.png", pixels(2, 2))
    data = load_dataset("folder", path=tmp_path)
    assert (data.sample_shape, data.levels, data.num_classes) == ((1, 4, 6), 256, None)
    assert (len(data.train), len(data.test)) == (18, 2)
    first = data.train[:, 0, 0, 0].tolist(), data.test[:, 0, 0, 0].tolist()
    assert sorted(first[0] + first[1]) == list(range(20))
    assert first[0] == sorted(first[0])
    again = load_dataset("folder", path=str(tmp_path))
    assert torch.equal(again.test, data.test)
    other = load_dataset("folder", path=tmp_path, split_seed=1, test_fraction=0.5)
    assert len(other.test) == 10


@pytest.mark.parametrize("end", ["png", "bmp", "webp", "tif", "ppm"])
def test_lossless_formats_come_back_exactly(tmp_path, end):
    options = {"lossless": True} if end == "webp" else {}
    expected = [save(tmp_path / f"{i}.{end}", pixels(5, 7, 3, seed=i), **options) for i in range(3)]
    read = every(load_dataset("folder", path=tmp_path))
    assert read.shape == (3, 3, 5, 7)
    assert {x.numpy().tobytes() for x in read} == {np.moveaxis(x, 2, 0).tobytes() for x in expected}


def test_jpeg_is_read(tmp_path):
    for i in range(2):
        save(tmp_path / f"{i}.JPG", np.full((8, 8, 3), 100 * i, np.uint8), quality=95)
    assert sorted(every(load_dataset("folder", path=tmp_path)).float().mean((1, 2, 3)).tolist()) == [0, 100]


def test_sub_folders_are_classes(tmp_path):
    for i, name in enumerate(("dog/a/1.png", "dog/2.png", "cat/1.png", "cat/2.png", "cat/3.png")):
        save(tmp_path / name, np.full((2, 2), i, np.uint8))
    data = load_dataset("folder", path=tmp_path, test_fraction=0.2)
    assert data.class_names == ("cat", "dog")
    assert data.num_classes == 2
    for x, y in ((data.train, data.train_labels), (data.test, data.test_labels)):
        assert torch.equal(y, (x[:, 0, 0, 0] < 2).long())


def test_one_sub_folder_or_stray_images_make_no_classes(tmp_path):
    for i in range(3):
        save(tmp_path / f"images/{i}.png", pixels(2, 2))
    assert load_dataset("folder", path=tmp_path).train_labels is None
    save(tmp_path / "more/0.png", pixels(2, 2))
    assert load_dataset("folder", path=tmp_path).class_names == ("images", "more")
    save(tmp_path / "stray.png", pixels(2, 2))
    assert load_dataset("folder", path=tmp_path).train_labels is None


def test_train_and_test_folders_are_the_parts(tmp_path):
    for part, n in (("train", 4), ("test", 2)):
        for name in ("a", "b"):
            for i in range(n):
                save(tmp_path / part / name / f"{i}.png", pixels(2, 2))
    data = load_dataset("folder", path=tmp_path)
    assert data.train_labels.tolist() == [0] * 4 + [1] * 4
    assert data.test_labels.tolist() == [0] * 2 + [1] * 2
    save(tmp_path / "test/c/0.png", pixels(2, 2))
    with pytest.raises(ValueError, match=r"classes .* differ: \('a', 'b'\) in train, \('a', 'b', 'c'\)"):
        load_dataset("folder", path=tmp_path)


def test_mixed_sizes_are_refused_and_image_size_mends_them(tmp_path):
    save(tmp_path / "a.png", np.full((6, 8, 3), 50, np.uint8))
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200  # the centred square
    save(tmp_path / "b.png", wide)
    message = r"sizes are mixed: 'a.png' is 8x6 and 'b.png' is 12x4 \(width x height\); use image_size=N"
    with pytest.raises(ValueError, match=message):
        load_dataset("folder", path=tmp_path)
    read = every(load_dataset("folder", path=tmp_path, image_size=4))
    assert read.shape == (2, 3, 4, 4)
    assert sorted(read.unique().tolist()) == [50, 200]
    assert load_dataset("folder", path=tmp_path, image_size=(2, 6)).sample_shape == (3, 2, 6)


def test_mixed_kinds_are_refused_and_channels_mends_them(tmp_path):
    save(tmp_path / "a.png", np.full((2, 2, 3), 50, np.uint8))
    save(tmp_path / "b.png", np.full((2, 2), 60, np.uint8))
    with pytest.raises(
        ValueError, match=r"'b.png' is grey and 'a.png' is in colour; use channels=1 or channels=3"
    ):
        load_dataset("folder", path=tmp_path)
    for channels in (1, 3):
        read = every(load_dataset("folder", path=tmp_path, channels=channels))
        assert read.shape == (2, channels, 2, 2)
        assert sorted(read.unique().tolist()) == [50, 60]


def test_palettes_and_opaque_alpha_are_colour(tmp_path):
    save(tmp_path / "a.png", np.dstack((np.full((2, 2, 3), 9, np.uint8), np.full((2, 2), 255, np.uint8))))
    Image.fromarray(np.full((2, 2, 3), 9, np.uint8)).quantize(4).save(tmp_path / "b.png")
    read = every(load_dataset("folder", path=tmp_path))
    assert read.shape == (2, 3, 2, 2)
    assert (read == 9).all()


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    array = pixels(2, 4)
    for i in range(2):
        save(tmp_path / f"{i}.png", array, exif=exif)
    assert np.array_equal(load_dataset("folder", path=tmp_path).train[0, 0].numpy(), np.rot90(array, -1))


def test_damaged_and_unfit_images_are_named(tmp_path):
    save(tmp_path / "a.png", pixels(32, 32, 3))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"image 'b\.png' is truncated"):
        load_dataset("folder", path=tmp_path)
    (tmp_path / "b.png").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"image 'b\.png' is truncated, damaged or no image"):
        load_dataset("folder", path=tmp_path)
    save(tmp_path / "b.png", np.full((32, 32, 4), 128, np.uint8))
    with pytest.raises(ValueError, match=r"image 'b\.png' is in part transparent"):
        load_dataset("folder", path=tmp_path)
    save(tmp_path / "b.png", np.full((32, 32), 40_000, np.uint16))
    with pytest.raises(ValueError, match=r"image 'b\.png' has the mode 'I;16'"):
        load_dataset("folder", path=tmp_path)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match="has no images"):
        load_dataset("folder", path=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere/at/all' does not exist \(the path exists up to "):
        load_dataset("folder", path=tmp_path / "nowhere/at/all")
    with pytest.raises(ValueError, match="needs a path, got None"):
        load_dataset("folder")
    save(tmp_path / "a.png", pixels(2, 2))
    with pytest.raises(NotADirectoryError, match=r"a\.png"):
        load_dataset("folder", path=tmp_path / "a.png")
    with pytest.raises(ValueError, match="cannot hold out a test part of 1 sample:"):
        load_dataset("folder", path=tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 0}, "image_size must be a positive integer .* got 0"),
        ({"image_size": (1, 2, 3)}, r"got \(1, 2, 3\)"),
        ({"channels": 2}, "channels must be 1 .* got 2"),
        ({"test_fraction": 0.0}, "test_fraction must be > 0 and < 1, got 0.0"),
    ],
)
def test_folder_options_are_checked(tmp_path, options, message):
    for i in range(2):
        save(tmp_path / f"{i}.png", pixels(2, 2))
    with pytest.raises(ValueError, match=message):
        load_dataset("folder", path=tmp_path, **options)


# Arrays


@pytest.mark.parametrize("shape", [(10, 5, 4), (10, 1, 5, 4), (10, 5, 4, 1)])
def test_grey_arrays(tmp_path, shape):
    array = pixels(10, 5, 4)
    np.save(tmp_path / "mine.npy", array.reshape(shape))
    data = load_dataset("arrays", path=tmp_path / "mine.npy", test_fraction=0.3)
    assert (data.name, data.sample_shape, data.levels) == ("mine", (1, 5, 4), 256)
    assert (len(data.train), len(data.test)) == (7, 3)
    assert {x.tobytes() for x in every(data).numpy()} == {x.tobytes() for x in array}


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "x_test", "y_train", "y_test"),
        ("train", "test", "train_labels", "test_labels"),
        ("train_images", "test_images", "train_labels", "test_labels"),
    ],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_archives_with_two_parts(tmp_path, names, labelled):
    train, test = pixels(6, 4, 4, 3), pixels(2, 4, 4, 3, seed=1)
    values = (train, test, np.arange(6)[:, None] % 3, np.array([0, 2], np.uint8))
    np.savez_compressed(tmp_path / "a.npz", **dict(zip(names[: 4 if labelled else 2], values, strict=False)))
    data = load_dataset("arrays", path=tmp_path / "a.npz")
    assert np.array_equal(data.train.numpy(), np.moveaxis(train, 3, 1))
    assert np.array_equal(data.test.numpy(), np.moveaxis(test, 3, 1))
    if labelled:
        assert data.train_labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert data.test_labels.tolist() == [0, 2]
        assert data.num_classes == 3
    else:
        assert data.train_labels is None


def test_archives_that_are_split(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(20, 3))
    np.savez(tmp_path / "a.npz", x=vectors, y=np.arange(20))
    data = load_dataset("arrays", path=tmp_path / "a.npz")
    assert (data.levels, data.sample_shape) == (None, (3,))
    for x, y in ((data.train, data.train_labels), (data.test, data.test_labels)):
        torch.testing.assert_close(x, torch.from_numpy(vectors[y.numpy()]).float())
    np.savez(tmp_path / "b.npz", anything=vectors)
    assert load_dataset("arrays", path=tmp_path / "b.npz").train_labels is None


def test_levels_and_layout_of_arrays(tmp_path):
    array = pixels(4, 3, 5, 3) % 17
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=r"\(4, 3, 5, 3\), either axis 1 or axis 3 can be .* layout='NCHW'"):
        load_dataset("arrays", path=tmp_path / "a.npy")
    load = {"path": tmp_path / "a.npy", "levels": 17}
    assert load_dataset("arrays", layout="NCHW", **load).sample_shape == (3, 3 + 2, 3)
    data = load_dataset("arrays", layout="NHWC", **load)
    assert (data.sample_shape, data.levels) == ((3, 3, 5), 17)
    with pytest.raises(ValueError, match=r"unknown layout 'NHCW'; did you mean 'NH"):
        load_dataset("arrays", path=tmp_path / "a.npy", layout="NHCW")
    with pytest.raises(ValueError, match=r"levels must lie in 0 \.\. 3"):
        load_dataset("arrays", path=tmp_path / "a.npy", layout="NCHW", levels=4)


def test_where_the_channels_are():
    assert image_layout((5, 3, 32, 32), "a") == "NCHW"
    assert image_layout((5, 32, 32, 1), "a") == "NHWC"
    with pytest.raises(ValueError, match="neither axis 1 nor axis 3"):
        image_layout((5, 4, 4, 4), "a")


class Trap:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((4, 3), np.uint8), r"got uint8 \(4, 3\)"),
        (np.zeros((4, 3), np.int64), r"got int64 \(4, 3\)"),
        (np.zeros((4, 2, 2, 1), np.float32), r"got float32 \(4, 2, 2, 1\)"),
        (np.array([[0.0, np.nan]] * 4), "not finite"),
        (np.zeros((0, 2, 2), np.uint8), "cannot hold out"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        load_dataset("arrays", path=tmp_path / "a.npy")


def test_damaged_array_files_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", pixels(10, 8, 8))
    np.savez_compressed(tmp_path / "a.npz", x=pixels(10, 8, 8))
    for name in ("a.npy", "a.npz"):
        whole = (tmp_path / name).read_bytes()
        for n in (0, 5, len(whole) // 2):
            (tmp_path / name).write_bytes(whole[:n])
            with pytest.raises(ValueError, match=rf"{name}' is truncated, damaged or of another kind"):
                load_dataset("arrays", path=tmp_path / name)


def test_arrays_never_unpickle(tmp_path):
    np.save(tmp_path / "a.npy", np.array([Trap(tmp_path / "sprung")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_dataset("arrays", path=tmp_path / "a.npy")
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ValueError, match=r"b\.npy"):
        load_dataset("arrays", path=tmp_path / "b.npy")
    assert not (tmp_path / "sprung").exists()


def test_unfit_array_archives_are_refused(tmp_path):
    image = pixels(4, 2, 2)
    file = tmp_path / "a.npz"
    for arrays, message in (
        (
            {"x_train": image, "stuff": image},
            r"holds the arrays \['stuff', 'x_train'\]; the names understood",
        ),
        ({"x": image, "y": np.arange(3)}, "4 samples but 3 labels"),
        ({"x": image, "y": np.zeros(4)}, r"labels must be integers \(N,\), got float64 \(4,\)"),
        ({"x_train": image, "x_test": image, "y_train": np.arange(4)}, "one part has labels"),
        ({"x_train": image, "x_test": image.reshape(4, 4) / 255}, "differ in shape"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(ValueError, match=message):
            load_dataset("arrays", path=file)
    np.savez(file, x=np.zeros((4, 2)))
    with pytest.raises(ValueError, match="levels are for uint8 images, got float64"):
        load_dataset("arrays", path=file, levels=17)
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"\.npy or \.npz file is needed, got .*a\.csv"):
        load_dataset("arrays", path=tmp_path / "a.csv")


# IDX


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(
    folder: Path, mark: str = "-", packed: bool = False, labelled: bool = True
) -> tuple[np.ndarray, ...]:
    folder.mkdir(exist_ok=True)
    arrays = (
        pixels(5, 4, 3),
        np.array([1, 0, 9, 2, 2], np.uint8),
        pixels(2, 4, 3, seed=1),
        np.array([3, 4], np.uint8),
    )
    names = ("train-images", 3), ("train-labels", 1), ("t10k-images", 3), ("t10k-labels", 1)
    for (name, ndim), array in zip(names, arrays, strict=True):
        if labelled or ndim == 3:
            raw = idx_bytes(array)
            file = folder / f"{name}{mark}idx{ndim}-ubyte{'.gz' if packed else ''}"
            file.write_bytes(gzip.compress(raw) if packed else raw)
    return arrays


@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("labelled", [True, False])
def test_idx_files(tmp_path, mark, packed, labelled):
    train, train_labels, test, test_labels = write_mnist(tmp_path / "mnist", mark, packed, labelled)
    data = load_dataset("idx", path=tmp_path / "mnist")
    assert (data.name, data.sample_shape, data.levels) == ("mnist", (1, 4, 3), 256)
    assert np.array_equal(data.train[:, 0].numpy(), train)
    assert np.array_equal(data.test[:, 0].numpy(), test)
    if labelled:
        assert data.train_labels.tolist() == train_labels.tolist()
        assert data.test_labels.tolist() == test_labels.tolist()
    else:
        assert data.train_labels is None


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"", "not an IDX file: it starts with nothing"),
        (b"PK\x03\x04", "it starts with 50 4b 03 04"),
        (bytes((0, 0, 9, 1)) + bytes(4), "IDX type 0x09"),
        (bytes((0, 0, 8, 3)) + bytes(12), "has 3 dimensions; 1 are needed"),
        (bytes((0, 0, 8, 1)) + bytes(2), "truncated: 6 bytes, its header alone has 8"),
        (idx_bytes(np.arange(9, dtype=np.uint8))[:-1], r"truncated: 16 bytes, the shape \(9,\) needs 17"),
        (idx_bytes(np.arange(9, dtype=np.uint8)) + b"x", "longer than its header says: 18 bytes"),
        (gzip.compress(idx_bytes(np.arange(9, dtype=np.uint8)))[:-12], "truncated, damaged"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, raw, message):
    (tmp_path / "labels").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "labels", 1)


def test_incomplete_idx_folders_are_refused(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no 't10k-images-idx3-ubyte' .* it has: t10k-labels-idx1-ubyte, train"
    ):
        load_dataset("idx", path=tmp_path)
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(4, np.uint8)))
    with pytest.raises(ValueError, match=r"has 5 images but .*train-labels-idx1-ubyte' has 4 labels"):
        load_dataset("idx", path=tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="one part has labels and the other has none"):
        load_dataset("idx", path=tmp_path)


def test_the_real_mnist():
    folder = shared_path("data", "mnist")
    test = read_idx(folder / "t10k-images-idx3-ubyte.gz", 3)
    labels = read_idx(folder / "train-labels-idx1-ubyte.gz", 1)
    assert (tuple(test.shape), tuple(labels.shape)) == ((10_000, 28, 28), (60_000,))
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]


# CIFAR-10


def cifar_batch(n: int, seed: int, protocol: int = 2) -> tuple[bytes, np.ndarray, list[int]]:
    data, labels = pixels(n, 3072, seed=seed), [(seed + i) % 10 for i in range(n)]
    content = {b"batch_label": b"a", b"labels": labels, b"data": data, b"filenames": [b"a.png"] * n}
    return pickle.dumps(content, protocol=protocol), data, labels


def cifar_files(binary: bool, protocol: int = 2) -> tuple[dict[str, bytes], np.ndarray, list[int]]:
    """The six files, and the pixels and labels of all in order."""
    files, blocks, labels = {}, [], []
    for seed, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        raw, data, y = cifar_batch(3, seed, protocol)
        if binary:
            name, raw = f"{name}.bin", np.hstack((np.array(y, np.uint8)[:, None], data)).tobytes()
        files[name] = raw
        blocks.append(data)
        labels += y
    return files, np.concatenate(blocks), labels


def write_tar(path: Path, folder: str, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, raw in {**files, "readme.html": b"<html>"}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("where", ["archive", "folder", "folder above"])
def test_cifar10(tmp_path, binary, where):
    files, blocks, labels = cifar_files(binary)
    folder = f"cifar-10-batches-{'bin' if binary else 'py'}"
    if where == "archive":
        path = write_tar(tmp_path / "cifar.tar.gz", folder, files)
    else:
        (tmp_path / folder).mkdir()
        for name, raw in files.items():
            (tmp_path / folder / name).write_bytes(raw)
        path = tmp_path / folder if where == "folder" else tmp_path
    data = load_dataset("cifar10", path=path)
    assert (data.sample_shape, data.levels, data.num_classes) == ((3, 32, 32), 256, 10)
    assert (len(data.train), len(data.test)) == (15, 3)
    assert np.array_equal(every(data).numpy(), blocks.reshape(-1, 3, 32, 32))
    assert torch.cat((data.train_labels, data.test_labels)).tolist() == labels
    assert data.class_names == CLASSES


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_is_read(protocol):
    raw, data, labels = cifar_batch(3, 1, protocol)
    x, y = read_python_batch(raw, "here")
    assert np.array_equal(x.numpy(), data.reshape(3, 3, 32, 32))
    assert y.tolist() == labels


def test_a_pickle_written_by_python_2_is_read():
    """The archive's own dialect: numpy's old module name, and byte strings in the opcodes of Python 2."""
    data = pixels(2, 3072)
    raw = b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\n"
    raw += (
        b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
    )
    raw += (
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<i", data.nbytes)
        + data.tobytes()
        + b"tb"
    )
    raw += b"U\x06labels](K\x06K\x09eu."
    x, y = read_python_batch(raw, "here")
    assert np.array_equal(x.numpy(), data.reshape(2, 3, 32, 32))
    assert y.tolist() == [6, 9]


def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path):
    trap = tmp_path / "sprung"
    attacks = [
        pickle.dumps({b"data": Trap(trap), b"labels": []}),
        b"cos\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nscalar\n.",
        pickle.dumps({b"data": np.array([Trap(trap)], dtype=object), b"labels": [1]}),
    ]
    files, _, _ = cifar_files(False)
    for attack in attacks:
        with pytest.raises(ValueError, match="was refused or is damaged: it asks for"):
            read_python_batch(attack, "here")
        path = write_tar(tmp_path / "a.tar.gz", "cifar-10-batches-py", {**files, "data_batch_3": attack})
        with pytest.raises(ValueError, match=r"a\.tar\.gz', data_batch_3 was refused"):
            load_dataset("cifar10", path=path)
    assert not trap.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "not a CIFAR-10 batch"),
        ({b"data": pixels(2, 3072)}, "not a CIFAR-10 batch"),
        ({b"data": pixels(2, 3072).astype(np.int16), b"labels": [0, 1]}, "not an array of unsigned bytes"),
        ({b"data": pixels(2, 12), b"labels": [0, 1]}, r"pixels \(2, 12\)"),
        ({b"data": pixels(2, 3072), b"labels": [0]}, r"labels \(1,\)"),
        ({b"data": pixels(2, 3072), b"labels": [0, 10]}, "labels from 0 to 10"),
        ({b"data": b"123", b"labels": [0, 10]}, "not a CIFAR-10 batch"),
    ],
)
def test_other_contents_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        read_python_batch(pickle.dumps(content), "here")


def test_truncated_and_incomplete_archives_are_refused(tmp_path):
    files, _, _ = cifar_files(False)
    path = write_tar(tmp_path / "a.tar.gz", "cifar-10-batches-py", files)
    whole = path.read_bytes()
    for n in (0, 100, len(whole) // 2):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"a\.tar\.gz' is truncated, damaged or of another kind"):
            load_dataset("cifar10", path=path)
    short = {**files, "data_batch_2": files["data_batch_2"][:5000]}
    with pytest.raises(
        ValueError, match=r"data_batch_2 was refused or is damaged|data_batch_2 is not a CIFAR-10 batch"
    ):
        load_dataset("cifar10", path=write_tar(path, "cifar-10-batches-py", short))
    del files["data_batch_4"]
    with pytest.raises(ValueError, match="it has no data_batch_4"):
        load_dataset("cifar10", path=write_tar(path, "cifar-10-batches-py", files))
    binary, _, _ = cifar_files(True)
    binary["test_batch.bin"] = binary["test_batch.bin"][:-1]
    with pytest.raises(ValueError, match=r"test_batch\.bin is truncated: 9218 bytes"):
        load_dataset("cifar10", path=write_tar(path, "cifar-10-batches-bin", binary))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it has no data_batch_1"):
        load_dataset("cifar10", path=tmp_path / "empty")
