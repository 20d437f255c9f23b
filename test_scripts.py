"""Every script end to end for one tiny step, and the maths of every loss. No network, no data files: pytest."""

import argparse
import ast
import contextlib
import csv
import gzip
import http.client
import importlib
import io
import itertools
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import imageio.v2 as imageio
import matplotlib.axes
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel

import common
import dcgan
import infogan
import mlp_gan
import wgan_gp
from bench import score, speed

HERE = Path(__file__).parent
TINY = {
    "mlp_gan": ["--hidden", "4", "8", "--latent-dim", "8"],
    "dcgan": ["--hidden-channels", "4", "8", "--depth", "1", "--latent-dim", "8"],
    "wgan_gp": ["--hidden-channels", "4", "8", "--depth", "1", "--latent-dim", "8", "--critic-steps", "1"],
    "infogan": ["--hidden-channels", "4", "8", "--hidden", "16", "--latent-dim", "8"],
}
METRICS = ["epoch", "step", "loss_d", "loss_g", "d_real", "d_fake", "grad_norm_d", "grad_norm_g", "images_per_second"]
OWN = {
    "mlp_gan": ["acc_real", "acc_fake"],
    "dcgan": [],
    "wgan_gp": ["wasserstein", "wasserstein_heldout", "gradient_penalty", "critic_grad_norm"],
    "infogan": ["info_cat", "info_cont", "code_accuracy", "cluster_error"],
}


@pytest.fixture(params=TINY)
def script(request):
    return importlib.import_module(request.param)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


draws_axes, draws_plots, draws_gifs, draws_frames = (  # for tests that look at them
    pytest.mark.usefixtures(name) for name in ("axes", "plots", "gifs", "frames")
)


@pytest.fixture
def axes():
    """Axes are made and filled, but no file is written."""


@pytest.fixture
def plots(axes):
    """The files of plots are drawn."""


@pytest.fixture
def frames():
    """The pictures of walks and traversals are made."""


@pytest.fixture
def gifs(frames):
    """They are written as GIFs."""


def nothing_drawn(shape):
    """What Figure.subplots returns, without Axes, which take longer to make than a tiny run."""
    axes = np.empty(shape, object)
    axes.fill(Mock())
    return axes.squeeze()


@pytest.fixture(autouse=True)
def plots_and_gifs_are_drawn_only_where_they_are_looked_at(request, monkeypatch):
    """Drawing takes longer than the tiny runs; all but the drawing is done in each test."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda self, path, dpi: Path(path).write_bytes(b""))
    if "axes" not in request.fixturenames:
        monkeypatch.setattr(Figure, "subplots", lambda self, *shape: nothing_drawn(shape) if shape else Mock())
        monkeypatch.setattr(Figure, "add_subplot", lambda self, *_, **__: Mock())
    if "gifs" not in request.fixturenames:
        monkeypatch.setattr(imageio, "mimwrite", lambda *_, **__: b"")  # choosing 256 colours takes longest
    if "frames" not in request.fixturenames:  # some fifty grids
        monkeypatch.setattr(dcgan, "noise_path", lambda z, kind: z[:1])
        monkeypatch.setattr(infogan, "save_traversals", lambda *_: None)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A --data-dir with 3,000 of the built-in digits, where a run would look for its 60,000."""
    folder = tmp_path_factory.mktemp("data")
    common.save_atomically(folder / "digits" / "digits-2.pt", common.render_digits(3000, seed=0)._asdict())
    return str(folder)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A --data-dir with 26 small colour pictures, for runs of many short epochs: a tenth, 2, may be held out."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(26):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    return str(folder)


def run(script, *flags):
    """main() with the tiny networks of the script; the exit code."""
    return script.main([*TINY[script.__name__], *map(str, flags)])


def run_on_pictures(script, pictures, out, *flags):
    """24 pictures, or 26, in batches of 8: 3 steps an epoch."""
    few = ["--dataset", "folder", "--data-dir", pictures, "--img-size", 8, "--batch-size", 8]
    return run(script, *few, "--log-every", 2, "--out", out, *flags)


@pytest.fixture(scope="session")
def copy_one_step(pictures, tmp_path_factory):
    """copy_one_step(script): the run of one step on the pictures, made once a script, copied to ./r."""
    made = {}

    def copy(script):
        if script not in made:
            made[script] = tmp_path_factory.mktemp("one") / "r"
            assert run_on_pictures(script, pictures, made[script], "--max-steps", 1) == 0
        shutil.copytree(made[script], "r")

    return copy


def judge(script):
    """The class that tells real from fake."""
    return script.Critic if script is wgan_gp else script.Discriminator


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


def test_ctrl_c_before_the_first_step_is_one_sentence(script, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "load_data", interrupted)
    assert "KeyboardInterrupt" in refusal(capsys, run(script), [1])


@draws_plots
@draws_gifs
def test_one_step_writes_everything(script, digits):
    assert run(script, "--data-dir", digits, "--max-steps", 1, "--log-every", 1) == 0
    out = Path(f"runs/{script.__name__}-digits")
    names = {path.name for path in out.iterdir()}
    assert {"args.json", "log.csv", "losses.png", "real.png", "samples", "samples.gif", "checkpoint.pt"} <= names
    (row,) = log(out)
    metrics = [name for name in METRICS if name not in ("d_real", "d_fake")] if script is wgan_gp else METRICS
    assert list(row) == metrics + OWN[script.__name__]
    assert (row["epoch"], row["step"]) == ("1", "1")
    assert all(math.isfinite(float(value)) for value in row.values())
    flags = json.loads((out / "args.json").read_text())
    assert flags["latent_dim"] == 8
    assert flags["torch"] == torch.__version__
    assert flags["parameters"]["G"] > 0
    assert imageio.imread(out / "samples" / "000000.png").shape[2] == 3
    assert checkpoint(out)["step"] == 1
    pictures = {"infogan": 2700, "wgan_gp": 2700}.get(script.__name__, 3000)  # a tenth is held out
    steps = pictures // (32 if script is wgan_gp else 64)
    assert flags["epochs"] == math.ceil((4000 if script is wgan_gp else 9000) / steps)  # the default, for so few


def test_one_step_changes_every_weight_of_both_networks(script, digits):
    before = {}

    def keep(part, original):
        def init(self, *args, **kwargs):
            original(self, *args, **kwargs)
            before[part] = {key: value.clone() for key, value in self.named_parameters()}

        return init

    with pytest.MonkeyPatch.context() as patch:
        for part, network in (("G", script.Generator), ("D", judge(script))):
            patch.setattr(network, "__init__", keep(part, network.__init__))
        run(script, "--data-dir", digits, "--max-steps", 1, "--out", "r")
    after = checkpoint("r")
    for part in ("G", "D"):
        for key, value in before[part].items():
            assert not torch.equal(value, after[part][key]), f"{part}.{key} did not move"


def test_the_command_line(script, digits, monkeypatch):
    flags = [*TINY[script.__name__], "--data-dir", digits, "--max-steps", "2", "--out", "r"]
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(HERE / f"{script.__name__}.py"), run_name="__main__")
    assert stop.value.code == 0
    assert Path("r/samples.gif").exists()


def test_an_import_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); sys.argv = ['x', '--nonsense']; import {', '.join(TINY)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (0, "", [])


def test_help_names_every_flag_and_what_it_is_for(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    assert stop.value.code == 0
    _, _, said = capsys.readouterr().out.partition("\nrun:\n")  # below the usage
    flags = re.findall(r'^ +[a-z]+\("(--[a-z0-9-]+)"', (HERE / f"{script.__name__}.py").read_text(), re.MULTILINE)
    assert len(flags) > 30
    for flag in flags:
        assert re.search(rf"^  {flag}(,? \S.*?)?(  +|\n {{10,}})\S", said, re.MULTILINE), flag
    _, *texts = re.split(r"^  (?=--)", said, flags=re.MULTILINE)
    assert len(texts) == len(flags)
    defaults = vars(script.parse_args([])) | {"out": None}  # which has a name in capitals there
    for text in texts:  # with its default, but for switches, and N pictures
        text = " ".join(text.split("\n\n")[0].split())  # without the next group's title
        assert re.match(r"--(compile|overwrite|resume|sample|diffaugment)\b", text) or "(" in text, text
        default = defaults[re.match("--([a-z0-9-]+)", text)[1].replace("-", "_")]
        if default:  # 0 may be called off
            values = default if isinstance(default, list) else [default]
            told = " ".join(value if isinstance(value, str) else f"{value:g}" for value in values)
            assert re.search(rf"\((.* )?{re.escape(told)}( .*)?\)$", text), text


def test_every_flag_is_read(script):
    tree = ast.parse((HERE / f"{script.__name__}.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name != "parse_args"]
    read = {
        node.attr
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and ast.unparse(node.value) == "args"
    }
    flags = set(vars(script.parse_args([]))) - {"script"}
    assert flags <= read, f"never read: {sorted(flags - read)}"


def test_the_flags_that_all_scripts_share_come_in_one_order():
    flags = [list(vars(importlib.import_module(name).parse_args([]))) for name in TINY]
    shared = set.intersection(*map(set, flags))
    assert len(shared) == 28
    orders = [[name for name in names if name in shared] for names in flags]
    assert orders == [orders[0]] * 4


# Runs: resuming, stopping, faults


def same_run(one, two):
    """Equal log.csv but for speed, and equal weights, optimisers and noise."""
    assert [row | {"images_per_second": 0} for row in log(one)] == [row | {"images_per_second": 0} for row in log(two)]
    flat_one, flat_two = flatten(checkpoint(one)), flatten(checkpoint(two))
    assert flat_one.keys() == flat_two.keys()
    for name, value in flat_one.items():
        assert np.array_equal(value, flat_two[name], equal_nan=True), name  # cluster_error is nan without labels


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
    common.epoch_order.cache_clear()  # as in a new process
    assert script.main(["--out", "parts", "--resume", "--epochs", "2", "--max-steps", "1000"]) == 0
    assert [row["step"] for row in log("whole")] == ["2", "3", "4", "6"]
    same_run("whole", "parts")


def test_resume_drops_what_a_killed_run_logged_after_its_checkpoint(script, pictures):
    run_on_pictures(script, pictures, "whole", "--epochs", 2)
    run_on_pictures(script, pictures, "parts", "--epochs", 1)
    with open("parts/log.csv", "a") as file:
        file.write("2,4," + ",".join(["7"] * (len(log("whole")[0]) - 2)) + "\n")
    Path("parts/samples/000099.png").write_bytes(b"half a picture")
    assert script.main(["--out", "parts", "--resume", "--epochs", "2"]) == 0
    same_run("whole", "parts")


def test_a_run_that_was_moved_is_resumed_where_it_is(script, pictures):
    run_on_pictures(script, pictures, "old", "--epochs", 1)
    Path("runs").mkdir()
    Path("old").rename(f"runs/{script.__name__}-digits")  # the default folder
    shutil.copytree(pictures, "data moved too")
    assert script.main(["--resume", "--epochs", "2", "--data-dir", "data moved too"]) == 0
    assert not Path("old").exists()
    assert checkpoint(f"runs/{script.__name__}-digits")["step"] == 6


def test_resume_goes_on_to_the_same_last_step_or_to_the_epochs_named_now(script, pictures, capsys):
    run_on_pictures(script, pictures, "r", "--max-steps", 2, "--overwrite")
    assert script.main(["--out", "r", "--resume"]) == 0
    assert checkpoint("r")["step"] == 2
    capsys.readouterr()
    assert "overwrite" in refusal(capsys, script.main(["--out", "r", "--resume", "--overwrite"]), [2])
    assert script.main(["--out", "r", "--resume", "--epochs", "2"]) == 0
    assert checkpoint("r")["step"] == 6


@pytest.mark.parametrize("flags", [[], ["--epochs", "1"]], ids=["the same epochs", "fewer"])
def test_resume_of_a_finished_run_changes_nothing(script, pictures, capsys, flags):
    run_on_pictures(script, pictures, "r", "--epochs", 2)
    before, step, _ = Path("r/checkpoint.pt").read_bytes(), checkpoint("r")["step"], capsys.readouterr()
    assert script.main(["--out", "r", "--resume", *flags]) == 0
    assert Path("r/checkpoint.pt").read_bytes() == before
    assert f"Step {step} of {step}." in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--latent-dim 9", "--seed 5", "--dataset digits", "--lr-g 0.1"])
def test_resume_refuses_a_flag_that_contradicts_the_run(script, copy_one_step, capsys, flag):
    copy_one_step(script)
    capsys.readouterr()
    said = refusal(capsys, script.main(["--out", "r", "--resume", *flag.split()]), [2])
    assert f"has {flag.split()[0].strip('-')} " in said


def test_a_run_never_writes_over_another(script, pictures, capsys):
    run_on_pictures(script, pictures, "r", "--epochs", 2)
    capsys.readouterr()
    said = refusal(capsys, run_on_pictures(script, pictures, "r"), [2])
    assert "--resume" in said
    assert "--overwrite" in said
    assert "--out" in said
    assert run_on_pictures(script, pictures, "r", "--epochs", 1, "--overwrite") == 0
    assert [path.stem for path in sorted(Path("r/samples").iterdir())] == ["000000", "000001", "000002", "000003"]


def test_grids_of_a_run_whose_files_were_deleted_do_not_mix_with_new_ones(script, pictures, copy_one_step, capsys):
    copy_one_step(script)
    for path in [path for path in Path("r").iterdir() if path.is_file()]:  # as rm r/* does
        path.unlink()
    Path("r/samples/000007.png").write_bytes(b"old")
    assert "has a run" in refusal(capsys, run_on_pictures(script, pictures, "r", "--max-steps", 1), [2])
    assert run_on_pictures(script, pictures, "r", "--max-steps", 1, "--overwrite") == 0
    assert [path.stem for path in sorted(Path("r/samples").iterdir())] == ["000000", "000001"]


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_nothing_that_is_not_of_a_run_is_deleted(script, pictures, flags):
    Path("r/samples").mkdir(parents=True)
    for name in ("cat.png", "7.png"):
        Path("r/samples", name).write_bytes(b"mine")
    assert run_on_pictures(script, pictures, "r", "--max-steps", 1, *flags) == 0
    assert {Path("r/samples", name).read_bytes() for name in ("cat.png", "7.png")} == {b"mine"}


@pytest.mark.parametrize("lost", ["samples/000000.png", "checkpoint.pt"])
def test_overwrite_takes_all_of_the_old_run_and_nothing_else(script, pictures, copy_one_step, monkeypatch, lost):
    copy_one_step(script)
    script.main(["--out", "r", "--sample", "1"])
    old = ["samples/000007.png", "generators/epoch_007.pt", "generated.png", "generated/00000.png"]
    old += ["score.csv", "score.png", "nearest.png"]
    own = {"dcgan": ["interpolation.gif"], "infogan": ["factors.png", "traversal.png", "traversal.gif"]}
    old += own.get(script.__name__, [])
    Path("r/generators").mkdir()
    mine = ["samples/cat.png", "generated/cat.png", "generators/notes.txt"]
    for name in old + mine:
        Path("r", name).write_bytes(b"old")
    Path("r", lost).unlink()
    monkeypatch.setattr(script, "generator_loss", lambda logits, *_: logits.mean() * math.nan)  # no clean end either
    assert run_on_pictures(script, pictures, "r", "--max-steps", 1, "--overwrite") == 1
    assert not any(Path("r", name).exists() for name in [*old, "checkpoint.pt"])
    assert all(Path("r", name).exists() for name in mine)


@pytest.mark.parametrize("told", ["[enforce fail at alloc_cpu.cpp:127] CPUAllocator: can't allocate memory", ""])
def test_out_of_memory_is_one_sentence_and_a_mistake_in_the_code_is_not(script, capsys, monkeypatch, told):
    def load_data(*args):
        raise RuntimeError(told or "shapes cannot be multiplied\nand so on")

    monkeypatch.setattr(script, "load_data", load_data)
    if told:
        assert "memory: try a smaller --batch-size" in refusal(capsys, run(script), [1])
    else:
        with pytest.raises(RuntimeError, match="multiplied"):
            run(script)
        assert "multiplied" in refusal(capsys, run(script, "--compile"), [1])  # no compiler: also one of many kinds


def test_ctrl_c_makes_one_more_step_saves_and_can_be_resumed(script, pictures, monkeypatch):
    run_on_pictures(script, pictures, "whole", "--epochs", 2)
    calls, generator_loss = [], script.generator_loss

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return generator_loss(*args)

    monkeypatch.setattr(script, "generator_loss", interrupt)
    before = signal.getsignal(signal.SIGINT)
    assert run_on_pictures(script, pictures, "parts", "--epochs", 2) == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint("parts")["step"] == 5
    assert Path("parts/samples.gif").exists()
    script.main(["--out", "parts", "--resume"])
    same_run("whole", "parts")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(script, pictures, monkeypatch, capsys):
    original, calls = script.generator_loss, []

    def loss(*args):
        calls.append(args)
        return original(*args) * (math.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(script, "generator_loss", loss)
    monkeypatch.setattr(infogan, "save_traversals", lambda G, args, device: Path("r/traversal.png").touch())
    said = refusal(capsys, run_on_pictures(script, pictures, "r", "--epochs", 9, "--log-every", 1), [1])
    assert "loss_g" in said
    assert "step 5" in said
    assert checkpoint("r")["step"] == 3
    assert log("r")[-1]["step"] == "4"
    assert Path("r/losses.png").exists()
    assert Path("r/samples.gif").exists()
    assert not [name for name in ("interpolation.gif", "traversal.png") if Path("r", name).exists()]  # of nan: black


def test_sample_writes_single_pictures_of_their_own_size(script, copy_one_step):
    copy_one_step(script)
    assert script.main(["--out", "r", "--sample", "3"]) == 0
    paths = sorted(Path("r/generated").iterdir())
    assert [path.name for path in paths] == ["00000.png", "00001.png", "00002.png"]
    assert imageio.imread(paths[0]).shape == (8, 8, 3)
    first = [path.read_bytes() for path in paths]
    script.main(["--out", "r", "--sample", "3"])
    assert [path.read_bytes() for path in paths] == first  # by the seed alone
    script.main(["--out", "r", "--sample", "3", "--seed", "7"])
    assert [path.read_bytes() for path in paths] != first


def test_sample_draws_other_noise_than_the_grid_has(script, copy_one_step, monkeypatch):
    copy_one_step(script)
    seeds = []

    def spy(n, latent_dim, seed):
        seeds.append(seed)
        return common.fixed_noise(n, latent_dim, seed)

    monkeypatch.setattr(script, "fixed_noise", spy)
    script.main(["--out", "r", "--sample", "3", "--seed", "5"])
    assert seeds == [6]


def test_samples_gif_has_at_most_60_grids_and_holds_the_last(monkeypatch):
    Path("samples").mkdir()
    for step in range(150):
        Path(f"samples/{step:06d}.png").write_text("")
    monkeypatch.setattr(imageio, "imread", lambda path: int(path.stem))
    made = []
    monkeypatch.setattr(common, "save_gif", lambda path, frames, duration: made.extend(frames))
    common.save_history(Path(), 149)
    assert made == [*range(0, 150, 3), *[149] * 10]


def damage(name):
    path = Path("r/checkpoint.pt")
    if name == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "one bit":
        raw, weights = bytearray(path.read_bytes()), next(iter(checkpoint("r")["G"].values())).numpy().tobytes()
        raw[raw.index(weights)] ^= 64
        path.write_bytes(raw)
    elif name == "another kind of file":
        torch.save([1, 2, 3], path)
    elif name == "of another script":
        run = checkpoint("r")
        torch.save(run | {"args": run["args"] | {"script": "vae"}}, path)
    elif name == "of an edited network":
        run = checkpoint("r")
        torch.save(run | {"D": {f"new.{key}": value for key, value in run["D"].items()}}, path)
    elif name == "a snapshot of G":
        torch.save({key: value for key, value in checkpoint("r").items() if key in ("args", "step", "G")}, path)
    else:
        path.unlink()


DAMAGES = ["truncated", "empty", "one bit", "another kind of file", "of another script", "of an edited network"]
DAMAGES += ["a snapshot of G"]


@pytest.mark.parametrize("name", [*DAMAGES, "gone"])
@pytest.mark.parametrize("action", [["--resume"], ["--sample", "2"]])
def test_a_checkpoint_that_cannot_be_used(script, copy_one_step, capsys, name, action):
    copy_one_step(script)
    damage(name)
    capsys.readouterr()
    said = refusal(capsys, script.main(["--out", "r", *action]))
    assert ("checkpoint.pt has script vae" if name == "of another script" else "checkpoint.pt") in said


def test_pictures_that_turned_from_grey_to_colour_end_a_resume(script, tmp_path, capsys):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(grey + i).save(folder / f"{i}.png")
    run_on_pictures(script, folder, "r", "--max-steps", 1)
    Image.fromarray(np.stack([grey, grey + 1, grey + 2], 2)).save(folder / "3.png")
    capsys.readouterr()
    assert "r was trained on" in refusal(capsys, script.main(["--out", "r", "--resume", "--max-steps", "2"]))


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_checkpoint_alone_can_be_resumed(script, pictures, epochs):
    run_on_pictures(script, pictures, "r", "--epochs", 1)
    Path("alone").mkdir()
    shutil.copy("r/checkpoint.pt", "alone")
    assert script.main(["--out", "alone", "--resume", "--epochs", str(epochs)]) == 0
    assert Path("alone/real.png").read_bytes() == Path("r/real.png").read_bytes()
    assert len(list(Path("alone/samples").iterdir())) == epochs


def test_runs_and_hidden_files_below_the_pictures_are_no_pictures_and_links_are_followed(tmp_path, monkeypatch):
    pixels = np.zeros((4, 4, 3), np.uint8)
    tmp_path /= ".of a hidden folder"  # above the data: that is the user's own affair
    for folder in ("a", "run/samples", "elsewhere", "data/.thumbnails"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / folder / "0.png")
    (tmp_path / "a" / "._0.png").write_bytes(b"what a Mac adds to an archive")
    (tmp_path / "run" / "args.json").write_text("{}")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    for folder in ("a", "run"):
        (tmp_path / folder).rename(tmp_path / "data" / folder)
    data = common.load_data("folder", tmp_path / "data", 4)
    assert data.images.shape == (2, 1, 4, 4)
    assert data.labels.tolist() == [0, 1]
    monkeypatch.setattr(common, "RESIDENT", 0)  # into a file, under a name that is not UTF-8 too
    (tmp_path / "data" / "a" / "0.png").rename(tmp_path / "data" / "a" / "caf\udce9.png")
    assert torch.equal(common.load_data("folder", tmp_path / "data", 4).images, data.images)


@contextlib.contextmanager
def full_disk(size):
    """No file may grow beyond so many bytes: writing ends in the OSError of a full disk, but for its number."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("content", [b"0" * 9000, {"weights": torch.zeros(9000)}, lambda file: file.write(b"0" * 9000)])
def test_a_full_disk_leaves_no_half_a_file(tmp_path, content):
    with full_disk(5000), pytest.raises(OSError, match="File too large"):
        common.save_atomically(tmp_path / "checkpoint.pt", content)
    assert not list(tmp_path.iterdir())


def test_a_disk_too_full_for_decoded_pictures_is_told_and_left_clean(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESIDENT", 0)
    for i in range(3):
        Image.new("L", (8, 8), 80 * i).save(tmp_path / f"{i}.png")
    with full_disk(100):
        said = refusal(capsys, run(dcgan, "--dataset", "folder", "--data-dir", tmp_path, "--img-size", 8), [1])
    assert "File too large" in said
    assert len(list(tmp_path.iterdir())) == 3


def test_a_row_of_the_log_that_a_full_disk_cut_off_is_no_traceback(script, pictures, capsys, monkeypatch):
    limits, loss = contextlib.ExitStack(), script.generator_loss

    def full(*args):
        if len(log("r")) == 2:
            limits.enter_context(full_disk(Path("r/log.csv").stat().st_size + 9))
        return loss(*args)

    monkeypatch.setattr(script, "generator_loss", full)
    with limits:
        said = refusal(capsys, run_on_pictures(script, pictures, "r", "--max-steps", 3, "--log-every", 1), [1])
    assert "File too large" in said
    assert not Path("r/checkpoint.pt").exists()


@draws_gifs
def test_grids_and_gifs_are_whole_or_not_there(tmp_path):
    frame = np.zeros((9, 9, 3), np.uint8)
    for save, what in ((common.save_png, frame), (partial(common.save_gif, duration=1), [frame])):
        with full_disk(50), pytest.raises(OSError, match="File too large"):
            save(tmp_path / "picture", what)
    assert not list(tmp_path.iterdir())


def test_a_sample_of_fewer_leaves_no_old_ones(tmp_path):
    for n in (3, 2):
        common.save_pictures(tmp_path / "generated", torch.zeros(n, 1, 4, 4, dtype=torch.uint8))
    assert len(list((tmp_path / "generated").iterdir())) == 2


def test_a_grid_of_large_pictures_stays_small():
    picture = torch.arange(600).div(3, rounding_mode="floor").byte().expand(16, 3, 600, 600)
    assert common.grid(picture).shape == (2 * (256 + 2) + 2, 8 * (256 + 2) + 2, 3)
    assert (common.grid(picture)[2, 2:258, 0] == picture[0, 0, 0, (torch.arange(256) * 600) // 256].numpy()).all()


def test_a_history_skips_pictures_that_are_not_its_own(tmp_path, monkeypatch):
    (tmp_path / "samples").mkdir()
    for i, name in enumerate(("000000", "000002", "000000 (1)", "2024-holiday", "000004")):
        imageio.imwrite(tmp_path / "samples" / f"{name}.png", np.full((8, 8, 3), i, np.uint8))
    found = []
    monkeypatch.setattr(common, "save_gif", lambda path, frames, duration: found.extend(frames))
    common.save_history(tmp_path, 3)
    assert [frame.max() for frame in found] == [0] + [1] * 11
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples").rename(tmp_path / "~")  # a folder of this name, as in --out=~
    (tmp_path / "~" / "samples").mkdir()
    (tmp_path / "~" / "000000.png").rename(tmp_path / "~" / "samples" / "000000.png")
    common.save_history(Path("~"), 3)
    assert len(found) == 12 + 11


@pytest.mark.parametrize("classes", [[0, 99], [99]])
def test_a_class_that_is_not_there_is_named(digits, classes):
    with pytest.raises(common.Misuse, match="99"):
        common.load_data("digits", digits, classes=classes)


@pytest.mark.parametrize("kind", ["linear", "slerp", "rotation"])
@draws_frames
@pytest.mark.parametrize("latent_dim", [1, 2])
def test_a_path_through_z_of_few_numbers_stays_near_them(kind, latent_dim):
    z = common.fixed_noise(4 * 32, latent_dim, 0).view(4, 32, latent_dim)  # some are nearly opposite
    assert dcgan.noise_path(z, kind).norm(dim=2).max() < 2.5 * z.norm(dim=2).max()


@pytest.mark.parametrize("script", [dcgan, wgan_gp])
def test_networks_deeper_than_their_default_width_have_one_channel(script, pictures):
    few = ["--dataset", "folder", "--data-dir", pictures, "--img-size", "8", "--batch-size", "8", "--max-steps", "1"]
    assert script.main([*few, "--depth", "33", "--out", "r"]) == 0
    assert json.loads(Path("r/args.json").read_text())["hidden_channels"] == [1]


def test_infogan_measures_its_error_at_an_epochs_end_not_where_it_is_stopped(pictures, monkeypatch):
    monkeypatch.setattr(infogan, "measure", lambda D, *_: next(D.parameters()).flatten()[0].item())
    run_on_pictures(infogan, pictures, "r", "--max-steps", 106, "--sample-every", 200)
    rows = [row.split(",") for row in Path("r/log.csv").read_text().splitlines()[1:]]
    errors = {int(row[1]): row[-1] for row in rows}
    assert errors[2] == errors[100] != errors[102]  # the end of the first epoch after 100 steps
    assert errors[102] == errors[104] == errors[106]


@pytest.mark.parametrize("end", ["\n", "", "1,2,0.", None])  # None: log.csv is gone
def test_a_resumed_run_mends_its_log(script, pictures, end):
    run_on_pictures(script, pictures, "r", "--max-steps", 2)
    path = Path("r/log.csv")
    whole = path.read_text().splitlines()
    path.unlink() if end is None else path.write_text("\n".join(whole) + "\n" + end)
    run_on_pictures(script, pictures, "r", "--resume", "--max-steps", 3)
    *rows, last = path.read_text().splitlines()
    assert rows == whole
    assert last.split(",")[1] == "3"


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--epochs", "0"], "--epochs"),
        (["--batch-size", "many"], "--batch-size"),
        (["--batch-size", "1"], "--batch-size"),
        (["--lr-g", "nan"], "--lr-g"),
        (["--adam-eps", "0"], "--adam-eps"),
        (["--clip-grad-norm", "inf"], "--clip-grad-norm"),
        (["--seed", "-1"], "--seed"),
        (["--dataset", "cats"], "--dataset"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_a_wrong_flag_exits_with_2(script, capsys, flags, word):
    with pytest.raises(SystemExit) as stop:
        script.main(flags)
    assert stop.value.code == 2
    assert word in capsys.readouterr().err.splitlines()[-1]  # below the usage, which has all flags
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("flags", "word", "code"),
    [
        (["--device", "cuda:99"], "cuda:99", 2),
        (["--device", "toaster"], "toaster", 2),
        (["--device", "hpu"], "hpu", 2),  # without its package an ImportError
        (["--background", "greenish"], "greenish", 2),
        (["--classes", "12"], "--classes", 2),
        (["--dataset", "folder", "--data-dir", "nowhere"], "nowhere", 1),
    ],
)
def test_a_flag_that_does_not_fit_is_refused_in_one_sentence(script, digits, capsys, flags, word, code):
    assert word in refusal(capsys, run(script, "--data-dir", digits, *flags), [code])


def test_a_folder_that_cannot_be_written_is_one_sentence(script, digits, capsys):
    Path("file").write_text("")
    assert "file" in refusal(capsys, run(script, "--data-dir", digits, "--out", "file/run"), [1])


def test_into_a_file_one_line_an_epoch(script, pictures, capsys):
    run_on_pictures(script, pictures, "r", "--epochs", 3, "--log-every", 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]


def test_on_a_terminal_one_line_is_redrawn(script, pictures, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run_on_pictures(script, pictures, "r", "--epochs", 100, "--max-steps", 5, "--log-every", 1)
    out = capsys.readouterr().out
    lines = out[out.index("epoch ") : out.index("Step 5 of 5")]
    assert (lines.count("\r"), lines.count("\n")) == (4, 1)  # the last one stays
    for line in re.split("[\r\n]", lines)[:5]:
        assert re.match(r"epoch [12]/100 \[[# ]{10}\] .* img/s \d+\.\d min left $", line), line
        assert len(line) < 80  # or a terminal would wrap it


@pytest.mark.parametrize(
    ("error", "told"), [(OSError(28, "Disk full"), "[Errno 28] Disk full: make room,"), (common.Fault("x"), "x ")]
)
def test_a_fault_on_a_terminal_covers_the_status_line(script, pictures, capsys, monkeypatch, error, told):
    def full(path, content):
        if path.name == "checkpoint.pt":
            raise error
        save(path, content)

    save = script.save_atomically
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(script, "save_atomically", full)
    assert run_on_pictures(script, pictures, "r", "--epochs", 2, "--log-every", 1) == 1
    out, said = capsys.readouterr()
    assert out.endswith("\r")
    assert len(said) > len(out.splitlines()[-1].rstrip())  # with its end of line
    assert said.startswith(f"{script.__name__}.py: {told}")


def test_a_copy_of_a_script_has_runs_of_its_own(script, pictures, capsys, tmp_path, monkeypatch):
    source = (HERE / f"{script.__name__}.py").read_text()
    monkeypatch.syspath_prepend(tmp_path)
    Path(f"my_{script.__name__}.py").write_text(source.replace("nn.Tanh()", "nn.Hardtanh()"))
    mine = importlib.import_module(f"my_{script.__name__}")
    flags = [*TINY[script.__name__], "--dataset", "folder", "--data-dir", pictures, "--img-size", "8"]
    assert mine.main([*flags, "--max-steps", "1"]) == 0
    out = Path(f"runs/my_{script.__name__}-folder")
    assert checkpoint(out)["args"]["script"] == f"my_{script.__name__}"  # whose G is scored
    assert score.draw(out / "checkpoint.pt", 4)[0].shape == (4, 3, 8, 8)
    capsys.readouterr()
    assert refusal(capsys, mine.main(flags), [2]).startswith(f"my_{script.__name__}.py: runs/my_")


def test_images_per_second_and_minutes_left(script, pictures, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(script, "time", Mock(perf_counter=Mock(side_effect=itertools.count(0, 600))))  # 10 min a step
    twice = {"wgan_gp": ["--critic-steps", 2], "infogan": []}.get(script.__name__, ["--d-steps", 2])
    run_on_pictures(script, pictures, "r", "--epochs", 100, "--max-steps", 3, "--log-every", 1, *twice)
    seen = 8 if script is infogan else 16  # in a step
    assert [float(row["images_per_second"]) for row in log("r")] == pytest.approx([seen / 600] * 3, rel=1e-3)
    assert re.findall(r"(\S+) min left", capsys.readouterr().out) == ["20.0", "10.0", "0.0"]


@draws_axes
def test_losses_png_has_the_losses_what_d_thinks_and_the_gradients(script, digits, monkeypatch):
    labels, plot = set(), matplotlib.axes.Axes.plot

    def spy(self, *values, label=None, **kwargs):
        labels.add(label)
        return plot(self, *values, label=label, **kwargs)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", spy)
    assert run(script, "--data-dir", digits, "--max-steps", 1, "--log-every", 1) == 0
    own = {"wgan_gp": {"wasserstein", "wasserstein_heldout", "critic_grad_norm"}, "infogan": set(OWN["infogan"])}
    thinks = set() if script is wgan_gp else {"d_real", "d_fake"}
    drawn = {"loss_d", "loss_g", "grad_norm_d", "grad_norm_g"} | thinks | own.get(script.__name__, set())
    assert labels - {None} == drawn


@draws_axes
def test_the_dark_line_is_the_running_mean_of_a_fortieth_of_the_log(script, monkeypatch):
    columns = METRICS + sum(OWN.values(), [])
    rows = [",".join(["1", str(step), *[str(step % 3)] * (len(columns) - 2)]) for step in range(1, 81)]  # 1, 2, 0, ...
    drawn = []
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", lambda *values, **kwargs: drawn.append((values[-3:-1], kwargs)))
    monkeypatch.setattr(matplotlib.axes.Axes, "legend", lambda self: None)
    script.save_plots(Path(), [",".join(columns), *rows], *[torch.ones(1, 3)] * (script is mlp_gan))
    means = [values for values, more in drawn if "label" in more]
    assert len(means) > 3
    assert all(y.tolist() == [1.0] * 78 for _, y in means)  # of 3 rows each
    assert all(x.tolist() == list(range(3, 81)) for x, _ in means)  # at the last of them


@draws_axes
def test_gradients_png_shows_at_most_a_dozen_epochs(monkeypatch):
    epochs = []
    monkeypatch.setattr(matplotlib.axes.Axes, "violinplot", lambda self, row, position, **_: epochs.extend(position))
    for n, shown in ((2, [1, 2]), (30, [1, 4, 7, 10, 13, 16, 19, 22, 25, 28])):
        epochs.clear()
        mlp_gan.save_plots(Path(), [",".join(METRICS)], torch.ones(n, 5))
        assert epochs == shown


@draws_plots
def test_a_log_without_rows_is_drawn(script, pictures):
    assert run_on_pictures(script, pictures, "r", "--max-steps", 1) == 0  # no epoch's end, and no step that is logged
    assert log("r") == []
    assert imageio.imread("r/losses.png").shape[1] > 1000


def test_small_data_and_single_leftovers(script, pictures):
    assert run_on_pictures(script, pictures, "r", "--batch-size", 23, "--epochs", 1) == 0
    assert checkpoint("r")["step"] == 1
    assert run_on_pictures(script, pictures, "s", "--batch-size", 500, "--epochs", 1) == 0
    assert checkpoint("s")["step"] == 1


def test_two_pictures_are_enough(script, tmp_path):
    for i in range(2):
        Image.new("RGB", (8, 8), (90 * i, 9, 200)).save(tmp_path / f"{i}.png")
    assert run_on_pictures(script, tmp_path, "r", "--max-steps", 2, "--log-every", 1) == 0
    assert checkpoint("r")["step"] == 2


@draws_gifs
def test_snapshots_and_sample_grids(script, pictures):
    run_on_pictures(script, pictures, "r", "--epochs", 4, "--snapshot-every", 2, "--sample-every", 5)
    assert sorted(path.name for path in Path("r/generators").iterdir()) == ["epoch_002.pt", "epoch_004.pt"]
    steps = [0, 1, 2, 3, 5, 6, 9, 10, 12]  # 1, 2, 4, ... of the first epoch, which has 3
    assert sorted(path.stem for path in Path("r/samples").iterdir()) == [f"{step:06d}" for step in steps]
    assert imageio.mimread("r/samples.gif", memtest=False)[0].shape == imageio.imread("r/samples/000000.png").shape
    snapshot = torch.load("r/generators/epoch_004.pt", weights_only=True)
    assert snapshot["epoch"] == 4
    for name, value in snapshot["G"].items():  # the weights that samples come from
        assert torch.equal(value, checkpoint("r")["G_ema"][f"module.{name}"])


def test_a_run_killed_between_snapshot_and_checkpoint_makes_both_again(script, pictures, monkeypatch):
    def killed(path, content):
        save(path, content)
        if path.name == "epoch_002.pt":
            raise KeyboardInterrupt

    save, few = script.save_atomically, ["--snapshot-every", 2, "--epochs", 2]
    run_on_pictures(script, pictures, "whole", *few)
    with monkeypatch.context() as patch:
        patch.setattr(script, "save_atomically", killed)
        assert run_on_pictures(script, pictures, "r", *few) == 1
    assert checkpoint("r")["epoch"] == 1
    Path("r/generators/epoch_002.pt").unlink()
    assert script.main(["--resume", "--out", "r"]) == 0
    kept = [torch.load(f"{out}/generators/epoch_002.pt", weights_only=True)["G"] for out in ("whole", "r")]
    for name, value in kept[0].items():
        assert torch.equal(value, kept[1][name])


def test_plots_are_drawn_after_each_epoch_but_not_all_the_time(script, pictures, digits, monkeypatch):
    drawn = []
    monkeypatch.setattr(script, "save_plots", lambda out, *_: drawn.append(int(log(out)[-1]["step"])))
    monkeypatch.setattr(script, "save_history", lambda *_: None)
    monkeypatch.setattr(script, "update_bn", lambda *_: None)
    run_on_pictures(script, pictures, "r", "--epochs", 35, "--sample-every", 1000)  # 3 steps each
    assert drawn == [102, 105]  # the first epoch that ends after 100 steps, and the end
    drawn.clear()
    small = ["--img-size", 8, "--batch-size", 25, "--sample-every", 1000]
    run(script, "--data-dir", digits, *small, "--epochs", 2, "--max-steps", 122, "--out", "long")
    assert 100 < drawn[0] < 122
    assert len(drawn) == 2  # after the first epoch, and at the end, once
    grids = [int(path.stem) for path in sorted(Path("long/samples").iterdir())]
    assert grids == [0, 1, 2, 4, 8, 16, 32, 64, drawn[0], 122]


def test_after_a_hundred_short_epochs_few_are_saved(script, tmp_path, monkeypatch):
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 9, 200)).save(tmp_path / f"{i}.png")
    saved, grids, save = [], [], script.save_atomically

    def spy(path, content):
        saved.append((path.name, content))
        if path.name == "log.csv":
            save(path, content)

    monkeypatch.setattr(script, "save_atomically", spy)
    monkeypatch.setattr(script, "sample", lambda G, z: torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    monkeypatch.setattr(script, "update_bn", lambda *_: None)
    monkeypatch.setattr(script, "save_png", lambda path, picture: grids.append(path.stem))
    run_on_pictures(script, tmp_path, "r", "--epochs", 212, "--batch-size", 4, "--snapshot-every", 110)  # 1 step each
    steps = [*range(101), 110, 200, 212]
    assert [int(stem) for stem in grids if stem != "real"] == steps
    assert [content["step"] for name, content in saved if name == "checkpoint.pt"] == steps[1:]
    assert [name for name, _ in saved if name.startswith("epoch")] == ["epoch_110.pt"]
    assert {"log.csv", "args.json"} <= {name for name, _ in saved}  # whole or not there, too


def test_g_step_freezes_d(script, pictures, monkeypatch):
    forwards, network = [], judge(script)

    def forward(self, x, original=network.forward):
        if self.training:
            forwards.append((x.requires_grad, {p.requires_grad for p in self.parameters()}))
        return original(self, x)

    monkeypatch.setattr(network, "forward", forward)
    run_on_pictures(script, pictures, "r", "--max-steps", 1, "--log-every", 1)
    d_step = [(False, {True})] * (3 if script is infogan else 2)  # real, fake, distorted
    d_step += [(True, {True})] * (script is wgan_gp)  # between real and fake
    assert forwards[: len(d_step) + 1] == [*d_step, (True, {False})]  # then fake for G


def test_the_seed_decides_weights_fixed_noise_and_order(script, pictures, monkeypatch):
    seeds, order = set(), script.epoch_order
    monkeypatch.setattr(script, "epoch_order", lambda *args: seeds.add(args[2]) or order(*args))
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_on_pictures(script, pictures, out, "--epochs", 1, "--seed", seed, "--lr-g", 0)  # G's first weights stay
        assert seeds == {seed}
        seeds.clear()
    same_run("a", "b")
    one, two = checkpoint("a"), checkpoint("c")
    assert not torch.equal(one["z_fixed"][:, :8], two["z_fixed"][:, :8])  # infogan.py's codes apart
    for name, value in one["G"].items():
        assert value.dim() < 2 or not torch.equal(value, two["G"][name]), name


def test_each_precision_is_that_of_the_networks_and_weights_stay_in_float32(script, pictures, monkeypatch):
    seen, forward = set(), judge(script).forward
    monkeypatch.setattr(judge(script), "forward", lambda self, x: seen.add(x.dtype) or forward(self, x))
    for precision, dtypes in (("fp32", {torch.float32}), ("bf16", {torch.float32, torch.bfloat16})):  # x, G(z)
        flags = ["--precision", precision, "--device", "cpu", "--max-steps", 1]
        assert run_on_pictures(script, pictures, precision, *flags) == 0
        assert seen == dtypes
        assert json.loads(Path(precision, "args.json").read_text())["on"] == f"cpu, {precision}"
        assert {value.dtype for value in checkpoint(precision)["G"].values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("precision", "has", "bf16"),
    [
        ("fp32", {"avx512_bf16": True}, False),
        ("bf16", {"avx512_bf16": False}, True),
        ("auto", {"avx512_bf16": True}, True),
        ("auto", {"avx512_bf16": False}, False),
        ("auto", {"bf16": True}, False),  # of ARM, which torch for Macs emulates
        ("auto", {}, False),
    ],
)
def test_bf16_only_where_asked_or_native(script, monkeypatch, precision, has, bf16):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    args = script.parse_args(["--precision", precision, "--device", "cpu"])
    assert script.pick_device(args) == (torch.device("cpu"), bf16)


# mlp_gan.py


def test_mlp_gan_shapes():
    for size, channels, hidden in ((28, 1, [5]), (5, 3, [4, 6, 7])):
        G, D = mlp_gan.Generator(7, size, channels, hidden), mlp_gan.Discriminator(size, channels, hidden)
        x = G(torch.randn(5, 7))
        assert x.shape == (5, channels, size, size)
        assert x.abs().max() <= 1
        assert D(x).shape == (5,)
        assert D(x[:1]).shape == (1,)
        widths = [layer.out_features for layer in [*G.modules(), *D.modules()] if isinstance(layer, nn.Linear)]
        assert widths == [*hidden, channels * size**2, *reversed(hidden), 1]


def kinds_and_rates(network):
    names = [type(layer).__name__ for layer in network.modules()]
    return names.count("BatchNorm1d"), [layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)]


@pytest.mark.parametrize(
    ("norm", "in_g", "in_d"),
    [("none", (0, [0, 0]), (0, [0.2, 0.2])), ("batch", (2, [0, 0]), (2, [0.2, 0.2])),
     ("dropout", (0, [0.2, 0.2]), (0, [0.2, 0.2]))],
)  # fmt: skip
def test_mlp_gan_norm_and_dropout(norm, in_g, in_d):
    args = mlp_gan.parse_args(["--norm", norm, "--dropout", "0.2", "--hidden", "4", "6"])
    args.img_size, args.img_channels = 8, 1
    G, D = mlp_gan.build(args)
    assert kinds_and_rates(G) == in_g
    assert kinds_and_rates(D) == in_d


def test_label_smoothing_and_minimax_against_hand_computed_numbers():
    real, fake = torch.tensor([2.0]), torch.tensor([-1.0, 1.0])
    smooth = 0.9 * 0.126928 + 0.1 * 2.126928  # -log sigmoid(2), and -log(1 - sigmoid(2))
    assert abs(mlp_gan.discriminator_loss(real, fake, 0.1).item() - (smooth + 1.626523 / 2)) < 1e-5
    assert abs(mlp_gan.generator_loss(fake, "minimax").item() + (0.313262 + 1.313262) / 2) < 1e-5


def test_minimax_gives_a_thousandth_of_the_gradient_where_d_is_sure():
    slope = {}
    for loss in ("nonsaturating", "minimax"):
        logits = torch.tensor([0.001]).logit().requires_grad_()
        mlp_gan.generator_loss(logits, loss).backward()
        slope[loss] = logits.grad.item()
    assert abs(slope["nonsaturating"] + 0.999) < 1e-5
    assert abs(slope["minimax"] / slope["nonsaturating"] - 0.001 / 0.999) < 1e-6


def test_mlp_gan_loss_and_smoothing_and_steps_reach_the_loop(pictures, monkeypatch):
    seen = watched(monkeypatch, mlp_gan)
    flags = ["--loss", "minimax", "--label-smoothing", 0.2, "--d-steps", 3, "--g-steps", 2, "--batch-size", 4]
    run_on_pictures(mlp_gan, pictures, "r", "--epochs", 1, *flags)
    assert (len(seen["loss_d"]), len(seen["loss_g"])) == (6, 4)  # 24 pictures are 2 steps of 3 x 4
    assert seen["loss_d"][0][2:] == (0.2,)
    assert seen["loss_g"][0][1:] == ("minimax",)
    assert torch.equal(seen["x"][6], seen["x"][5])  # the first G step judges the fakes that D has just seen
    assert not torch.equal(seen["x"][7], seen["x"][6])  # the second one new ones


def test_mlp_gan_logs_how_often_d_is_right(pictures, monkeypatch):
    seen = watched(monkeypatch, mlp_gan)
    run_on_pictures(mlp_gan, pictures, "r", "--epochs", 1, "--log-every", 1, "--dropout", 0, "--precision", "fp32")
    for row, real, fake in zip(log("r"), seen["out"][0::3], seen["out"][1::3], strict=True):
        assert float(row["acc_real"]) == pytest.approx((real > 0).float().mean().item())
        assert float(row["acc_fake"]) == pytest.approx((fake < 0).float().mean().item())
        assert float(row["d_real"]) == pytest.approx(real.sigmoid().mean().item(), rel=1e-4)


@draws_plots
def test_mlp_gan_keeps_the_gradient_of_the_last_layer_of_each_epoch(pictures, monkeypatch):
    seen = []
    step = torch.optim.Adam.step

    def spy(self, *args):
        seen.append(self.param_groups[0]["params"][-2].grad.clone())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    run_on_pictures(mlp_gan, pictures, "r", "--epochs", 14, "--max-steps", 4)  # an epoch and a third
    mlp_gan.main(["--out", "r", "--resume", "--epochs", "14"])
    gradients = checkpoint("r")["gradients"]
    assert gradients.shape == (14, 4)
    for epoch in range(14):  # D's step is the first of two, 3 steps an epoch
        assert torch.equal(gradients[epoch], seen[6 * epoch + 4].flatten())
    assert imageio.imread("r/gradients.png").shape[2] in (3, 4)


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


@pytest.mark.parametrize("script", [dcgan, wgan_gp, infogan])
@pytest.mark.parametrize(("size", "hidden"), [(27, [4]), (28, [4, 4, 4])])
def test_sizes_that_cannot_be_made_are_refused(script, size, hidden):
    with pytest.raises(common.Misuse, match="multiple"):
        script.Generator(7, size, 1, hidden)


@pytest.mark.parametrize("script", [dcgan, wgan_gp, infogan])
def test_an_image_size_that_cannot_be_made_is_refused_from_the_command_line(script, digits, capsys):
    assert "--img-size" in refusal(capsys, run(script, "--data-dir", digits, "--img-size", 30), [2])


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
                assert abs(module.weight.mean()) < 0.002
                assert abs(module.weight.std() - 0.02) < 0.002
                assert module.bias is None


def test_dcgan_d_has_no_batch_norm_on_its_first_layer_and_g_has_tanh_last():
    D, G = dcgan.Discriminator(), dcgan.Generator()
    assert [type(layer).__name__ for layer in D][:4] == ["Conv2d", "LeakyReLU", "Conv2d", "BatchNorm2d"]
    assert [type(layer).__name__ for layer in G][-2:] == ["ConvTranspose2d", "Tanh"]
    assert {layer.negative_slope for layer in D if isinstance(layer, nn.LeakyReLU)} == {0.2}
    same = dcgan.Discriminator(8, 3, [6, 6])  # as many channels as hidden ones must not move the batch norm
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in same) == 1
    same = dcgan.Discriminator(8, 3, [3, 6])
    assert [type(layer).__name__ for layer in same][:4] == ["Conv2d", "LeakyReLU", "Conv2d", "BatchNorm2d"]


def test_dcgan_memory_layout_does_not_change_the_result():
    torch.manual_seed(0)
    G, D = dcgan.Generator(8, 8, 3, [4, 8]), dcgan.Discriminator(8, 3, [4, 8])
    z = torch.randn(4, 8)
    plain = D(G(z))
    G.to(memory_format=torch.channels_last)
    D.to(memory_format=torch.channels_last)
    assert torch.allclose(D(G(z)), plain, atol=1e-5)
    last = []
    for layer in [*list(G)[2:], *list(D)[:-4]]:  # all but the flat ones
        layer.register_forward_hook(lambda _, __, x: last.append(x.is_contiguous(memory_format=torch.channels_last)))
    D(G(z))
    assert all(last)


@pytest.mark.parametrize("script", [dcgan, wgan_gp, infogan])
def test_a_run_lays_its_convolutions_channels_last(script, pictures, monkeypatch):
    built, build = [], script.build
    monkeypatch.setattr(script, "build", lambda args: built.append(build(args)) or built[-1])
    run_on_pictures(script, pictures, "r", "--max-steps", 1)
    weights = [p for network in built[0] for p in network.parameters() if p.dim() == 4]
    assert len(weights) >= 2
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@pytest.mark.parametrize("script", [mlp_gan, dcgan, infogan])
def test_losses_against_hand_computed_numbers(script):
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 1.0])
    # -log sigmoid(2) = 0.126928, -log sigmoid(0) = 0.693147; -log(1 - sigmoid(-1)) = 0.313262, of 1: 1.313262
    assert abs(script.discriminator_loss(real, fake).item() - (0.820075 / 2 + 1.626523 / 2)) < 1e-5
    assert abs(script.generator_loss(fake).item() - (1.313262 + 0.313262) / 2) < 1e-5
    zero = torch.zeros(3)
    assert abs(script.discriminator_loss(zero, zero).item() - 2 * math.log(2)) < 1e-6
    far = torch.tensor([-200.0], requires_grad=True)
    script.generator_loss(far).backward()
    assert far.grad.item() == -1  # no vanishing gradient while D is sure


def test_dcgan_depth_and_width_default_to_the_image_size(digits):
    flags = ["--data-dir", digits, "--max-steps", "1", "--batch-size", "4", "--classes", "1"]
    for size, depth, hidden in (("28", 2, [16, 32]), ("64", 1, [32, 64, 128])):
        dcgan.main([*flags, "--img-size", size, "--out", size])
        found = checkpoint(size)["args"]
        assert (found["depth"], found["hidden_channels"]) == (depth, hidden)


# dcgan.py: each flag and its effect


def kinds(network):
    return [type(layer).__name__ for layer in getattr(network, "layers", network)]


def built(flags, depth=1):
    """The networks of dcgan.py for pictures of 28x28, by its flags."""
    args = dcgan.parse_args(f"--latent-dim 7 --hidden-channels 4 8 --depth {depth} {flags}".split())
    args.img_size, args.img_channels = 28, 1
    return dcgan.build(args)


@pytest.mark.parametrize("kernel_size", [3, 4, 5])
def test_kernel_size(kernel_size):
    G, D = built(f"--kernel-size {kernel_size}")
    strided = [layer for layer in [*G, *D] if getattr(layer, "stride", None) == (2, 2)]
    assert [layer.kernel_size for layer in strided] == [(kernel_size, kernel_size)] * 4
    assert G(torch.randn(2, 7)).shape == (2, 1, 28, 28)
    assert D(G(torch.randn(2, 7))).shape == (2,)


def test_upsample_nearest():
    G, _ = built("--upsample nearest")
    assert kinds(G).count("UpsampleConv2d") == 2
    assert "ConvTranspose2d" not in kinds(G)
    assert {layer.kernel_size for layer in G if isinstance(layer, nn.Conv2d)} == {(3, 3)}
    assert G(torch.randn(2, 7)).shape == (2, 1, 28, 28)


def test_upsampling_and_convolution_are_one_transposed_convolution():
    fast, conv = dcgan.UpsampleConv2d(3, 2, 3, 1, 1, bias=False).double(), nn.Conv2d(3, 2, 3, 1, 1, bias=False).double()
    conv.load_state_dict(fast.state_dict())
    x = torch.randn(4, 3, 5, 6, dtype=torch.double, requires_grad=True)
    out, expected = fast(x), conv(nn.Upsample(scale_factor=2)(x))
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)  # so that no error in the gradients cancels
    found = torch.autograd.grad((weights * out).sum(), [x, fast.weight])
    torch.testing.assert_close(found, torch.autograd.grad((weights * expected).sum(), [x, conv.weight]))


def test_depth_adds_convolutions_at_each_resolution():
    for depth in (1, 2, 3):
        G, D = built("", depth)
        assert (kinds(G).count("Conv2d"), kinds(G).count("ConvTranspose2d")) == (2 * (depth - 1), 2)
        assert kinds(D).count("Conv2d") == 2 * depth
        assert kinds(D).count("BatchNorm2d") == 2 * depth - 1
        assert D(G(torch.randn(2, 7))).shape == (2,)


def test_d_norm():
    assert "BatchNorm2d" not in kinds(built("--d-norm none")[1])
    _, D = built("--d-norm spectral")
    assert "BatchNorm2d" not in kinds(D)
    for _ in range(50):
        D(torch.randn(2, 1, 28, 28))
    for layer in D:
        if hasattr(layer, "weight"):
            assert abs(torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() - 1) < 0.05


def test_init():
    for network in built("--init default"):
        scales = [layer.weight for layer in network if isinstance(layer, nn.BatchNorm2d)]
        assert all((weight == 1).all() for weight in scales)
        weights = [layer.weight for layer in network if hasattr(layer, "weight") and layer.weight.dim() > 1]
        assert abs(torch.cat([weight.flatten() for weight in weights]).std() - 0.02) > 0.02


def test_dropout():
    assert "Dropout" not in kinds(built("")[1])
    _, D = built("--d-norm none --dropout 0.3")
    assert [layer.p for layer in D if isinstance(layer, nn.Dropout)] == [0.3, 0.3]
    x = torch.randn(2, 1, 28, 28)
    assert not torch.equal(D(x), D(x))


def test_hinge_loss_against_hand_computed_numbers():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    assert dcgan.discriminator_loss(real, fake, "hinge").item() == (0 + 0.5) / 2 + (0 + 1.25) / 2
    assert dcgan.generator_loss(fake, "hinge").item() == (3 - 0.25) / 2


def test_label_smoothing_is_one_sided_and_asks_for_less_than_certainty():
    loss = dcgan.discriminator_loss
    logits = torch.linspace(-6, 6, 2401)
    fake = torch.zeros(1)
    losses = torch.stack([loss(logit[None], fake, smoothing=0.1) for logit in logits])
    assert abs(logits[losses.argmin()].sigmoid().item() - 0.9) < 0.01
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert losses.min().item() == pytest.approx(entropy + math.log(2), abs=1e-4)
    gap = loss(fake, logits, smoothing=0.1) - loss(fake, logits, smoothing=0.0)
    assert abs(gap.item()) < 1e-6  # for fakes nothing changes; at logit 0 real costs ln 2 either way


def test_r1_of_a_linear_discriminator_is_the_square_of_its_slope():
    w = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    for batch in (1, 7):
        x = torch.randn(batch, 1, 2, 2, requires_grad=True)
        penalty = dcgan.r1_penalty((x.squeeze(1) * w).sum((1, 2)), x)
        assert abs(penalty.item() - 14.25) < 1e-5
    (slope,) = torch.autograd.grad(dcgan.r1_penalty((x**2).sum((1, 2, 3)), x), x)
    assert torch.allclose(slope, 8 * x / 7)  # it can be differentiated again


def test_diffaugment_is_random_for_each_picture_and_differentiable():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 16, 16).expand(64, 3, 16, 16).clone().requires_grad_()
    y = dcgan.diffaugment(x)
    assert y.shape == x.shape
    assert len({round(value, 5) for value in y.flatten(1).mean(1).tolist()}) == 64
    holes = (y == 0).all(1).flatten(1).sum(1)
    assert holes.min() >= 16  # a quarter of the picture, less what falls over its edge
    assert holes.max() <= 64 + 17
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad != 0).any(1).flatten(1).float().mean() > 0.5
    grey = dcgan.diffaugment(torch.rand(4, 1, 8, 8))
    assert grey.shape == (4, 1, 8, 8)


def diffaugment_with(monkeypatch, x, *numbers):
    """dcgan.diffaugment(x) with these for light, colour, contrast, top, left, down, right."""
    monkeypatch.setattr(torch, "rand", lambda *size, device: torch.tensor(numbers).view(7, 1, 1, 1, 1))
    return dcgan.diffaugment(x)


def test_diffaugment_moves_by_an_eighth_and_cuts_a_quarter(monkeypatch):
    x = torch.rand(1, 3, 16, 16) + 1
    y = diffaugment_with(monkeypatch, x, 0.5, 0.5, 0.5, 0.0, 0.5, 1.0, 0.0)  # neither light, colour nor contrast
    expected = x[:, :, torch.arange(2, 18).clamp(max=15)][..., torch.arange(-2, 14).clamp(min=0)]  # 2 up, 2 right
    expected[:, :, :4, 5:12] = 0  # nearer than 4 to row 0 and to column 8
    assert torch.allclose(y, expected, atol=1e-6)


def test_diffaugment_changes_light_colour_and_contrast_by_so_much(monkeypatch):
    x = torch.tensor([0.6, 0.0, 0.3]).view(1, 3, 1, 1).expand(1, 3, 16, 16)  # its mean: 0.3
    def last_pixel(*numbers):
        return diffaugment_with(monkeypatch, x, *numbers, 0.0, 0.0, 0.5, 0.5)[0, :, -1, -1]
    assert torch.allclose(last_pixel(0.9, 0.5, 0.5), torch.tensor([1.0, 0.4, 0.7]))
    assert torch.allclose(last_pixel(0.5, 0.0, 0.5), torch.tensor([0.3, 0.3, 0.3]))  # grey
    assert torch.allclose(last_pixel(0.5, 1.0, 0.5), torch.tensor([0.9, -0.3, 0.3]))  # twice as far from it
    assert torch.allclose(last_pixel(0.5, 0.5, 1.0), torch.tensor([0.75, -0.15, 0.3]))  # 1.5 times from the mean


def watched(monkeypatch, script=dcgan):
    """Record what D is fed, and the logits and losses of each step."""
    seen = {"x": [], "out": [], "loss_d": [], "loss_g": []}
    forward, loss_d, loss_g = script.Discriminator.forward, script.discriminator_loss, script.generator_loss

    def record(self, x):
        seen["x"].append(x.detach().clone())
        seen["out"].append(forward(self, x))
        return seen["out"][-1]

    monkeypatch.setattr(script.Discriminator, "forward", record)
    monkeypatch.setattr(script, "discriminator_loss", lambda *a: seen["loss_d"].append(a) or loss_d(*a))
    monkeypatch.setattr(script, "generator_loss", lambda *a: seen["loss_g"].append(a) or loss_g(*a))
    return seen


def test_flip_labels(pictures, monkeypatch):
    seen = watched(monkeypatch)
    run_on_pictures(dcgan, pictures, "all", "--max-steps", 1, "--flip-labels", 1)
    assert torch.equal(seen["loss_d"][0][0], -seen["out"][0])
    assert torch.equal(seen["loss_d"][0][1], -seen["out"][1])
    run_on_pictures(dcgan, pictures, "none", "--max-steps", 1)
    assert torch.equal(seen["loss_d"][1][0], seen["out"][3])
    run_on_pictures(dcgan, pictures, "half", "--epochs", 9, "--flip-labels", 0.5)
    real, fake = (torch.cat([a[i] for a in seen["loss_d"][2:]]) != torch.cat(seen["out"][6 + i :: 3]) for i in (0, 1))
    for flipped in (real, fake, real ^ fake):  # the labels of the fakes by themselves
        assert 0.35 < flipped.float().mean() < 0.65


def test_instance_noise_is_on_all_that_d_sees_and_falls_to_zero(pictures, monkeypatch):
    seen = watched(monkeypatch)
    flags = ["--epochs", 4, "--precision", "fp32"]
    run_on_pictures(dcgan, pictures, "r", *flags, "--instance-noise", 0.5, "--overwrite")
    real = common.load_data("folder", pictures, 8).images
    order = torch.cat([common.epoch_order(26, 8, 0, epoch) for epoch in range(4)])
    for step in (1, 6, 12):
        noise = seen["x"][3 * step - 3] - common.to_batch(real, order[step - 1])
        assert abs(noise.std().item() - 0.5 * (1 - step / 12)) < 0.02
    assert abs((seen["x"][1] - seen["x"][2]).std().item() - 0.5 * (11 / 12) * 2**0.5) < 0.04  # fresh for the G step


def test_diffaugment_is_on_all_that_d_sees(pictures, monkeypatch):
    calls = []
    monkeypatch.setattr(dcgan, "diffaugment", lambda x: calls.append(x.requires_grad) or x)
    run_on_pictures(dcgan, pictures, "r", "--max-steps", 1, "--diffaugment")
    assert calls == [False, False, True]  # real, fake, and fake with a way back to G


def test_d_steps_and_g_steps(pictures, monkeypatch):
    seen = watched(monkeypatch)
    run_on_pictures(dcgan, pictures, "r", "--epochs", 1, "--batch-size", 4, "--d-steps", 3, "--g-steps", 2)
    assert (len(seen["loss_d"]), len(seen["loss_g"])) == (6, 4)  # 24 pictures are 2 steps of 3 x 4
    assert checkpoint("r")["step"] == 2
    reals = torch.cat([x for i, x in enumerate(seen["x"]) if i % 8 in (0, 2, 4)])
    assert len(reals.flatten(1).unique(dim=0)) == 24  # each picture once
    assert torch.equal(seen["x"][6], seen["x"][5])  # the first G step judges the fakes that D has just seen
    assert not torch.equal(seen["x"][7], seen["x"][6])  # the second one new ones


def test_more_d_steps_than_pictures(pictures):
    assert run_on_pictures(dcgan, pictures, "r", "--d-steps", 50, "--max-steps", 1) == 0


def test_betas_adam_eps_and_schedule_reach_the_optimisers(script, pictures):
    flags = ["--betas", 0.1, 0.9, "--adam-eps", 0.01, "--lr-g", 0.004, "--lr-d", 0.002]
    run_on_pictures(script, pictures, "constant", "--max-steps", 1, *flags)
    run_on_pictures(script, pictures, "cosine", "--epochs", 2, "--lr-schedule", "cosine", "--max-steps", 5, *flags)
    for name, rate in (("opt_g", 0.004), ("opt_d", 0.002)):
        group = checkpoint("constant")[name]["param_groups"][0]
        assert (list(group["betas"]), group["eps"], group["lr"]) == ([0.1, 0.9], 0.01, rate)
        faded = rate * (1 + math.cos(0.8 * math.pi)) / 2  # before the last of 5 steps 4 are done
        assert checkpoint("cosine")[name]["param_groups"][0]["lr"] == pytest.approx(faded)


def test_every_step_is_clipped_and_not_only_those_that_are_logged(script, pictures, monkeypatch):
    norms, step = [], torch.optim.Adam.step

    def spy(self):
        norms.append(nn.utils.get_total_norm([p.grad for p in self.param_groups[0]["params"]]).item())
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    run_on_pictures(script, pictures, "r", "--max-steps", 2, "--log-every", 99, "--clip-grad-norm", 1e-3)
    assert len(norms) == 4
    assert 0.9e-3 < min(norms) <= max(norms) < 1.1e-3


def test_ema_averages_weights_with_a_decay_that_ramps_up(script, pictures, monkeypatch):
    steps = []
    monkeypatch.setattr(script, "save_plots", lambda *_: None)
    for n in (1, 2, 3):
        run_on_pictures(script, pictures, f"r{n}", "--max-steps", n, "--ema", 0.3)
        steps.append(checkpoint(f"r{n}"))
    for key in (key for key in steps[0]["G"] if key.endswith("weight")):
        mean = steps[0]["G"][key]
        for step, decay in ((2, 3 / 12), (3, 0.3)):  # (1 + step) / (10 + step), at most 0.3
            mean = decay * mean + (1 - decay) * steps[step - 1]["G"][key]
        assert torch.allclose(steps[2]["G_ema"][f"module.{key}"], mean, atol=1e-7)
        assert not torch.equal(mean, steps[2]["G"][key])
    run_on_pictures(script, pictures, "off", "--max-steps", 3, "--ema", 0)
    off = checkpoint("off")
    weights = [key for key in off["G"] if key.endswith(("weight", "bias"))]
    assert all(torch.equal(off["G_ema"][f"module.{key}"], off["G"][key]) for key in weights)


@pytest.mark.parametrize("script", [mlp_gan, dcgan, wgan_gp])
def test_the_averaged_g_has_batch_norm_statistics_of_its_own(script, pictures):
    run_on_pictures(script, pictures, "r", "--max-steps", 3, *(["--norm", "batch"] if script is mlp_gan else []))
    state, seen = checkpoint("r"), []
    G = AveragedModel(script.build(argparse.Namespace(**state["args"]))[0]).eval()
    G.load_state_dict(state["G_ema"])
    name, layer = next((n, m) for n, m in G.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].transpose(0, 1).flatten(1)))
    for z in state["z_fixed"].split(128):
        G(z)
    assert torch.allclose(layer.running_mean, torch.stack([x.mean(1) for x in seen]).mean(0), atol=1e-5)
    assert torch.allclose(layer.running_var, torch.stack([x.var(1) for x in seen]).mean(0), rtol=1e-4)
    of_G = state["G"][f"{name.removeprefix('module.')}.running_var"]
    assert not torch.allclose(layer.running_var, of_G, rtol=0.1)  # that begins at 1, and takes a tenth at each step


def test_r1_and_label_smoothing_and_loss_reach_the_step(pictures, monkeypatch):
    seen = watched(monkeypatch)
    run_on_pictures(dcgan, pictures, "a", "--max-steps", 1, "--loss", "hinge", "--label-smoothing", 0.2)
    assert seen["loss_d"][0][2:] == ("hinge", 0.2)
    assert seen["loss_g"][0][1:] == ("hinge",)
    weights = []
    monkeypatch.setattr(dcgan, "r1_penalty", lambda logits, x: weights.append(x.shape) or logits.sum() * 0 + 1)
    run_on_pictures(dcgan, pictures, "b", "--max-steps", 1, "--r1", 5)
    assert weights == [(8, 3, 8, 8)]
    for every, steps in (1, 7), (3, 3), (6, 2), (8, 1):  # at the first step, and so many later
        weights.clear()
        run_on_pictures(dcgan, pictures, f"c{every}", "--max-steps", 7, "--epochs", 3, "--r1", 5, "--r1-every", every)
        assert len(weights) == steps
    weights.clear()
    flags = ["--d-steps", 2, "--max-steps", 7, "--epochs", 7, "--r1", 5, "--r1-every", 3]
    run_on_pictures(dcgan, pictures, "d", *flags)
    assert len(weights) == 6  # in both updates of D, in three steps


@pytest.mark.parametrize("every", [1, 4])
def test_r1_has_half_its_weight_in_the_d_step_times_the_steps_that_it_stands_for(pictures, monkeypatch, every):
    found, slopes, built, step, build = [], [], [], torch.optim.Adam.step, dcgan.build

    def spy_step(self):
        found.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))
        return step(self)

    def penalty(logits, x):
        grads = torch.autograd.grad(logits.sum(), list(built[-1][1].parameters()), retain_graph=True)
        slopes.append(torch.cat([grad.flatten() for grad in grads]))
        return logits.sum()

    monkeypatch.setattr(torch.optim.Adam, "step", spy_step)
    monkeypatch.setattr(dcgan, "build", lambda args: built.append(build(args)) or built[-1])
    monkeypatch.setattr(dcgan, "r1_penalty", penalty)
    for weight in (0, 3):
        flags = ["--r1", weight, "--r1-every", every, "--precision", "fp32", "--init", "default", "--max-steps", 1]
        run_on_pictures(dcgan, pictures, f"r{weight}", *flags)
    (without, _, with_it, _), (slope,) = found, slopes  # D, G; D, G
    assert slope.abs().max() > 0.1
    assert torch.allclose(with_it - without, 1.5 * every * slope, atol=1e-4)


def test_r1_flattens_d_at_real_pictures(pictures):
    slopes = []
    for weight in (0, 100):
        out = f"r{weight}"
        flags = ["--epochs", 5, "--r1", weight, "--d-norm", "none", "--init", "default", "--lr-d", 0.02, "--lr-g", 0]
        run_on_pictures(dcgan, pictures, out, *flags, "--precision", "fp32")
        D = dcgan.build(argparse.Namespace(**checkpoint(out)["args"]))[1]
        D.load_state_dict(checkpoint(out)["D"])
        x = common.to_batch(common.load_data("folder", pictures, 8).images, torch.arange(24)).requires_grad_()
        slopes.append(dcgan.r1_penalty(D(x), x).item())
    assert slopes[1] < slopes[0] / 4


@pytest.mark.parametrize(
    ("script", "flags", "names"),
    [(mlp_gan, [], ["Generator", "Discriminator"]), (infogan, [], ["Generator", "Discriminator"]),
     (dcgan, [], ["Generator", "Discriminator"]), (dcgan, ["--r1", 1], ["Generator"]),
     (wgan_gp, ["--lipschitz", "clip"], ["Generator", "Critic"]), (wgan_gp, [], ["Generator"])],
)  # fmt: skip
def test_compile_wraps_both_networks_but_no_d_that_is_differentiated_twice(script, flags, names, pictures, monkeypatch):
    wrapped = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: wrapped.append(type(self).__name__))
    run_on_pictures(script, pictures, "r", "--max-steps", 1, "--compile", *flags)
    assert wrapped == names
    assert script.main(["--out", "r", "--resume", "--max-steps", "2", "--no-compile"]) == 0  # no compiler here
    assert wrapped == names


@draws_frames
def test_noise_paths_close_and_pass_through_each_z():
    z = common.fixed_noise(4 * 5, 200, 0).view(4, 5, 200)
    for kind in ("linear", "slerp", "rotation"):
        path = dcgan.noise_path(z, kind, frames=6)
        assert path.shape == (24, 5, 200)
        for leg in range(4):
            assert torch.allclose(path[6 * leg], z[leg], atol=1e-4), kind
        steps = (path.roll(-1, 0) - path).norm(dim=2)
        assert steps.max() < 3 * steps.min(), kind  # the way back to the first frame is no jump
    lengths = {kind: dcgan.noise_path(z, kind).norm(dim=2) / 200**0.5 for kind in ("linear", "slerp", "rotation")}
    assert lengths["linear"].min() < 0.8  # it cuts through the middle
    assert lengths["slerp"].min() > 0.85
    assert lengths["rotation"].min() > 0.85


@draws_gifs
def test_resume_along_another_path_changes_interpolation_gif_alone(pictures):
    run_on_pictures(dcgan, pictures, "r", "--epochs", 1)
    before, state = Path("r/interpolation.gif").read_bytes(), Path("r/checkpoint.pt").read_bytes()
    assert len(imageio.mimread("r/interpolation.gif", memtest=False)) > 20
    assert dcgan.main(["--out", "r", "--resume", "--interpolate", "linear"]) == 0
    assert Path("r/interpolation.gif").read_bytes() != before
    assert Path("r/checkpoint.pt").read_bytes() == state


def test_dcgan_gives_in_to_a_full_disk_in_one_sentence(pictures, capsys):
    run_on_pictures(dcgan, pictures, "r", "--epochs", 1)
    before = Path("r/checkpoint.pt").read_bytes()
    capsys.readouterr()
    with full_disk(len(before) // 2):
        said = refusal(capsys, dcgan.main(["--out", "r", "--resume", "--epochs", "2"]), [1])
    assert "File too large" in said
    assert Path("r/checkpoint.pt").read_bytes() == before


def test_a_full_disk_on_resume_leaves_the_log_whole(script, copy_one_step, capsys):
    copy_one_step(script)
    run = checkpoint("r")
    rows = run["log"] * 4000  # longer than a grid
    torch.save(run | {"log": rows}, "r/checkpoint.pt")
    Path("r/log.csv").write_text("\n".join(rows) + "\n")
    before = Path("r/log.csv").read_bytes()
    with full_disk(len(before) - 1):
        said = refusal(capsys, script.main(["--out", "r", "--resume", "--epochs", "2"]), [1])
    assert "File too large" in said
    assert Path("r/log.csv").read_bytes() == before


def test_overwrite_keeps_the_old_run_until_the_new_one_can_start(pictures):
    run_on_pictures(dcgan, pictures, "r", "--epochs", 1)
    assert run_on_pictures(dcgan, pictures, "r", "--overwrite", "--classes", 3) == 2
    assert run_on_pictures(dcgan, pictures, "r", "--overwrite", "--img-size", 9) == 2
    assert checkpoint("r")["step"] == 3
    assert Path("r/samples/000003.png").exists()


def test_kill_9_leaves_a_checkpoint_that_resumes(pictures):
    flags = ["--dataset", "folder", "--data-dir", pictures, "--img-size", "8", "--batch-size", "8", "--epochs", "500"]
    command = [sys.executable, str(HERE / "dcgan.py"), *TINY["dcgan"], *flags, "--out", "r"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(4)]  # one line of facts, then one an epoch
    process.kill()
    process.wait()
    assert "epoch 3/500" in lines[3]
    step = checkpoint("r")["step"]
    assert step >= 6
    assert dcgan.main(["--out", "r", "--resume", "--epochs", str(step // 3 + 1)]) == 0
    assert checkpoint("r")["step"] == step // 3 * 3 + 3


# wgan_gp.py


class Linear(nn.Module):
    """D(x) = w.x, whose slope is |w| everywhere."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        return (x * self.w).sum((1, 2, 3))


def test_gradient_penalty_of_a_linear_critic_is_the_distance_of_its_slope_from_one():
    torch.manual_seed(0)
    for scale in (0.01, 1, 3):
        w = scale * torch.randn(2, 5, 5)
        for batch in (1, 3, 64):
            x_real, x_fake = torch.randn(2, batch, 2, 5, 5)
            penalty = wgan_gp.gradient_penalty(Linear(w), x_real, x_fake)
            assert penalty.shape == ()
            assert penalty.item() == pytest.approx((w.norm().item() - 1) ** 2, rel=1e-5, abs=1e-5)


def test_the_norm_is_over_all_values_of_one_picture():
    """D(x) = sum of x^2 / 2 has the gradient x, so that the slopes are the lengths of the mixed pictures."""
    x = torch.arange(1.0, 4).view(3, 1, 1, 1).expand(3, 2, 4, 4)  # lengths 1, 2 and 3 times the root of 32
    slopes = wgan_gp.slopes(lambda x: x.square().sum((1, 2, 3)) / 2, x, x)
    assert torch.allclose(slopes, 32**0.5 * torch.arange(1.0, 4))


def test_alpha_is_one_uniform_number_a_picture():
    torch.manual_seed(0)
    seen = []

    def critic(x):
        seen.append(x.detach().clone())
        return x.sum((1, 2, 3))

    wgan_gp.gradient_penalty(critic, torch.ones(4000, 3, 2, 2), torch.zeros(4000, 3, 2, 2))
    alpha = seen[0].flatten(1)
    assert (alpha == alpha[:, :1]).all()
    alpha = alpha[:, 0].sort().values
    assert (alpha - torch.linspace(0, 1, 4000)).abs().max() < 0.04  # uniform in [0, 1]


def test_a_critic_without_slope_gives_finite_gradients():
    critic = Linear(torch.zeros(1, 4, 4))
    penalty = wgan_gp.gradient_penalty(critic, *torch.randn(2, 8, 1, 4, 4))
    penalty.backward()
    assert penalty.item() == pytest.approx(1, abs=1e-5)
    assert torch.isfinite(critic.w.grad).all()
    flat = wgan_gp.Critic(8, 1, [4, 4])
    nn.init.zeros_(flat.score.weight)
    wgan_gp.gradient_penalty(flat, *torch.randn(2, 8, 1, 8, 8)).backward()
    assert flat.score.weight.grad is not None
    assert all(torch.isfinite(p.grad).all() for p in flat.parameters() if p.grad is not None)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("slope", [0, 0.2])
def test_leaky_relu_is_that_of_torch_but_for_zeros_in_the_second_derivative(slope, inplace):
    x, ours = torch.tensor([-2.0, -0.5, 0.5, 3.0]).requires_grad_(), wgan_gp.LeakyReLU(slope, inplace)
    for dtype in (torch.float32, torch.bfloat16):
        copy = x.to(dtype, copy=True)
        y = ours(copy)
        assert y.dtype == dtype
        assert (y is copy) == inplace
        assert torch.allclose(y.float(), nn.LeakyReLU(slope)(x), rtol=0.01)
    (gradient,) = torch.autograd.grad(ours(x.clone()).sum(), x, create_graph=True)
    assert torch.allclose(gradient, torch.tensor([slope, slope, 1.0, 1.0]))
    assert not gradient.requires_grad  # it does not depend on x


@pytest.mark.parametrize("arch", ["conv", "resnet"])
def test_the_penalty_has_the_gradients_that_it_has_with_the_leaky_relu_of_torch(monkeypatch, arch):
    torch.manual_seed(0)
    D, x = wgan_gp.Critic(8, 1, [4, 8], arch=arch), torch.randn(2, 6, 1, 8, 8)
    found = []
    for forward in (wgan_gp.LeakyReLU.forward, nn.LeakyReLU.forward):
        monkeypatch.setattr(wgan_gp.LeakyReLU, "forward", forward)
        D.zero_grad()
        torch.manual_seed(1)
        wgan_gp.gradient_penalty(D, *x).backward()
        found.append([torch.zeros(()) if p.grad is None else p.grad for p in D.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_wgan_losses_against_hand_computed_numbers():
    real, fake = torch.tensor([2.0, 4.0]), torch.tensor([-1.0, 0.5])
    assert wgan_gp.critic_loss(real, fake).item() == -0.25 - 3
    assert wgan_gp.generator_loss(fake).item() == 0.25


@pytest.mark.parametrize("arch", ["conv", "resnet"])
@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("lipschitz", ["gp", "spectral"])  # clip: as gp
def test_wgan_shapes_and_no_batch_norm_in_the_critic(arch, norm, lipschitz):
    args = wgan_gp.parse_args(["--arch", arch, "--critic-norm", norm, "--lipschitz", lipschitz, "--latent-dim", "7"])
    args.img_size, args.img_channels, args.hidden_channels, args.depth = 24, 2, [3, 4, 5], 2
    G, D = wgan_gp.build(args)
    x = G(torch.randn(5, 7))
    assert x.shape == (5, 2, 24, 24)
    assert x.abs().max() <= 1
    assert D(x).shape == (5,)
    assert D(x[:1]).shape == (1,)
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in D.modules())
    assert any(isinstance(layer, nn.GroupNorm) for layer in D.modules()) == (norm == "layer")
    assert any(isinstance(layer, wgan_gp.ResBlock) for layer in [*G.modules(), *D.modules()]) == (arch == "resnet")
    D.eval()
    assert torch.allclose(D(x)[:1], D(x[:1]), atol=1e-5)  # no picture depends on the others


def test_depth_is_of_the_conv_networks_alone(pictures):
    for depth in ("1", "2"):
        flags = ["--dataset", "folder", "--data-dir", pictures, "--img-size", "16", "--max-steps", "1", "--out", depth]
        assert wgan_gp.main([*flags, "--arch", "resnet", "--depth", depth]) == 0
    one, two = (checkpoint(depth)["args"] for depth in "12")
    assert one["hidden_channels"] == two["hidden_channels"]
    assert wgan_gp.main([*flags, "--arch", "resnet", "--depth", "2", "--resume", "--max-steps", "2"]) == 0


@pytest.mark.parametrize(("script", "flags"), [(wgan_gp, ["--clip-value", "0"]), (infogan, ["--categorical", "251"])])
def test_a_critic_of_zeros_and_a_gif_too_high_are_refused(script, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(flags)
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err.splitlines()[-1]


def test_the_defaults_of_the_critic_follow_the_constraint():
    for lipschitz, norm, rate in (("gp", "none", 1e-3), ("clip", "layer", 2e-4), ("spectral", "none", 2e-4)):
        args = wgan_gp.parse_args(["--lipschitz", lipschitz])
        assert (args.critic_norm, args.lr_d) == (norm, rate)
        args = wgan_gp.parse_args(["--lipschitz", lipschitz, "--critic-norm", "none", "--lr-d", "0.5"])
        assert (args.critic_norm, args.lr_d) == ("none", 0.5)


def test_resblock_doubles_or_halves_around_its_skip_connection():
    x = torch.randn(2, 3, 8, 8)
    up = wgan_gp.ResBlock(3, 5, nn.BatchNorm2d, up=[nn.Upsample(scale_factor=2)])
    down = wgan_gp.ResBlock(3, 5, lambda channels: nn.Identity(), down=[nn.AvgPool2d(2)])
    assert up(x).shape == (2, 5, 16, 16)
    assert down(x).shape == (2, 5, 4, 4)
    assert torch.equal(down.main(-x.abs()), down.main(torch.zeros_like(x)))  # ReLU comes first
    nn.init.zeros_(down.main[5].weight)
    nn.init.zeros_(down.main[5].bias)
    assert torch.equal(down(x), down.skip(x))
    before = x.clone()
    down(x)
    assert torch.equal(x, before)  # the first ReLU must not change what the skip connection takes


def test_clipping_holds_every_weight_within_the_bound(pictures):
    run_on_pictures(wgan_gp, pictures, "r", "--max-steps", 2, "--lipschitz", "clip", "--clip-value", 0.02)
    state = checkpoint("r")
    assert max(value.abs().max() for value in state["D"].values()) <= 0.02
    assert max(value.abs().max() for value in state["G"].values()) > 0.02
    assert "square_avg" in state["opt_d"]["state"][0]  # RMSprop, as in the paper


def test_spectral_normalisation_holds_the_largest_singular_value_at_one(pictures):
    flags = ["--epochs", 20, "--lipschitz", "spectral", "--lr-d", 1e-3, "--precision", "fp32"]
    run_on_pictures(wgan_gp, pictures, "r", *flags)
    D = wgan_gp.build(argparse.Namespace(**checkpoint("r")["args"]))[1]
    D.load_state_dict(checkpoint("r")["D"])
    D.eval()
    layers = [layer for layer in D.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 3
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.1)


def test_gp_draws_the_slope_towards_one(pictures):
    flags = ["--epochs", 40, "--lr-d", 5e-3, "--lr-g", 0, "--precision", "fp32"]
    run_on_pictures(wgan_gp, pictures, "r", *flags, "--betas", 0, 0.9)
    assert 0.7 < float(log("r")[-1]["critic_grad_norm"]) < 1.3
    run_on_pictures(wgan_gp, pictures, "s", *flags, "--gp-weight", 0)
    assert float(log("s")[-1]["critic_grad_norm"]) > 3


def test_the_estimates_of_w_are_of_pictures_and_fakes_that_d_was_not_just_fitted_to(digits, monkeypatch):
    forward, seen = wgan_gp.Critic.forward, []

    def spy(self, x):
        scores = forward(self, x)
        if not self.training:
            seen.append((x, scores))
        return scores

    monkeypatch.setattr(wgan_gp.Critic, "forward", spy)
    run(wgan_gp, "--data-dir", digits, "--max-steps", 1, "--log-every", 1, "--out", "r", "--seed", 5)
    _, *seen = seen  # the first is on the way between real and fake
    (row,), images = log("r"), common.load_digits("digits", Path(digits), None, None).images
    real, held = torch.cat([scores for _, scores in seen]).view(2, 300).mean(1).tolist()
    assert float(row["wasserstein"]) == pytest.approx(real + float(row["loss_g"]), rel=1e-4)  # loss_g: of fresh z
    assert float(row["wasserstein_heldout"]) == pytest.approx(held + float(row["loss_g"]), rel=1e-4)
    order = common.epoch_order(3000, 3000, 5, 0)[0]  # the first 300 are held out
    assert torch.equal(torch.cat([x for x, _ in seen]), common.to_batch(images, order[:600].roll(300)))
    assert max(len(x) for x, _ in seen) <= 256  # all at once take ten times the memory of a batch


def test_each_step_makes_exactly_critic_steps_updates_on_fresh_noise(pictures, monkeypatch):
    seen, critic_loss, backward = [], wgan_gp.critic_loss, torch.Tensor.backward
    forward, fakes, with_gradient = wgan_gp.Generator.forward, [], []

    def record(self, z):
        fakes.append(z)
        x = forward(self, z)
        with_gradient.append(x.requires_grad)
        return x

    G_grads = []

    def spy(*scores):
        seen.append(scores)
        return critic_loss(*scores)

    def check(loss, *args):
        backward(loss, *args)
        G_grads.append(len([p for p in generators[0].parameters() if p.grad is not None and p.grad.abs().sum() > 0]))

    generators, init = [], wgan_gp.Generator.__init__
    monkeypatch.setattr(wgan_gp.Generator, "__init__", lambda self, *a: (init(self, *a), generators.append(self))[0])
    monkeypatch.setattr(wgan_gp.Generator, "forward", record)
    monkeypatch.setattr(wgan_gp, "critic_loss", spy)
    monkeypatch.setattr(torch.Tensor, "backward", check)
    flags = ["--critic-steps", 3, "--batch-size", 4, "--epochs", 1, "--log-every", 100, "--sample-every", 100]
    run_on_pictures(wgan_gp, pictures, "r", *flags)
    assert checkpoint("r")["step"] == 2  # 24 pictures for training are 2 steps of 3 x 4
    assert len(seen) == 6
    in_training = [i for i, z in enumerate(fakes) if len(z) == 4]
    assert [with_gradient[i] for i in in_training] == [False, False, False, True] * 2
    noise = torch.stack([fakes[i] for i in in_training])
    assert len(noise.flatten(1).unique(dim=0)) == 8  # fresh for each of them
    assert G_grads[:3] == [0, 0, 0]
    assert G_grads[3] > 0
    steps = {int(state["step"]) for state in checkpoint("r")["opt_d"]["state"].values()}
    assert steps == {6}


def test_each_critic_step_has_new_pictures_and_held_out_ones_are_never_trained_on(pictures, monkeypatch):
    batches, held = [], []

    def to_batch(images, index, device):
        (batches if len(index) == 8 else held).append(index.tolist())
        return common.to_batch(images, index, device)

    monkeypatch.setattr(wgan_gp, "to_batch", to_batch)
    run_on_pictures(wgan_gp, pictures, "r", "--epochs", 3, "--critic-steps", 3)
    used = set(sum(batches, []))
    assert [len(set(sum(batches[i : i + 3], []))) for i in (0, 3, 6)] == [24] * 3  # an epoch is a step of three
    assert len(used) == 24
    assert {tuple(index) for index in held} == {tuple(held[0]), tuple(held[1])}  # for the two estimates of W
    assert set(held[0]) <= used
    assert set(held[1]) == set(range(26)) - used


def test_the_logged_penalty_is_that_of_the_loss_unweighted(pictures, monkeypatch):
    monkeypatch.setattr(wgan_gp, "critic_loss", lambda real, fake: 0 * (real.sum() + fake.sum()))
    monkeypatch.setattr(wgan_gp, "slopes", lambda *_: torch.tensor([0.0, 2.0] * 4))
    run_on_pictures(wgan_gp, pictures, "r", "--max-steps", 1, "--log-every", 1)
    (row,) = log("r")
    assert [float(row[name]) for name in ("gradient_penalty", "critic_grad_norm", "loss_d")] == [1, 1, 10]


def test_the_slope_that_is_logged_does_not_go_through_the_compiled_critic(pictures, monkeypatch):
    def compiled(x):
        raise RuntimeError("compiled code cannot be differentiated twice")

    def measured(critic, x_real, x_fake):
        monkeypatch.setattr(wgan_gp.Critic, "_compiled_call_impl", compiled)
        try:
            return slopes(critic, x_real, x_fake)
        finally:
            monkeypatch.setattr(wgan_gp.Critic, "_compiled_call_impl", None)

    slopes = wgan_gp.slopes
    monkeypatch.setattr(wgan_gp, "slopes", measured)
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    assert run_on_pictures(wgan_gp, pictures, "r", "--max-steps", 1, "--compile", "--lipschitz", "clip") == 0


def test_the_penalty_in_bf16_is_that_of_fp32():
    torch.manual_seed(0)
    critic = wgan_gp.Critic(28, 1, [16, 32], 2).to(memory_format=torch.channels_last)
    x_real, x_fake = torch.rand(2, 64, 1, 28, 28) * 2 - 1
    found = {}
    for bf16 in (False, True):
        torch.manual_seed(1)
        critic.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            penalty = wgan_gp.gradient_penalty(critic, x_real, x_fake)
        penalty.backward()
        found[bf16] = penalty.item(), torch.cat([p.grad.flatten() for p in critic.parameters() if p.grad is not None])
    assert found[True][0] == pytest.approx(found[False][0], rel=0.01)
    assert torch.cosine_similarity(found[True][1], found[False][1], dim=0) > 0.99


# infogan.py


def test_infogan_shapes():
    args = infogan.parse_args(["--categorical", "3", "4", "--continuous", "2", "--latent-dim", "7"])
    args.img_size, args.img_channels, args.hidden_channels = 12, 2, [4, 5]
    assert args.hidden == 512
    G, D = infogan.build(args)
    x = G(torch.randn(5, 7 + 3 + 4 + 2))
    assert x.shape == (5, 2, 12, 12)
    assert x.abs().max() <= 1
    logits, guesses = D(x)
    assert logits.shape == (5,)
    assert guesses.shape == (5, 3 + 4 + 2 * 2)
    assert D.eval()(x[:1])[0].shape == (1,)
    assert infogan.Discriminator()(infogan.Generator()(torch.randn(5, 16 + 10 + 2)))[1].shape == (5, 10 + 2 * 2)


def test_infogan_width_defaults_to_the_image_size(digits):
    flags = ["--data-dir", digits, "--max-steps", "1", "--batch-size", "4", "--classes", "1", "--hidden", "4"]
    for size, hidden in (("28", [16, 32]), ("64", [32, 64, 128])):
        infogan.main([*flags, "--img-size", size, "--out", size])
        assert checkpoint(size)["args"]["hidden_channels"] == hidden


def test_q_can_be_surer_than_a_softmax_before_the_cross_entropy_allows():
    c = torch.eye(10)
    bound = infogan.categorical_bound(20 * c, c, [10])  # right, and sure
    assert math.log(10) - bound.item() < 1e-4  # a cross-entropy far below 1.46
    assert math.log(10) - infogan.categorical_bound((20 * c).softmax(1), c, [10]).item() > 1.46
    assert abs(infogan.categorical_bound(torch.zeros(10, 10), c, [10]).item()) < 1e-6  # a guess tells nothing
    D = infogan.Discriminator(14, 8, 1, [4, 8])
    assert isinstance(D.guess[-1], nn.Linear)
    assert D(10 * torch.randn(8, 1, 8, 8))[1].sum(1).sub(1).abs().max() > 0.01  # no probabilities


def test_the_bound_of_continuous_codes_against_hand_computed_numbers():
    c = torch.tensor([[0.5, -1.0], [0.0, 1.0]])

    def bound(mean, log_variance, variance="learned"):
        return infogan.continuous_bound(torch.cat([mean, torch.full((2, 2), log_variance)], 1), c, [], variance).item()

    assert bound(c, 0.0) == pytest.approx(2 * (math.log(2) - 0.918939), abs=1e-5)  # ln 2 - ln(2 pi) / 2 each
    assert bound(c + 0.5, 0.0) == pytest.approx(bound(c, 0.0) - 2 * 0.125, abs=1e-5)
    assert bound(c, -2.0) == pytest.approx(bound(c, 0.0) + 2, abs=1e-5)
    assert bound(c, -2.0, "fixed") == bound(c, 0.0)


def test_codes_are_uniform():
    torch.manual_seed(0)
    c = infogan.draw_codes(20_000, [4, 3], 2)
    assert c.shape == (20_000, 4 + 3 + 2)
    for one_hot, size in ((c[:, :4], 4), (c[:, 4:7], 3)):
        assert (one_hot.sum(1) == 1).all()
        assert (one_hot.mean(0) - 1 / size).abs().max() < 0.02
    for values in c[:, 7:].T:
        assert values.abs().max() <= 1
        assert (values.sort().values - torch.linspace(-1, 1, 20_000)).abs().max() < 0.03
    assert torch.corrcoef(c[:, 7:].T)[0, 1].abs() < 0.03


def test_the_codes_of_the_grid_do_not_depend_on_the_networks(pictures):
    z = []
    for width in (4, 5):
        run_on_pictures(infogan, pictures, f"r{width}", "--max-steps", 1, "--hidden-channels", width)
        z.append(checkpoint(f"r{width}")["z_fixed"])
    assert torch.equal(*z)


def test_the_bounds_split_guesses_and_codes_in_the_same_order():
    torch.manual_seed(0)
    c = infogan.draw_codes(50, [4, 3], 2)
    perfect = torch.cat([50 * c[:, :7], c[:, 7:], torch.full((50, 2), -4.0)], 1)
    assert infogan.categorical_bound(perfect, c, [4, 3]).item() == pytest.approx(math.log(4) + math.log(3), abs=1e-4)
    cont = infogan.continuous_bound(perfect, c, [4, 3], "learned").item()
    assert cont == pytest.approx(2 * (math.log(2) - 0.918939 + 2), abs=1e-4)
    assert infogan.continuous_bound(torch.zeros(50, 3), torch.zeros(50, 3), [3], "fixed") == 0  # no continuous codes


def test_the_matching_is_the_best_one():
    assert infogan.best_matching([[9, 0, 0], [0, 0, 5], [0, 7, 0]]) == (21, (0, 2, 1))
    # Taking the largest number first gives 10 + 1 + 1 = 12; the best is 9 + 9 + 1.
    assert infogan.best_matching([[10, 9, 0], [9, 1, 0], [0, 0, 1]]) == (19, (1, 0, 2))
    torch.manual_seed(0)
    for _ in range(20):
        table = torch.randint(100, (5, 5)).tolist()
        best = max(sum(table[i][j] for i, j in enumerate(p)) for p in itertools.permutations(range(5)))
        fit, labels = infogan.best_matching(table)
        assert fit == best == sum(table[i][j] for i, j in enumerate(labels))


def test_the_information_reaches_q_the_trunk_and_g_but_not_the_head_of_d():
    torch.manual_seed(0)
    G, D = infogan.Generator(20, 8, 1, [4, 8]), infogan.Discriminator(14, 8, 1, [4, 8])
    c = infogan.draw_codes(16, [10], 2)
    for bound, more in ((infogan.categorical_bound, []), (infogan.continuous_bound, ["fixed"])):
        _, guesses = D(G(torch.cat([torch.randn(16, 8), c], 1)))
        D.zero_grad(), G.zero_grad()
        bound(guesses, c, [10], *more).backward()
        for network in (G, D.trunk, D.guess):
            assert all(p.grad.abs().sum() > 0 for p in network.parameters() if p.dim() > 1)
        assert all(p.grad is None or p.grad.abs().sum() == 0 for p in D.classify.parameters())


def test_code_accuracy_is_that_of_the_first_code_on_fakes(pictures, monkeypatch):
    seen, bound = [], infogan.categorical_bound
    monkeypatch.setattr(infogan, "categorical_bound", lambda *args: seen.append(args[:2]) or bound(*args))
    flags = ["--categorical", 2, 3, "--log-every", 1, "--batch-size", 20]
    run_on_pictures(infogan, pictures, "r", "--max-steps", 3, *flags)
    for row, (guesses, c) in zip(log("r"), seen[1::2], strict=True):  # of the G step, on plain fakes
        right = guesses[:, :2].argmax(1) == c[:, :2].argmax(1)
        assert float(row["code_accuracy"]) == pytest.approx(right.float().mean().item(), abs=1e-5)


def test_the_information_is_maximised_by_its_weights_in_both_steps(pictures, monkeypatch):
    found, slopes, networks, step, build = [], [], [], torch.optim.Adam.step, infogan.build

    def spy_step(self):
        found.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))
        return step(self)

    def spy_build(args):
        networks[:] = build(args)
        return networks

    def spy_bound(bound):
        def spy(*args):
            value, (G, D) = bound(*args), networks
            turn = list(D.parameters() if D.classify.weight.requires_grad else G.parameters())
            grads = torch.autograd.grad(value, turn, retain_graph=True, materialize_grads=True)
            slopes.append(torch.cat([grad.flatten() for grad in grads]))
            return value

        return spy

    monkeypatch.setattr(torch.optim.Adam, "step", spy_step)
    monkeypatch.setattr(infogan, "build", spy_build)
    for name in ("categorical_bound", "continuous_bound"):
        monkeypatch.setattr(infogan, name, spy_bound(getattr(infogan, name)))

    def grads(cat, cont):
        found.clear(), slopes.clear()
        flags = ["--info-weight-cat", cat, "--info-weight-cont", cont, "--precision", "fp32", "--overwrite"]
        run_on_pictures(infogan, pictures, "r", "--max-steps", 1, "--lr-d", 0, *flags)  # the same D in the G step
        return list(found)

    none = grads(0, 0)
    for weights in ((1, 0), (0, 2), (3, 1)):
        both = grads(*weights)
        for i in range(2):  # the gradients of D, Q and their trunk in the D step, those of G in the G step
            cat, cont = slopes[2 * i : 2 * i + 2]
            assert min(cat.abs().max(), cont.abs().max()) > 1e-3
            assert torch.allclose(none[i] - both[i], weights[0] * cat + weights[1] * cont, atol=1e-4)


def test_augment_is_random_for_each_picture_and_differentiable():
    torch.manual_seed(0)
    x = torch.rand(1, 2, 12, 12).expand(8, 2, 12, 12).clone().requires_grad_()
    assert torch.allclose(infogan.augment(x, 0), x, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(infogan.augment(x, 0), x, atol=1e-5)
    y = infogan.augment(x, 0.25)
    assert y.shape == x.shape
    assert len({round(value, 5) for value in y.flatten(1).sum(1).tolist()}) == 8
    y.sum().backward()
    assert (x.grad != 0).float().mean() > 0.5
    assert torch.allclose(infogan.augment(torch.full((3, 1, 8, 8), -1.0), 0.5), torch.tensor(-1.0))  # no new border


def test_augment_shifts_and_scales_by_up_to_its_strength_either_way(monkeypatch):
    def augmented(x, *numbers):
        monkeypatch.setattr(torch, "rand", lambda *size, device: torch.tensor(numbers).view(1, 2, 3))
        return infogan.augment(x, 0.25)
    x = torch.rand(1, 1, 16, 16)
    y = augmented(x, 0.5, 0.5, 1.0, 0.5, 0.5, 0.0)  # 2 to the left, 2 down
    expected = x[:, :, torch.arange(-2, 14).clamp(min=0)][..., torch.arange(2, 18).clamp(max=15)]
    assert torch.allclose(y, expected, atol=1e-5)
    ramp = (torch.arange(16) - 7.5).expand(1, 1, 16, 16)
    assert torch.allclose(augmented(ramp, 0.0, 0.5, 0.5, 0.5, 0.5, 0.5), 0.75 * ramp, atol=1e-5)
    assert torch.allclose(augmented(ramp, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5), (1.25 * ramp).clamp(-7.5, 7.5), atol=1e-5)
    slanted = augmented(ramp, 0.5, 1.0, 0.5, 0.5, 0.5, 0.5)
    assert torch.allclose(slanted, (ramp + 0.25 * ramp.mT).clamp(-7.5, 7.5), atol=1e-5)


def test_q_learns_categories_from_distorted_fakes_and_tells_g_of_clean_ones(pictures, monkeypatch):
    seen, guesses = [], []
    cat, cont = infogan.categorical_bound, infogan.continuous_bound
    monkeypatch.setattr(infogan, "augment", lambda x, strength: seen.append((len(x), strength)) or x * 0)
    monkeypatch.setattr(infogan, "categorical_bound", lambda g, *rest: guesses.append(g.detach()) or cat(g, *rest))
    monkeypatch.setattr(infogan, "continuous_bound", lambda g, *rest: guesses.append(g.detach()) or cont(g, *rest))
    run_on_pictures(infogan, pictures, "r", "--max-steps", 1, "--augment", 0.1)
    assert seen == [(8, 0.1)]  # in the D step alone
    far, near, in_g, also_in_g = guesses
    assert (far == far[0]).all()  # all of the same picture, a grey one
    assert len(near.unique(dim=0)) == 8
    assert len(in_g.unique(dim=0)) == 8
    assert torch.equal(in_g, also_in_g)


def confident(monkeypatch, table):
    """A D whose Q says category table[label] for a picture that is filled with its label."""

    def forward(self, x):
        label = ((x[:, 0, 0, 0] + 1) * 127.5).round().long()
        return x[:, 0, 0, 0], torch.cat([nn.functional.one_hot(table[label], 10), torch.zeros(len(x), 4)], 1).float()

    monkeypatch.setattr(infogan.Discriminator, "forward", forward)
    return infogan.Discriminator()


@draws_axes
def test_cluster_error_and_its_table(tmp_path, monkeypatch):
    labels = torch.arange(10).repeat(20)
    data = common.Data(labels.byte().view(-1, 1, 1, 1).expand(-1, 1, 28, 28), labels)
    shown, args = [], infogan.parse_args(["--out", str(tmp_path)])

    def imshow(self, values, cmap, aspect, vmin, vmax):
        shown.append(values)
        red, green, blue, _ = matplotlib.colormaps[cmap]((1 - vmin) / (vmax - vmin))
        assert 0.2 * red + 0.7 * green + 0.1 * blue > 0.35  # black text can be read on the darkest cell

    monkeypatch.setattr("matplotlib.axes.Axes.imshow", imshow)
    table = (torch.arange(10) + 3) % 10
    assert infogan.measure(confident(monkeypatch, table), data, *[torch.arange(200)] * 2, args, "cpu") == 0
    assert (shown[0] == np.eye(10)[(np.arange(10) - 3) % 10]).all()  # all of label 0 in category 3, ...
    table[7] = table[1]  # two digits in one category
    error = infogan.measure(confident(monkeypatch, table), data, *[torch.arange(200)] * 2, args, "cpu")
    assert error == pytest.approx(0.1)
    assert (shown[1].sum(0) == 1).all()  # each label is whole, wherever it went
    assert sorted(shown[1].sum(1)) == [0, *[1] * 8, 2]
    data = data._replace(labels=None)
    assert math.isnan(infogan.measure(confident(monkeypatch, table), data, *[torch.arange(9)] * 2, args, "cpu"))


@draws_axes
def test_a_category_beyond_the_labels_is_not_called_a_label(tmp_path, monkeypatch):
    labels, rows = torch.arange(10).repeat(20), []
    data = common.Data(labels.byte().view(-1, 1, 1, 1).expand(-1, 1, 28, 28), labels)
    monkeypatch.setattr("matplotlib.axes.Axes.set_yticklabels", lambda self, labels, **kwargs: rows.extend(labels))
    args = infogan.parse_args(["--out", str(tmp_path), "--categorical", "12"])
    infogan.measure(confident(monkeypatch, torch.arange(10)), data, *[torch.arange(200)] * 2, args, "cpu")
    assert rows == [*(f"category {k}: {k}" for k in range(10)), "category 10: -", "category 11: -"]


@pytest.mark.parametrize("size, label", [(10, 16), (17, 9)])
def test_with_over_sixteen_categories_or_labels_nothing_is_measured(size, label):
    args = infogan.parse_args(["--categorical", str(size)])
    assert math.isnan(infogan.measure(None, common.Data(None, torch.tensor([label])), [], [], args, "cpu"))


def test_infogans_average_copies_batch_norm_statistics(pictures):
    run_on_pictures(infogan, pictures, "r", "--max-steps", 3)
    state = checkpoint("r")
    buffers = [key for key in state["G"] if "running" in key]
    assert buffers
    assert all(torch.equal(state["G_ema"][f"module.{key}"], state["G"][key]) for key in buffers)


def test_what_codes_mean_is_measured_with_an_average_of_d(pictures, monkeypatch):
    measured, steps = [], []
    monkeypatch.setattr(infogan, "measure", lambda D, *_: measured.append(D.module.guess[0].weight.clone()) or 0.0)
    for n in (1, 2):
        run_on_pictures(infogan, pictures, f"r{n}", "--max-steps", n)
        steps.append(checkpoint(f"r{n}"))
    one, two = (step["D"]["guess.0.weight"] for step in steps)
    mean = 3 / 12 * one + 9 / 12 * two  # (1 + step) / (10 + step)
    assert not torch.allclose(mean, two, atol=1e-5)
    assert torch.allclose(measured[-1], mean, atol=1e-7)
    assert torch.equal(measured[-1], steps[1]["D_ema"]["module.guess.0.weight"])


def test_a_resumed_run_logs_the_error_that_was_measured_last(digits, monkeypatch):
    monkeypatch.setattr(infogan, "measure", lambda *_: next(errors))
    flags = ["--data-dir", digits, "--log-every", 10, "--batch-size", 26]  # 103 steps an epoch
    for out, steps in (("whole", 110), ("parts", 105)):
        errors = iter([0.9, 0.5, 0.4])  # before the first step, after the first epoch, at the end
        run(infogan, *flags, "--max-steps", steps, "--out", out)
    errors = iter([0.3])
    assert infogan.main(["--out", "parts", "--resume", "--max-steps", "110"]) == 0
    same_run("whole", "parts")
    first, *_, last = log("whole")
    assert (first["cluster_error"], last["cluster_error"]) == ("0.9", "0.5")


def test_q_meets_real_pictures_with_their_own_batch_norm_statistics(digits):
    data, D = common.load_data("digits", digits), infogan.Discriminator().eval()
    D(torch.randn(64, 1, 28, 28))  # fakes
    infogan.measure(D, data, torch.arange(900, 2000), torch.arange(300), infogan.parse_args(["--out", "."]), "cpu")
    seen = D.trunk[:3](common.to_batch(data.images, torch.arange(900, 1412)))
    assert torch.allclose(D.trunk[3].running_mean, seen.mean((0, 2, 3)), atol=1e-5)
    assert not D.training


def test_a_run_measures_the_average_of_d_in_eval_mode_on_pictures_that_are_not_trained_on(pictures, monkeypatch):
    modes, sets, used = [], [], set()

    def measure(D, data, training, held_out, *_):
        modes.append((D.training, isinstance(D, AveragedModel)))
        sets.append((set(training.tolist()), set(held_out.tolist())))
        return 0.5

    def to_batch(images, index, device):
        used.update(index.tolist())
        return common.to_batch(images, index, device)

    monkeypatch.setattr(infogan, "measure", measure)
    monkeypatch.setattr(infogan, "to_batch", to_batch)
    run_on_pictures(infogan, pictures, "r", "--epochs", 35)  # of 3 steps each
    assert modes == [(False, True)] * 3  # before the first step, at step 102, and at the end
    assert sets == [(used, set(range(26)) - used)] * 3
    assert len(used) == 24


@draws_axes
def test_the_codes_of_the_digits_are_compared_with_their_factors(digits, monkeypatch):
    shown, texts = [], []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda self, r, **kwargs: shown.append(r))
    monkeypatch.setattr("matplotlib.axes.Axes.text", lambda self, *at, **kwargs: texts.append(at))
    data = common.load_data("digits", digits)
    factor = data.factors["slant"]

    def forward(self, x):
        n = len(x)
        means = torch.stack([-((factor[forward.at : forward.at + n]) ** 3), torch.randn(n)], 1)
        forward.at += n * (not self.training)
        return x[:, 0, 0, 0], torch.cat([torch.zeros(n, 10), means, torch.zeros(n, 2)], 1)

    forward.at = 0
    monkeypatch.setattr(infogan.Discriminator, "forward", forward)
    args = infogan.parse_args(["--out", "."])
    infogan.measure(infogan.Discriminator().eval(), data, torch.arange(9), torch.arange(2000), args, "cpu")
    names, r = list(data.factors), shown[1]
    assert r.shape == (2, len(names))
    assert r[0, names.index("slant")] == pytest.approx(1, abs=1e-4)  # any falling curve is a rank correlation of 1
    assert r[0, names.index("rotation")] < 0.1
    assert r[1].max() < 0.1
    cells = [(column, row, f"{value:.2f}") for (row, column), value in np.ndenumerate(r) if value >= 0.005]
    assert texts[-len(cells) :] == cells


@pytest.fixture
def sampled(frames, monkeypatch):
    """What infogan's G is given to draw."""
    seen = []

    def sample(G, z):
        seen.append(z)
        return torch.zeros(len(z), 1, 28, 28, dtype=torch.uint8)

    monkeypatch.setattr(infogan, "sample", sample)
    return seen


def test_each_sweep_of_a_traversal_moves_one_number(sampled):
    infogan.save_traversals(None, infogan.parse_args(["--out", "."]), "cpu")
    numbers = [z[:, -2:] for z in sampled]  # of the categories' block, the first sweep, its 24 frames, the second
    sweep, rest = torch.linspace(-2, 2, 9).repeat(10), torch.zeros(90)  # a row of 9 for each of 10 categories
    assert torch.equal(numbers[0], torch.zeros(90, 2))
    assert torch.equal(numbers[1], torch.stack([sweep, rest], 1))
    assert torch.equal(numbers[26], torch.stack([rest, sweep], 1))
    assert max(frame[:, 0].max().item() for frame in numbers[2:26]) == pytest.approx(2)
    assert not torch.cat(numbers[2:26])[:, 1].any()


def test_the_traversal_of_a_categorical_code_moves_it_alone(sampled):
    infogan.save_traversals(None, infogan.parse_args(["--out", ".", "--categorical", "3", "4"]), "cpu")
    first, second = (z[:, 16:23].split([3, 4], 1) for z in sampled[:2])  # one-hot codes of two blocks
    row = torch.arange(4)[:, None].expand(4, 9).flatten()
    assert torch.equal(first[0].argmax(1), row[:27])
    assert torch.equal(second[1].argmax(1), row)
    assert not first[1].argmax(1).any() and not second[0].argmax(1).any()  # the other stays at category 0


def test_the_sample_grid_has_a_category_a_row(pictures):
    run_on_pictures(infogan, pictures, "r", "--max-steps", 1)
    z = checkpoint("r")["z_fixed"].view(10, 8, -1)
    assert torch.equal(z[:, :, 8:18].argmax(2), torch.arange(10).view(10, 1).expand(10, 8))
    others = torch.cat([z[..., :8], z[..., 18:]], 2)
    assert len(others.flatten(0, 1).unique(dim=0)) == 80
    assert z[..., 18:].abs().max() <= 1


@draws_plots
@draws_gifs
@pytest.mark.parametrize(
    ("flags", "n"),
    [(["--categorical", 3, 2, "--continuous", 1, "--continuous-variance", "learned"], 24), (["--continuous", 0], 0)],
)
def test_infogan_traversals_for_any_codes(pictures, flags, n):
    assert run_on_pictures(infogan, pictures, "r", "--max-steps", 1, *flags) == 0
    assert infogan.main(["--out", "r", "--sample", "3"]) == 0
    assert imageio.imread("r/traversal.png").shape[1] > 300
    assert Path("r/traversal.gif").exists() == (n > 0)
    assert not n or len(imageio.mimread("r/traversal.gif", memtest=False)) == n


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
    for centre, shift in ((centre_x, "shift_x"), (centre_y, "shift_y")):
        variances = torch.stack([centre, data.factors[shift]]).cov()
        assert variances[0, 1] / variances[1, 1] == pytest.approx(1, abs=0.1)  # in pixels
    assert correlation(mass, data.factors["thickness"]) > 0.6
    assert correlation((x > 60).any(2).sum(1).float(), data.factors["scale"]) > 0.6
    lean = ((x * (place - centre_x[:, None])[:, None, :] * (place - centre_y[:, None])[:, :, None]).sum((1, 2))) / mass
    assert correlation(lean, data.factors["rotation"]) < -0.3  # clockwise: the top goes right
    assert correlation(lean, data.factors["slant"]) < -0.3


def test_rotation_is_in_degrees_and_slant_a_shear(monkeypatch):
    def moments(rotation=0.5, slant=0.5):
        """Variance of x, of y (downwards), and covariance of the ink, for factors from 0, the least, to 1."""
        factors = torch.tensor([rotation, slant, 0.5, 0.5, 0.5, 0.5])[:, None].expand(6, 300)
        monkeypatch.setattr(torch, "rand", lambda *_, **__: factors)
        ink = common.render_digits(300, 0).images.double().squeeze(1)
        ink, place = ink / ink.sum((1, 2), keepdim=True), torch.arange(28.0).double()
        x, y = (place - (ink.sum(dim) @ place)[:, None] for dim in (1, 2))  # from the centre
        return (ink.sum(1) * x**2).sum(1), (ink.sum(2) * y**2).sum(1), (ink * x[:, None] * y[:, :, None]).sum((1, 2))

    def angle(x, y, xy):
        return 90 / math.pi * torch.atan2(2 * xy, x - y)  # of the long axis

    plain, turned, slanted = moments(), moments(rotation=1), moments(slant=1)
    turn = (angle(*turned) - angle(*plain)).remainder(180)
    assert turn.median().item() == pytest.approx(15, abs=1)
    shear = (slanted[2] - plain[2]) / plain[1]
    assert shear.median().item() == pytest.approx(-0.3, abs=0.03)  # the top goes right


def test_digits_are_cached_and_a_damaged_cache_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "render_digits", lambda n, seed, render=common.render_digits: render(100, seed))
    one = common.load_data("digits", tmp_path)
    (cache,) = (tmp_path / "digits").iterdir()
    cache.write_bytes(b"damaged")
    assert torch.equal(common.load_data("digits", tmp_path).images, one.images)
    assert cache.stat().st_size > 100
    monkeypatch.setattr(common, "render_digits", None)
    assert torch.equal(common.load_data("digits", tmp_path).factors["slant"], one.factors["slant"])


def test_a_folder_that_cannot_keep_the_digits_costs_no_run(monkeypatch):
    render = common.render_digits
    monkeypatch.setattr(common, "render_digits", lambda n, seed: render(20, seed))
    Path("file").write_text("")
    assert len(common.load_data("digits", "file").images) == 20


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allocate in other ways")
def test_freed_memory_is_kept_for_the_next_step(digits):
    code = f"""
import resource, sys; sys.path.insert(0, {str(HERE)!r})
import common, torch
common.load_data("digits", {digits!r})
faults = []
for size in range(15, 30):  # MB; each is larger than all before: glibc as it is would ask the system for 4,000 pages
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size * 2**18)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[len(faults) // 2])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2000


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
    files = {"train-images-idx3": x, "train-labels-idx1": y, "t10k-images-idx3": x[:2], "t10k-labels-idx1": [5, 9]}
    for name, array in files.items():
        content = gzip.compress(idx(array)) if packed else idx(array)
        (folder / (name + "-ubyte" + ".gz" * packed)).write_bytes(content)
    data = common.load_data("mnist", tmp_path)
    assert data.images.shape == (4, 1, 28, 28)
    assert np.array_equal(data.images.squeeze(1).numpy(), x)
    assert data.labels.tolist() == y
    assert score.load_test("mnist", tmp_path).labels.tolist() == [5, 9]  # what no script trains on
    assert set("".join(map(str, score.load_test("stacked-mnist", tmp_path).labels.tolist()))) == {"5", "9"}


SIGNED = b"\x00\x00\x09\x01\x00\x00\x00\x01\xff"  # one int8


@pytest.mark.parametrize("content", [b"", idx([[1, 2]])[:-1], gzip.compress(b"x" * 999)[:20], b"\0\0\x0d\x01", SIGNED])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"])
def test_a_damaged_idx_file_is_named(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(common.Fault, match=f"{name} is damaged"):
        common.load_data("mnist", tmp_path)


@pytest.mark.parametrize(("images", "labels"), [((3, 28, 20), 3), ((3, 28, 28), 2), ((3, 784), 3)])
def test_idx_files_that_are_no_mnist_are_refused(tmp_path, images, labels):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros(images)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(labels)))
    with pytest.raises(common.Fault, match="28x28"):
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
        if url == "https://broken":
            raise http.client.IncompleteRead(b"half")  # no OSError
        return Answer({"https://b": b"wrong", "https://c": b"right"}[url])

    monkeypatch.setattr(common.urllib.request, "urlopen", urlopen)
    md5 = "7c4f29407893c334a6cb7a87bf045c0d"  # of b"right"
    urls = ["https://a", "https://broken", "https://b", "https://c"]
    common.download(urls, tmp_path / "new" / "file", [], md5)
    assert asked == urls
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
    for words in (
        str(tmp_path),
        "--data-dir",
        "--dataset digits",
        "no network",
        common.MIRRORS[dataset],
        "amazonaws.com",
    ):
        assert words in said


def test_fashion_mnist_of_debian_is_not_taken_for_mnist(tmp_path, monkeypatch):
    (tmp_path / "fashion-mnist").mkdir()
    monkeypatch.setattr(common, "Path", lambda path: Path(str(path).replace("/usr/share/datasets", str(tmp_path))))
    asked = []
    monkeypatch.setattr(common, "download", lambda urls, path, places, md5: asked.append(places))
    monkeypatch.setattr(common, "read_idx", lambda path: torch.zeros(2, *[28, 28] * ("images" in path.name)))
    for dataset, found in (("mnist", False), ("fashion", True)):
        asked.clear()
        common.load_data(dataset, tmp_path / "data")
        assert (tmp_path / "fashion-mnist" in asked[0]) == found


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


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])  # screenshots are often RGBA, and all opaque
def test_folder_pads_what_is_transparent_and_crops_what_is_not(tmp_path, mode):
    wide = Image.new(mode, (30, 10), "black")
    wide.paste("white", (10, 0, 20, 10))
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


def test_sixteen_bit_and_rotated_pictures(tmp_path):
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "deep.png")
    photo = Image.new("RGB", (8, 8))
    photo.paste((255, 255, 255), (0, 0, 8, 4))  # white above
    exif = photo.getexif()
    exif[0x0112] = 3  # the camera was upside down
    photo.save(tmp_path / "photo.png", exif=exif)
    deep, turned = common.load_data("folder", tmp_path, img_size=8).images
    assert (deep == 128).all()
    assert (turned[0, :4] == 0).all()


def test_a_memory_mapped_run_equals_a_resident_one(pictures, monkeypatch):
    shutil.copytree(pictures, "copy")
    run_on_pictures(dcgan, "copy", "resident", "--epochs", 2)
    monkeypatch.setattr(common, "RESIDENT", 0)
    run_on_pictures(dcgan, "copy", "mapped", "--epochs", 2)
    same_run("resident", "mapped")
    (cache,) = Path("copy").glob("decoded-*")
    monkeypatch.setattr(common, "decode", None)  # the second time nothing is decoded
    assert common.load_data("folder", "copy", 8).images.shape == (26, 3, 8, 8)


@pytest.mark.parametrize("damaged", [b"", bytes(100), bytes(4 * 26 * 8 * 8)])
def test_a_decoded_file_of_another_size_is_decoded_anew(pictures, monkeypatch, damaged):
    monkeypatch.setattr(common, "RESIDENT", 0)
    shutil.copytree(pictures, "copy")
    images = common.load_data("folder", "copy", 8).images.clone()
    (cache,) = Path("copy").glob("decoded-*")
    cache.write_bytes(damaged)
    assert common.load_data("folder", "copy", 8).images.equal(images)


def test_the_decoded_file_is_keyed_by_what_went_in_and_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESIDENT", 0)
    for i in range(3):
        Image.new("L", (8, 8), 80 * i).save(tmp_path / f"{i}.png")
    assert common.load_data("folder", tmp_path, 8).images.shape == (3, 1, 8, 8)
    common.load_data("folder", tmp_path, 4)
    Image.new("RGB", (8, 8), (9, 0, 0)).save(tmp_path / "3.bmp")
    assert common.load_data("folder", tmp_path, 8).images.shape == (4, 3, 8, 8)
    assert len(list(tmp_path.glob("decoded-*.raw"))) == 3
    common.load_data("folder", os.path.relpath(tmp_path), 8)
    assert len(list(tmp_path.glob("decoded-*.raw"))) == 3
    Image.new("RGB", (8, 8), (0, 99, 0)).save(tmp_path / "3.bmp")  # as large as the picture that it replaces
    os.utime(tmp_path / "3.bmp", (1, 1))
    assert common.load_data("folder", tmp_path, 8).images[3, 1].float().mean() == 99
    common.load_data("folder", tmp_path, 8, background="black")
    assert len(list(tmp_path.glob("decoded-*.raw"))) == 5
    (tmp_path / "4.png").write_bytes(b"damaged")
    with pytest.raises(common.Fault, match="4.png"):
        common.load_data("folder", tmp_path, 8)
    assert len(list(tmp_path.glob("decoded-*.raw"))) == 5


@pytest.mark.parametrize("dataset", ["celeba", "lsun"])
def test_celeba_and_lsun_say_where_to_put_the_pictures_and_read_them(tmp_path, capsys, dataset):
    flags = ["--dataset", dataset, "--data-dir", tmp_path / "d", "--img-size", 8, "--max-steps", 1]
    said = refusal(capsys, run(dcgan, *flags), [1])
    assert f"d/{dataset}" in said
    assert {"celeba": "img_align_celeba", "lsun": "the pictures of a category"}[dataset] in said
    mixed_pictures(tmp_path / "d" / dataset)
    assert run(dcgan, *flags, "--out", "r") == 0


def test_stacked_mnist(tmp_path):
    x, y = np.stack([np.full((28, 28), 20 * n) for n in range(10)]), np.arange(10)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(x))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(y))
    data = common.load_data("stacked-mnist", tmp_path)
    assert data.images.shape == (128_000, 3, 28, 28)
    digits = data.images[:, :, 0, 0].long() // 20
    assert torch.equal(data.labels, digits[:, 0] * 100 + digits[:, 1] * 10 + digits[:, 2])
    assert len(data.labels.unique()) == 1000
    assert torch.equal(data.labels, common.load_data("stacked-mnist", tmp_path).labels)


def test_pokemon_reads_regular_sprites_on_the_background(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "pokesprite-c5aaa610ff2acdf7fd8e2dccd181bca8be9fcb3e.zip", "w") as archive:
        for name in ("regular/a", "regular/female/b", "shiny/c"):
            sprite = Image.new("RGBA", (68, 56), (255, 0, 0, 0))
            sprite.putpixel((34, 28), (0, 0, 0, 255))
            with archive.open(f"pokesprite-x/pokemon-gen8/{name}.png", "w") as file:
                sprite.save(file, "png")
    images = common.load_data("pokemon", tmp_path, background="#00ff00").images
    assert images.shape == (2, 3, 64, 64)
    black = (images[0] == 0).all(0)
    assert black.nonzero().tolist() == [[32, 32]]  # pixel by pixel, without a blur
    assert (images[0][:, ~black] == torch.tensor([[0], [255], [0]])).all()
    (path,) = tmp_path.glob("*.zip")
    whole = bytearray(path.read_bytes())
    whole[90] ^= 255  # within the first sprite
    path.write_bytes(whole)
    assert f"{path} is damaged: delete" in refusal(capsys, run(dcgan, "--dataset", "pokemon", "--data-dir", tmp_path))
    path.write_bytes(path.read_bytes()[:100])
    assert "pokesprite" in refusal(capsys, run(dcgan, "--dataset", "pokemon", "--data-dir", tmp_path), [1])
    zipfile.ZipFile(path, "w").close()  # without sprites
    assert "pokesprite" in refusal(capsys, run(dcgan, "--dataset", "pokemon", "--data-dir", tmp_path), [1])


def test_cifar10(tmp_path, monkeypatch, capsys):
    class Cifar:
        filename = "cifar-10-python.tar.gz"
        data = np.arange(2 * 32 * 32 * 3).reshape(2, 32, 32, 3).astype(np.uint8)
        targets = [3, 9]

        def __init__(self, root, train, download):
            self.targets = self.targets if train else [1, 2]
            assert socket.getdefaulttimeout() == 20  # without one a dead mirror is waited for for ever
            if self.data is None:
                raise RuntimeError("no network")

    socket.setdefaulttimeout(None)
    monkeypatch.setattr(common, "CIFAR10", Cifar)
    data = common.load_data("cifar10", tmp_path)
    assert data.images.shape == (2, 3, 32, 32)
    assert data.images[0, :, 0, 0].tolist() == [0, 1, 2]
    assert data.labels.tolist() == [3, 9]
    assert score.load_test("cifar10", tmp_path).labels.tolist() == [1, 2]
    Cifar.data = None
    said = refusal(capsys, run(dcgan, "--dataset", "cifar10", "--data-dir", tmp_path), [1])
    assert "no network" in said
    assert "--dataset digits" in said


def test_one_picture_is_too_few(tmp_path, capsys):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert "1 pictures" in refusal(capsys, run(dcgan, "--dataset", "folder", "--data-dir", tmp_path), [1])


def test_reading_many_pictures_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(common, "read_picture", lambda *_: torch.zeros(3, 1, 1, dtype=torch.uint8))
    assert len(common.decode(["x"] * 25_000, 1, None, io.BytesIO()).getvalue()) == 25_000
    lines = ["10,000 of 25,000 pictures read", "20,000 of 25,000 pictures read"]
    assert capsys.readouterr().out.splitlines() == lines


def test_epoch_order_is_a_shuffle_that_depends_on_seed_and_epoch_alone():
    order = common.epoch_order(10, 3, seed=1, epoch=2)
    torch.manual_seed(99)
    common.epoch_order.cache_clear()  # or it is the same tensor
    assert torch.equal(order, common.epoch_order(10, 3, seed=1, epoch=2))
    assert order.shape == (3, 3)
    assert len(set(order.flatten().tolist())) == 9
    assert not torch.equal(order, common.epoch_order(10, 3, seed=1, epoch=3))
    assert not torch.equal(order, common.epoch_order(10, 3, seed=2, epoch=2))
    orders = {str(common.epoch_order(10, 3, *pair)) for pair in itertools.product((0, 1), range(50))}
    assert len(orders) == 100  # nor on their sum


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
    G.register_forward_hook(lambda *_: grad_enabled.append(torch.is_grad_enabled()))
    grad_enabled = []
    together = common.sample(G, z)
    assert grad_enabled == [False]
    assert together.dtype == torch.uint8
    assert G.training
    for name, value in G.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(common.sample(G, z[:1]), together[:1])  # no picture depends on the others
    G.eval()
    common.sample(G, z)
    assert not G.training


def test_smaller_pictures_are_means_of_all_that_they_cover(monkeypatch):
    stripes = torch.tensor([255, 0, 0, 255] * 7, dtype=torch.uint8).expand(3, 1, 28, 28)  # two neighbours alone: black
    monkeypatch.setitem(common.DATASETS, "digits", lambda *_: common.Data(stripes))
    small = common.load_data("digits", img_size=7).images
    assert small.shape == (3, 1, 7, 7)
    assert ((small.float() - 127.5).abs() < 40).all()


def test_pictures_are_on_the_device_unless_they_are_many(monkeypatch):
    monkeypatch.setitem(common.DATASETS, "digits", lambda *_: common.Data(torch.zeros(3, 1, 8, 8, dtype=torch.uint8)))
    assert common.load_data("digits", device="meta").images.device.type == "meta"
    monkeypatch.setattr(common, "RESIDENT", 3 * 64 - 1)
    assert common.load_data("digits", device="meta").images.device.type == "cpu"


def test_samples_are_rounded_to_the_nearest_shade_and_never_wrap_around():
    z = torch.tensor([-1.01, -1.0, -0.999, 0.0, 0.999, 1.0, 1.01]).view(7, 1, 1, 1)
    assert common.sample(nn.Identity(), z).flatten().tolist() == [0, 0, 0, 128, 255, 255, 255]
    assert common.sample(nn.Identity(), torch.zeros(600, 1, 2, 2)).shape == (600, 1, 2, 2)


def test_a_grid_is_never_rescaled():
    flat = torch.full((4, 1, 28, 28), 100, dtype=torch.uint8)
    picture = common.grid(flat)
    assert set(np.unique(picture)) == {96, 100}
    assert (picture == 100).sum() == 4 * 3 * 56 * 56  # small images twice as large


# bench/score.py


def test_frechet_distance_of_gaussians_has_its_closed_form():
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(20_000, 4, generator=rng, dtype=torch.float64)
    assert abs(score.frechet(a, a)) < 1e-6
    assert score.frechet(a, a + 2) == pytest.approx(16, rel=1e-6)  # a shift of 2 in each of 4 dimensions
    spread = sum(a.var(0)).item()
    assert score.frechet(a, 3 * a) == pytest.approx(4 * spread + 4 * a.mean(0).square().sum().item(), rel=1e-6)
    b = a[:, :2] @ torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=torch.float64)  # its axes are not those of a
    a = a[:, :2] * torch.tensor([3.0, 1.0])
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = ((cov_a @ cov_b).trace() + 2 * (cov_a.det() * cov_b.det()).sqrt()).sqrt()  # tr (A B)^(1/2) of 2x2
    expected = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root
    assert score.frechet(a, b) == pytest.approx(expected.item(), rel=1e-6)


def test_kid_of_a_set_against_itself_is_about_zero():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4000, 8, generator=rng)
    mean, error = score.kid(a, b, blocks=20)
    assert abs(mean) < 5 * error + 0.01
    assert abs(score.kid(a, a, blocks=20)[0]) < 5 * error + 0.01
    assert score.kid(a, b + 1, blocks=20)[0] > 20 * abs(mean)


@pytest.mark.filterwarnings("ignore:std")  # of one block there is no standard error
def test_kid_of_two_pairs_is_what_it_is_by_hand():
    for unit in (1, 2):  # mean x.x of real images is unit^2; of features in this unit the kernel is (x.y + 1)^3
        fake, real = torch.tensor([[0.0], [2.0]]) * unit, torch.tensor([[1.0], [1.0]]) * unit
        assert score.kid(fake, real)[0] == pytest.approx(1 + 8 - 2 * (1 + 27) / 2)


def test_the_standard_error_of_kid_is_how_far_it_varies():
    rng = torch.Generator().manual_seed(0)
    found = np.array([score.kid(*torch.randn(2, 400, 4, generator=rng), blocks=10) for _ in range(100)])
    assert found[:, 0].std() == pytest.approx(found[:, 1].mean(), rel=0.3)


def test_precision_and_recall():
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(500, 4, generator=rng)
    assert score.precision_recall(a, a) == (1, 1)
    assert score.precision_recall(a, a + 100) == (0, 0)
    precision, recall = score.precision_recall(a, a[:1].repeat(500, 1) + 1e-4 * torch.randn(500, 4, generator=rng))
    assert precision == 1  # one mode, a real one
    assert recall < 0.05
    real, fake = torch.arange(0.0, 50, 10)[:, None], torch.arange(65.0, 69)[:, None]
    assert score.precision_recall(real, fake) == (1, 0)  # 25 to 28 from 40, whose third neighbour, 10, is 30 away
    assert score.precision_recall(real, fake + 10) == (0, 0)


def test_the_balance_and_the_modes_of_a_hand_made_set():
    expected = torch.tensor([0] * 50 + [1] * 50)
    assert score.balance(torch.tensor([0] * 50 + [1] * 50), expected, 2) == (0, 2)
    kl, classes = score.balance(torch.tensor([0] * 100), expected, 2)
    assert kl == pytest.approx(math.log(2))
    few = torch.randint(80, (500,), generator=torch.Generator().manual_seed(0))
    assert score.balance(few, few, 1000)[0] < 0.01  # also where most classes are empty
    assert classes == 1
    assert score.balance(torch.tensor([0] * 198 + [1] * 2), expected, 2)[1] == 2  # a class has 1 label in 100
    assert score.balance(torch.tensor([0] * 199 + [1] * 1), expected, 2)[1] == 1
    modes = torch.tensor([0, 0, 7, 999])
    assert score.balance(modes, torch.arange(1000), 1000)[1] == 3
    rare = torch.tensor([0] * 500 + [1])  # one picture makes a mode, but no class
    assert score.balance(rare, torch.arange(1000), 1000)[1] == 2
    assert score.balance(rare, torch.arange(10), 10)[1] == 1


@pytest.fixture(scope="session")
def rendered():
    return common.render_digits(400, seed=0), common.render_digits(300, seed=1)


@pytest.fixture
def few_digits(rendered, monkeypatch):
    """The scripts and score.py see 400 digits to train on and 300 others."""
    train, test = rendered
    for module in (mlp_gan, dcgan, wgan_gp, infogan, score):
        monkeypatch.setattr(module, "load_data", lambda *_: train)
    monkeypatch.setattr(score, "load_test", lambda *_: test)
    score.reference.cache_clear()


def scores(folder):
    with open(Path(folder) / "score.csv") as file:
        return list(csv.DictReader(file))


@draws_axes
@pytest.mark.parametrize("script", [mlp_gan, infogan])  # without codes, and with
def test_score_runs_end_to_end_on_a_one_step_run(script, few_digits):
    run(script, "--max-steps", 1, "--out", "r")
    assert score.main(["r", "--samples", "100", "--sanity"]) == 0
    rows = scores("r")
    assert list(rows[0]) == score.COLUMNS
    assert [row["epoch"] for row in rows] == ["0", "real", "blurred", "noise"]
    fd = [float(row["fd"]) for row in rows]
    assert fd[1] == float(rows[0]["fd_floor"])
    assert fd[1] < fd[2] < fd[3]
    assert fd[1] < fd[0]
    assert [float(row["kl"]) < 0.1 for row in rows[1:]] == [True, True, False]
    assert imageio.imread("r/nearest.png").shape[1] == imageio.imread("r/real.png").shape[1]
    assert Path("r/score.png").exists()
    one, two = (score.draw("r/checkpoint.pt", 9)[0] for _ in range(2))
    assert torch.equal(one, two)


def test_score_compares_with_the_data_of_the_run_or_with_those_that_dataset_names(pictures, monkeypatch):
    flags = ["--dataset", "folder", "--data-dir", pictures, "--img-size", 8, "--background", "red", "--out", "r"]
    run(mlp_gan, *flags, "--max-steps", 1)
    flags = json.loads(Path("r/args.json").read_text())
    Path("r/args.json").write_text(json.dumps(flags | {"classes": [1, 2]}))
    asked = []

    def reference(*args):
        asked.append(args)
        raise common.Fault("asked")

    monkeypatch.setattr(score, "reference", reference)
    for more in ([], ["--dataset", "mnist"], ["--dataset", "mnist", "--data-dir", "d", "--features", "inception"]):
        assert score.main(["r", *more]) == 1
    assert asked[0] == ("folder", pictures, 8, (1, 2), "red", False)
    assert asked[1:] == [("mnist", "data", 8, (), "white", False), ("mnist", "d", 8, (), "white", True)]


def test_score_of_stacked_digits_counts_modes_of_26_000_samples(monkeypatch):
    shades = (torch.arange(10) * 255 // 9).byte().view(10, 1, 1, 1).expand(-1, 1, 8, 8)  # a picture for each digit
    digits = common.Data(shades, torch.arange(10))
    monkeypatch.setitem(score.DATASETS, "mnist", lambda *_, **__: digits)
    triples = torch.cartesian_prod(*[torch.arange(10)] * 3)
    train = common.Data(shades[triples].squeeze(2), triples @ torch.tensor([100, 10, 1]))
    for module in (mlp_gan, score):
        monkeypatch.setattr(module, "load_data", lambda *_: train)
    monkeypatch.setattr(score, "load_classifier", lambda *_: nearest_shade())
    monkeypatch.setattr(score, "precision_recall", lambda *_: (0.5, 0.5))  # of 10,000, which takes seconds
    score.reference.cache_clear()
    run(mlp_gan, "--dataset", "stacked-mnist", "--max-steps", 1, "--out", "r")
    (samples, _), asked, draw = score.draw("r/checkpoint.pt", 26_000), [], score.draw
    monkeypatch.setattr(score, "draw", lambda path, n: asked.append(n) or draw(path, n))
    assert score.main(["r"]) == 0
    assert asked == [26_000]
    (row,), labels = scores("r"), score.extract(nearest_shade(), samples)[1]
    assert int(row["classes"]) == len(labels.unique())
    modes = train.labels.unique()
    assert float(row["kl"]) == pytest.approx(score.balance(labels, modes, 1000)[0], rel=1e-3)
    assert len(score.reference("stacked-mnist", "data", 8, (), "white", False).held) == 26_000
    monkeypatch.setattr(score, "load_data", lambda *_: common.Data(train.images[:2], modes[:2]))  # of two classes
    few = score.reference("stacked-mnist", "data", 8, (0, 1), "white", False).labels
    assert score.balance(torch.tensor([0, 1]), few, 1000)[0] < 1e-3


def test_score_draws_no_more_samples_than_there_are_training_images(few_digits, monkeypatch):
    run(mlp_gan, "--max-steps", 1, "--out", "r")
    asked, draw = [], score.draw
    monkeypatch.setattr(score, "draw", lambda path, n: asked.append(n) or draw(path, n))
    assert score.main(["r"]) == 0
    assert asked == [400]  # so that fd_floor is of as many


def test_precision_and_recall_do_not_depend_on_the_order_of_the_pictures(tmp_path):
    eyes = nearest_shade()
    images = torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(300).view(600, 1, 1, 1).expand(-1, 3, 8, 8)
    held, labels = score.extract(eyes, images)
    known = {"train": images, "seen": held, "held": held, "labels": labels, "order": torch.arange(600), "classes": 1000}
    for some in (images[::2], images[:400], images[200:]):  # both are in each, sorted; the first 300 of held are alike
        rows = []
        score.score(some, "pictures", argparse.Namespace(eyes=eyes, **known), rows, tmp_path)
        assert rows[0][5:7] == [1, 1]
    score.score(images[:300], "pictures", argparse.Namespace(eyes=eyes, **known), rows, tmp_path)  # of one kind alone
    assert rows[-1][5] == 1
    assert 0.4 < rows[-1][6] < 0.6


def test_ctrl_c_ends_watching_as_it_should_and_scoring_as_a_fault(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(score, "score_folder", interrupted)
    assert (score.main(["r", "--watch"]), score.main(["r"])) == (0, 1)


def test_score_of_snapshots_of_folders_and_of_several_runs(few_digits, capsys):
    run(mlp_gan, "--epochs", 2, "--snapshot-every", 1, "--out", "r")
    mlp_gan.main(["--out", "r", "--sample", "120"])
    assert score.main(["r", "--samples", "100", "--snapshots"]) == 0
    rows = scores("r")
    assert [row["epoch"] for row in rows] == ["1", "2", "2"]
    assert rows[1] == rows[2]  # the snapshot of the last epoch is the average in the checkpoint
    best = min(rows, key=lambda row: float(row["fd"]))["epoch"]
    assert f"best: epoch {best}" in capsys.readouterr().out
    assert score.main(["r/generated", "--dataset", "digits"]) == 0
    (pictures,) = scores("r/generated")
    assert pictures["epoch"] == "pictures"
    assert 0.5 < float(pictures["fd"]) / float(rows[2]["fd"]) < 2  # other samples of the same G
    assert score.main(["r", "r/generated", "--dataset", "digits", "--samples", "100"]) == 0
    low, high = sorted([float(rows[2]["fd"]), float(pictures["fd"])])
    told = re.search(r"fd: mean (\S+), from (\S+) to (\S+)", capsys.readouterr().out).groups()
    assert [float(value) for value in told] == pytest.approx([(low + high) / 2, low, high], rel=1e-3)


@draws_axes
def test_the_plot_of_scores_shows_a_kernel_distance_below_0(few_digits, monkeypatch):
    drawn = []

    class Seen(Figure):
        def savefig(self, *_, **__):
            drawn.extend(self.axes)

    monkeypatch.setattr(score, "Figure", Seen)
    monkeypatch.setattr(score, "kid", lambda *_: (-0.01, 0.001))
    run(mlp_gan, "--max-steps", 1, "--out", "r")
    assert score.main(["r", "--samples", "100", "--sanity"]) == 0  # which adds to the table, not to the plot
    fd, kid, share, _ = (axes.get_ylim()[0] for axes in drawn)
    assert (fd, share) == (0, 0)
    assert kid < -0.01
    samples, expected = ([bar.get_height() for bar in bars] for bars in drawn[3].containers)
    assert [sum(samples), sum(expected)] == pytest.approx([1, 1])
    assert sum(share >= 0.01 for share in samples) == int(scores("r")[0]["classes"]) < len(samples) == 10
    assert all(axes.get_xlabel() and axes.get_ylabel() and axes.get_title() for axes in drawn)


def test_score_watches_a_training(few_digits, monkeypatch):
    run(mlp_gan, "--epochs", 1, "--snapshot-every", 1, "--out", "r")
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 2:
            raise KeyboardInterrupt
        mlp_gan.main([*TINY["mlp_gan"], "--out", "r", "--resume", "--epochs", "2"])

    monkeypatch.setattr(score.time, "sleep", sleep)
    assert score.main(["r", "--samples", "100", "--watch"]) == 0
    assert [row["epoch"] for row in scores("r")] == ["1", "2"]


def test_score_without_labels_asks_for_inception_and_says_where_its_weights_are_missing(pictures, monkeypatch, capsys):
    run_on_pictures(mlp_gan, pictures, "r", "--max-steps", 1)
    capsys.readouterr()
    assert "--features inception" in refusal(capsys, score.main(["r"]), [1])

    for error in (OSError("no network"), RuntimeError("invalid hash value")):
        monkeypatch.setattr(score, "inception_v3", Mock(side_effect=error))
        assert "cannot be downloaded" in refusal(capsys, score.main(["r", "--features", "inception"]), [1])

    class Net(nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.fc = nn.Linear(3, 1000)

        def forward(self, x):
            assert x.shape[1:] == (3, 299, 299)
            return self.fc(x.mean((2, 3)))

    monkeypatch.setattr(score, "inception_v3", Net)
    assert score.main(["r", "--features", "inception", "--samples", "13"]) == 0
    assert float(scores("r")[0]["fd"]) > float(scores("r")[0]["fd_floor"]) > 1e-6  # the floor is of the other half
    train = common.load_data("folder", pictures, 8)
    monkeypatch.setattr(score, "load_data", lambda *_: train._replace(images=train.images[:6]))  # 3 are held out
    score.reference.cache_clear()
    assert "3 real ones" in refusal(capsys, score.main(["r", "--features", "inception"]), [1])


def test_score_says_what_it_cannot_score(few_digits, capsys):
    assert "name runs" in refusal(capsys, score.main([]), [2])
    assert "--dataset" in refusal(capsys, score.main(["empty"]), [2])
    assert "nosuch holds no saved run" in refusal(capsys, score.main(["nosuch", "--dataset", "digits"]), [2])
    run(mlp_gan, "--max-steps", 1, "--out", "r")
    capsys.readouterr()
    for flag in ("--watch", "--snapshots"):
        assert "--snapshot-every" in refusal(capsys, score.main(["r", flag]), [2])
    for flags in (["r", "--samples", "3"], ["r", "--samples", "-5"], ["r", "r", "--watch"], ["--sanity", "--watch"]):
        assert "4 or more" in refusal(capsys, score.main(flags), [2])
    Path("few").mkdir()
    Image.new("L", (28, 28)).save("few/1.png")
    assert "4 pictures" in refusal(capsys, score.main(["few", "--dataset", "digits"]), [1])
    Path("few/args.json").write_text("{")
    assert "--dataset" in refusal(capsys, score.main(["few"]), [2])
    Path("r/checkpoint.pt").write_bytes(b"damaged")
    assert "checkpoint.pt" in refusal(capsys, score.main(["r"]), [1])
    Path("r/args.json").rename("r/args.txt")  # or losses.png and the grids would be scored
    assert "r holds no saved run" in refusal(capsys, score.main(["r", "--dataset", "digits"]), [2])
    Path("r/args.txt").rename("r/args.json")
    Path("r/checkpoint.pt").unlink()  # told before a classifier is trained
    assert "r holds no saved run" in refusal(capsys, score.main(["r"]), [2])


def test_score_of_a_folder_does_not_read_its_own_pictures_and_makes_colours_grey(few_digits):
    Path("all/p").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in (*range(20), "score", "nearest"):
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), np.uint8)).save(f"all/p/{i}.png")
    assert score.main(["all/p", "--dataset", "digits"]) == 0
    first = scores("all/p")
    assert Path("p-nearest.png").exists()
    assert score.main(["all/p", "--dataset", "digits"]) == 0
    assert scores("all/p") == first
    assert len(list(Path("all").rglob("*.png"))) == 22  # none was taken away, none put where pictures are


def test_score_shows_the_nearest_training_images_first(few_digits, rendered):
    common.save_pictures(Path("p"), rendered[0].images[:20])
    assert score.main(["p", "--dataset", "digits"]) == 0
    cell = np.asarray(imageio.imread("p-nearest.png"), float)[4:-4, 4:-4]  # without the outer frame
    side = 2 * 28 + 4  # a picture and the frame to the next
    for row in range(8):
        for column in range(0, 8, 4):
            left = cell[row * side : row * side + 56, column * side :]
            shown, nearest, *farther = (left[:, i * side : i * side + 56] for i in range(4))
            assert (shown == nearest).all()  # it is a training image
            assert all((shown != other).any() for other in farther)


def test_score_keeps_to_the_classes_of_the_run(few_digits, rendered, monkeypatch):
    train, test = rendered
    few = torch.isin(train.labels, torch.tensor([3, 7]))
    monkeypatch.setattr(score, "load_data", lambda *_: common.Data(train.images[few], train.labels[few]))
    eyes = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 28), nn.Flatten()), nn.Linear(2, 10)).requires_grad_(False)
    monkeypatch.setattr(score, "load_classifier", lambda *_: eyes)
    real = score.reference("digits", "data", None, (3, 7), "white", False)
    assert len(real.held) == torch.isin(test.labels, torch.tensor([3, 7])).sum()
    assert real.order.sort().values.tolist() == list(range(int(few.sum()))) != real.order.tolist()  # sorted data, too


def nearest_shade():
    """A classifier of stacked pictures, each filled with one of 10 shades."""
    brightness = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())  # -1 to 1 for the digits 0 to 9
    digit = nn.Linear(1, 10).requires_grad_(False)
    digit.weight.data = torch.linspace(-1, 1, 10)[:, None]  # the digit of nearest brightness has the highest logit
    digit.bias.data = -digit.weight.data.squeeze(1) ** 2 / 2
    return nn.Sequential(brightness, digit)


def test_the_classifier_of_stacked_digits_reads_each_channel():
    images = torch.tensor([[3, 0, 7], [9, 9, 1]])[:, :, None, None].expand(-1, -1, 4, 4) * 255 // 9
    features, labels = score.extract(nearest_shade(), images.byte())
    assert features.shape == (2, 3)
    assert labels.tolist() == [307, 991]


# bench/speed.py


@pytest.mark.parametrize("name", ["wgan_gp", "infogan"])
def test_speed_runs_the_script_and_what_it_is_compared_with(name):
    data = common.Data(torch.randint(256, (200, 1, 28, 28), dtype=torch.uint8))
    found = speed.measure(name, " ".join(TINY[name]), data, steps=2, rounds=1)
    assert list(found) == ["bf16", "fp32"]
    for (ratio,), (ready,), (over,), (adam,), (speed_of_it,) in found.values():
        assert min(ratio, ready, speed_of_it) > 0
        assert math.isfinite(over + adam)  # differences: below 0 if the machine was busy


def test_the_columns_of_speed(monkeypatch):
    args = wgan_gp.parse_args([*TINY["wgan_gp"], "--critic-steps", "5", "--batch-size", "10"])
    args.img_size, args.img_channels = 8, 1
    monkeypatch.setattr(speed, "run_script", lambda *_: (2.0, args))
    took = Mock(side_effect=[6.0, 4.0, 1.0, 1.25, 0.5, 0.75])  # plain, batch ready, bound, with Adam; the last in fp32
    monkeypatch.setattr(speed, "seconds", took)
    found = speed.measure("wgan_gp", "", common.Data(torch.zeros(20, 1, 8, 8, dtype=torch.uint8)), steps=1, rounds=1)
    assert found["bf16"] == [(3.0,), (2.0,), (0.75,), (0.25,), (25.0,)]
    assert found["fp32"] == [(3.0,), (2.0,), (2.5,), (0.5,), (25.0,)]


def test_a_step_is_timed_from_one_loss_to_the_next_without_the_first(monkeypatch):
    monkeypatch.setattr(speed, "time", Mock(perf_counter=Mock(side_effect=[0, 100, 101, 102])))
    data = common.Data(torch.zeros(200, 1, 8, 8, dtype=torch.uint8))
    took, args = speed.run_script(mlp_gan, TINY["mlp_gan"], data, steps=2)
    assert took == 1
    assert args.batch_size == 64


@pytest.mark.parametrize("critic_steps", [1, 3])
def test_the_steps_that_are_timed(critic_steps):
    calls, G, D = [], nn.Linear(2, 3), nn.Linear(3, 1)

    def loss_d(D, real, fake):
        calls.append(("D", D.weight.requires_grad, fake.requires_grad))
        return [D(real).mean(), D(fake).mean()]

    def loss_g(D, fake):
        calls.append(("G", D.weight.requires_grad, fake.requires_grad))
        return D(fake).mean()

    class Optimiser:
        def __init__(self, name):
            self.zero_grad, self.step = (lambda: None), lambda: calls.append(f"{name} updated")

    def draw(*size):
        return lambda: torch.randn(*size)

    parts = draw(4, 3), draw(4, 2), loss_d, loss_g, critic_steps
    speed.plain_step(G, D, Optimiser("G"), Optimiser("D"), *parts)
    assert calls == [("D", True, False), "D updated"] * critic_steps + [("G", True, True), "G updated"]
    calls.clear()
    updated = []
    parts = draw(4, 3)(), draw(4, 2)(), loss_d, loss_g, critic_steps, contextlib.nullcontext, updated.append
    speed.bound_step(G, D, *parts)
    assert calls == [("D", True, False)] * critic_steps + [("G", False, True)]  # D's weights are frozen
    assert updated == [D] * critic_steps + [G]
    assert all(p.grad.abs().sum() > 0 for p in [*G.parameters(), *D.parameters()])


def test_the_plain_loop_upsamples_and_convolves_in_two_layers_and_copies_nothing(monkeypatch):
    seen, copied = [], []
    monkeypatch.setattr(speed, "plain_step", lambda G, D, *_: seen.extend([G, D]))
    data = common.Data(torch.zeros(64, 1, 28, 28, dtype=torch.uint8))
    speed.measure("dcgan", " ".join([*TINY["dcgan"], "--upsample nearest"]), data, steps=1, rounds=1)
    assert "Conv2d" in kinds(seen[0])
    assert "UpsampleConv2d" not in kinds(seen[0])
    for layer in [*seen[0], *seen[1]]:
        if type(layer).__name__ in ("Permute", "Flatten", "Unflatten"):
            layer.register_forward_hook(lambda _, inputs, y: copied.append(y.data_ptr() != inputs[0].data_ptr()))
    x = seen[0](torch.randn(2, next(seen[0].parameters()).shape[1]))
    assert x.shape == (2, 1, 28, 28)
    assert seen[1](x).shape == (2,)
    assert copied == [False] * 5


def test_the_plain_loop_has_the_penalties_of_the_script():
    x_real, x_fake = torch.rand(2, 4, 1, 8, 8) * 2 - 1
    for script, flags in ((wgan_gp, ["--gp-weight", "7"]), (dcgan, ["--r1", "3", "--init", "default"])):
        args = script.parse_args([*TINY[script.__name__], *flags])
        args.img_size, args.img_channels = 8, 1
        _, D = script.build(args)
        loss_d, loss_g = speed.losses(script, args)
        torch.manual_seed(1)
        found = sum(loss_d(D, x_real.clone(), x_fake)).item()
        torch.manual_seed(1)
        if script is wgan_gp:
            expected = wgan_gp.critic_loss(D(x_real), D(x_fake)) + 7 * wgan_gp.gradient_penalty(D, x_real, x_fake)
            assert loss_g(D, x_fake).item() == pytest.approx(wgan_gp.generator_loss(D(x_fake)).item(), rel=1e-5)
        else:
            x = x_real.clone().requires_grad_()
            logits = D(x)
            expected = dcgan.discriminator_loss(logits, D(x_fake)) + 1.5 * dcgan.r1_penalty(logits, x)
            args.r1_every = 3
            loss_d, _ = speed.losses(script, args)
            thrice, *rest = (sum(loss_d(D, x_real.clone(), x_fake)).item() for _ in range(3))
            assert rest == pytest.approx([dcgan.discriminator_loss(logits, D(x_fake)).item()] * 2, rel=1e-5)
            assert thrice - rest[0] == pytest.approx(3 * (found - rest[0]), rel=1e-4)
        assert found == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["mlp_gan", "dcgan", "infogan"])
def test_the_plain_loop_has_the_losses_of_the_script(name, monkeypatch):
    script = importlib.import_module(name)
    args = script.parse_args([*TINY[name]])
    args.img_size, args.img_channels = 8, 1
    torch.manual_seed(0)
    _, D = (network.eval() for network in script.build(args))
    x_real, x_fake = torch.rand(2, 4, 1, 8, 8) * 2 - 1
    loss_d, loss_g = speed.losses(script, args)
    if name == "infogan":
        monkeypatch.setattr(script, "categorical_bound", lambda *_: torch.tensor(2.0))
        monkeypatch.setattr(script, "continuous_bound", lambda *_: torch.tensor(-3.0))
        args.c, bound = None, 2 * args.info_weight_cat - 3 * args.info_weight_cont
        monkeypatch.setattr(script, "augment", Mock(wraps=script.augment))
        logits_real, logits_fake = D(x_real)[0], D(x_fake)[0]
    else:
        logits_real, logits_fake, bound = D(x_real), D(x_fake), 0
    expected = script.discriminator_loss(logits_real, logits_fake).item() - bound
    assert sum(loss_d(D, x_real, x_fake)).item() == pytest.approx(expected, rel=1e-5)
    assert loss_g(D, x_fake).item() == pytest.approx(script.generator_loss(logits_fake).item() - bound, rel=1e-5)
    if name == "infogan":
        script.augment.assert_called_once()  # for the category in D's step


@pytest.mark.parametrize("kind", ["resident", "mapped"])
def test_the_pictures_that_are_timed_are_where_the_table_says(tmp_path, kind):
    images = speed.load_size(2000, kind, tmp_path).images
    assert images.shape == (2000, 1, 28, 28)
    assert torch.equal(images[:1000], images[1000:])
    images[0] = 7
    assert not (np.fromfile(tmp_path / "2000", np.uint8)[:784] == 7).all()  # never written to
    if sys.platform != "linux":
        pytest.skip("/proc is Linux's")
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path / "2000") in line]
    assert len(mapped) == (kind == "mapped")


@pytest.mark.parametrize(("flags", "word"), [(["--rounds", "0"], "--rounds"), (["--data"], "--scripts")])
def test_speed_refuses_what_it_cannot_measure(flags, word, monkeypatch, capsys):
    monkeypatch.setattr(Path, "exists", lambda self: False)  # no /proc
    monkeypatch.setattr(speed, "table_of_sizes", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        speed.main(flags)
    assert stop.value.code == 2
    assert word in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak memory is read from /proc")
def test_the_tables_of_speed(monkeypatch, capsys):
    monkeypatch.setattr(speed, "ROWS", {"a title": ("mlp_gan", "--hidden 4 8", 60)})

    def in_this_process(command, **_):
        assert command[:2] == [sys.executable, speed.__file__]
        said = f"{speed.measure_memory(int(command[3]), command[4], int(command[5])):.1f}\n"
        return subprocess.CompletedProcess(command, 0, stdout=said)

    monkeypatch.setattr(speed.subprocess, "run", in_this_process)
    speed.main(["--quick"])
    scripts, sizes = capsys.readouterr().out.strip().split("\n\n")
    head, _, *rows = (line.strip("| ").split(" | ") for line in scripts.splitlines())
    assert [row[:2] for row in rows] == [["a title", "bf16"], ["a title", "fp32"]]
    for row in rows:
        assert len(row) == len(head) == 7
        assert float(row[2].replace(",", "")) > 0  # images/s
        assert re.fullmatch(r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)", row[3])
        assert re.fullmatch(r"-?\d+% \(-?\d+% to -?\d+%\)", row[5])
    head, _, *rows = (line.strip("| ").split(" | ") for line in sizes.splitlines())
    assert [row[:2] for row in rows] == [["1,000", "resident"], ["1,000", "mapped"]]
    assert rows[0][3] == "1.00 (1.00 to 1.00)"
    for row in rows:
        assert len(row) == len(head) == 5
        assert 50 < float(row[4].replace(",", "")) < 100_000  # MB: PyTorch alone takes some hundreds


# README.md


class Parsed(Exception):
    """The flags were understood."""


def test_every_command_in_the_readme_parses(monkeypatch):
    text = (HERE / "README.md").read_text()
    blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    lines = [line.removeprefix("OMP_NUM_THREADS=1 ") for line in lines]
    commands = [line for line in lines if re.match(r"python [\w/]+\.py", line)]
    assert len(commands) >= 15
    commands += [line for line in re.findall(r"`(python [\w/]+\.py[^`]*)`", text) if "--help" not in line]
    parse = argparse.ArgumentParser.parse_args

    def parse_only(*args):
        parse(*args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    for command in commands:
        _, path, *flags = shlex.split(command)
        with pytest.raises(Parsed):
            importlib.import_module(path.removesuffix(".py").replace("/", ".")).main(flags)


def test_the_readme_counts_the_lines_of_each_script(script):
    row = re.search(rf"^\| `{script.__name__}.py` \| \[.*", (HERE / "README.md").read_text(), re.MULTILINE)[0]
    assert row.split(" | ")[3] == str(len(Path(script.__file__).read_text().splitlines()))


def test_the_docstring_commands_parse(script):
    text = re.sub(r"\\\n +", "", script.__doc__)
    commands = re.findall(r"^ +python \w+\.py(.*?)(?:#.*)?$", text, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        script.parse_args(shlex.split(command))


def test_the_docstring_says_what_changes_from_the_script_before_and_from_the_paper(script):
    parts = ["arXiv ", " maximise", f"python {script.__name__}.py --dataset mnist --epochs 20"]
    before = {"dcgan": "mlp_gan", "wgan_gp": "dcgan", "infogan": "dcgan"}.get(script.__name__)
    parts += [f"What changes from {before}.py: "] * bool(before) + ["Where this differs from the paper"]
    places = [script.__doc__.find(part) for part in parts]
    assert -1 not in places and places == sorted(places)
