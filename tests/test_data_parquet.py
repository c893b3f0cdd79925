"""Parquet files, data sets of the hub, and the table of names."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sde_diffusion.data import LOADERS, load_dataset
from sde_diffusion.data.parquet import read_parquet, split_names
from shared_data import shared_path


def png(value: int, height: int = 4, width: int = 5) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value % 256, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def write(path, values, *, image="image", label="label", plain=False, cells=None, labels=None):
    """A parquet file of images that are constant, with the constant as the label."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    cells = [png(v) if plain else {"bytes": png(v), "path": None} for v in values] if cells is None else cells
    columns = {image: cells, "other": [0.0] * len(cells)}
    if label is not None:
        columns[label] = list(values) if labels is None else labels
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("label", ["label", "fine_label", None])
def test_one_parquet_file_is_split(tmp_path, plain, label):
    file = write(tmp_path / "all.parquet", range(20), image="img", label=label, plain=plain)
    data = load_dataset("parquet", path=file)
    assert (data.name, data.sample_shape, data.levels) == ("all", (3, 4, 5), 256)
    assert (len(data.train), len(data.test)) == (18, 2)
    assert sorted(torch.cat((data.train, data.test))[:, 0, 0, 0].tolist()) == list(range(20))
    if label:
        assert torch.equal(data.train_labels, data.train[:, 0, 0, 0].long())
    else:
        assert data.train_labels is None


def test_parts_of_a_folder(tmp_path):
    write(tmp_path / "data/train-00000-of-00002.parquet", range(5))
    write(tmp_path / "data/train-00001-of-00002.parquet", range(5, 400))
    write(tmp_path / "data/test-00000-of-00001.parquet", range(3))
    write(tmp_path / "data/validation-00000-of-00001.parquet", range(9))
    data = load_dataset("parquet", path=tmp_path, limit=300)
    assert data.train_labels.tolist() == list(range(300))
    assert data.test_labels.tolist() == [0, 1, 2]
    (tmp_path / "data/test-00000-of-00001.parquet").unlink()
    assert load_dataset("parquet", path=tmp_path, limit=7).test_labels.tolist() == list(range(7))


def test_names_of_parts():
    assert split_names(["train", "test", "validation"]) == (["train"], ["test"])
    assert split_names(["train", "valid"]) == (["train"], ["valid"])
    assert split_names(["default/train/0.parquet", "default/test/0.parquet"]) == (
        ["default/train/0.parquet"],
        ["default/test/0.parquet"],
    )
    assert split_names(["images", "more"]) == (["images", "more"], [])


def test_options_of_parquet(tmp_path):
    file = write(tmp_path / "a.parquet", range(6), image="photo", label="kind")
    with pytest.raises(
        ValueError, match="none of the columns photo, other, kind is an image by name; give image_column"
    ):
        load_dataset("parquet", path=file)
    data = load_dataset(
        "parquet",
        path=file,
        image_column="photo",
        label_column="kind",
        image_size=2,
        channels=1,
        test_fraction=0.5,
    )
    assert data.sample_shape == (1, 2, 2)
    assert torch.equal(data.test_labels, data.test[:, 0, 0, 0].long())
    with pytest.raises(ValueError, match="no image column 'foto'; its columns are: photo, other, kind"):
        load_dataset("parquet", path=file, image_column="foto")
    with pytest.raises(ValueError, match="no label column 'sort'"):
        load_dataset("parquet", path=file, image_column="photo", label_column="sort")
    with pytest.raises(ValueError, match="limit must be an integer >= 1, got 0"):
        load_dataset("parquet", path=file, image_column="photo", limit=0)


def test_unfit_parquet_is_refused(tmp_path):
    file = tmp_path / "a.parquet"
    write(file, range(2), cells=[png(0), png(1, width=6)])
    with pytest.raises(ValueError, match=r"sizes are mixed: .*row 0' is 5x4 and .*row 1' is 6x4"):
        load_dataset("parquet", path=file)
    write(file, range(2), cells=[{"bytes": png(0), "path": None}, {"bytes": None, "path": "b.png"}])
    with pytest.raises(ValueError, match="row 1 holds no image bytes, but dict"):
        load_dataset("parquet", path=file)
    write(file, range(2), cells=[png(0), b"hello"])
    with pytest.raises(ValueError, match=r"row 1' is truncated, damaged or no image"):
        load_dataset("parquet", path=file)
    write(file, range(2), labels=[0.5, 1.0])
    with pytest.raises(ValueError, match=r"labels must be integers, got 0\.5"):
        load_dataset("parquet", path=file)
    write(file, [])
    with pytest.raises(ValueError, match="no rows"):
        load_dataset("parquet", path=file)


def test_damaged_parquet_is_refused(tmp_path):
    file = write(tmp_path / "a.parquet", range(50))
    whole = file.read_bytes()
    for raw in (b"", whole[: len(whole) // 2], b"hello " * 100):
        file.write_bytes(raw)
        with pytest.raises(ValueError, match=r"a\.parquet' is truncated, damaged or of another kind"):
            load_dataset("parquet", path=file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no \.parquet files in it or below"):
        load_dataset("parquet", path=tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_dataset("parquet", path=tmp_path / "nowhere")


def test_real_images_in_parquet():
    pytest.importorskip("pyarrow")
    folder = shared_path("data", "cifar10_jpeg75")
    x, labels = read_parquet([folder / "test-00000-of-00001.parquet"], limit=200)
    assert x.shape == (200, 3, 32, 32)
    assert set(labels.tolist()) <= set(range(10))
    assert 90 < x.float().mean() < 150


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"'pyarrow'; install it with: pip install 'sde_diffusion\[data\]'"):
        load_dataset("parquet", path=tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"'datasets'; install it with: pip install 'sde_diffusion\[hub\]'"):
        load_dataset("hf:somebody/something")


class Table:
    """As much of ``datasets.Dataset`` as is used."""

    def __init__(self, rows, features, decoded=True):
        self.rows, self.features, self.column_names, self.decoded = rows, features, list(features), decoded

    def cast_column(self, column, feature):
        assert not feature.decode
        return Table(self.rows, self.features, decoded=False)

    def select_columns(self, columns):
        rows = [{key: row[key] for key in columns} for row in self.rows]
        return Table(rows, {key: self.features[key] for key in columns}, self.decoded)

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        assert not self.decoded
        return iter(self.rows)


class Image_:
    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


Image_.__name__ = "Image"


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package ``datasets`` with one data set in it; records what was asked for."""
    features = {"photo": Image_(), "label": SimpleNamespace(names=["cat", "dog"])}

    def table(n):
        rows = [{"photo": {"bytes": png(i), "path": None}, "label": i % 2} for i in range(n)]
        return Table(rows, features)

    module = SimpleNamespace(Image=Image_, asked=[], tables={"train": table(6), "test": table(2)})

    def load(*arguments):
        module.asked.append(arguments)
        return module.tables

    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_data_sets_of_the_hub(hub):
    data = load_dataset("hf:somebody/pets:small", channels=1)
    assert hub.asked == [("somebody/pets", "small")]
    assert (data.name, data.sample_shape, data.class_names) == (
        "somebody/pets:small",
        (1, 4, 5),
        ("cat", "dog"),
    )
    assert data.train[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert data.train_labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert len(data.test) == 2
    del hub.tables["test"]
    data = load_dataset("hf:somebody/pets", limit=4, test_fraction=0.25)
    assert hub.asked[-1] == ("somebody/pets", None)
    assert (len(data.train), len(data.test)) == (3, 1)


def test_the_hub_refuses(hub):
    with pytest.raises(ValueError, match="a name is needed after 'hf:'"):
        load_dataset("hf:")
    with pytest.raises(
        ValueError, match="part 'train' has no image column 'foto'; its columns are: photo, label"
    ):
        load_dataset("hf:somebody/pets", image_column="foto")
    with pytest.raises(ValueError, match="'hf:somebody/pets' does not take path"):
        load_dataset("hf:somebody/pets", path="here")


# The table of names


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match=r"unknown data set 'digit'; did you mean 'digits'.* allowed: arrays, checker"
    ):
        load_dataset("digit")
    with pytest.raises(ValueError, match="unknown data set None"):
        load_dataset(None)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("digits", {"path": "x"}, r"'digits' does not take path \(got 'x'\); it takes no options"),
        ("digits", {"split_seed": 0}, "does not take split_seed"),
        ("moons", {"image_size": 8}, "does not take image_size .* it takes: size, split_seed, test_fraction"),
        ("idx", {"levels": 17}, "does not take levels"),
    ],
)
def test_options_that_would_do_nothing_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(name, **options)


@pytest.mark.parametrize("name", ["folder", "arrays", "idx", "cifar10", "parquet"])
def test_sets_in_files_need_a_path(name, tmp_path):
    with pytest.raises(ValueError, match="needs a path, got None"):
        load_dataset(name)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_dataset(name, path=tmp_path / "nowhere")


def test_the_table_names_every_loader_in_its_docstring():
    for name in LOADERS:
        assert f"``{name}``" in load_dataset.__doc__
