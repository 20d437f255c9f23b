r"""DCGAN, the convolutional GAN of Radford, Metz and Chintala 2015, arXiv 1511.06434.

Two networks play a game: the generator G turns noise z into a picture, the discriminator D says how likely a picture is
to be real. D learns to tell pictures of the data, x, from G's; G learns to make pictures that D takes for real.
DCGAN made this work with convolutions: strides in place of pooling, batch norm in both, ReLU in G, LeakyReLU in D.
    D maximises  log D(x) + log(1 - D(G(z)))    loss_d = -mean log D(x) - mean log(1 - D(G(z)))
    G maximises  log D(G(z))                    loss_g = -mean log D(G(z))
    python dcgan.py                             # the built-in digits, no download
    python dcgan.py --dataset mnist --epochs 20
    python dcgan.py --dataset mnist --epochs 20 --lr-g 2e-4 --lr-d 2e-4 --betas 0.5 0.999 --out runs/adam  # the paper's
The strongest recipe found here: wider, nearest upsampling, R1 instead of D's batch norm, higher rates that fade:
    python dcgan.py --dataset mnist --epochs 8 --hidden-channels 32 64 --upsample nearest --d-norm none --r1 0.5 \
        --r1-every 4 --lr-g 1e-3 --lr-d 1e-3 --init default --lr-schedule cosine --out runs/strong
What changes from mlp_gan.py: the networks, their first weights; no minimax, no gradients.png; walks through the space
of z, in interpolation.gif; tricks: hinge loss, R1, spectral norm, flipped labels, instance noise, diffaugment.
Where this differs from the paper: Adam at 5e-4 with betas (0, 0.99), better after 20 epochs than 2e-4 and (0.5, 0.999);
z is normal, not uniform, and the same in both steps; batch 64, not 128; kernels 4x4; samples from an average of G's
weights, whose batch norm has statistics of its own (--ema 0: G's weights); networks for laptops (theirs: 1024, 512,
256, 128 channels from 4x4 up). Images under 64x64, halved one to three times, have two convolutions at each
resolution (--depth 1: one, the paper's). --r1-every leaves Adam's rates as they are (1912.04958 rescales them)."""
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
from torch.nn.functional import avg_pool2d, conv_transpose2d, relu, softplus
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torchvision.ops import Permute
from common import DATASETS, Fault, Misuse, epoch_order, fixed_noise, grid, load_data, sample, save_atomically
from common import save_gif, save_history, save_pictures, save_png, to_batch

class UpsampleConv2d(nn.Conv2d):
    """nn.Upsample(scale_factor=2), then this 3x3 convolution: (B, in_channels, H, W) -> (B, out_channels, 2H, 2W).
    In one dimension y[2i] = w0 x[i-1] + (w1 + w2) x[i] and y[2i+1] = (w0 + w1) x[i] + w2 x[i+1]. So x[i] is spread by
    the weights w2, w1 + w2, w0 + w1, w0: a transposed convolution, of 4 products, not 6; in two dimensions 16, not 36.
    Each y has w0 + w1 + w2 in all, but at the border, where x is 0 outside: what is flat stays so, no checkerboard."""
    def forward(self, x):
        sums = 4 * avg_pool2d(self.weight, 2, 1, 1)  # (out_channels, in_channels, 4, 4): of each 2x2, outside lies 0
        return conv_transpose2d(x, sums.transpose(0, 1).flip(2, 3), self.bias, stride=2, padding=1)

class Generator(nn.Sequential):
    """z (B, latent_dim) -> image (B, img_channels, img_size, img_size) in [-1, 1]; shapes below: by the defaults.
    hidden_channels: from the image inwards. Raises Misuse if img_size cannot be halved once for each of them."""
    def __init__(self, latent_dim=100, img_size=64, img_channels=3, hidden_channels=(128, 256, 512),
                 kernel_size=4, upsample="transpose", depth=1, init="dcgan"):  # fmt: skip
        factor = 2 ** len(hidden_channels)
        if img_size % factor:
            raise Misuse(f"--img-size {img_size} is no multiple of {factor}: change it or use fewer --hidden-channels.")
        widths = [*reversed(hidden_channels), img_channels]
        start = img_size // factor, img_size // factor, widths[0]
        layers = [nn.Linear(latent_dim, math.prod(start), bias=False), nn.Unflatten(1, start)]  # (B, 8, 8, 512)
        layers += [Permute([0, 3, 1, 2])]  # (B, 512, 8, 8), channels last in memory, as the convolutions want them
        for channels, width in zip(widths[:-1], widths[1:], strict=True):  # (B, 256, 16, 16) to (B, 3, 64, 64)
            for _ in range(depth - 1):
                layers += [nn.BatchNorm2d(channels), nn.ReLU(True), nn.Conv2d(channels, channels, 3, 1, 1, bias=False)]
            layers += [nn.BatchNorm2d(channels), nn.ReLU(True)]
            if upsample == "nearest":
                layers += [UpsampleConv2d(channels, width, 3, 1, 1, bias=False)]
            else:
                pad = (kernel_size - 1) // 2, kernel_size % 2  # so that the size doubles
                layers += [nn.ConvTranspose2d(channels, width, kernel_size, 2, *pad, bias=False)]
        super().__init__(*layers, nn.Tanh())
        if init == "dcgan":
            self.apply(init_weights)

class Discriminator(nn.Sequential):
    """image (B, img_channels, img_size, img_size) -> logit l (B,) of D(x) = sigmoid(l): G's mirror image."""
    def __init__(self, img_size=64, img_channels=3, hidden_channels=(128, 256, 512),
                 kernel_size=4, depth=1, norm="batch", dropout=0.0, init="dcgan"):  # fmt: skip
        layers, channels, bias = [], img_channels, norm != "batch"  # no bias with batch norm, not even first and last
        for width in hidden_channels:  # (B, 128, 32, 32), (B, 256, 16, 16), (B, 512, 8, 8)
            convs = [nn.Conv2d(channels, width, kernel_size, 2, (kernel_size - 1) // 2, bias=bias)]
            convs += [nn.Conv2d(width, width, 3, 1, 1, bias=bias) for _ in range(depth - 1)]
            for conv in convs:
                batch_norm = [nn.BatchNorm2d(width)] if norm == "batch" and layers else []  # not on the first
                layers += [conv, *batch_norm, nn.LeakyReLU(0.2, True)] + ([nn.Dropout(dropout)] if dropout else [])
            channels, img_size = width, img_size // 2
        layers += [Permute([0, 2, 3, 1]), nn.Flatten()]  # (B, 8 * 8 * 512), as in memory
        super().__init__(*layers, nn.Linear(img_size**2 * channels, 1, bias=bias), nn.Flatten(0))  # (B,)
        if init == "dcgan":
            self.apply(init_weights)
        if norm == "spectral":
            self.apply(lambda layer: spectral_norm(layer) if hasattr(layer, "weight") else layer)

def init_weights(module):
    """The paper's N(0, 0.02) for weights; N(1, 0.02) for the scales of batch norm. Biases stay as they are."""
    if hasattr(module, "weight"):
        nn.init.normal_(module.weight, 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0, 0.02)

def discriminator_loss(logits_real, logits_fake, loss="bce", smoothing=0.0):
    """-log D(x) - log(1 - D(G(z))): -log sigmoid(l) = softplus(-l). Hinge: relu(1 - l) for x, relu(1 + l) for G(z)."""
    f = softplus if loss == "bce" else lambda logits: relu(1 + logits)
    real = (1 - smoothing) * f(-logits_real) + smoothing * f(logits_real)  # (B,)
    return real.mean() + f(logits_fake).mean()

def generator_loss(logits_fake, loss="bce"):
    """-log D(G(z)) = softplus(-l): its gradient is large while D sees through G. Hinge: -l."""
    return softplus(-logits_fake).mean() if loss == "bce" else -logits_fake.mean()

def r1_penalty(logits_real, x_real):
    """mean |grad_x l(x)|^2: keeps D flat at the data (1801.04406). Batch norm in D would mix the pictures."""
    (gradient,) = torch.autograd.grad(logits_real.sum(), x_real, create_graph=True)  # (B, C, H, W)
    return gradient.square().flatten(1).sum(1).mean()

def diffaugment(x):
    """Colour, translation and cutout, random for each picture (2006.10738, but a shift repeats edges)."""
    b, _, h, w = x.shape
    light, colour, contrast, top, left, down, right = torch.rand(7, b, 1, 1, 1, device=x.device)  # (B, 1, 1, 1) each
    x = x + light - 0.5
    x = torch.lerp(x.mean(1, keepdim=True), x, 2 * colour)
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast + 0.5)
    row, column = torch.arange(h, device=x.device).view(h, 1), torch.arange(w, device=x.device)
    hole = ((row - h * top).abs() < h / 4) & ((column - w * left).abs() < w / 4)  # (B, 1, H, W), of half the sides
    row = (row + ((down - 0.5) * h / 4).round().long()).clamp(0, h - 1).squeeze(1)  # (B, H, 1), shifted by up to 1/8
    column = (column + ((right - 0.5) * w / 4).round().long()).clamp(0, w - 1).squeeze(1)  # (B, 1, W)
    x = x.permute(0, 2, 3, 1)[torch.arange(b, device=x.device).view(b, 1, 1), row, column]  # (B, H, W, C)
    return x.permute(0, 3, 1, 2).masked_fill(hole, 0)

def noise_path(z, kind, frames=12):
    """z (4, N, latent_dim) -> (4 * frames, N, latent_dim), from each z to the next, and back to the first: a loop.
    slerp turns by the angle between two z, rotation by 90 degrees: both keep near the lengths that G was trained on."""
    a, b, u = z[:, None], z.roll(-1, 0)[:, None], torch.arange(frames).view(-1, 1, 1) / frames
    if kind == "linear":
        return (a + u * (b - a)).flatten(0, 1)
    cosine = torch.cosine_similarity(a, b, dim=-1)[..., None].clamp(-0.9, 0.999)  # -0.9: opposite z lead far off
    angle = cosine.acos() if kind == "slerp" else torch.tensor(math.pi / 2)
    return ((((1 - u) * angle).sin() * a + (u * angle).sin() * b) / angle.sin()).flatten(0, 1)

def number(kind, low, high=math.inf):  # a type for argparse: an int or a float from low to high
    def number(text):  # argparse puts this name into its message
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
    return number

def parse_args(argv=None, known=None):
    """The flags: argv wins over known, the Namespace of an older run, and that over the defaults."""
    parser = argparse.ArgumentParser(description="DCGAN, arXiv 1511.06434. In brackets: the defaults.")
    count, share, amount = number(int, 1), number(float, 0, 1), number(float, 0, 1e9)
    groups = [parser.add_argument_group(name) for name in ("run", "data", "model", "optimiser", "tricks")]
    run, data, model, adam, trick = (group.add_argument for group in groups)
    run("--epochs", type=count, help="passes over the data, in all (10; more if under 9,000 steps)")
    run("--max-steps", type=count, help="stop after so many steps, if that comes first (never)")
    run("--batch-size", type=number(int, 2), default=64, help="pictures in a batch (%(default)s)")
    run("--seed", type=number(int, 0, 2**31), default=0, help="of the weights, the noise and the order (%(default)s)")
    run("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    run("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 if x86 or CUDA has it (auto)")
    run("--compile", action=argparse.BooleanOptionalAction, help="torch.compile G, and D without --r1: for GPUs only")
    run("--out", help="the folder of the run (runs/SCRIPT-DATASET)")
    run("--overwrite", action="store_true", help="replace the run that is in the folder")
    run("--resume", action="store_true", help="go on with the run that is in the folder, by its flags, to --epochs")
    run("--sample", type=count, metavar="N", help="train nothing: write N pictures with the folder's checkpoint")
    run("--log-every", type=count, default=50, help="steps between rows of log.csv (%(default)s)")
    run("--sample-every", type=count, help="steps between extra sample grids (none; in epoch 1: 1, 2, 4, ...)")
    run("--snapshot-every", type=count, help="epochs between copies of G in generators/ (none)")
    run("--interpolate", choices=["linear", "slerp", "rotation"], default="slerp", help="in interpolation.gif (slerp)")
    data("--dataset", choices=list(DATASETS), default="digits", help="folder: your own pictures (%(default)s)")
    data("--data-dir", default="data", help="where the data is, or is downloaded to (%(default)s)")
    data("--classes", type=int, nargs="+", help="only the pictures with these labels (all)")
    data("--background", default="white", help="what transparent pictures are laid on (%(default)s)")
    data("--img-size", type=count, help="resize the pictures to this (the size of the data; 64 for folder)")
    model("--latent-dim", type=count, default=100, help="how many numbers z has (%(default)s)")
    model("--hidden-channels", type=count, nargs="+", help="from image to z (16 32; depth 1: 32 64; 64x64: 32 64 128)")
    model("--kernel-size", type=int, choices=[3, 4, 5], default=4, help="of the strided convolutions (%(default)s)")
    model("--upsample", choices=["transpose", "nearest"], default="transpose", help="nearest: + 3x3 conv (transpose)")
    model("--depth", type=count, help="convolutions at each resolution, the extra ones 3x3 (1; under 64x64 2)")
    model("--d-norm", choices=["batch", "spectral", "none"], default="batch", help="spectral: 1802.05957 (batch)")
    model("--init", choices=["dcgan", "default"], default="dcgan", help="N(0, 0.02), or PyTorch's own (%(default)s)")
    adam("--lr-g", type=share, default=5e-4, help="Adam's rate for G (%(default)s)")
    adam("--lr-d", type=share, default=5e-4, help="Adam's rate for D (%(default)s)")
    adam("--betas", type=number(float, 0, 0.9999), nargs=2, default=[0.0, 0.99], help="Adam's decay rates (0 0.99)")
    adam("--adam-eps", type=number(float, 1e-20, 1), default=1e-8, help="Adam's epsilon (%(default)s)")
    adam("--lr-schedule", choices=["constant", "cosine"], default="constant", help="cosine: towards 0 (%(default)s)")
    adam("--clip-grad-norm", type=amount, help="scale gradients down to this L2 norm, against jumps (off)")
    adam("--ema", type=share, default=0.999, help="decay of the average of G that is sampled; 0: G's own (0.999)")
    adam("--d-steps", type=count, default=1, help="D updates a step (%(default)s)")
    adam("--g-steps", type=count, default=1, help="G updates a step (%(default)s)")
    trick("--loss", choices=["bce", "hinge"], default="bce", help="hinge: Geometric GAN, 1705.02894 (%(default)s)")
    trick("--r1", type=amount, default=0, help="this / 2 * |grad of D's logit at x|^2: 1801.04406; --d-norm none (off)")
    trick("--r1-every", type=count, default=1, metavar="N", help="--r1 in one of N steps, but N-fold: 1912.04958 (1)")
    trick("--label-smoothing", type=share, default=0, help="D's target for real is 1 - this: 1606.03498 (off)")
    trick("--flip-labels", type=share, default=0, help="share of D's labels that are made wrong on purpose (off)")
    trick("--instance-noise", type=amount, default=0, help="noise on all that D sees, falling to 0: 1610.04490 (off)")
    trick("--dropout", type=number(float, 0, 0.99), default=0, help="in D, after activation: against overfitting (off)")
    trick("--diffaugment", action="store_true", help="for few pictures: colour, shift, cut-out, 2006.10738 (off)")
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
    free = {"epochs", "max_steps", "device", "compile", "data_dir", "out", "resume", "sample", "interpolate"}
    for name, value in flags.items():
        if getattr(args, name) != value and name not in free and not (args.sample and name == "seed"):
            raise Misuse(f"{path} has {name.replace('_', '-')} {value}: keep to it, or change --out.")
    return args, run

def build(args):
    """G and D as the flags say."""
    shape, init = (args.img_size, args.img_channels, args.hidden_channels), args.init
    G = Generator(args.latent_dim, *shape, args.kernel_size, args.upsample, args.depth, init)
    return G, Discriminator(*shape, args.kernel_size, args.depth, args.d_norm, args.dropout, init)

def save_plots(out, log):
    """losses.png: the curves of log, the lines of log.csv, each with its running mean."""
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
    args.depth = args.depth or (2 if args.img_size < 64 else 1)
    halvings = max(1, round(math.log2(args.img_size / 8)))  # to about 8x8
    args.hidden_channels = args.hidden_channels or [max(1, 32 // args.depth * 2**n) for n in range(halvings)]
    torch.manual_seed(args.seed + (run["step"] if run else 0))  # on a GPU a resumed run draws new noise
    G, D = (network.to(device, memory_format=torch.channels_last) for network in build(args))
    G_ema = AveragedModel(G)
    opt_g = torch.optim.Adam(G.parameters(), args.lr_g, args.betas, args.adam_eps, fused=True)
    opt_d = torch.optim.Adam(D.parameters(), args.lr_d, args.betas, args.adam_eps, fused=True)
    parts = {"G": G, "D": D, "G_ema": G_ema, "opt_g": opt_g, "opt_d": opt_d}
    if args.compile:
        G.compile(), args.r1 or D.compile()  # R1 differentiates D twice, and compiled code cannot be
    step, z_fixed = 0, fixed_noise(512, args.latent_dim, args.seed).to(device)  # the first 64 make the grid
    batch_size = min(args.batch_size, len(images))
    steps_per_epoch = max(1, len(images) // (batch_size * args.d_steps))
    args.epochs = args.epochs or max(10, math.ceil(9000 / steps_per_epoch))
    last_step = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    counts = {name: sum(p.numel() for p in parts[name].parameters()) for name in ("G", "D")}
    facts = {"torch": torch.__version__, "on": f"{device}, {'bf16' if bf16 else 'fp32'}", "parameters": counts}
    log = ["epoch,step,loss_d,loss_g,d_real,d_fake,grad_norm_d,grad_norm_g,images_per_second"]
    if run:
        for name, part in parts.items():
            part.load_state_dict(run[name])
        step, z_fixed, log = run["step"], run["z_fixed"].to(device), run["log"]
        torch.set_rng_state(run["rng"])
    elif (out / "checkpoint.pt").exists() or (out / "samples/000000.png").exists():  # --overwrite: clear the old run
        own = "interpolation.gif", "nearest.png", "score.*"
        for name in "checkpoint.pt", "generated.png", *own, "samples/[0-9]*.png", "gen*/*[0-9].p*":
            list(map(Path.unlink, sorted(out.glob(name))))
    save_png(out / "real.png", grid(images[:: max(1, len(images) // 64)][:64].cpu()))
    save_png(out / f"samples/{step:06d}.png", grid(sample(G_ema, z_fixed[:64])))
    save_atomically(out / "log.csv", ("\n".join(log) + "\n").encode())  # no rows later than the checkpoint
    save_atomically(out / "args.json", json.dumps(vars(args) | facts, indent=2).encode())
    print(f"{len(images):,} pictures {tuple(images.shape[1:])}, parameters {counts}, {facts['on']}, {out}", flush=True)
    def D_seen(x):  # (B, C, H, W) -> (B,); step is that of the loop below
        x = x + args.instance_noise * (1 - step / last_step) * torch.randn_like(x) if args.instance_noise else x
        return D(diffaugment(x) if args.diffaugment else x).float()
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
            r1 = 0 if (step - 1) % args.r1_every else args.r1 * args.r1_every  # steps 1, N + 1, ...: N times as strong
            for index in epoch_order(len(images), batch_size * args.d_steps, args.seed, epoch)[i].split(batch_size):
                x_real = to_batch(images, index, device).requires_grad_(r1 > 0)  # (B, C, H, W) in [-1, 1]
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    x_fake = G(torch.randn(batch_size, args.latent_dim, device=device))  # kept for (2)
                    logits_real, logits_fake = D_seen(x_real), D_seen(x_fake.detach())  # no gradient for G
                sign = torch.where(torch.rand(2, batch_size, device=device) < args.flip_labels, -1, 1)  # -1: wrong
                seen_real, seen_fake = sign[0] * logits_real, sign[1] * logits_fake  # -l: logit of the other label
                loss_d = discriminator_loss(seen_real, seen_fake, args.loss, args.label_smoothing)
                penalty = r1 / 2 * r1_penalty(logits_real, x_real) if r1 else 0  # in grad_norm_d, not in loss_d
                opt_d.zero_grad()
                (loss_d + penalty).backward()
                if logging or args.clip_grad_norm:  # up to inf: measured, not changed
                    norm_d = nn.utils.clip_grad_norm_(D.parameters(), args.clip_grad_norm or math.inf)
                opt_d.step()
            # (2) G step: maximise log D(G(z)) for the same z; the gradient passes through D, whose weights are frozen
            D.requires_grad_(False)
            for again in range(args.g_steps):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    x_fake = G(torch.randn(batch_size, args.latent_dim, device=device)) if again else x_fake
                    logits = D_seen(x_fake)
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
                row = torch.stack(row).tolist() + [speed * batch_size * args.d_steps]
                for name, value in zip(log[0].split(",")[2:], row, strict=True):
                    if not math.isfinite(value):
                        raise Fault(f"{name} is {value} at step {step}, which is not saved. Try a lower rate.")
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
                save_atomically(out / "checkpoint.pt", state | rest | {"z_fixed": z_fixed})
                if step % 100 < steps_per_epoch and not stopping:  # once in each 100: it takes as long as many steps
                    save_plots(out, log)
            if stopping:
                break
    finally:  # at the end, after Ctrl-C, and after a fault
        signal.signal(signal.SIGINT, old_handler)
        save_plots(out, log)
        save_history(out, step)
    z = noise_path(fixed_noise(4 * 32, args.latent_dim, args.seed).view(4, 32, -1), args.interpolate).to(device)
    save_gif(out / "interpolation.gif", [grid(sample(G_ema, z_t)) for z_t in z], 100)
    print(f"Step {step} of {max(step, last_step)}. Look at {out}/samples.gif, interpolation.gif and losses.png.")

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
