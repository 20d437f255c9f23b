r"""WGAN and WGAN-GP: Arjovsky et al. 2017, arXiv 1701.07875, and Gulrajani et al. 2017, arXiv 1704.00028.

How far is it from G's pictures to the data, if all probability has to be carried there, at a cost of mass x distance?
This Wasserstein distance W shrinks as G improves, even where a discriminator tells both apart with certainty and its
gradient vanishes. By the dual of Kantorovich and Rubinstein
    W = max over D with |D(x) - D(y)| <= |x - y| for all x, y   of   E D(x) - E D(G(z))
so that a critic D, which returns a score and no probability, is trained to measure it, and G to make it small:
    D maximises  E D(x) - E D(G(z))   loss_d = mean D(G(z)) - mean D(x) + 10 mean (|grad D(x_mix)| - 1)^2
    G maximises  E D(G(z))            loss_g = -mean D(G(z)), whose zero has no meaning: it may drift
D must be 1-Lipschitz, nowhere steeper than 1; the best D has |grad D| = 1 along the lines of an optimal transport.
--lipschitz chooses how. gp: a penalty on slopes other than 1 at x_mix, random points between random real-fake pairs; it
needs the gradient of a gradient. clip: all weights within 0.05, those of layer norm too, with RMSprop, about 1.4 times
as fast; D tends to be too simple. spectral (1802.05957): each layer's weights, as a matrix, over their largest singular
value, about 1.15 times as fast; convolutions may still be steeper than 1. With these two the scale of W is unknown.
    python wgan_gp.py                           # the built-in digits, no download
    python wgan_gp.py --dataset mnist --epochs 20
    python wgan_gp.py --dataset mnist --epochs 20 --lr-g 1e-4 --lr-d 1e-4 --batch-size 64 --out runs/wgan-adam
The last has the papers' rates and batch, so half as many steps: FD (bench/score.py; lower is better) 51, not 3.
What changes from dcgan.py: no probabilities, tricks or batch norm in D, five D steps a G step, residual networks, W in
the log, over training pictures and over others: where the second is much lower, D knows the training pictures by heart.
Where this differs from the papers (theirs in brackets): rates 1e-3, of D without gp 2e-4 (Adam 1e-4, RMSprop 5e-5);
clip within 0.05 (0.01), with layer norm (batch norm) in D; betas as in Algorithm 1 (their MNIST code: (0.5, 0.9)); z of
100 (128); batch 32 (64); kernels 4x4 (5x5); widths 16, 32, two layers at each resolution (wider, one); the residual
critic flattens its last layer (averages it); PyTorch's initial weights; samples from an average of G's weights."""
import argparse
import json
import math
import signal
import sys
import time
from functools import partial
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torchvision.ops import Permute
from common import DATASETS, Fault, Misuse, epoch_order, fixed_noise, grid, load_data, sample, save_atomically
from common import save_history, save_pictures, save_png, to_batch

class LeakyReLU(nn.LeakyReLU):
    """As torch's, but to autograd x times a constant: torch's, differentiated twice, sends zeros back, to no use."""
    def forward(self, x):
        factor = x.detach().sign().clamp_(min=self.negative_slope)  # 1 or slope
        return x.mul_(factor) if self.inplace else x * factor

class ResBlock(nn.Module):
    """(B, size_in, H, W) -> (B, size_out, H', W'), twice norm, ReLU, convolution, and a skip connection around them."""
    def __init__(self, size_in, size_out, norm, up=(), down=()):
        super().__init__()
        layers = [norm(size_in), LeakyReLU(0), *up, nn.Conv2d(size_in, size_out, 3, 1, 1), norm(size_out), LeakyReLU(0)]
        self.main = nn.Sequential(*layers, nn.Conv2d(size_out, size_out, 3, 1, 1), *down)
        self.skip = nn.Sequential(*down, nn.Conv2d(size_in, size_out, 1), *up)

    def forward(self, x):
        return self.main(x) + self.skip(x)

class Generator(nn.Sequential):
    """z (B, latent_dim) -> image (B, img_channels, img_size, img_size) in [-1, 1]; shapes below: by the defaults.
    hidden_channels: from the image inwards. Raises Misuse if img_size cannot be halved once for each of them."""
    def __init__(self, latent_dim=100, img_size=28, img_channels=1, hidden_channels=(64, 128), depth=1, arch="conv"):
        factor = 2 ** len(hidden_channels)
        if img_size % factor:
            raise Misuse(f"--img-size {img_size} is no multiple of {factor}: change it or use fewer --hidden-channels.")
        widths = [*reversed(hidden_channels), img_channels if arch == "conv" else hidden_channels[0]]
        start = img_size // factor, img_size // factor, widths[0]
        layers = [nn.Linear(latent_dim, math.prod(start), bias=False), nn.Unflatten(1, start)]  # (B, 7, 7, 128)
        layers += [Permute([0, 3, 1, 2])]  # (B, 128, 7, 7), channels last in memory, as the convolutions want them
        for channels, width in zip(widths[:-1], widths[1:], strict=True):  # (B, 64, 14, 14), (B, 1, 28, 28; resnet: 64)
            if arch == "resnet":
                layers += [ResBlock(channels, width, nn.BatchNorm2d, up=[nn.Upsample(scale_factor=2)])]
            else:
                convs = [nn.Conv2d(channels, channels, 3, 1, 1, bias=False) for _ in range(depth - 1)]
                for conv in [*convs, nn.ConvTranspose2d(channels, width, 4, 2, 1, bias=False)]:
                    layers += [nn.BatchNorm2d(channels), nn.ReLU(True), conv]
        if arch == "resnet":
            layers += [nn.BatchNorm2d(width), nn.ReLU(True), nn.Conv2d(width, img_channels, 3, 1, 1)]
        super().__init__(*layers, nn.Tanh())

class Critic(nn.Module):
    """image (B, img_channels, img_size, img_size) -> score (B,); no batch norm: it would mix the pictures' slopes."""
    def __init__(self, img_size, img_channels, hidden_channels, depth=1, arch="conv", norm="none", spectral=False):
        super().__init__()
        norm = partial(nn.GroupNorm, 1) if norm == "layer" else lambda channels: nn.Identity()  # 1 group
        layers = [nn.Conv2d(img_channels, hidden_channels[0], 3, 1, 1)] if arch == "resnet" else []
        channels = hidden_channels[0] if layers else img_channels
        for width in hidden_channels:  # (B, 64, 14, 14), (B, 128, 7, 7)
            if arch == "resnet":
                layers += [ResBlock(channels, width, norm, down=[nn.AvgPool2d(2)])]
            else:
                convs = [nn.Conv2d(width, width, 3, 1, 1) for _ in range(depth - 1)]
                for conv in [nn.Conv2d(channels, width, 4, 2, 1), *convs]:
                    layers += [conv, norm(width), LeakyReLU(0.2, True)]
            channels, img_size = width, img_size // 2
        layers += [LeakyReLU(0)] if arch == "resnet" else []
        self.layers = nn.Sequential(*layers, Permute([0, 2, 3, 1]), nn.Flatten())  # (B, 7 * 7 * 128), as in memory
        self.score = nn.Linear(img_size**2 * channels, 1, bias=False)
        if spectral:
            self.apply(lambda layer: spectral_norm(layer) if isinstance(layer, (nn.Conv2d, nn.Linear)) else layer)

    def forward(self, x):
        x = self.layers(x).float()  # fp32 from here on: a score may drift to where bf16 has no fractions
        return (x * self.score.weight).sum(1)  # (B,)

def critic_loss(scores_real, scores_fake):
    """mean D(G(z)) - mean D(x) = -W, W the critic's estimate of the Wasserstein distance."""
    return scores_fake.mean() - scores_real.mean()

def generator_loss(scores_fake):
    """-mean D(G(z))"""
    return -scores_fake.mean()

def slopes(critic, x_real, x_fake):
    """|grad D(x)| (B,) at random points on the lines from each real picture to a fake one, (B, C, H, W) both."""
    alpha = torch.rand(len(x_real), 1, 1, 1, device=x_real.device)  # one for each picture
    x = torch.lerp(x_fake.float(), x_real, alpha).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)  # (B, C, H, W), to be differentiated too
    return (gradient.square().flatten(1).sum(1) + 1e-12).sqrt()  # 1e-12: the derivative of a root is infinite at 0

def gradient_penalty(critic, x_real, x_fake):
    """mean (|grad D(x)| - 1)^2, unweighted: Gulrajani et al. 2017, 1704.00028, equation 3."""
    return (slopes(critic, x_real, x_fake) - 1).square().mean()

def number(kind, low, high=math.inf):  # a type for argparse: an int or a float from low to high
    def number(text):  # argparse puts this name into its message
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
    return number

def parse_args(argv=None, known=None):
    """The flags: argv wins over known, the Namespace of an older run, and that over the defaults."""
    parser = argparse.ArgumentParser(description="WGAN-GP, arXiv 1704.00028. In brackets: the defaults.")
    count, share, amount = number(int, 1), number(float, 0, 1), number(float, 0, 1e9)
    groups = [parser.add_argument_group(name) for name in ("run", "data", "model", "optimiser", "Lipschitz constraint")]
    run, data, model, adam, lipschitz = (group.add_argument for group in groups)
    run("--epochs", type=count, help="passes over the data, in all (10; more if under 4,000 steps)")
    run("--max-steps", type=count, help="stop after so many steps, if that comes first (never)")
    run("--batch-size", type=number(int, 2), default=32, help="pictures in a batch (%(default)s)")
    run("--seed", type=number(int, 0, 2**31), default=0, help="of the weights, the noise and the order (%(default)s)")
    run("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    run("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 if x86 or CUDA has it (auto)")
    run("--compile", action=argparse.BooleanOptionalAction, help="torch.compile G, and D without gp: for GPUs only")
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
    model("--hidden-channels", type=count, nargs="+", help="from image to z (16 32; depth 1: 32 64; 64x64: 32 64 128)")
    model("--arch", choices=["conv", "resnet"], default="conv", help="resnet: residual blocks, as in 1704.00028 (conv)")
    model("--depth", type=count, help="convolutions at each resolution of conv, the extra ones 3x3 (1; under 64x64 2)")
    model("--critic-norm", choices=["none", "layer"], help="layer norm in the critic (layer with clip, else none)")
    adam("--lr-g", type=share, default=1e-3, help="rate for G (%(default)s)")
    adam("--lr-d", type=share, help="rate for D (0.001 with gp, else 0.0002)")
    adam("--betas", type=number(float, 0, 0.9999), nargs=2, default=[0.0, 0.9], help="Adam's decay rates (0 0.9)")
    adam("--adam-eps", type=number(float, 1e-20, 1), default=1e-8, help="epsilon of Adam or RMSprop (%(default)s)")
    adam("--lr-schedule", choices=["constant", "cosine"], default="constant", help="cosine: towards 0 (%(default)s)")
    adam("--clip-grad-norm", type=amount, help="scale gradients down to this L2 norm, against jumps (off)")
    adam("--ema", type=share, default=0.999, help="decay of the average of G that is sampled; 0: G's own (0.999)")
    lipschitz("--lipschitz", choices=["gp", "clip", "spectral"], default="gp", help="what bounds the slope of D (gp)")
    lipschitz("--gp-weight", type=amount, default=10, help="of the penalty of gp (%(default)s)")
    lipschitz("--clip-value", type=number(float, 1e-6), default=0.05, help="clip: bound of D's weights (%(default)s)")
    lipschitz("--critic-steps", type=count, default=5, help="D updates for each update of G (%(default)s)")
    args = parser.parse_args(argv, known)
    args.script, args.out = Path(__file__).stem, args.out or f"runs/{Path(__file__).stem}-{args.dataset}"
    args.critic_norm = args.critic_norm or ("layer" if args.lipschitz == "clip" else "none")
    args.lr_d = (1e-3 if args.lipschitz == "gp" else 2e-4) if args.lr_d is None else args.lr_d
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
    shape = args.img_size, args.img_channels, args.hidden_channels, args.depth, args.arch
    return Generator(args.latent_dim, *shape), Critic(*shape, args.critic_norm, args.lipschitz == "spectral")

def save_plots(out, log):
    """losses.png: the curves of log, the lines of log.csv, each with its running mean."""
    log = np.atleast_1d(np.genfromtxt(log, delimiter=",", names=True))
    figure, n = Figure(figsize=(16, 3.8), layout="constrained"), len(log) // 40 + 1  # rows in the running mean
    panels = [("wasserstein wasserstein_heldout", "Wasserstein distance, estimated", "E D(x) - E D(G(z))", {})]
    panels += [("loss_d loss_g", "Loss: the zero of loss_g drifts", "loss", {})]
    panels += [("critic_grad_norm", "The critic's slope: gp wants 1", "|grad D| between real and fake", {})]
    panels += [("grad_norm_d grad_norm_g", "Gradient norm", "L2 norm of all gradients", {"yscale": "log"})]
    for axes, (columns, title, ylabel, more) in zip(figure.subplots(1, 4), panels, strict=True):
        for i, column in enumerate(columns.split() if log.size else []):
            axes.plot(log["step"], log[column], f"C{i}", alpha=0.25)
            axes.plot(log["step"][n - 1 :], np.convolve(log[column], np.ones(n) / n, "valid"), f"C{i}", label=column)
            axes.legend(), axes.locator_params("x", nbins=5)
        axes.set(title=title, xlabel="step (dark: running mean)", ylabel=ylabel, **more)
    figure.savefig(out / "losses.png", dpi=100)

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
    args.depth = args.depth or (2 if args.arch == "conv" and args.img_size < 64 else 1)
    halvings = max(1, round(math.log2(args.img_size / 8)))  # to about 8x8
    width = 32 // args.depth if args.arch == "conv" else 32
    args.hidden_channels = args.hidden_channels or [max(1, width * 2**n) for n in range(halvings)]
    torch.manual_seed(args.seed + (run["step"] if run else 0))  # on a GPU a resumed run draws new noise
    G, D = (network.to(device, memory_format=torch.channels_last) for network in build(args))
    G_ema = AveragedModel(G)
    opt = partial(torch.optim.Adam, betas=args.betas, fused=True) if args.lipschitz != "clip" else torch.optim.RMSprop
    opt_g, opt_d = opt(G.parameters(), args.lr_g, eps=args.adam_eps), opt(D.parameters(), args.lr_d, eps=args.adam_eps)
    parts = {"G": G, "D": D, "G_ema": G_ema, "opt_g": opt_g, "opt_d": opt_d}
    if args.compile:
        G.compile(), args.lipschitz == "gp" or D.compile()  # gp differentiates D twice, and compiled code cannot be
    step, z_fixed = 0, fixed_noise(512, args.latent_dim, args.seed).to(device)  # the first 64 make the grid
    shuffled, n = epoch_order(len(images), len(images), args.seed, 0)[0], min(1000, len(images) // 10)
    held_out, training = shuffled[: n or 1], shuffled[n:]  # indexes; of under 10 pictures all are trained on
    batch_size = min(args.batch_size, len(training))
    steps_per_epoch = max(1, len(training) // (batch_size * args.critic_steps))
    args.epochs = args.epochs or max(10, math.ceil(4000 / steps_per_epoch))
    last_step = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    counts = {name: sum(p.numel() for p in parts[name].parameters()) for name in ("G", "D")}
    facts = {"torch": torch.__version__, "on": f"{device}, {'bf16' if bf16 else 'fp32'}", "parameters": counts}
    log = ["epoch,step,loss_d,loss_g,grad_norm_d,grad_norm_g,images_per_second,wasserstein,wasserstein_heldout"]
    log[0] += ",gradient_penalty,critic_grad_norm"
    if run:
        for name, part in parts.items():
            part.load_state_dict(run[name])
        step, z_fixed, log = run["step"], run["z_fixed"].to(device), run["log"]
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
            # (1) D steps: maximise E D(x) - E D(G(z)) under the constraint; W is a maximum over D, hence several steps
            D.requires_grad_(True)
            order = epoch_order(len(training), batch_size * args.critic_steps, args.seed, epoch)[i]
            for index in training[order].split(batch_size):  # critic_steps times (B,)
                x_real = to_batch(images, index, device)  # (B, C, H, W) in [-1, 1]
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    with torch.no_grad():
                        x_fake = G(torch.randn(batch_size, args.latent_dim, device=device))
                    loss_d = critic_loss(D(x_real), D(x_fake))
                    if args.lipschitz == "gp":
                        loss_d = loss_d + args.gp_weight * gradient_penalty(D, x_real, x_fake)
                opt_d.zero_grad()
                loss_d.backward()
                if logging or args.clip_grad_norm:  # up to inf: measured, not changed
                    norm_d = nn.utils.clip_grad_norm_(D.parameters(), args.clip_grad_norm or math.inf)
                opt_d.step()
                for weight in D.parameters() if args.lipschitz == "clip" else ():
                    weight.data.clamp_(-args.clip_value, args.clip_value)
            # (2) G step: maximise E D(G(z)) for fresh z; the gradient passes through D, whose weights are frozen
            D.requires_grad_(False)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss_g = generator_loss(D(G(torch.randn(batch_size, args.latent_dim, device=device))))
            opt_g.zero_grad()
            loss_g.backward()
            if logging or args.clip_grad_norm:
                norm_g = nn.utils.clip_grad_norm_(G.parameters(), args.clip_grad_norm or math.inf)
            opt_g.step()
            G_ema.multi_avg_fn = get_ema_multi_avg_fn(min(args.ema, (1 + step) / (10 + step)))  # short memory at first
            G_ema.update_parameters(G)  # averages the parameters, copies the buffers
            # (3) log, sample, save
            if logging:  # D after its last update; loss_d and norm_d are from before it
                speed = (step - first) / (time.perf_counter() - started)  # steps a second
                D.eval()  # spectral norm improves its estimate at each call in training mode
                # fork_rng: the random numbers of training stay what they are without a log (on a CPU)
                with torch.random.fork_rng([]), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    slope = slopes(D.forward, x_real, x_fake).detach()  # (B,); .forward is not compiled
                    seen, held = (torch.cat([D(to_batch(images, index, device)) for index in part.split(256)]).mean()
                                  for part in (training[: len(held_out)], held_out))  # not what D was just fitted to
                D.train()
                row = [loss_d, loss_g, norm_d, norm_g, seen + loss_g, held + loss_g]  # loss_g = -E D(new fakes)
                row = torch.stack([*row, (slope - 1).square().mean(), slope.mean()]).tolist()
                row.insert(4, speed * batch_size * args.critic_steps)  # images_per_second
                for name, value in zip(log[0].split(",")[2:], row, strict=True):
                    if not math.isfinite(value):
                        raise Fault(f"{name} is {value} at step {step}, which is not saved. Try a lower rate.")
                if epoch_ends or step % args.log_every == 0:  # not where Ctrl-C fell: a resumed run has the same rows
                    log.append(",".join([str(epoch + 1), str(step), *(f"{value:.6g}" for value in row)]))
                    with open(out / "log.csv", "a") as file:
                        print(log[-1], file=file)
                line = f"epoch {epoch + 1}/{args.epochs} [{'#' * (10 * step // last_step):10}] G step {step} W "
                line += f"{row[5]:.3f} {row[4]:.0f} img/s {(last_step - step) / speed / 60:.1f} min left "
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
                save_atomically(out / "checkpoint.pt", state | rest | {"z_fixed": z_fixed})
                if step % 100 < steps_per_epoch and not stopping:  # once in each 100: it takes as long as many steps
                    save_plots(out, log)
            if stopping:
                break
    finally:  # at the end, after Ctrl-C, and after a fault
        signal.signal(signal.SIGINT, old_handler)
        save_plots(out, log)
        save_history(out, step)
    print(f"Step {step} of {max(step, last_step)}. Look at {out}/samples.gif and losses.png.")

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
