"""DCGAN, the convolutional GAN of Radford, Metz and Chintala 2015, arXiv 1511.06434.

A generator G turns noise z into a picture; a discriminator D says how likely a picture is to be real. They are trained
against each other until D can no longer tell G(z) from the data x. DCGAN is the recipe that made this work with
convolutions: strides in place of pooling, batch norm in both networks, ReLU in G, LeakyReLU in D, Adam with beta1 0.5.

    D maximises  log D(x) + log(1 - D(G(z)))    loss_d = -mean log D(x) - mean log(1 - D(G(z)))
    G maximises  log D(G(z))                    loss_g = -mean log D(G(z))

    python dcgan.py                                # the built-in digits, no download
    python dcgan.py --dataset mnist --epochs 20

Where this differs from the paper: z is normal, not uniform; batch 64, not 128; the networks are as deep and wide as the
image size and a laptop allow (the paper: 1024, 512, 256 and 128 channels from 4x4 to 64x64).
"""

import argparse
import io
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import softplus

from common import DATASETS, Fault, Misuse, epoch_order, fixed_noise, grid, load_data, sample, to_batch


class Generator(nn.Module):
    """z (B, latent_dim) -> image (B, img_channels, img_size, img_size) in [-1, 1].

    hidden_channels are listed from the image inwards. Raises Fault if img_size cannot be halved once for each of them.
    The shapes below are those of the default arguments.
    """

    def __init__(self, latent_dim=100, img_size=64, img_channels=3, hidden_channels=(128, 256, 512)):
        super().__init__()
        factor = 2 ** len(hidden_channels)
        if factor == 1 or img_size % factor:
            raise Fault(
                f"images of size {img_size} cannot be halved once for each of {len(hidden_channels)} hidden channels: "
                f"make --img-size a multiple of {max(factor, 2)}, or give fewer --hidden-channels."
            )
        *rest, channels = hidden_channels
        self.start = (img_size // factor, img_size // factor, channels)
        self.project = nn.Linear(latent_dim, math.prod(self.start), bias=False)
        layers = [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]  # (B, 512, 8, 8)
        for width in reversed(rest):
            layers += [nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]  # (B, 256, 16, 16), then (B, 128, 32, 32)
            channels = width
        layers += [nn.ConvTranspose2d(channels, img_channels, 4, stride=2, padding=1, bias=False), nn.Tanh()]
        self.layers = nn.Sequential(*layers)  # (B, 3, 64, 64)
        self.apply(init_weights)

    def forward(self, z):
        x = self.project(z).view(-1, *self.start)  # (B, 8, 8, 512)
        return self.layers(x.permute(0, 3, 1, 2))  # channels last in memory, as the convolutions want them


class Discriminator(nn.Module):
    """image (B, img_channels, img_size, img_size) -> logit (B,): G's mirror image."""

    def __init__(self, img_size=64, img_channels=3, hidden_channels=(128, 256, 512)):
        super().__init__()
        layers, channels = [], img_channels
        for i, width in enumerate(hidden_channels):
            layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width)] if i > 0 else []  # none on the first layer
            layers += [nn.LeakyReLU(0.2, inplace=True)]  # (B, 128, 32, 32), (B, 256, 16, 16), (B, 512, 8, 8)
            channels = width
        self.layers = nn.Sequential(*layers)
        self.classify = nn.Linear((img_size // 2 ** len(hidden_channels)) ** 2 * channels, 1, bias=False)
        self.apply(init_weights)

    def forward(self, x):
        x = self.layers(x).permute(0, 2, 3, 1).flatten(1)  # (B, 8 * 8 * 512), in the order in which they lie in memory
        return self.classify(x).squeeze(1).float()  # (B,)


def init_weights(module):
    """The paper's: N(0, 0.02) in every layer, N(1, 0.02) for the scale of batch norm."""
    if isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
    elif isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)


def discriminator_loss(logits_real, logits_fake):
    """-log D(x) - log(1 - D(G(z))). With D = sigmoid(l), -log D is softplus(-l) and -log(1 - D) is softplus(l)."""
    return softplus(-logits_real).mean() + softplus(logits_fake).mean()


def generator_loss(logits_fake):
    """-log D(G(z)) = softplus(-l). Its gradient is large while D sees through G; that of log(1 - D(G(z))) vanishes."""
    return softplus(-logits_fake).mean()


def number(kind, low, high=math.inf):
    """A type for argparse: an int or a float from low to high."""

    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)

    parse.__name__ = kind.__name__
    return parse


def parse_args(argv=None):
    """The flags; and in args.given the names of those that stand in argv."""
    parser = argparse.ArgumentParser(description="DCGAN, arXiv 1511.06434")
    count, rate = number(int, 1), number(float, 0, 1)
    add = parser.add_argument_group("run").add_argument
    add("--epochs", type=count, default=10, help="passes over the data, in all (%(default)s)")
    add("--max-steps", type=count, help="stop after so many generator updates, if that comes first")
    add("--batch-size", type=count, default=64, help="pictures a step (%(default)s)")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of the weights, the noise and the order (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 where the hardware has it")
    add("--out", help="the folder of the run (runs/dcgan-DATASET)")
    add("--overwrite", action="store_true", help="replace the run that is in the folder")
    add("--resume", action="store_true", help="go on with the run that is in the folder, by its flags, to --epochs")
    add("--sample", type=count, metavar="N", help="train nothing: write N pictures with the folder's checkpoint")
    add("--log-every", type=count, default=50, help="steps from one row of log.csv to the next (%(default)s)")
    add("--sample-every", type=count, help="steps from one sample grid to the next (an epoch, and fewer in the first)")
    add("--snapshot-every", type=count, help="epochs from one copy of G in generators/ to the next (none)")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=list(DATASETS), default="digits", help="folder: your own pictures (%(default)s)")
    add("--data-dir", default="data", help="where the data is, or is downloaded to (%(default)s)")
    add("--classes", type=int, nargs="+", help="only the pictures with these labels (all)")
    add("--background", default="white", help="what transparent pictures are laid on (%(default)s)")
    add("--img-size", type=count, help="resize the pictures to this (the size of the data; 64 for folder)")
    add = parser.add_argument_group("model").add_argument
    add("--latent-dim", type=count, default=100, help="how many numbers z has (%(default)s)")
    add("--hidden-channels", type=count, nargs="+", help="from the image inwards (32 64 ..., until 8x8 or smaller)")
    add = parser.add_argument_group("optimiser").add_argument
    add("--lr-g", type=rate, default=2e-4, help="Adam's rate for G (%(default)s)")
    add("--lr-d", type=rate, default=2e-4, help="Adam's rate for D (%(default)s)")
    args = parser.parse_args(argv)
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))  # None wherever argv says nothing
    args.given = [name for name, value in vars(given).items() if value is not None]
    args.out = args.out or f"runs/dcgan-{args.dataset}"
    return args


def pick_device(args):
    """The device, and whether to compute in bfloat16 on it. Raises Misuse if it is not there."""
    try:
        best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        device = torch.zeros(1, device=best if args.device == "auto" else args.device).device
    except (RuntimeError, AssertionError) as error:
        raise Misuse(f"--device {args.device} cannot be used here: {str(error).splitlines()[0]}") from error
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # elsewhere bf16 is emulated, and slow
    native = device.type == "cpu" and any(cpu.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    native = native or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    return device, args.precision == "bf16" or (args.precision == "auto" and native)


def open_run(args):
    """Make the folder of a new run and return None; or load the run that is there, and its flags into args.

    Raises Misuse if that would write over a run or contradict its flags, Fault if its checkpoint is damaged.
    """
    out, path = Path(args.out), Path(args.out) / "checkpoint.pt"
    if not (args.resume or args.sample):
        if (out / "args.json").exists() and not args.overwrite:
            raise Misuse(f"{out} holds a run: continue it with --resume, replace it with --overwrite, or change --out.")
        for file in [*out.glob("checkpoint.pt"), *out.glob("samples/*.png"), *out.glob("generators/*.pt")]:
            file.unlink()
        (out / "samples").mkdir(parents=True, exist_ok=True)
        return None
    if not path.exists():
        raise Misuse(f"there is no {path}: name the folder of a run with --out.")
    try:
        run = torch.load(path, map_location="cpu", weights_only=True)
        script, flags = run["script"], run["args"]
    except Exception as error:  # torch.load raises many kinds for a file that is not a checkpoint
        raise Fault(f"{path} is damaged: start again with --overwrite.") from error
    if script != "dcgan":
        raise Misuse(f"{path} is a run of {script}.py: resume it with that, or name another folder with --out.")
    free = {"epochs", "max_steps", "device", "data_dir", "out", "overwrite", "resume", "sample"}
    for name, value in flags.items():
        if name not in args.given:
            setattr(args, name, value)
        elif getattr(args, name) != value and name not in free and not args.sample:
            raise Misuse(f"--{name.replace('_', '-')} contradicts the run in {out}, which has {value}: leave it out.")
    return run


def save_plots(out):
    """losses.png: the curves of log.csv."""
    log = np.atleast_1d(np.genfromtxt(out / "log.csv", delimiter=",", names=True))
    if not log.size:
        return
    window = np.ones(len(log) // 40 + 1) / (len(log) // 40 + 1)
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    columns = [("loss_d", "loss_g"), ("d_real", "d_fake"), ("grad_norm_d", "grad_norm_g")]
    labels = [("D", "G"), ("D(x), real", "D(G(z)), fake"), ("D", "G")]
    for panel, pair, names in zip(panels, columns, labels, strict=True):
        for column, name, colour in zip(pair, names, ("tab:blue", "tab:orange"), strict=True):
            panel.plot(log["step"], log[column], color=colour, alpha=0.25)
            smooth = np.convolve(log[column], window, "valid")
            panel.plot(log["step"][len(window) - 1 :], smooth, color=colour, label=name)
        panel.set_xlabel("step (generator updates)")
        panel.legend()
        panel.grid(alpha=0.3)
    panels[0].set(title="Loss", ylabel="loss", ylim=(0, None))
    panels[1].set(title="What D thinks: 0.5 is a draw", ylabel="probability of being real", ylim=(0, 1))
    panels[2].set(title="Gradient norm", ylabel="L2 norm of all gradients", yscale="log")
    figure.savefig(out / "losses.png", dpi=100)


def save_atomically(path, state):
    """Write state so that after a crash at any moment path holds either what it held or the new state, whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer)  # first into memory: only then is a full disk an OSError
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".tmp").write_bytes(buffer.getbuffer())
    os.replace(path.with_suffix(".tmp"), path)


def grad_norm(network):
    """The L2 norm of all gradients of a network taken together."""
    return torch.nn.utils.get_total_norm([p.grad for p in network.parameters()]).item()


def generate(args):
    """--sample N: N single pictures in generated/, and all of them in generated.png."""
    run = open_run(args)
    G = Generator(args.latent_dim, args.img_size, args.img_channels, args.hidden_channels)
    G.load_state_dict(run["G"])
    images = sample(G, fixed_noise(args.sample, args.latent_dim, args.seed + 1))  # uint8 (N, C, H, W)
    folder = Path(args.out) / "generated"
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        imageio.imwrite(folder / f"{i:05d}.png", image.permute(1, 2, 0).squeeze(2).numpy())
    imageio.imwrite(folder.with_suffix(".png"), grid(images))
    print(f"{len(images)} pictures in {folder}, all of them in {folder}.png")


def train(args):
    """Train G and D as the flags say. Everything is written to args.out. Raises Fault."""
    run, out = open_run(args), Path(args.out)
    device, bf16 = pick_device(args)
    images = load_data(args.dataset, args.data_dir, args.img_size, args.classes, args.background).images.to(device)
    args.num_images, args.img_channels, args.img_size, _ = images.shape
    halvings = next(n for n in range(99) if args.img_size >> n <= 8 or (args.img_size >> n) % 2)
    args.hidden_channels = args.hidden_channels or [32 * 2**n for n in range(halvings)]
    if run and run["args"]["num_images"] != args.num_images:
        raise Fault(f"{out} was trained on {run['args']['num_images']} pictures, but {args.num_images} are there now.")

    torch.manual_seed(args.seed)
    G = Generator(args.latent_dim, args.img_size, args.img_channels, args.hidden_channels)
    D = Discriminator(args.img_size, args.img_channels, args.hidden_channels)
    G.to(device, memory_format=torch.channels_last)
    D.to(device, memory_format=torch.channels_last)
    opt_g = torch.optim.Adam(G.parameters(), args.lr_g, betas=(0.5, 0.999), fused=True)
    opt_d = torch.optim.Adam(D.parameters(), args.lr_d, betas=(0.5, 0.999), fused=True)
    parts = {"G": G, "D": D, "opt_g": opt_g, "opt_d": opt_d}
    z_fixed = fixed_noise(64, args.latent_dim, args.seed).to(device)

    batch_size = min(args.batch_size, len(images))
    steps_per_epoch = len(images) // batch_size
    last_step = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    step, log = 0, ["epoch,step,loss_d,loss_g,d_real,d_fake,grad_norm_d,grad_norm_g,images_per_second"]
    if run:
        for name, part in parts.items():
            part.load_state_dict(run[name])
        step, z_fixed = run["step"], run["z_fixed"].to(device)
        torch.manual_seed(args.seed + step)  # an accelerator's random state is not in the checkpoint; the CPU's is
        torch.set_rng_state(run["rng"])
        rows = (out / "log.csv").read_text().splitlines()[1:]
        log += [row for row in rows if int(row.split(",")[1]) <= step]  # a killed run has logged more than it saved
    else:
        imageio.imwrite(out / "real.png", grid(images[:: len(images) // 64 or 1][:64].cpu()))
        imageio.imwrite(out / "samples" / "000000.png", grid(sample(G, z_fixed)))
    (out / "log.csv").write_text("\n".join(log) + "\n")
    sizes = {name: sum(p.numel() for p in parts[name].parameters()) for name in ("G", "D")}
    facts = {"torch": torch.__version__, "on": f"{device}, {'bf16' if bf16 else 'fp32'}", "parameters": sizes}
    flags = {name: value for name, value in vars(args).items() if name != "given"}
    (out / "args.json").write_text(json.dumps(flags | facts, indent=2) + "\n")
    print(f"{len(images):,} pictures {tuple(images.shape[1:])}, parameters {sizes}, {facts['on']}, {out}", flush=True)

    stop, started, since = [], (time.time(), step), (time.time(), step)
    ctrl_c = signal.signal(signal.SIGINT, lambda *_: stop.append("Ctrl-C"))  # finish the step, then save
    try:
        while step < last_step:
            epoch, i = divmod(step, steps_per_epoch)
            if i == 0 or step == started[1]:
                order = epoch_order(len(images), batch_size, args.seed, epoch).to(device)  # (steps_per_epoch, B)
            step += 1

            # (1) D step: maximise log D(x) + log(1 - D(G(z)))
            D.requires_grad_(True)
            x_real = to_batch(images, order[i])
            z = torch.randn(len(x_real), args.latent_dim, device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                x_fake = G(z)
                logits_real, logits_fake = D(x_real), D(x_fake.detach())
            loss_d = discriminator_loss(logits_real, logits_fake)
            opt_d.zero_grad()
            loss_d.backward()
            opt_d.step()

            # (2) G step: maximise log D(G(z)) for the same z; D is frozen, or its gradients would be computed in vain
            D.requires_grad_(False)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = D(x_fake)
            loss_g = generator_loss(logits)
            opt_g.zero_grad()
            loss_g.backward()
            opt_g.step()

            # (3) log, sample, save
            epoch_ends = i + 1 == steps_per_epoch
            stopping = step == last_step or bool(stop)
            if epoch_ends or stopping or step % args.log_every == 0:
                now = time.time()
                row = {"loss_d": loss_d.item(), "loss_g": loss_g.item()}
                row |= {"d_real": logits_real.sigmoid().mean().item(), "d_fake": logits_fake.sigmoid().mean().item()}
                row |= {"grad_norm_d": grad_norm(D), "grad_norm_g": grad_norm(G)}
                row["images_per_second"] = (step - since[1]) * len(x_real) / (now - since[0])
                for name, value in row.items():
                    if not math.isfinite(value):
                        raise Fault(f"{name} is {value} at step {step}; the last checkpoint is kept. Try a lower rate.")
                if epoch_ends or step % args.log_every == 0:
                    with open(out / "log.csv", "a") as file:
                        file.write(f"{epoch + 1},{step}," + ",".join(f"{value:.6g}" for value in row.values()) + "\n")
                since = (now, step)
                left = (now - started[0]) / (step - started[1]) * (last_step - step)
                bar = "#" * (20 * step // last_step)
                line = f"epoch {epoch + 1}/{args.epochs} [{bar:20}] "
                line += " ".join(f"{name} {row[name]:.3f}" for name in ("loss_d", "loss_g", "d_real", "d_fake"))
                line += f" {row['images_per_second']:.0f} images/s {left // 60:.0f}:{left % 60:02.0f} left  "
                if sys.stdout.isatty() or epoch_ends:
                    print(line, end="\r" if sys.stdout.isatty() else "\n", flush=True)
            early = epoch == 0 and step in [steps_per_epoch >> n for n in range(1, 6)]
            if step % args.sample_every == 0 if args.sample_every else epoch_ends or early:
                imageio.imwrite(out / "samples" / f"{step:06d}.png", grid(sample(G, z_fixed)))
            if epoch_ends or stopping:
                state = {name: part.state_dict() for name, part in parts.items()} | {"script": "dcgan", "args": flags}
                state |= {"step": step, "epoch": epoch + epoch_ends, "z_fixed": z_fixed, "rng": torch.get_rng_state()}
                save_atomically(out / "checkpoint.pt", state)
                save_plots(out)
            if epoch_ends and args.snapshot_every and (epoch + 1) % args.snapshot_every == 0:
                state = {"script": "dcgan", "epoch": epoch + 1, "args": flags, "G": G.state_dict()}
                save_atomically(out / "generators" / f"epoch_{epoch + 1:03d}.pt", state)
            if stopping:
                break
    finally:  # at the end, after Ctrl-C, and after a fault
        signal.signal(signal.SIGINT, ctrl_c)
        save_plots(out)
        paths = sorted((out / "samples").glob("*.png"), key=lambda path: int(path.stem))
        frames = [imageio.imread(path) for path in paths + paths[-1:] * 9]  # the last one is held
        imageio.mimsave(out / "samples.gif", frames, duration=200, loop=0)  # milliseconds
    print(f"\nStep {step} of {last_step}. Look at {out / 'samples.gif'} and {out / 'losses.png'}.")


def main(argv=None):
    """Run the script; the exit code is 2 for bad use, 1 for a fault, each told in one sentence."""
    try:
        args = parse_args(argv)
        generate(args) if args.sample else train(args)
    except (Fault, OSError) as error:
        print(f"dcgan.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, Misuse) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
