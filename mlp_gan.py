r"""The first GAN, of Goodfellow et al. 2014, arXiv 1406.2661, with fully connected networks.

Two networks play a game: the generator G turns noise z into a picture, the discriminator D says how likely a picture is
to be real. D learns to tell pictures of the data, x, from G's; G learns to make pictures that D takes for real.
    D maximises  log D(x) + log(1 - D(G(z)))    loss_d = -mean log D(x) - mean log(1 - D(G(z)))
    G maximises  log D(G(z))                    loss_g = -mean log D(G(z))       (--loss nonsaturating)
    or minimises log(1 - D(G(z)))               loss_g = mean log(1 - D(G(z)))   (--loss minimax)
The theory uses minimax. But while D sees through G, D(G(z)) is near 0, and so is -D(G(z)), the slope of log(1 - D) in
D's logit: G learns little. That of -log D, D(G(z)) - 1, is near -1. At equilibrium D = 1/2 and loss_d = 2 ln 2 = 1.386.
    python mlp_gan.py                           # the built-in digits, no download
    python mlp_gan.py --dataset mnist --epochs 20
Batch norm for dropout fails: after epoch 3 D(G(z)) is 0.005, not 0.5; gradients in D's last layer are 4e-4, not 0.05:
    python mlp_gan.py --dataset mnist --img-size 64 --hidden 512 512 512 --norm batch --dropout 0 --out runs/bn
    python mlp_gan.py --dataset mnist --img-size 64 --hidden 512 512 512 --norm dropout --out runs/dropout
Where this differs from the paper: LeakyReLU, not ReLU in G and maxout in D; Adam, not momentum; z is normal, and the
same in both steps; G ends in tanh; PyTorch's initial weights; narrower; batch 64; dropout 0.3; an EMA of G."""
import argparse
import json
import math
import signal
import sys
import time
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import softplus
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from common import DATASETS, Fault, Misuse, epoch_order, fixed_noise, grid, load_data, sample, save_atomically
from common import save_history, save_pictures, save_png, to_batch

class Generator(nn.Sequential):
    """z (B, latent_dim) -> image (B, img_channels, img_size, img_size) in [-1, 1]."""
    def __init__(self, latent_dim=100, img_size=28, img_channels=1, hidden=(256, 512), norm="none", dropout=0.0):
        layers = [*blocks([latent_dim, *hidden], norm, dropout), nn.Linear(hidden[-1], img_channels * img_size**2)]
        super().__init__(*layers, nn.Tanh(), nn.Unflatten(1, (img_channels, img_size, img_size)))  # from (B, 784)

class Discriminator(nn.Sequential):
    """image (B, img_channels, img_size, img_size) -> logit l (B,) of D(x) = sigmoid(l): G's mirror image."""
    def __init__(self, img_size=28, img_channels=1, hidden=(256, 512), norm="none", dropout=0.0):
        layers = blocks([img_channels * img_size**2, *reversed(hidden)], norm, dropout)  # (B, 784) to (B, 256)
        super().__init__(nn.Flatten(), *layers, nn.Linear(hidden[0], 1), nn.Flatten(0))  # (B,)

def blocks(sizes, norm, dropout):
    """The layers that lead from (B, sizes[0]) to (B, sizes[1]), and so on."""
    for size_in, size_out in zip(sizes[:-1], sizes[1:], strict=True):
        batch_norm = [nn.BatchNorm1d(size_out)] if norm == "batch" else []
        yield from (nn.Linear(size_in, size_out), *batch_norm, nn.LeakyReLU(0.2, True), nn.Dropout(dropout))

def discriminator_loss(logits_real, logits_fake, smoothing=0.0):
    """-log D(x) - log(1 - D(G(z))): -log sigmoid(l) = softplus(-l), and -log(1 - sigmoid(l)) = softplus(l)."""
    real = (1 - smoothing) * softplus(-logits_real) + smoothing * softplus(logits_real)  # (B,)
    return real.mean() + softplus(logits_fake).mean()

def generator_loss(logits_fake, loss="nonsaturating"):
    """-log D(G(z)) = softplus(-l); or minimax, log(1 - D(G(z))) = -softplus(l), with slope -D(G(z))."""
    return softplus(-logits_fake).mean() if loss == "nonsaturating" else -softplus(logits_fake).mean()

def number(kind, low, high=math.inf):  # a type for argparse: an int or a float from low to high
    def number(text):  # argparse puts this name into its message
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
    return number

def parse_args(argv=None, known=None):
    """The flags: argv wins over known, the Namespace of an older run, and that over the defaults."""
    parser = argparse.ArgumentParser(description="The first GAN, arXiv 1406.2661. In brackets: the defaults.")
    count, share, amount = number(int, 1), number(float, 0, 1), number(float, 0, 1e9)
    groups = [parser.add_argument_group(name) for name in ("run", "data", "model", "optimiser", "tricks")]
    run, data, model, adam, trick = (group.add_argument for group in groups)
    run("--epochs", type=count, help="passes over the data, in all (10; more if under 9,000 steps)")
    run("--max-steps", type=count, help="stop after so many steps, if that comes first (never)")
    run("--batch-size", type=number(int, 2), default=64, help="pictures in a batch (%(default)s)")
    run("--seed", type=number(int, 0, 2**31), default=0, help="of the weights, the noise and the order (%(default)s)")
    run("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    run("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 if x86 or CUDA has it (auto)")
    run("--compile", action=argparse.BooleanOptionalAction, help="torch.compile both networks: for GPUs only")
    run("--out", help="the folder of the run (runs/SCRIPT-DATASET)")
    run("--overwrite", action="store_true", help="replace the run that is in the folder")
    run("--resume", action="store_true", help="go on with the run that is in the folder, by its flags, to --epochs")
    run("--sample", type=count, metavar="N", help="train nothing: write N pictures with the folder's checkpoint")
    run("--log-every", type=count, default=50, help="steps between rows of log.csv (%(default)s)")
    run("--sample-every", type=count, help="steps between extra sample grids (none; in epoch 1: 1, 2, 4, ...)")
    run("--snapshot-every", type=count, help="epochs between copies of G in generators/ (none)")
    data("--dataset", choices=list(DATASETS), default="digits", help="folder: your own pictures (%(default)s)")
    data("--data-dir", default="data", help="where the data is, or is downloaded to (%(default)s)")
    data("--classes", type=int, nargs="+", help="only the pictures with these labels (all)")
    data("--background", default="white", help="what transparent pictures are laid on (%(default)s)")
    data("--img-size", type=count, help="resize the pictures to this (the size of the data; 64 for folder)")
    model("--latent-dim", type=count, default=100, help="how many numbers z has (%(default)s)")
    model("--hidden", type=count, nargs="+", default=[256, 512], help="widths in G; in D reversed (256 512)")
    model("--norm", choices=["none", "batch", "dropout"], default="none", help="batch: both; dropout: also in G (none)")
    model("--dropout", type=number(float, 0, 0.99), default=0.3, help="rate in D, and in G with --norm dropout (0.3)")
    adam("--lr-g", type=share, default=1e-3, help="Adam's rate for G (%(default)s)")
    adam("--lr-d", type=share, default=5e-4, help="Adam's rate for D (%(default)s)")
    adam("--betas", type=number(float, 0, 0.9999), nargs=2, default=[0.0, 0.99], help="Adam's decay rates (0 0.99)")
    adam("--adam-eps", type=number(float, 1e-20, 1), default=1e-8, help="Adam's epsilon (%(default)s)")
    adam("--lr-schedule", choices=["constant", "cosine"], default="constant", help="cosine: towards 0 (%(default)s)")
    adam("--clip-grad-norm", type=amount, help="scale gradients down to this L2 norm, against jumps (off)")
    adam("--ema", type=share, default=0.999, help="decay of the average of G that is sampled; 0: G's own (0.999)")
    adam("--d-steps", type=count, default=1, help="D updates a step (%(default)s)")
    adam("--g-steps", type=count, default=1, help="G updates a step (%(default)s)")
    trick("--loss", choices=["nonsaturating", "minimax"], default="nonsaturating", help="G's (%(default)s)")
    trick("--label-smoothing", type=share, default=0, help="D's target for real is 1 - this: 1606.03498 (off)")
    args = parser.parse_args(argv, known)
    args.script, args.out = Path(__file__).stem, args.out or f"runs/{Path(__file__).stem}-{args.dataset}"
    return args

def pick_device(args):
    """The device, and whether to compute in bfloat16: "auto" does where it is not emulated. Raises Misuse."""
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.zeros(1, device=best if args.device == "auto" else args.device).device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise Misuse(f"--device {args.device} is not there, or not for this torch: auto is {best} here.") from error
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {"gpu_bf16": torch.cuda.is_bf16_supported(False)}
    return device, {"fp32": False, "bf16": True}.get(args.precision, has.get("avx512_bf16", has.get("gpu_bf16", False)))

def open_run(args, argv):
    """args and None for a new run; else the flags and the checkpoint of the run in args.out. Raises Misuse or Fault."""
    path = Path(args.out) / "checkpoint.pt"
    if not (args.resume or args.sample):
        if (path.exists() or (path.parent / "samples/000000.png").exists()) and not args.overwrite:
            raise Misuse(f"{args.out} has a run: --out avoids it, --overwrite replaces it, --resume goes on if saved.")
        return args, None
    try:
        run = {} if ZipFile(path).testzip() else torch.load(path, map_location="cpu", weights_only=True)  # {}: damaged
        flags = run["args"] | {"out": args.out, "overwrite": False} | ({"max_steps": None} if args.epochs else {})
        args = parse_args(argv, argparse.Namespace(**flags))  # argv wins over flags; --epochs over an old --max-steps
        for name, network in zip("GD", build(argparse.Namespace(**flags)), strict=True):
            network.load_state_dict(run[name])  # only to see if they fit
    except Exception as error:  # torch.load raises many kinds for a file that is not a checkpoint
        raise Fault(f"{path} is missing (train first), damaged or of other networks: change --out.") from error
    free = {"epochs", "max_steps", "device", "compile", "data_dir", "out", "resume", "sample"}
    for name, value in flags.items():
        if getattr(args, name) != value and name not in free and not (args.sample and name == "seed"):
            raise Misuse(f"{path} has {name.replace('_', '-')} {value}: keep to it, or change --out.")
    return args, run

def build(args):
    """G and D as the flags say."""
    shape, dropout = (args.img_size, args.img_channels, args.hidden, args.norm), args.dropout
    return Generator(args.latent_dim, *shape, dropout if args.norm == "dropout" else 0), Discriminator(*shape, dropout)

def save_plots(out, log, gradients):
    """losses.png from log, lines of CSV; gradients.png: the sizes of gradients, (epochs, weights of D's last layer)."""
    log = np.atleast_1d(np.genfromtxt(log, delimiter=",", names=True))
    figure, n = Figure(figsize=(13, 3.8), layout="constrained"), len(log) // 40 + 1  # rows in the running mean
    panels = [("loss_d loss_g", "Loss", "loss", {})]
    panels += [("d_real d_fake", "What D thinks: 0.5 is a draw", "probability of being real", {"ylim": (0, 1)})]
    panels += [("grad_norm_d grad_norm_g", "Gradient norm", "L2 norm of all gradients", {"yscale": "log"})]
    for axes, (columns, title, ylabel, more) in zip(figure.subplots(1, 3), panels, strict=True):
        for i, column in enumerate(columns.split() if log.size else []):
            axes.plot(log["step"], log[column], f"C{i}", alpha=0.25)
            axes.plot(log["step"][n - 1 :], np.convolve(log[column], np.ones(n) / n, "valid"), f"C{i}", label=column)
            axes.legend(), axes.locator_params("x", nbins=5)
        axes.set(title=title, xlabel="step (dark: running mean)", ylabel=ylabel, **more)
    figure.savefig(out / "losses.png", dpi=100)
    axes, gap = Figure(figsize=(8, 5), layout="constrained").subplots(), len(gradients) // 12 + 1
    for i, row in enumerate(gradients[::gap].abs().clamp(min=1e-12).log10()):
        axes.violinplot(row, [1 + i * gap], orientation="horizontal", side="high", widths=2.5 * gap, showextrema=False)
    axes.set(title="Gradients of D's last layer", xlabel="log10 of their size", ylabel="epoch", xlim=(-9, 1))
    axes.figure.savefig(out / "gradients.png", dpi=100)

def generate(args, run):
    """--sample N: N single pictures in generated/, and all of them in generated.png."""
    G_ema = AveragedModel(build(args)[0])
    G_ema.load_state_dict(run["G_ema"])
    save_pictures(Path(args.out) / "generated", sample(G_ema, fixed_noise(args.sample, args.latent_dim, args.seed + 1)))

def train(args, run):
    """Train G and D as the flags say, on from run or from the start, into args.out. Raises Misuse or Fault."""
    out, (device, bf16) = Path(args.out), pick_device(args)
    images = load_data(args.dataset, args.data_dir, args.img_size, args.classes, args.background, device).images
    if run and images.shape[:2] != (args.num_images, args.img_channels):
        raise Fault(f"{out} was trained on {args.num_images} pictures of {args.img_channels} channels, not these.")
    args.num_images, args.img_channels, args.img_size, _ = images.shape  # for build() and the checkpoint
    torch.manual_seed(args.seed + (run["step"] if run else 0))  # on a GPU a resumed run draws new noise
    G, D = (network.to(device) for network in build(args))
    G_ema = AveragedModel(G)
    opt_g = torch.optim.Adam(G.parameters(), args.lr_g, args.betas, args.adam_eps, fused=True)
    opt_d = torch.optim.Adam(D.parameters(), args.lr_d, args.betas, args.adam_eps, fused=True)
    parts = {"G": G, "D": D, "G_ema": G_ema, "opt_g": opt_g, "opt_d": opt_d}
    if args.compile:
        G.compile(), D.compile()
    step, z_fixed = 0, fixed_noise(512, args.latent_dim, args.seed).to(device)  # the first 64 make the grid
    batch_size, gradients = min(args.batch_size, len(images)), torch.empty(0, args.hidden[0])
    steps_per_epoch = max(1, len(images) // (batch_size * args.d_steps))
    args.epochs = args.epochs or max(10, math.ceil(9000 / steps_per_epoch))
    last_step = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    counts = {name: sum(p.numel() for p in parts[name].parameters()) for name in ("G", "D")}
    facts = {"torch": torch.__version__, "on": f"{device}, {'bf16' if bf16 else 'fp32'}", "parameters": counts}
    log = ["epoch,step,loss_d,loss_g,d_real,d_fake,grad_norm_d,grad_norm_g,images_per_second,acc_real,acc_fake"]
    if run:
        for name, part in parts.items():
            part.load_state_dict(run[name])
        step, z_fixed, log, gradients = run["step"], run["z_fixed"].to(device), run["log"], run["gradients"]
        torch.set_rng_state(run["rng"])
    elif (out / "checkpoint.pt").exists() or (out / "samples/000000.png").exists():  # --overwrite: clear the old run
        for name in "checkpoint.pt", "generated.png", "nearest.png", "score.*", "samples/[0-9]*.png", "gen*/*[0-9].p*":
            list(map(Path.unlink, sorted(out.glob(name))))
    save_png(out / "real.png", grid(images[:: max(1, len(images) // 64)][:64].cpu()))
    save_png(out / f"samples/{step:06d}.png", grid(sample(G_ema, z_fixed[:64])))
    save_atomically(out / "log.csv", ("\n".join(log) + "\n").encode())  # no rows later than the checkpoint
    save_atomically(out / "args.json", json.dumps(vars(args) | facts, indent=2).encode())
    print(f"{len(images):,} pictures {tuple(images.shape[1:])}, parameters {counts}, {facts['on']}, {out}", flush=True)
    first, stop, started = step, [], time.perf_counter()
    old_handler = signal.signal(signal.SIGINT, lambda *_: stop.append("Ctrl-C"))  # end this step, make one more, save
    try:
        for step in range(first + 1, last_step + 1):
            epoch, i = divmod(step - 1, steps_per_epoch)
            epoch_ends, stopping = (i + 1 == steps_per_epoch), (step == last_step or bool(stop))  # bool: a list grows
            logging = epoch_ends or stopping or step % args.log_every == 0
            fade = (1 + math.cos(math.pi * (step - 1) / last_step)) / 2 if args.lr_schedule == "cosine" else 1
            opt_g.param_groups[0]["lr"], opt_d.param_groups[0]["lr"] = args.lr_g * fade, args.lr_d * fade
            # (1) D step: maximise log D(x) + log(1 - D(G(z)))
            D.requires_grad_(True)
            for index in epoch_order(len(images), batch_size * args.d_steps, args.seed, epoch)[i].split(batch_size):
                x_real = to_batch(images, index, device)  # (B, C, H, W) in [-1, 1]
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    x_fake = G(torch.randn(batch_size, args.latent_dim, device=device))  # kept for (2)
                    logits_real, logits_fake = D(x_real).float(), D(x_fake.detach()).float()  # no gradient for G
                loss_d = discriminator_loss(logits_real, logits_fake, args.label_smoothing)
                opt_d.zero_grad()
                loss_d.backward()
                if logging or args.clip_grad_norm:  # up to inf: measured, not changed
                    norm_d = nn.utils.clip_grad_norm_(D.parameters(), args.clip_grad_norm or math.inf)
                opt_d.step()
            # (2) G step: maximise log D(G(z)) for the same z; the gradient passes through D, whose weights are frozen
            D.requires_grad_(False)
            for again in range(args.g_steps):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    x_fake = G(torch.randn(batch_size, args.latent_dim, device=device)) if again else x_fake
                    logits = D(x_fake).float()
                loss_g = generator_loss(logits, args.loss)
                opt_g.zero_grad()
                loss_g.backward()
                if logging or args.clip_grad_norm:
                    norm_g = nn.utils.clip_grad_norm_(G.parameters(), args.clip_grad_norm or math.inf)
                opt_g.step()
            G_ema.multi_avg_fn = get_ema_multi_avg_fn(min(args.ema, (1 + step) / (10 + step)))  # short memory at first
            G_ema.update_parameters(G)  # averages the parameters, copies the buffers
            # (3) log, sample, save
            if logging:
                speed = (step - first) / (time.perf_counter() - started)  # steps a second
                row = [loss_d, loss_g, logits_real.sigmoid().mean(), logits_fake.sigmoid().mean(), norm_d, norm_g]
                row = torch.stack([*row, (logits_real > 0).float().mean(), (logits_fake < 0).float().mean()]).tolist()
                row.insert(6, speed * batch_size * args.d_steps)  # images_per_second
                for name, value in zip(log[0].split(",")[2:], row, strict=True):
                    if not math.isfinite(value):
                        raise Fault(f"{name} is {value} at step {step}, which is not saved. Try a lower rate.")
                gradients = torch.cat([gradients, D[-2].weight.grad.cpu()]) if epoch_ends else gradients
                if epoch_ends or step % args.log_every == 0:  # not where Ctrl-C fell: a resumed run has the same rows
                    log.append(",".join([str(epoch + 1), str(step), *(f"{value:.6g}" for value in row)]))
                    with open(out / "log.csv", "a") as file:
                        print(log[-1], file=file)
                line = f"epoch {epoch + 1}/{args.epochs} [{'#' * (10 * step // last_step):10}] loss_d {row[0]:.3f} "
                line += f"loss_g {row[1]:.3f} {row[6]:.0f} img/s {(last_step - step) / speed / 60:.1f} min left "
                if sys.stdout.isatty() or epoch_ends:
                    print(line, end="\r" if sys.stdout.isatty() and not stopping else "\n", flush=True)
            keeping = epoch_ends and args.snapshot_every and (epoch + 1) % args.snapshot_every == 0
            saving = keeping or stopping or (epoch_ends and (epoch < 100 or step % 100 < steps_per_epoch))
            if saving or step % (args.sample_every or math.inf) == 0 or (epoch == 0 and step.bit_count() == 1):
                update_bn(z_fixed.split(128), G_ema)  # batch norm's statistics anew: those copied fit G's own weights
                save_png(out / f"samples/{step:06d}.png", grid(sample(G_ema, z_fixed[:64])))
            state = {"args": vars(args), "step": step, "epoch": epoch + epoch_ends}
            if keeping:  # before the checkpoint: a run that is killed between the two makes it again
                save_atomically(out / f"generators/epoch_{epoch + 1:03d}.pt", state | {"G": G_ema.module.state_dict()})
            if saving:  # after each epoch; from the 101st on, if epochs have under 100 steps, once in 100
                rest = {k: part.state_dict() for k, part in parts.items()} | {"rng": torch.get_rng_state(), "log": log}
                save_atomically(out / "checkpoint.pt", state | rest | {"z_fixed": z_fixed, "gradients": gradients})
                if step % 100 < steps_per_epoch and not stopping:  # once in each 100: it takes as long as many steps
                    save_plots(out, log, gradients)
            if stopping:
                break
    finally:  # at the end, after Ctrl-C, and after a fault
        signal.signal(signal.SIGINT, old_handler)
        save_plots(out, log, gradients)
        save_history(out, step)
    print(f"Step {step} of {max(step, last_step)}. Look at {out}/samples.gif, losses.png and gradients.png.")

def main(argv=None):
    """Run the script. Returns the exit code: 2 for bad use, 1 for a fault, told in a line that replaces the status."""
    try:
        args, run = open_run(parse_args(argv), argv)
        return (generate if args.sample else train)(args, run) or 0  # neither returns anything
    except (Fault, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error) and not args.compile:
            raise  # a mistake in the code
        tip = ": try a smaller --batch-size" if isinstance(error, RuntimeError) and "memory" in str(error) else ""
        tip = ": make room, get write access, or choose another folder" if isinstance(error, OSError) else tip
        print(f"{Path(__file__).name}:", (str(error).split("\n")[0] + tip or repr(error)).ljust(67), file=sys.stderr)
        return 2 if isinstance(error, Misuse) else 1

if __name__ == "__main__":
    sys.exit(main())
