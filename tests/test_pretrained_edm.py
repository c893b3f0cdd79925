"""EDM's networks and snapshots against EDM's own outputs, and files that must be refused."""

from __future__ import annotations

import builtins
import os
import pickle
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sde_diffusion as sd
from sde_diffusion.networks.edm import DhariwalUNet, SongUNet
from sde_diffusion.presets import PRESETS
from sde_diffusion.pretrained import edm
from sde_diffusion.pretrained.edm import detect
from sde_diffusion.pretrained.state import PretrainedError
from sde_diffusion.pretrained.unpickle import PERSISTENT, Recorded, read_pickle
from shared_data import shared_path

HERE = Path(__file__).parent / "fixtures" / "edm"
NAMES = ("song_ncsnpp", "song_ddpmpp", "dhariwal")
PRECONDS = ("EDMPrecond", "VPPrecond", "VEPrecond")


def folder(name: str) -> Path:
    """The fixture here, or beside the checkout."""
    return HERE / name if (HERE / name).is_dir() else shared_path("fixtures", "edm", name)


def arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path / "io.npz", allow_pickle=False) as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


def labels(io: dict[str, Tensor]) -> Tensor | None:
    """One-hot rows as classes; a row of zeros is the null class."""
    if "labels" not in io:
        return None
    rows = io["labels"]
    return torch.where(rows.sum(1) > 0, rows.argmax(1), rows.shape[1])


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"


# ------------------------------------------------------------------------------------- against EDM's own outputs


@pytest.mark.parametrize("name", NAMES)
def test_bare_networks(name: str) -> None:
    path = folder(name)
    io, net = arrays(path), sd.load_pretrained(path).net
    kind = DhariwalUNet if name == "dhariwal" else SongUNet
    assert type(net) is kind
    tolerance = 1e-4 if name == "song_ncsnpp" else 1e-5
    with torch.no_grad():
        out = net(io["raw_x"], io["raw_noise_labels"], labels(io))
        assert_close(out, io["raw_out"], tolerance)
        if "augment_labels" in io:
            out = net(io["raw_x"], io["raw_noise_labels"], labels(io), io["augment_labels"])
            assert_close(out, io["raw_out_augment"], tolerance)


@pytest.mark.parametrize("precond", PRECONDS)
@pytest.mark.parametrize("name", NAMES)
def test_denoisers(name: str, precond: str) -> None:
    path = folder(name)
    io = arrays(path)
    model = sd.load_pretrained(path, config={"class_name": precond})
    tolerance = 1e-4 if name == "song_ncsnpp" or precond == "VPPrecond" else 1e-5
    given = {} if labels(io) is None else {"y": labels(io)}
    with torch.no_grad():
        d = model.predict_data(io["x"], io["sigma"], **given)
        assert_close(d, io[f"{precond}/D"], tolerance)
        score = model(io["x"], io["sigma"], **given)
        variance = io["sigma"].double().square().view(-1, 1, 1, 1)
        # The reference tells a Fourier network 999 t in float32, which at sigma = 0.03 is 1.4e-4 off.
        rough = name == "song_ncsnpp" and precond == "VPPrecond"
        expected = (io[f"{precond}/D"].double() - io["x"]) / variance
        assert_close(score, expected, 2e-2 if rough else 1e-4)
        if given:
            unlabelled = model.predict_data(io["x"], io["sigma"])
            assert_close(unlabelled, io[f"{precond}/D_no_label_given"], tolerance)
        if "augment_labels" in io:
            augmented = model.predict_data(io["x"], io["sigma"], augment=io["augment_labels"], **given)
            assert_close(augmented, io[f"{precond}/D_augment"], tolerance)
    low, high = io[f"{precond}/sigma_min_max"].tolist()
    if precond != "EDMPrecond":
        # VPPrecond computes its lower end in float32, where exp(1e-6) - 1 has two digits.
        assert model.sde.t_min == pytest.approx(low, rel=0.03)
        assert model.sde.t_max == pytest.approx(high, rel=1e-5)


def test_a_preset_says_the_architecture() -> None:
    path = folder("song_ncsnpp") / "model.safetensors"
    small = {"channels": 12, "channel_multipliers": (1, 2), "blocks_per_level": 1, "num_classes": 5}
    published = PRESETS["edm_cifar10_ve"]
    preset = replace(published, image_size=16, arguments={**published.arguments, **small})
    model = edm.load(path, preset, True).eval()
    io = arrays(path.parent)
    with torch.no_grad():
        assert_close(model.predict_data(io["x"], io["sigma"], y=labels(io)), io["EDMPrecond/D"], 1e-4)
    with pytest.raises(PretrainedError, match="a NCSNpp is no network of EDM"):
        edm.load(path, replace(PRESETS["ncsnpp_cifar10_ve"], arguments={"channels": 12}), True)


@pytest.mark.parametrize("precond", PRECONDS)
def test_losses_are_squared_errors_of_the_network(precond: str) -> None:
    """EDM's weighted losses of the denoiser are the plain squared error against the parametrization's target."""
    path = shared_path("fixtures", "edm", "dhariwal")
    io = arrays(path)
    model = sd.load_pretrained(path, config={"class_name": precond})
    normal, uniform = io["loss_rnd_normal"].flatten().double(), io["loss_rnd_uniform"].flatten().double()
    sigma = {
        "EDMPrecond": (1.2 * normal - 1.2).exp(),
        "VPPrecond": torch.expm1(
            0.5 * 19.9 * (1 + uniform * (1e-5 - 1)).square() + 0.1 * (1 + uniform * (1e-5 - 1))
        ).sqrt(),
        "VEPrecond": 0.02 * (100 / 0.02) ** uniform,
    }[precond]
    y, noise = io["loss_y"], io["loss_noise"]
    x = model.sde.perturb(y, sigma, noise)
    target = model.parametrization.target(y, noise, torch.ones_like(sigma), sigma)
    with torch.no_grad():
        predicted = model.predict_data(x, sigma, **({} if labels(io) is None else {"y": labels(io)}))
    estimate = (x - predicted) / sigma.view(-1, 1, 1, 1)
    output = model.parametrization.target(predicted, estimate, torch.ones_like(sigma), sigma)
    assert_close((output - target).square(), io[f"{precond}/loss"], 2e-4)


# ------------------------------------------------------------------------------------------------------ snapshots

SOURCE = "open({marker!r}, 'w').close()\nraise SystemExit('code of a snapshot was run')\n"


class Persistent(nn.Module):
    """Pickled as EDM's classes are: a call of the helper with the source code, class name and attributes."""

    def __init__(self, class_name: str, source: str) -> None:
        super().__init__()
        self.class_name = class_name
        self.source = source

    def __reduce__(self) -> tuple[Any, ...]:
        state = dict(self.__dict__)
        meta = {
            "type": "class",
            "version": 6,
            "module_src": state.pop("source"),
            "class_name": state.pop("class_name"),
            "state": state,
        }
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None


@pytest.fixture
def persistence(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``torch_utils.persistence`` while a test writes pickles; gone when it reads them."""
    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta: Any) -> Any:
        raise AssertionError("the helper was called")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_utils", package)
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)
    yield monkeypatch


def snapshot(
    path: Path,
    state: dict[str, Tensor],
    class_name: str,
    kwargs: dict[str, Any],
    source: str = "",
    **more: Any,
) -> Path:
    """Writes what EDM's training would: nested modules made from the names of a state_dict."""
    root = Persistent(class_name, source)
    root._init_args, root._init_kwargs = (), kwargs  # type: ignore[assignment]
    root.skip_scale = np.sqrt(0.5)  # a NumPy number, of which real files have many
    for name, tensor in state.items():
        module: nn.Module = root
        *parents, leaf = name.split(".")
        for i, parent in enumerate(parents):
            if parent not in module._modules:
                inner = i == 1 and parent in ("enc", "dec")
                module.add_module(parent, nn.ModuleDict() if inner else Persistent("Block", source))
            module = module._modules[parent]  # type: ignore[assignment]
        if leaf in ("resample_filter", "freqs", "u"):
            module.register_buffer(leaf, tensor)
        else:
            module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    loss = Persistent("EDMLoss", source)
    content = {"ema": root, "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": {"path": "x"}, **more}
    path.write_bytes(pickle.dumps(content))
    return path


def written(tmp_path: Path, marker: Path, **more: Any) -> Path:
    source = folder("song_ncsnpp")
    flags = edm.read_json(source / "flags.json")
    kwargs = {"img_resolution": 16, "img_channels": 3, **flags["network_kwargs"], "use_fp16": True}
    code = SOURCE.format(marker=str(marker))
    state = load_file(source / "model.safetensors")
    return snapshot(tmp_path / "network-snapshot-000200.pkl", state, "EDMPrecond", kwargs, code, **more)


def test_a_snapshot_is_read_and_its_code_is_not_run(tmp_path: Path, persistence: Any) -> None:
    marker = tmp_path / "marker"
    path = written(tmp_path, marker)
    persistence.undo()
    assert b"SystemExit" in path.read_bytes()
    io = arrays(folder("song_ncsnpp"))
    for given in (path, tmp_path):  # the file, and the folder with it
        assert detect(given)
        assert edm.snapshot_resolution(given) == 16
        model = sd.load_pretrained(given)
        with torch.no_grad():
            d = model.predict_data(io["x"], io["sigma"], y=labels(io), augment=io["augment_labels"])
        assert_close(d, io["EDMPrecond/D_augment"], 1e-4)
    assert not marker.exists()
    assert "torch_utils" not in sys.modules


def test_a_record_says_what_was_not_made(tmp_path: Path, persistence: Any) -> None:
    path = written(tmp_path, tmp_path / "marker")
    persistence.undo()
    content = read_pickle(path)
    network = content["ema"]
    assert isinstance(network, Recorded)
    assert network.name == PERSISTENT
    (meta,) = network.args
    assert meta["class_name"] == "EDMPrecond"
    assert meta["state"]["_init_kwargs"]["model_channels"] == 12
    assert meta["state"]["skip_scale"].name.endswith("multiarray.scalar")
    inner = meta["state"]["_modules"]["model"].args[0]["state"]["_modules"]["enc"]
    assert inner.name == "torch.nn.modules.container.ModuleDict"
    assert "16x16_conv" in inner.state["_modules"]
    assert content["dataset_kwargs"] == {"path": "x"}


def test_the_latest_snapshot_of_a_folder(tmp_path: Path, persistence: Any) -> None:
    path = written(tmp_path, tmp_path / "marker")
    persistence.undo()
    (tmp_path / "network-snapshot-000100.pkl").write_bytes(b"\x80\x04damaged")
    assert sd.load_pretrained(tmp_path).net.config == sd.load_pretrained(path).net.config


def test_learned_variances_and_no_labels(tmp_path: Path, persistence: Any) -> None:
    """iDDPMPrecond: twice the output channels, a table ``u`` in the state, labels that may be absent."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"channel_multipliers": (1, 1), "blocks_per_level": 1, "attention_levels": ()}
    net = DhariwalUNet(1, out_channels=2, channels=8, **options)
    state = {"u": torch.zeros(1001)}
    for name, source in edm.edm_sources(net, 8).items():
        sizes = net.modulations.sizes if len(source.keys) > 1 else None
        value = torch.randn_like(net.state_dict()[name]) * 0.2
        net.state_dict()[name].copy_(value)
        parts = value.split(sizes) if sizes else (value,)
        for key, part in zip(source.keys, parts, strict=True):
            state[f"model.{key}"] = part.clone()
    kwargs = {
        "img_resolution": 8,
        "img_channels": 1,
        "model_channels": 8,
        "channel_mult": [1, 1],
        "num_blocks": 1,
        "attn_resolutions": [],
    }
    path = snapshot(tmp_path / "network-snapshot-1.pkl", state, "iDDPMPrecond", kwargs)
    persistence.undo()
    model = sd.load_pretrained(path)
    x, sigma = torch.randn(2, 1, 8, 8), sd.preconditioning.iddpm_noise_levels()[[990, 500]]
    with torch.no_grad():
        d = model.predict_data(x, sigma)
        scaled = (x / (sigma.view(-1, 1, 1, 1) ** 2 + 1).sqrt()).float()
        f = net.eval()(scaled, torch.tensor([9.0, 499.0]))
    assert f.shape[1] == 2
    assert_close(d, (x - sigma.view(-1, 1, 1, 1) * f[:, :1]).double(), 1e-5)


# --------------------------------------------------------------------------------------- what must be refused


class Call:
    """Pickled as a call of any function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function = function
        self.args = args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


def attacks(marker: Path) -> dict[str, tuple[Any, str]]:
    """Objects whose loading would make the marker, and the name by which each is refused."""
    touch, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    system = Call(os.system, touch)
    inner = pickle.dumps(system)
    os_system = f"{os.system.__module__}.system"
    return {
        "os.system": (system, os_system),
        "in a list in a dict": ({"ema": [1, {"a": (2, [system])}]}, os_system),
        "as a key": ({Call(eval, code): 1}, "builtins.eval"),
        "eval": (Call(eval, code), "builtins.eval"),
        "exec": (Call(exec, code), "builtins.exec"),
        "import": (Call(builtins.__import__, "antigravity"), "builtins.__import__"),
        "getattr": (Call(getattr, "", "join"), "builtins.getattr"),
        "subprocess": (Call(subprocess.Popen, ["touch", str(marker)]), "subprocess.Popen"),
        "pickle.loads": (Call(pickle.loads, inner), "_pickle.loads"),
        "torch.load": (Call(torch.load, str(marker)), "torch.serialization.load"),
        "in a tensor": (Call(torch.storage._load_from_bytes, _torch_file(marker)), os_system),
        "hook": (Call(torch._utils._rebuild_tensor_v2, 1, 0, (1,), (1,), False, system), os_system),
    }


def _torch_file(marker: Path) -> bytes:
    """A file of torch.save in its older format with a call in place of numbers."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, Call(os.system, f"touch {marker}"), []]
    return b"".join(pickle.dumps(part, protocol=2) for part in parts)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", attacks(Path("marker")))
def test_malicious_pickles_are_refused_by_name(tmp_path: Path, name: str, protocol: int) -> None:
    marker = tmp_path / "marker"
    attack, refused = attacks(marker)[name]
    path = tmp_path / "network-snapshot-1.pkl"
    path.write_bytes(pickle.dumps(attack, protocol=protocol))
    with pytest.raises(PretrainedError) as caught:
        sd.load_pretrained(path)
    # Before protocol 3 modules have the names of Python 2.
    assert f"asks for {refused}," in str(caught.value) or (
        protocol < 3 and f"{refused[refused.rindex('.') :]}, which is no tensor" in str(caught.value)
    )
    assert "nothing in the file was run" in str(caught.value)
    assert str(path) in str(caught.value)
    assert not marker.exists()


def test_a_call_hidden_in_a_real_snapshot(tmp_path: Path, persistence: Any) -> None:
    marker = tmp_path / "marker"
    path = written(tmp_path, marker, note=[Call(os.system, f"touch {marker}")])
    persistence.undo()
    with pytest.raises(PretrainedError, match=r"\.system, which is no tensor"):
        sd.load_pretrained(path)
    assert not marker.exists()


def test_functions_of_admitted_modules_are_written_down_and_not_called(tmp_path: Path) -> None:
    path = tmp_path / "network.pkl"
    program = b"\x80\x04\x8c\x17torch.nn.modules.module\x8c\x0dtorch.os.exit\x93K\x01\x85R."
    path.write_bytes(program)
    record = read_pickle(path)
    assert (record.name, record.args) == ("torch.nn.modules.module.torch.os.exit", (1,))
    with pytest.raises(PretrainedError, match="holds a exit without attributes"):
        sd.load_pretrained(path)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"cos\nsystem\n(S'touch marker'\ntR.", "os.system"),
        (b"(S'touch marker'\nios\nsystem\n.", "os.system"),
        (b"\x80\x02(cos\nsystem\nX\x05\x00\x00\x00touchoR.", "os.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.", "builtins.eval"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "a change to the state of a _Global"),
        (b"\x80\x02]}b.", "a change to the state of a list"),
        (b"\x80\x02X\x01\x00\x00\x00a)R.", "a call of a str"),
        (b"\x80\x02])\x81.", "a call of a list"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "damaged"),  # an object from outside the file
        (b"\x80\x02\x82\x01.", "damaged"),  # a name from the registry of copyreg
        (b"\x80\x05\x97.", "damaged"),  # a buffer from outside the file
        (b"", "is empty"),
        (b"\x80\x04", "truncated"),
        (b"\x80\x04\x95\xff\x00\x00\x00\x00\x00\x00\x00]", "truncated"),
        (b"\x80\x04]]]", "truncated"),
        (b"\x80\x04]aaaa.", "damaged"),
        (b"\x80\x63.", "damaged"),
        (b"hello, world", "damaged"),
    ],
)
def test_programs_are_refused(tmp_path: Path, program: bytes, message: str) -> None:
    path = tmp_path / "network.pkl"
    path.write_bytes(program)
    with pytest.raises(PretrainedError, match=message):
        sd.load_pretrained(path)


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((5,), (1,), 0),
        ((4,), (1,), 1),
        ((2,), (4,), 0),
        ((-1,), (1,), 0),
        ((2,), (1, 1), 0),
        ((2,), (-1,), 1),
    ],
)
def test_tensors_beyond_their_numbers_are_refused(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    rebuild, load = torch._utils._rebuild_tensor_v2, torch.storage._load_from_bytes
    storage = pickle.dumps(torch.arange(4.0))  # any real one, for the bytes inside
    numbers: list[bytes] = []

    class Finder(pickle._Unpickler):  # type: ignore[name-defined, misc]
        def find_class(self, module: str, name: str) -> Any:
            return (lambda data: numbers.append(data)) if name == "_load_from_bytes" else lambda *args: None

    import io as streams

    Finder(streams.BytesIO(storage)).load()
    path = tmp_path / "network.pkl"
    good = Call(rebuild, Call(load, numbers[0]), 0, (2, 2), (2, 1), False, None)
    path.write_bytes(pickle.dumps({"a": good}))
    assert torch.equal(read_pickle(path)["a"], torch.arange(4.0).view(2, 2))
    path.write_bytes(pickle.dumps(Call(rebuild, Call(load, numbers[0]), offset, size, stride, False, None)))
    with pytest.raises(PretrainedError, match="a tensor of"):
        read_pickle(path)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
def test_truncated_snapshots(tmp_path: Path, persistence: Any, fraction: float) -> None:
    path = written(tmp_path, tmp_path / "marker")
    persistence.undo()
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(PretrainedError, match="truncated"):
        sd.load_pretrained(path)


def test_pickles_that_are_no_snapshots(tmp_path: Path, persistence: Any) -> None:
    path = tmp_path / "network.pkl"
    path.write_bytes(pickle.dumps({"model": 1, "step": 2}))
    with pytest.raises(PretrainedError, match="holds a dict of model, step, and no network 'ema'"):
        sd.load_pretrained(path)
    snapshot(path, {}, "Generator", {})
    persistence.undo()
    with pytest.raises(PretrainedError, match="class 'Generator'; known: EDMPrecond"):
        sd.load_pretrained(path)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    source = folder("song_ncsnpp")
    state = load_file(source / "model.safetensors")
    (tmp_path / "flags.json").write_bytes((source / "flags.json").read_bytes())

    def message(changed: dict[str, Tensor], **config: Any) -> str:
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ValueError) as caught:
            sd.load_pretrained(tmp_path, config=config)
        return str(caught.value)

    fewer = {k: v for k, v in state.items() if "map_label" not in k}
    assert "2 missing: map_label.weight, map_label.bias" in message(fewer)
    assert "1 too many: extra" in message(state | {"model.extra": torch.zeros(1)})
    shape = message(state | {"model.map_layer0.bias": torch.zeros(7)})
    assert "map_layer0.bias" in shape and "(7,)" in shape and "(48,)" in shape
    assert "too many: dec.16x16_up" not in message(state, num_blocks=2)
    assert "options that EDM's SongUNet does not have: chanels" in message(state, chanels=3)
    assert "unknown model_type 'SungUNet'; did you mean 'SongUNet'" in message(state, model_type="SungUNet")
    assert "unknown class_name 'Precond'" in message(state, class_name="training.networks.Precond")
    (tmp_path / "flags.json").unlink()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(PretrainedError, match="give class_name, img_resolution, img_channels"):
        sd.load_pretrained(tmp_path / "model.safetensors", format="edm")


# -------------------------------------------------------------------------------------------------- what it is for


def test_a_loaded_model_samples_and_has_likelihoods(tmp_path: Path, persistence: Any) -> None:
    model = sd.load_pretrained(folder("song_ncsnpp"))
    shape = (2, 3, 8, 8)
    out = sd.sample(
        model.sde, model, shape, predictor=sd.DDIM(), times=sd.log_snr_times(model.sde, 4), seed=0
    )
    assert out.x.shape == shape and out.x.isfinite().all()
    ode = sd.sample_ode(model.sde, model, shape, solver=sd.Heun(sd.log_snr_times(model.sde, 3)), seed=0)
    assert ode.x.isfinite().all()
    likelihood = sd.log_likelihood(
        sd.EDM(t_min=0.5, t_max=80.0), model, out.x, divergence="hutchinson", rtol=0.1, atol=0.1, seed=0
    )
    assert likelihood.log_prob.isfinite().all()
