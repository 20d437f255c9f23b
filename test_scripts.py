"""Every script end to end for one tiny step, and the maths of every loss. No network, no data files: pytest."""

import argparse
import ast
import csv
import gzip
import importlib
import json
import math
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import common
import dcgan

HERE = Path(__file__).parent
SCRIPTS = ["dcgan"]
TINY = {"dcgan": ["--hidden-channels", "4", "8", "--latent-dim", "8"]}
COMMON_FLAGS = ["dataset", "data_dir", "classes", "background", "img_size"]
COMMON_FLAGS += ["epochs", "max_steps", "batch_size", "seed", "device", "precision", "out", "overwrite", "resume"]
COMMON_FLAGS += ["sample", "log_every", "sample_every", "snapshot_every", "latent_dim", "lr_g", "lr_d"]
METRICS = ["epoch", "step", "loss_d", "loss_g", "d_real", "d_fake", "grad_norm_d", "grad_norm_g", "images_per_second"]


@pytest.fixture(params=SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A --data-dir in which the built-in digits are rendered once for all tests."""
    folder = tmp_path_factory.mktemp("data")
    common.load_data("digits", folder)
    return str(folder)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A --data-dir with 24 small colour pictures, for runs of many short epochs."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    return str(folder)


def run(script, *flags):
    """main() with the tiny networks of the script; the exit code."""
    return script.main([*TINY[script.__name__], *map(str, flags)])


def run_on_pictures(script, pictures, out, *flags):
    """24 pictures in batches of 8: 3 steps an epoch."""
    few = ["--dataset", "folder", "--data-dir", pictures, "--img-size", 8, "--batch-size", 8]
    return run(script, *few, "--log-every", 2, "--out", out, *flags)


def checkpoint(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def log(out):
    with open(Path(out) / "log.csv") as file:
        return list(csv.DictReader(file))


def refusal(capsys, code, expected=(1, 2)):
    """What a failed run said: one sentence on standard error, and no traceback."""
    said = capsys.readouterr().err.strip()
    assert code in expected
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1, said
    return said


# Every script, one tiny step


def test_one_step_writes_everything(script, digits):
    assert run(script, "--data-dir", digits, "--max-steps", 1, "--log-every", 1) == 0
    out = Path(f"runs/{script.__name__}-digits")
    names = {path.name for path in out.iterdir()}
    assert {"args.json", "log.csv", "losses.png", "real.png", "samples", "samples.gif", "checkpoint.pt"} <= names
    (row,) = log(out)
    assert list(row)[: len(METRICS)] == METRICS
    assert (row["epoch"], row["step"]) == ("1", "1")
    assert all(math.isfinite(float(value)) for value in row.values())
    flags = json.loads((out / "args.json").read_text())
    assert flags["latent_dim"] == 8
    assert flags["torch"] == torch.__version__
    assert flags["parameters"]["G"] > 0
    assert imageio.imread(out / "samples" / "000000.png").shape[2] == 3
    assert checkpoint(out)["step"] == 1


def test_one_step_changes_every_weight_of_both_networks(script, digits):
    run(script, "--data-dir", digits, "--max-steps", 1)
    flags = [*TINY[script.__name__], "--data-dir", digits]
    before = {}

    def keep(name):
        original = getattr(script, name).__init__

        def init(self, *args, **kwargs):
            original(self, *args, **kwargs)
            before[name] = {key: value.clone() for key, value in self.named_parameters()}

        return init

    with pytest.MonkeyPatch.context() as patch:
        for name in ("Generator", "Discriminator"):
            patch.setattr(getattr(script, name), "__init__", keep(name))
        script.main([*flags, "--max-steps", "1", "--out", "again"])
    after = checkpoint("again")
    for name, part in (("Generator", "G"), ("Discriminator", "D")):
        for key, value in before[name].items():
            assert not torch.equal(value, after[part][key]), f"{part}.{key} did not move"


def test_the_command_line_and_an_import_that_does_nothing(script, digits, tmp_path):
    path = HERE / f"{script.__name__}.py"
    flags = [*TINY[script.__name__], "--data-dir", digits, "--max-steps", "2", "--out", "r"]
    done = subprocess.run([sys.executable, path, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r" / "samples.gif").exists()
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); sys.argv = ['x', '--nonsense']; import {script.__name__}"
    (tmp_path / "empty").mkdir()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path / "empty")
    assert (done.returncode, done.stdout, list((tmp_path / "empty").iterdir())) == (0, "", [])


def test_help_names_every_flag_and_what_it_is_for(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for flag in re.findall(r'^ +[a-z]+\("(--[a-z0-9-]+)"', (HERE / f"{script.__name__}.py").read_text()):
        assert re.search(rf"{flag} .*\n? +\S|{flag}  +\S", said), flag


def test_every_flag_is_read(script):
    tree = ast.parse((HERE / f"{script.__name__}.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name != "parse_args"]
    read = {
        node.attr
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and ast.unparse(node.value) == "args"
    }
    flags = set(vars(script.parse_args([]))) - {"given"}
    assert flags <= read, f"never read: {sorted(flags - read)}"


def test_the_common_flags_are_there(script):
    flags = vars(script.parse_args([]))
    for name in COMMON_FLAGS:
        assert name in flags


# Runs: resuming, stopping, faults


def same_run(one, two):
    """Equal log.csv but for speed, and equal weights, optimisers and noise."""
    assert [[*row.values()][:8] + [*row.values()][9:] for row in log(one)] == [
        [*row.values()][:8] + [*row.values()][9:] for row in log(two)
    ]
    flat_one, flat_two = flatten(checkpoint(one)), flatten(checkpoint(two))
    assert flat_one.keys() == flat_two.keys()
    for name, value in flat_one.items():
        assert torch.equal(value, flat_two[name]), name


def flatten(state, prefix=""):
    """The tensors and numbers of a checkpoint, without its flags."""
    found = {}
    for key, value in state.items():
        if isinstance(value, dict) and key != "args":
            found |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (torch.Tensor, int, float)):
            found[f"{prefix}{key}"] = torch.as_tensor(value)
    return found


@pytest.mark.parametrize("first", [["--epochs", 1], ["--epochs", 2, "--max-steps", 4]])
def test_a_resumed_run_equals_an_uninterrupted_one(script, pictures, first):
    run_on_pictures(script, pictures, "whole", "--epochs", 2)
    run_on_pictures(script, pictures, "parts", *first)
    torch.manual_seed(123)
    assert script.main(["--out", "parts", "--resume", "--epochs", "2", "--max-steps", "1000"]) == 0
    assert [row["step"] for row in log("whole")] == ["2", "3", "4", "6"]
    same_run("whole", "parts")


def test_resume_drops_what_a_killed_run_logged_after_its_checkpoint(script, pictures):
    run_on_pictures(script, pictures, "whole", "--epochs", 2)
    run_on_pictures(script, pictures, "parts", "--epochs", 1)
    with open("parts/log.csv", "a") as file:
        file.write("2,4," + ",".join(["7"] * (len(log("whole")[0]) - 2)) + "\n")
    script.main(["--out", "parts", "--resume", "--epochs", "2"])
    same_run("whole", "parts")


def test_resume_of_a_finished_run_changes_nothing(script, pictures):
    run_on_pictures(script, pictures, "r", "--epochs", 1)
    before = Path("r/checkpoint.pt").read_bytes()
    assert script.main(["--out", "r", "--resume"]) == 0
    assert Path("r/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("flag", [["--latent-dim", "9"], ["--seed", "5"], ["--dataset", "digits"], ["--lr-g", "0.1"]])
def test_resume_refuses_a_flag_that_contradicts_the_run(script, pictures, capsys, flag):
    run_on_pictures(script, pictures, "r", "--max-steps", 1)
    capsys.readouterr()
    said = refusal(capsys, script.main(["--out", "r", "--resume", *flag]), [2])
    assert flag[0] in said


def test_a_run_never_writes_over_another(script, pictures, capsys):
    run_on_pictures(script, pictures, "r", "--epochs", 2)
    capsys.readouterr()
    said = refusal(capsys, run_on_pictures(script, pictures, "r"), [2])
    assert "--resume" in said
    assert "--overwrite" in said
    assert "--out" in said
    assert run_on_pictures(script, pictures, "r", "--epochs", 1, "--overwrite") == 0
    assert [path.stem for path in sorted(Path("r/samples").iterdir())] == ["000000", "000001", "000003"]


def test_ctrl_c_finishes_the_step_saves_and_can_be_resumed(script, pictures, monkeypatch):
    run_on_pictures(script, pictures, "whole", "--epochs", 2)
    calls = []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return common.to_batch(*args)

    monkeypatch.setattr(script, "to_batch", interrupt)
    before = signal.getsignal(signal.SIGINT)
    assert run_on_pictures(script, pictures, "parts", "--epochs", 2) == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint("parts")["step"] == 4
    assert Path("parts/samples.gif").exists()
    script.main(["--out", "parts", "--resume"])
    same_run("whole", "parts")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(script, pictures, monkeypatch, capsys):
    original, calls = script.generator_loss, []

    def loss(*args):
        calls.append(args)
        return original(*args) * (math.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(script, "generator_loss", loss)
    said = refusal(capsys, run_on_pictures(script, pictures, "r", "--epochs", 9, "--log-every", 1), [1])
    assert "loss_g" in said
    assert "step 5" in said
    assert checkpoint("r")["step"] == 3
    assert log("r")[-1]["step"] == "4"
    assert Path("r/losses.png").exists()
    assert Path("r/samples.gif").exists()


def test_sample_writes_single_pictures_of_their_own_size(script, pictures, capsys):
    run_on_pictures(script, pictures, "r", "--max-steps", 1)
    assert script.main(["--out", "r", "--sample", "3"]) == 0
    paths = sorted(Path("r/generated").iterdir())
    assert [path.name for path in paths] == ["00000.png", "00001.png", "00002.png"]
    assert imageio.imread(paths[0]).shape == (8, 8, 3)
    first = [path.read_bytes() for path in paths]
    script.main(["--out", "r", "--sample", "3", "--seed", "7"])
    assert [path.read_bytes() for path in paths] != first


def damage(name):
    path = Path("r/checkpoint.pt")
    if name == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "another kind of file":
        torch.save([1, 2, 3], path)
    elif name == "of another script":
        torch.save(checkpoint("r") | {"script": "vae"}, path)
    else:
        path.unlink()


@pytest.mark.parametrize("name", ["truncated", "empty", "another kind of file", "of another script", "gone"])
@pytest.mark.parametrize("action", [["--resume"], ["--sample", "2"]])
def test_a_checkpoint_that_cannot_be_used(script, pictures, capsys, name, action):
    run_on_pictures(script, pictures, "r", "--max-steps", 1)
    damage(name)
    capsys.readouterr()
    assert "checkpoint.pt" in refusal(capsys, script.main(["--out", "r", *action]))


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--epochs", "0"], "--epochs"),
        (["--batch-size", "many"], "--batch-size"),
        (["--lr-g", "nan"], "--lr-g"),
        (["--seed", "-1"], "--seed"),
        (["--dataset", "cats"], "--dataset"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_a_wrong_flag_exits_with_2(script, capsys, flags, word):
    with pytest.raises(SystemExit) as stop:
        script.main(flags)
    assert stop.value.code == 2
    assert word in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "toaster"], "toaster"),
        (["--background", "greenish"], "greenish"),
        (["--classes", "12"], "--classes"),
        (["--dataset", "folder", "--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_a_flag_that_does_not_fit_is_refused_in_one_sentence(script, digits, capsys, flags, word):
    assert word in refusal(capsys, run(script, "--data-dir", digits, *flags))


def test_a_folder_that_cannot_be_written_is_one_sentence(script, digits, capsys):
    Path("file").write_text("")
    assert "file" in refusal(capsys, run(script, "--data-dir", digits, "--out", "file/run"), [1])


def test_into_a_file_one_line_an_epoch(script, pictures, capsys):
    run_on_pictures(script, pictures, "r", "--epochs", 3, "--log-every", 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]


def test_small_data_and_single_leftovers(script, pictures):
    assert run_on_pictures(script, pictures, "r", "--batch-size", 23, "--epochs", 1) == 0
    assert checkpoint("r")["step"] == 1
    assert run_on_pictures(script, pictures, "s", "--batch-size", 500, "--epochs", 1) == 0
    assert checkpoint("s")["step"] == 1


def test_snapshots_and_sample_grids(script, pictures):
    run_on_pictures(script, pictures, "r", "--epochs", 4, "--snapshot-every", 2, "--sample-every", 5)
    assert sorted(path.name for path in Path("r/generators").iterdir()) == ["epoch_002.pt", "epoch_004.pt"]
    assert sorted(path.stem for path in Path("r/samples").iterdir()) == ["000000", "000005", "000010"]
    assert imageio.mimread("r/samples.gif", memtest=False)[0].shape == imageio.imread("r/samples/000000.png").shape
    snapshot = torch.load("r/generators/epoch_004.pt", weights_only=True)
    assert snapshot["epoch"] == 4
    for name, value in checkpoint("r")["G"].items():
        assert torch.equal(value, snapshot["G"][name])


def test_the_seed_decides(script, pictures):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_on_pictures(script, pictures, out, "--epochs", 1, "--seed", seed)
    same_run("a", "b")
    assert log("a")[0]["loss_g"] != log("c")[0]["loss_g"]


# dcgan.py


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_dcgan_default_networks_have_the_known_sizes():
    assert count(dcgan.Generator()) == 5_906_176
    assert count(dcgan.Discriminator()) == 2_661_888


@pytest.mark.parametrize(
    ("size", "channels", "hidden"), [(28, 1, [4, 8]), (64, 3, [4, 4, 4, 4]), (6, 2, [5]), (24, 4, [3, 4, 5])]
)
def test_dcgan_shapes(size, channels, hidden):
    G, D = dcgan.Generator(7, size, channels, hidden), dcgan.Discriminator(size, channels, hidden)
    x = G(torch.randn(5, 7))
    assert x.shape == (5, channels, size, size)
    assert x.abs().max() <= 1
    assert D(x).shape == (5,)
    assert D(x[:1]).shape == (1,)


@pytest.mark.parametrize(("size", "hidden"), [(27, [4]), (28, [4, 4, 4]), (8, [])])
def test_dcgan_refuses_sizes_that_it_cannot_make(size, hidden):
    with pytest.raises(common.Fault, match="multiple"):
        dcgan.Generator(7, size, 1, hidden)


def test_dcgan_image_size_fault_from_the_command_line(digits, capsys):
    assert "--img-size" in refusal(capsys, run(dcgan, "--data-dir", digits, "--img-size", 30))


def test_dcgan_initial_weights_are_those_of_the_paper():
    torch.manual_seed(0)
    for network in (dcgan.Generator(), dcgan.Discriminator()):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert abs(module.weight.mean() - 1) < 0.01
                assert abs(module.weight.std() - 0.02) < 0.005
                assert (module.bias == 0).all()
                assert (module.eps, module.momentum) == (1e-5, 0.1)
            elif isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                assert abs(module.weight.std() - 0.02) < 0.002
                assert module.bias is None


def test_dcgan_d_has_no_batch_norm_on_its_first_layer_and_g_has_tanh_last():
    D, G = dcgan.Discriminator(), dcgan.Generator()
    assert [type(layer).__name__ for layer in D.layers][:4] == ["Conv2d", "LeakyReLU", "Conv2d", "BatchNorm2d"]
    assert [type(layer).__name__ for layer in G.layers][-2:] == ["ConvTranspose2d", "Tanh"]
    assert {layer.negative_slope for layer in D.layers if isinstance(layer, nn.LeakyReLU)} == {0.2}
    same = dcgan.Discriminator(8, 3, [6, 6])  # as many channels as hidden ones must not move the batch norm
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in same.layers) == 1
    same = dcgan.Discriminator(8, 3, [3, 6])
    assert [type(layer).__name__ for layer in same.layers][:4] == ["Conv2d", "LeakyReLU", "Conv2d", "BatchNorm2d"]


def test_dcgan_memory_layout_does_not_change_the_result():
    torch.manual_seed(0)
    G, D = dcgan.Generator(8, 8, 3, [4, 8]), dcgan.Discriminator(8, 3, [4, 8])
    z = torch.randn(4, 8)
    plain = D(G(z))
    G.to(memory_format=torch.channels_last)
    D.to(memory_format=torch.channels_last)
    assert torch.allclose(D(G(z)), plain, atol=1e-5)
    last = []
    for layer in [*G.layers, *D.layers]:
        layer.register_forward_hook(lambda _, __, x: last.append(x.is_contiguous(memory_format=torch.channels_last)))
    D(G(z))
    assert all(last)


def test_dcgan_losses_against_hand_computed_numbers():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 1.0])
    # -log sigmoid(2) = 0.126928, -log sigmoid(0) = 0.693147; -log(1 - sigmoid(-1)) = 0.313262, of 1: 1.313262
    assert abs(dcgan.discriminator_loss(real, fake).item() - (0.820075 / 2 + 1.626523 / 2)) < 1e-5
    assert abs(dcgan.generator_loss(fake).item() - (1.313262 + 0.313262) / 2) < 1e-5
    zero = torch.zeros(3)
    assert abs(dcgan.discriminator_loss(zero, zero).item() - 2 * math.log(2)) < 1e-6
    far = torch.tensor([-200.0], requires_grad=True)
    dcgan.generator_loss(far).backward()
    assert far.grad.item() == -1  # no vanishing gradient while D is sure


def test_g_step_freezes_d(script, pictures, monkeypatch):
    forwards = []

    def forward(self, x, original=script.Discriminator.forward):
        forwards.append((x.requires_grad, {p.requires_grad for p in self.parameters()}))
        return original(self, x)

    monkeypatch.setattr(script.Discriminator, "forward", forward)
    run_on_pictures(script, pictures, "r", "--max-steps", 1)
    assert forwards == [(False, {True}), (False, {True}), (True, {False})]  # real, fake, and fake for G


def test_dcgan_bf16_only_where_asked_or_native(pictures):
    for precision, words in (("fp32", "cpu, fp32"), ("bf16", "cpu, bf16")):
        flags = ["--precision", precision, "--device", "cpu", "--max-steps", 1]
        assert run_on_pictures(dcgan, pictures, precision, *flags) == 0
        assert json.loads(Path(precision, "args.json").read_text())["on"] == words
        assert {value.dtype for value in checkpoint(precision)["G"].values()} <= {torch.float32, torch.int64}


def test_dcgan_hidden_channels_default_to_the_image_size(digits):
    dcgan.main(["--data-dir", digits, "--max-steps", "1", "--batch-size", "4"])
    assert checkpoint("runs/dcgan-digits")["args"]["hidden_channels"] == [32, 64]


# common.py


def test_digits_are_white_on_black_balanced_and_the_same_each_time():
    one, two = common.render_digits(2000, 0), common.render_digits(2000, 0)
    assert torch.equal(one.images, two.images)
    assert one.images.shape == (2000, 1, 28, 28)
    assert one.images.dtype == torch.uint8
    assert torch.bincount(one.labels).min() > 150
    assert (one.images[:, :, 0] == 0).float().mean() > 0.99  # the border is black
    assert (one.images.flatten(1).amax(1) > 120).all()
    grey = ((one.images > 0) & (one.images < 255)).sum() / (one.images > 0).sum()
    assert 0.2 < grey < 0.8  # smooth outlines
    assert not torch.equal(one.images, common.render_digits(2000, 1).images)


def test_digits_show_the_factors_that_they_say():
    data = common.render_digits(4000, 0)
    x = data.images.float().squeeze(1)
    place = torch.arange(28.0)
    mass = x.sum((1, 2))

    def correlation(a, b):
        return torch.corrcoef(torch.stack([a, b]))[0, 1].item()

    centre_x, centre_y = (x.sum(1) @ place) / mass, (x.sum(2) @ place) / mass
    assert correlation(centre_x, data.factors["shift_x"]) > 0.7
    assert correlation(centre_y, data.factors["shift_y"]) > 0.7
    assert correlation(mass, data.factors["thickness"]) > 0.6
    assert correlation((x > 60).any(2).sum(1).float(), data.factors["scale"]) > 0.6
    lean = ((x * (place - centre_x[:, None])[:, None, :] * (place - centre_y[:, None])[:, :, None]).sum((1, 2))) / mass
    assert correlation(lean, data.factors["rotation"]) < -0.3  # clockwise: the top goes right
    assert correlation(lean, data.factors["slant"]) < -0.3


def test_digits_are_cached_and_a_damaged_cache_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "render_digits", lambda n, seed, render=common.render_digits: render(100, seed))
    one = common.load_data("digits", tmp_path)
    (cache,) = (tmp_path / "digits").iterdir()
    cache.write_bytes(b"damaged")
    assert torch.equal(common.load_data("digits", tmp_path).images, one.images)
    assert cache.stat().st_size > 100
    monkeypatch.setattr(common, "render_digits", None)
    assert torch.equal(common.load_data("digits", tmp_path).factors["slant"], one.factors["slant"])


def test_classes_keep_their_images_labels_and_factors(digits):
    whole, some = common.load_data("digits", digits), common.load_data("digits", digits, classes=[3, 7])
    assert set(some.labels.tolist()) == {3, 7}
    keep = (whole.labels == 3) | (whole.labels == 7)
    assert torch.equal(some.images, whole.images[keep])
    assert torch.equal(some.factors["slant"], whole.factors["slant"][keep])


def test_img_size_resizes_without_changing_the_range(digits):
    small = common.load_data("digits", digits, img_size=14, classes=[1])
    assert small.images.shape[1:] == (1, 14, 14)
    big = common.load_data("digits", digits, img_size=32, classes=[1])
    assert big.images.shape[1:] == (1, 32, 32)
    assert abs(big.images.float().mean() - common.load_data("digits", digits, classes=[1]).images.float().mean()) < 1


def idx(array):
    array = np.asarray(array, np.uint8)
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.mark.parametrize("place", ["MNIST/raw", "mnist", "."])
@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_found_raw_or_packed(tmp_path, place, packed):
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    x, y = np.arange(4 * 28 * 28).reshape(4, 28, 28) % 251, [3, 1, 4, 1]
    for name, array in (("train-images-idx3-ubyte", x), ("train-labels-idx1-ubyte", y)):
        content = gzip.compress(idx(array)) if packed else idx(array)
        (folder / (name + ".gz" * packed)).write_bytes(content)
    data = common.load_data("mnist", tmp_path)
    assert data.images.shape == (4, 1, 28, 28)
    assert np.array_equal(data.images.squeeze(1).numpy(), x)
    assert data.labels.tolist() == y


@pytest.mark.parametrize("content", [b"", idx([[1, 2]])[:-1], gzip.compress(b"x" * 999)[:20], b"\x00\x00\x0d\x01"])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"])
def test_a_damaged_idx_file_is_named(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(common.Fault, match=name):
        common.load_data("mnist", tmp_path)


class Answer:
    def __init__(self, content):
        self.content = content

    def read(self):
        return self.content

    __enter__ = lambda self: self  # noqa: E731
    __exit__ = lambda self, *_: None  # noqa: E731


def test_a_download_tries_each_mirror_and_checks_the_md5(tmp_path, monkeypatch):
    asked = []

    def urlopen(url, timeout):
        assert timeout <= 60
        asked.append(url)
        if url == "https://a":
            raise OSError("no route")
        return Answer({"https://b": b"wrong", "https://c": b"right"}[url])

    monkeypatch.setattr(common.urllib.request, "urlopen", urlopen)
    md5 = "7c4f29407893c334a6cb7a87bf045c0d"  # of b"right"
    common.download(["https://a", "https://b", "https://c"], tmp_path / "new" / "file", [], md5)
    assert asked == ["https://a", "https://b", "https://c"]
    assert (tmp_path / "new" / "file").read_bytes() == b"right"
    with pytest.raises(common.Fault, match="no route.*wrong md5"):
        common.download(["https://a", "https://b"], tmp_path / "other", [], md5)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("dataset", ["mnist", "fashion"])
def test_without_data_and_network_the_message_says_what_to_do(tmp_path, monkeypatch, capsys, dataset):
    def urlopen(url, timeout):
        raise OSError("no network")

    monkeypatch.setattr(common.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(common.Path, "glob", lambda *_: [])
    said = refusal(capsys, run(dcgan, "--dataset", dataset, "--data-dir", tmp_path), [1])
    for words in (str(tmp_path), "--data-dir", "--dataset digits", "no network", common.MIRRORS[dataset], "amazonaws.com"):
        assert words in said


def mixed_pictures(folder):
    folder.mkdir(parents=True)
    Image.new("L", (10, 10), 128).save(folder / "grey.png")
    Image.new("RGB", (20, 10), (200, 0, 0)).save(folder / "photo.jpg")
    palette = Image.new("P", (10, 10), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((5, 5), 1)
    palette.info["transparency"] = 0
    palette.save(folder / "palette.png", transparency=0)
    Image.new("RGBA", (10, 20), (255, 0, 0, 0)).save(folder / "hidden_red.png")
    Image.new("LA", (10, 10), (0, 0)).save(folder / "grey_alpha.png")


@pytest.mark.parametrize("nested", [False, True])
def test_folder_reads_mixed_pictures_and_trains_on_them(tmp_path, nested):
    for sub in ("b/deep", "a") if nested else (".",):
        mixed_pictures(tmp_path / "pictures" / sub)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    data = common.load_data("folder", tmp_path / "pictures", img_size=8, background="blue")
    assert data.images.shape == ((10 if nested else 5), 3, 8, 8)
    grey, grey_alpha, hidden, palette, photo = data.images[:5]
    by_name = dict(zip(["grey", "grey_alpha", "hidden_red", "palette", "photo"], data.images[:5], strict=True))
    assert (by_name["grey"] == 128).all()
    for name in ("grey_alpha", "hidden_red"):
        assert (by_name[name] == torch.tensor([0, 0, 255])[:, None, None]).all(), name
    assert by_name["palette"][2].float().mean() > 200  # mostly background, not the hidden red
    assert by_name["palette"][0].float().mean() < 20
    assert abs(by_name["photo"][0].float().mean() - 200) < 8
    if nested:
        assert data.labels.tolist() == [0] * 5 + [1] * 5
    else:
        assert data.labels is None
    flags = ["--dataset", "folder", "--data-dir", "pictures", "--img-size", 8, "--max-steps", 2, "--batch-size", 4]
    assert run(dcgan, *flags, "--out", "r") == 0


def test_folder_pads_what_is_transparent_and_crops_what_is_not(tmp_path):
    wide = Image.new("RGB", (30, 10), (0, 0, 0))
    wide.paste((255, 255, 255), (10, 0, 20, 10))
    wide.save(tmp_path / "a.png")
    sprite = Image.new("RGBA", (30, 10), (0, 0, 0, 255))
    sprite.putpixel((0, 0), (0, 0, 0, 0))
    sprite.save(tmp_path / "b.png")
    crop, pad = common.load_data("folder", tmp_path, img_size=30).images
    assert (crop == 255).float().mean() > 0.9  # the middle third
    assert (pad[:, :9] == 255).all()  # background above
    assert (pad[:, 12:18, 5:] == 0).all()


def test_folder_of_grey_pictures_has_one_channel(tmp_path):
    for i in range(3):
        Image.new("L", (8, 8), 80 * i).save(tmp_path / f"{i}.png")
    images = common.load_data("folder", tmp_path, img_size=8).images
    assert images.shape == (3, 1, 8, 8)
    assert images.flatten(1)[:, 0].tolist() == [0, 80, 160]


def test_folder_names_a_damaged_picture(tmp_path, capsys):
    mixed_pictures(tmp_path / "p")
    good = (tmp_path / "p" / "grey.png").read_bytes()
    (tmp_path / "p" / "broken.png").write_bytes(good[: len(good) // 2])
    said = refusal(capsys, run(dcgan, "--dataset", "folder", "--data-dir", tmp_path / "p"), [1])
    assert "broken.png" in said


def test_one_picture_is_too_few(tmp_path, capsys):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    refusal(capsys, run(dcgan, "--dataset", "folder", "--data-dir", tmp_path), [1])


def test_epoch_order_is_a_shuffle_that_depends_on_seed_and_epoch_alone():
    order = common.epoch_order(10, 3, seed=1, epoch=2)
    torch.manual_seed(99)
    assert torch.equal(order, common.epoch_order(10, 3, seed=1, epoch=2))
    assert order.shape == (3, 3)
    assert len(set(order.flatten().tolist())) == 9
    assert not torch.equal(order, common.epoch_order(10, 3, seed=1, epoch=3))
    assert not torch.equal(order, common.epoch_order(10, 3, seed=2, epoch=2))


def test_to_batch_scales_to_minus_one_and_one():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(3, 1, 1, 1)
    x = common.to_batch(images, torch.tensor([1, 0, 2, 2]))
    assert x.shape == (4, 1, 1, 1)
    assert torch.allclose(x.flatten(), torch.tensor([1.0, -1.0, -0.6, -0.6]))


def test_fixed_noise_does_not_depend_on_what_was_drawn_before():
    one = common.fixed_noise(4, 5, seed=3)
    torch.randn(7)
    state = torch.get_rng_state()
    assert torch.equal(one, common.fixed_noise(4, 5, seed=3))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(one, common.fixed_noise(4, 5, seed=4))


def test_sampling_is_in_eval_mode_without_gradients_and_leaves_g_as_it_was():
    G = dcgan.Generator(8, 8, 1, [4])
    z = torch.randn(6, 8)
    before = {name: value.clone() for name, value in G.state_dict().items()}
    together = common.sample(G, z)
    assert together.dtype == torch.uint8
    assert G.training
    for name, value in G.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(common.sample(G, z[:1]), together[:1])  # no picture depends on the others
    G.eval()
    common.sample(G, z)
    assert not G.training


def test_a_grid_is_never_rescaled():
    flat = torch.full((4, 1, 28, 28), 100, dtype=torch.uint8)
    picture = common.grid(flat)
    assert set(np.unique(picture)) == {96, 100}
    assert (picture == 100).sum() == 4 * 3 * 56 * 56  # small images twice as large


# README.md


def readme_commands():
    text = (HERE / "README.md").read_text()
    blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"python \w+\.py", line)]


def test_every_command_in_the_readme_parses():
    commands = readme_commands()
    assert len(commands) >= 4
    for command in commands:
        _, path, *flags = shlex.split(command)
        assert isinstance(importlib.import_module(path.removesuffix(".py")).parse_args(flags), argparse.Namespace)


def test_the_docstring_commands_parse(script):
    text = script.__doc__.replace("\\\n", " ")
    commands = re.findall(r"^ +python \w+\.py(.*?)(?:#.*)?$", text, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        script.parse_args(shlex.split(command))
