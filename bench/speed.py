"""How fast is a step of each script? Beside a plain loop, beside its own bound, and for more and more data.

    python bench/speed.py            # both tables, in Markdown
    python bench/speed.py --quick    # a few steps of each: that it works, not how fast it is
    python bench/speed.py --scripts  # the first table alone
    python bench/speed.py --data     # the second alone

First table. The script runs as it is, main() and all, on random pictures; samples, plots and checkpoints are not made.
The time of a step is that from one G loss to the next, after a few (with a row of the log if a round has 48). The plain
loop has the same networks, losses and size of batch, written as tutorials write it: contiguous float32, nn.Upsample
before a convolution, a backward pass for each of D's losses, D's weight gradients in the G step, G's graph in the D
step, Adam by default, .item() on each loss, pictures from a DataLoader with ToTensor and Normalize; or, in a column of
its own, a batch that lies ready. The bound is the forward and backward passes of the script's networks alone, in its
layout and precision, on fixed z and x: no optimiser, noise or logging. Adam is what the optimisers' steps add to it;
time over the bound is the rest. All of a row are timed in turn in one process, the ratios taken round by round.

Second table. dcgan.py on N pictures of 28x28, resident and in a memory-mapped file that has just been written, and lies
in memory if there is room: the time of a step, all in turn in one process; the peak memory, in a process each (Linux).
"""
import argparse
import importlib
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.ops import Permute
from torchvision.transforms import Compose, Normalize, ToTensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import Data  # noqa: E402

ROWS = {  # the script, its flags, steps a round: a multiple of --r1-every
    "mlp_gan": ("mlp_gan", "", 150),
    "dcgan": ("dcgan", "", 60),
    "dcgan, one convolution, 64 128": ("dcgan", "--depth 1 --hidden-channels 64 128", 30),
    "dcgan, nearest, 32x32": ("dcgan", "--img-size 32 --depth 1 --upsample nearest --hidden-channels 64 128", 20),
    "dcgan, strongest": ("dcgan", "--hidden-channels 32 64 --upsample nearest --d-norm none --r1 0.5 --r1-every 4", 20),
    "the same, R1 each step": ("dcgan", "--hidden-channels 32 64 --upsample nearest --d-norm none --r1 0.5", 20),
    "wgan_gp": ("wgan_gp", "", 48),  # long enough for a row of its log, which is dear
    "wgan_gp, one convolution, 64 128, batch 64": ("wgan_gp", "--depth 1 --hidden-channels 64 128 --batch-size 64", 8),
    "infogan": ("infogan", "", 30),
}
QUIET = ["save_plots", "save_history", "save_gif", "save_png", "save_atomically", "save_traversals", "sample", "grid"]
QUIET += ["update_bn", "print"]
WARM = 3  # steps that are not timed; fewer if there are not as many that are

def run_script(script, flags, data, steps):
    """Seconds of a step of script.main() on data, a Data; and the flags that it ran with."""
    times, loss, build, warm = [], script.generator_loss, Mock(wraps=script.build), min(WARM, steps)
    def timed_loss(*args):
        times.append(time.perf_counter())
        return loss(*args)
    torch.empty(31 * 2**20, dtype=torch.uint8)  # as load_data() does, which is not called here
    fakes = {"generator_loss": timed_loss, "build": build, "load_data": lambda *_: data}
    quiet = dict.fromkeys(QUIET, lambda *_, **__: None)
    with tempfile.TemporaryDirectory() as out, patch.multiple(script, create=True, **fakes, **quiet):
        if script.main([*flags, "--device", "cpu", "--max-steps", str(steps + warm), "--out", out]):
            raise RuntimeError(f"{script.__name__} {flags} did not run")
    return (times[-1] - times[warm - 1]) / steps, build.call_args.args[0]

def losses(script, args):
    """The losses of a script as functions of D and pictures: of D, a list to be summed; of G."""
    def label(logits, value):
        return nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, value))
    turns = cycle([getattr(args, "r1_every", 1)] + [0] * (getattr(args, "r1_every", 1) - 1))  # how strong R1 is
    def real_fake(D, real, fake):
        r1 = getattr(args, "r1", 0) * next(turns)
        real = real.detach().requires_grad_(r1 > 0)
        logits = D(real).float()
        penalty = r1 / 2 * script.r1_penalty(logits, real) if r1 else 0
        return [label(logits, 1) + penalty, label(D(fake).float(), 0)]
    def critic(D, real, fake):
        return [D(fake).mean() - D(real).mean() + args.gp_weight * script.gradient_penalty(D, real, fake)]
    def bound(far, guesses):
        cat = script.categorical_bound(far, args.c, args.categorical)
        cont = script.continuous_bound(guesses, args.c, args.categorical, args.continuous_variance)
        return args.info_weight_cat * cat + args.info_weight_cont * cont
    def info_d(D, real, fake):
        (logits, guesses), (_, far) = D(fake), D(script.augment(fake, args.augment))
        return [label(D(real)[0], 1), label(logits, 0) - bound(far, guesses)]
    def info_g(D, fake):
        logits, guesses = D(fake)
        return label(logits, 1) - bound(guesses, guesses)
    if script.__name__ == "wgan_gp":
        return critic, lambda D, fake: -D(fake).mean()
    if script.__name__ == "infogan":
        return info_d, info_g
    return real_fake, lambda D, fake: label(D(fake).float(), 1)

def batches(images, batch_size):
    """Batches (B, 1, H, W) in [-1, 1] as tutorials get them: each picture by itself goes through the transforms."""
    transform = Compose([Image.fromarray, ToTensor(), Normalize(0.5, 0.5)])
    collate = {"collate_fn": lambda rows: torch.stack([transform(row) for row in rows])}
    loader = DataLoader(images[:, 0].numpy(), batch_size, shuffle=True, drop_last=True, **collate)
    while True:
        yield from loader

def plain_step(G, D, opt_g, opt_d, new_x, new_z, loss_d, loss_g, critic_steps):
    """One step as tutorials write it."""
    for _ in range(critic_steps):
        x = new_x()
        opt_d.zero_grad()
        fake = G(new_z())
        for loss in loss_d(D, x, fake.detach()):
            loss.backward(), loss.item()
        opt_d.step()
    opt_g.zero_grad()
    loss = loss_g(D, G(new_z()) if critic_steps > 1 else fake)
    loss.backward(), loss.item()
    opt_g.step()

def bound_step(G, D, x, z, loss_d, loss_g, critic_steps, cast, update):
    """The forward and backward passes of a step of the script; and nothing else, but for what update(net) does."""
    G.zero_grad(), D.requires_grad_(True)
    for _ in range(critic_steps):
        D.zero_grad()
        with cast(), torch.set_grad_enabled(critic_steps == 1):
            fake = G(z)
        with cast():
            loss = sum(loss_d(D, x.detach(), fake.detach()))
        loss.backward()
        update(D)
    D.requires_grad_(False)
    with cast():
        loss = loss_g(D, G(z) if critic_steps > 1 else fake)
    loss.backward()
    update(G)

def seconds(step, steps):
    """Of one step, the first few apart."""
    for _ in range(min(WARM, steps)):
        step()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - started) / steps

def measure(name, flags, data, steps, rounds):
    """For each precision, tuples over the rounds: plain / script, plain with a ready batch / script, the rest / bound,
    Adam / bound, images a second."""
    script, found = importlib.import_module(name), {}
    for _ in range(rounds):
        for precision in ("bf16", "fp32"):
            took, args = run_script(script, [*flags.split(), "--precision", precision], data, steps)
            batch, critic_steps = args.batch_size, getattr(args, "critic_steps", 1)
            x, c = torch.rand(batch, *data.images.shape[1:]) * 2 - 1, torch.empty(batch, 0)
            args.c = script.draw_codes(batch, args.categorical, args.continuous) if name == "infogan" else c
            new_z = lambda: torch.cat([torch.randn(batch, args.latent_dim), args.c], 1)  # noqa: B023, E731
            loss_d, loss_g = losses(script, args)
            if precision == "bf16":
                G, D = script.build(args)
                for layer in [*G.modules(), *D.modules()]:
                    if isinstance(layer, Permute):  # tutorials order these numbers so that nothing is copied
                        layer.register_forward_hook(lambda _, inputs, output: inputs[0].reshape(output.shape))
                    if isinstance(layer, nn.LeakyReLU):  # wgan_gp.py has its own
                        layer.__class__ = nn.LeakyReLU
                    if isinstance(layer, getattr(script, "UpsampleConv2d", ())):  # dcgan.py's own
                        layer.__class__ = nn.Conv2d
                        layer.register_forward_pre_hook(lambda _, inputs: nn.Upsample(scale_factor=2)(*inputs))
                adam = [torch.optim.Adam(net.parameters(), 1e-4, (0.5, 0.9)) for net in (G, D)]
                loader, parts = batches(data.images, batch), (new_z, loss_d, loss_g, critic_steps)
                plain = seconds(lambda: plain_step(G, D, *adam, lambda: next(loader), *parts), steps)  # noqa: B023
                ready = seconds(lambda: plain_step(G, D, *adam, lambda: x, *parts), steps)  # noqa: B023
            G, D = (net.to(memory_format=torch.channels_last) for net in script.build(args))
            z, bf16 = new_z(), precision == "bf16"
            cast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16)  # noqa: B023, E731
            adam = {net: torch.optim.Adam(net.parameters(), 1e-4, fused=True) for net in (G, D)}
            parts = (G, D, x, z, loss_d, loss_g, critic_steps, cast)
            bound = seconds(lambda: bound_step(*parts, lambda net: None), steps)  # noqa: B023
            updated = seconds(lambda: bound_step(*parts, lambda net: adam[net].step()), steps)  # noqa: B023
            row = plain / took, ready / took, (took - updated) / bound, (updated - bound) / bound
            found.setdefault(precision, []).append((*row, batch * critic_steps / took))
    return {precision: list(zip(*rows, strict=True)) for precision, rows in found.items()}

def table_of_scripts(rounds, shorter):
    """One row a script and precision."""
    print("| script | precision | images/s | times as fast as a plain loop | no DataLoader | over the bound | Adam |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for title, (name, flags, steps) in ROWS.items():
        size = 32 if "--img-size 32" in flags else 28
        data = Data(torch.randint(256, (60_000 // shorter, 1, size, size), dtype=torch.uint8))
        found = measure(name, flags, data, max(1, steps // shorter), rounds)
        for precision, (ratio, ready, over, adam, speed) in found.items():
            cells = [f"{np.median(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in (ratio, ready)]
            cells += [f"{np.median(over):.0%} ({min(over):.0%} to {max(over):.0%})", f"{np.median(adam):.0%}"]
            print(f"| {title} | {precision} | {np.median(speed):,.0f}", *cells, sep=" | ", end=" |\n", flush=True)

def load_size(n, kind, folder):
    """A Data of n pictures, resident or in a memory-mapped file in the folder."""
    block, path = torch.randint(256, (1000, 1, 28, 28), dtype=torch.uint8).numpy(), f"{folder}/{n}"
    with open(path, "wb") as file:  # not through a map: its pages would count as this process's
        file.writelines([block] * (n // 1000))
    flat = np.memmap(path, np.uint8, "c") if kind == "mapped" else np.fromfile(path, np.uint8)
    return Data(torch.from_numpy(flat.reshape(n, 1, 28, 28)))

def measure_memory(n, kind, steps):
    """The peak memory, in MB, of this process after so many steps of dcgan.py on n pictures."""
    with tempfile.TemporaryDirectory() as folder:
        run_script(importlib.import_module("dcgan"), [], load_size(n, kind, folder), steps)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024

def table_of_sizes(rounds, shorter):
    """One row a size: seconds of a step, all sizes in turn in this process; memory, each in a process of its own."""
    print("\n| pictures | kept | ms a step | ratio to the first row | peak MB |\n| --- | --- | --- | --- | --- |")
    sizes, steps = [1000, 10_000, 100_000, 1_000_000] if shorter == 1 else [1000], 60 // shorter
    cases, found = [(n, kind) for n in sizes for kind in ("resident", "mapped")], []
    with tempfile.TemporaryDirectory() as folder:
        data = [load_size(*case, folder) for case in cases]
        for i in range(rounds):  # each on other pictures
            found.append([run_script(importlib.import_module("dcgan"), [f"--seed={i}"], one, steps)[0] for one in data])
    for (n, kind), took in zip(cases, zip(*found, strict=True), strict=True):
        ratios = [seconds / first for seconds, (first, *_) in zip(took, found, strict=True)]
        command = [sys.executable, __file__, "--measure", str(n), kind, str(steps)]
        peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
        spread = f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {n:,} | {kind} | {1000 * np.median(took):.2f} | {spread} | {float(peak):,.0f} |", flush=True)

def main(argv=None):
    """Print the tables."""
    parser = argparse.ArgumentParser(description="How fast is a step of each script?")
    parser.add_argument("--quick", action="store_true", help="a few steps of each: that it works, in half a minute")
    parser.add_argument("--scripts", action="store_true", help="the table of the scripts alone")
    parser.add_argument("--data", action="store_true", help="the table of the data set sizes alone")
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are taken (%(default)s)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # a process of the second table
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be 1 or more.")
    if not (args.scripts or Path("/proc/self/status").exists()):
        parser.error("the second table needs Linux: add --scripts for the first alone.")
    rounds, shorter = (1, 30) if args.quick else (args.rounds, 1)
    if args.measure:
        print(measure_memory(int(args.measure[0]), args.measure[1], int(args.measure[2])))
    if args.scripts or not (args.data or args.measure):
        table_of_scripts(rounds, shorter)
    if args.data or not (args.scripts or args.measure):
        table_of_sizes(rounds, shorter)

if __name__ == "__main__":
    main()
