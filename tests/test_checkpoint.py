"""Checkpoints: atomic, verified, compared, and loadable without trusting them."""

from __future__ import annotations

import os

import ml_collections
import numpy as np
import pytest
import torch
from torch import nn

from sde_diffusion.checkpoint import (
    CheckpointError,
    Checkpoints,
    config_differences,
    load_weights,
    plain,
    read_checkpoint,
    versions,
    write_checkpoint,
)
from sde_diffusion.config import default_config


def state(step):
    return {"step": step, "weights": {"w": torch.full((1000,), float(step))}, "config": {"a": [1, "b", None]}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def damage(path, position=0.5):
    """Flips one bit of the stored tensor."""
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] ^= 1
    path.write_bytes(bytes(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_round_trip(tmp_path):
    path = write_checkpoint(tmp_path / "new" / "a.pt", state(3))
    assert names(path.parent) == ["a.pt"]
    for loaded in (read_checkpoint(path), torch.load(path, weights_only=True)):
        assert loaded["step"] == 3 and loaded["config"] == {"a": [1, "b", None]}
        assert torch.equal(loaded["weights"]["w"], torch.full((1000,), 3.0))


def test_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "ordinary").touch()
    path = write_checkpoint(tmp_path / "a.pt", state(0))
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = write_checkpoint(tmp_path / "a.pt", state(1))

    def half(_, file):
        file.write(b"half of a file")
        raise OSError("No space left on device")

    def crash(*_):
        raise OSError("No space left on device")

    if moment == "write":
        monkeypatch.setattr(torch, "save", half)
    else:
        monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(path, state(2))
    assert names(tmp_path) == ["a.pt"]
    assert read_checkpoint(path)["step"] == 1


def test_data_reach_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (calls.append("fsync"), fsync(d))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
    write_checkpoint(tmp_path / "a.pt", state(1))
    assert calls[:2] == ["fsync", "replace"]


def test_code_in_a_file_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"step": 1, "x": Evil()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt cannot be read"):
        read_checkpoint(tmp_path / "a.pt")
    assert names(tmp_path) == ["a.pt"]


def test_unreadable_files_are_named(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*a\.pt"):
        read_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"a\.pt cannot be read"):
        read_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match=r"a\.pt holds a list, not a dict"):
        read_checkpoint(path)
    write_checkpoint(path, state(1))
    truncate(path)
    with pytest.raises(CheckpointError, match=r"a\.pt cannot be read"):
        read_checkpoint(path)


def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path):
    path = write_checkpoint(tmp_path / "a.pt", state(1))
    damage(path)
    with pytest.raises(CheckpointError, match=r"a\.pt is damaged: the checksum of its entry"):
        read_checkpoint(path)


# A folder of them.


def test_keeps_the_last_few_and_latest(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.load() is None
    for step in (5, 10, 100_000_000, 20):
        checkpoints.save(step, state(step))
    assert names(tmp_path / "c") == ["latest.pt", "step-00000020.pt", "step-100000000.pt"]
    assert read_checkpoint(checkpoints.latest)["step"] == 20
    path, loaded = checkpoints.load()
    assert path.name == "step-100000000.pt" and loaded["step"] == 100_000_000


def test_left_overs_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / ".step-00000004.pt.123.tmp").write_bytes(b"half")
    Checkpoints(tmp_path).save(5, state(5))
    assert names(tmp_path) == ["latest.pt", "step-00000005.pt"]


@pytest.mark.parametrize("harm", [truncate, damage, lambda path: path.write_bytes(b"")])
def test_falls_back_to_the_one_before_with_a_warning(tmp_path, harm):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    harm(tmp_path / "step-00000003.pt")
    with pytest.warns(UserWarning, match=r"step-00000003\.pt .*falling back to .*step-00000002\.pt"):
        path, loaded = checkpoints.load()
    assert path.name == "step-00000002.pt" and loaded["step"] == 2


def test_an_error_names_the_files_when_none_is_good(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        truncate(checkpoints.save(step, state(step)))
    with pytest.raises(
        CheckpointError, match=r"none of the checkpoints(.|\n)*step-00000002\.pt(.|\n)*step-00000001\.pt"
    ):
        checkpoints.load()


def test_latest_alone_is_enough(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1)).unlink()
    path, loaded = checkpoints.load()
    assert path.name == "latest.pt" and loaded["step"] == 1


def test_latest_is_a_copy_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state(step))
    assert read_checkpoint(checkpoints.latest)["step"] == 2
    assert names(tmp_path) == ["latest.pt", "step-00000001.pt", "step-00000002.pt"]


@pytest.mark.parametrize("keep", [0, -1, 1.5, True])
def test_keep_is_checked(tmp_path, keep):
    with pytest.raises(ValueError, match=f"keep must be an integer >= 1, got {keep!r}"):
        Checkpoints(tmp_path, keep)


# Comparing.


class Net(nn.Module):
    def __init__(self, width=3, extra=False):
        super().__init__()
        self.first = nn.Linear(2, width)
        self.norm = nn.BatchNorm1d(width)
        if extra:
            self.extra = nn.Linear(1, 1)


def test_weights_of_the_same_model_load():
    a, b = Net(), Net()
    load_weights(b, a.state_dict(), "file.pt")
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name])


def test_weights_of_another_model_are_refused_with_the_differences():
    model = Net(extra=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = Net(width=4).state_dict()
    weights["other.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as error:
        load_weights(model, weights, "some/file.pt")
    text = str(error.value)
    assert "some/file.pt are of another model" in text
    assert "missing: extra.weight (1, 1)" in text
    assert "unexpected: other.bias (7,)" in text
    assert "shape: first.weight is (4, 2) in the checkpoint, (3, 2) in the model" in text
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_long_lists_of_differences_are_cut():
    with pytest.raises(CheckpointError, match="and 8 more"):
        load_weights(nn.Module(), {f"w{i}": torch.zeros(1) for i in range(20)}, "file.pt")


def test_config_differences():
    saved = {
        "sde": {"name": "vp", "beta_max": 20.0},
        "training": {"seed": 0, "log_every": 5},
        "sampling": {"n": 1},
    }
    current = {
        "sde": {"name": "vp", "beta_min": 0.2},
        "training": {"seed": 1, "log_every": 9},
        "sampling": {"n": 2},
    }
    assert config_differences(saved, saved) == []
    assert config_differences(saved, current, ("training.log_every", "sampling")) == [
        "sde.beta_max: 20.0 in the checkpoint, absent now",
        "training.seed: 0 in the checkpoint, 1 now",
        "sde.beta_min: absent in the checkpoint, 0.2 now",
    ]
    assert config_differences({"a": {"bc": 1}}, {"a": {"bc": 2}}, ("a.b",)) != []


def test_a_key_that_is_newer_than_the_checkpoint_counts_unless_it_has_its_default():
    current = default_config().to_dict()
    saved = default_config().to_dict()
    del saved["model"]["level_counts"], saved["model"]["unshuffle"], saved["data"]["limit"]
    assert config_differences(saved, current, (), current) == []
    assert [line.split(":")[0] for line in config_differences(saved, current)] == [
        "model.level_counts", "model.unshuffle",
    ]  # fmt: skip
    defaults = default_config().to_dict()
    current["model"]["level_counts"] = True
    assert config_differences(saved, current, (), defaults) == [
        "model.level_counts: absent in the checkpoint, True now"
    ]
    assert config_differences(current | {"old": 1}, current, (), defaults) == [
        "old: 1 in the checkpoint, absent now"
    ]


def test_plain_values_load_without_trust(tmp_path):
    config = ml_collections.ConfigDict({"a": {"b": (1, 2.5)}, "n": None, "ok": True})
    value = {"config": config, "path": tmp_path, "number": np.int64(3), "list": [{"x": "y"}]}
    result = plain(value)
    assert result == {
        "config": {"a": {"b": [1, 2.5]}, "n": None, "ok": True},
        "path": str(tmp_path),
        "number": 3,
        "list": [{"x": "y"}],
    }
    assert type(result["config"]) is dict and type(result["number"]) is int
    assert read_checkpoint(write_checkpoint(tmp_path / "a.pt", result)) == result


def test_what_is_not_plain_is_named():
    with pytest.raises(TypeError, match=r"config\.a\[1\] must be made of .*, got tensor\(1\)"):
        plain({"a": [0, torch.tensor(1)]})


def test_versions_are_strings():
    assert set(versions()) == {"sde_diffusion", "python", "torch", "numpy"}
    assert all(type(value) is str for value in versions().values())
