r"""InfoGAN, of Chen et al. 2016, arXiv 1606.03657: codes that come to mean something, without labels.

G gets noise z and a code c: one of ten categories, and two numbers. A third network Q, which is D with last layers of
its own, guesses c from the fake x. G is rewarded if Q guesses right, so that c has to show in x: the category as the
digit, the numbers as slant or width. The reward L is a lower bound of the mutual information I, as KL(P || Q) >= 0:
    I(c; x) = H(c) - H(c|x) = H(c) + E log P(c|x) >= H(c) + E log Q(c|x) = L    for x = G(z, c), P the true posterior
    D and Q maximise  log D(x_real) + log(1 - D(G(z, c))) + weight * L    loss_d in the log: minus this, without L
    G maximises       log D(G(z, c)) + weight * L                         loss_g likewise
Guessed perfectly, ten categories give L = ln 10 = 2.303 nats, each number ln 2 - ln(2 pi) / 2 = -0.226 (variance 1).
    python infogan.py                           # the built-in digits, no download
    python infogan.py --dataset mnist --epochs 20
What changes from dcgan.py: codes, Q, L; a dense layer more in each; no tricks; a test of what the codes mean on a
tenth of the pictures, not trained on: by labels (cluster_error), by the factors of `digits`; both in factors.png.
Where this differs from the paper (its values in brackets): Q learns categories from fakes distorted at random, so that
none is a slant or size (--augment 0: off); plain fakes teach it numbers and reward G. z is 16 normal numbers (62),
with c the same in both steps; L weighs 1, numbers' 0.3 (1 or less); D's rate 5e-4 (2e-4); batch 64 (128); widths 16,
32, 512 (64, 128, 1024); LeakyReLU 0.2 (0.1); PyTorch's first weights; Q's variance 1 (learned); averaged weights."""
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
from torch.nn.functional import affine_grid, cross_entropy, gaussian_nll_loss, grid_sample, one_hot, softplus
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torchvision.ops import Permute
from common import DATASETS, Fault, Misuse, epoch_order, fixed_noise, grid, load_data, sample, save_atomically
from common import save_gif, save_history, save_pictures, save_png, to_batch

class Generator(nn.Sequential):
    """z and c (B, inputs) -> image (B, img_channels, img_size, img_size) in [-1, 1]; shapes below: by the defaults.
    hidden_channels: from the image inwards. Raises Misuse if img_size cannot be halved once for each of them."""
    def __init__(self, inputs=28, img_size=28, img_channels=1, hidden_channels=(16, 32), hidden=512):
        factor = 2 ** len(hidden_channels)
        if img_size % factor:
            raise Misuse(f"--img-size {img_size} is no multiple of {factor}: change it or use fewer --hidden-channels.")
        widths = [*reversed(hidden_channels), img_channels]
        start = img_size // factor, img_size // factor, widths[0]
        layers = [nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(True)]  # (B, 512)
        layers += [nn.Linear(hidden, math.prod(start), bias=False), nn.Unflatten(1, start)]  # (B, 7, 7, 32)
        layers += [Permute([0, 3, 1, 2])]  # (B, 32, 7, 7), channels last in memory, as the convolutions want them
        for channels, width in zip(widths[:-1], widths[1:], strict=True):  # (B, 16, 14, 14), (B, 1, 28, 28)
            layers += [nn.BatchNorm2d(channels), nn.ReLU(True)]
            layers += [nn.ConvTranspose2d(channels, width, 4, 2, 1, bias=False)]
        super().__init__(*layers, nn.Tanh())

class Discriminator(nn.Module):
    """image (B, img_channels, img_size, img_size) -> logit l (B,) of D(x) = sigmoid(l), and Q's guesses (B, guesses):
    a logit (no softmax) for each category of each categorical code, then the numbers' means, then log variances."""
    def __init__(self, guesses=14, img_size=28, img_channels=1, hidden_channels=(16, 32), hidden=512):
        super().__init__()
        layers, channels = [], img_channels
        for width in hidden_channels:  # (B, 16, 14, 14), (B, 32, 7, 7)
            batch_norm = [nn.BatchNorm2d(width)] if layers else []  # not on the first
            layers += [nn.Conv2d(channels, width, 4, 2, 1, bias=False), *batch_norm, nn.LeakyReLU(0.2, True)]
            channels, img_size = width, img_size // 2
        layers += [Permute([0, 2, 3, 1]), nn.Flatten(), nn.Linear(img_size**2 * channels, hidden, bias=False)]
        self.trunk = nn.Sequential(*layers, nn.BatchNorm1d(hidden), nn.LeakyReLU(0.2, True))  # (B, 512), D's and Q's
        self.classify = nn.Linear(hidden, 1)  # D's own
        layers = [nn.Linear(hidden, 128, bias=False), nn.BatchNorm1d(128), nn.LeakyReLU(0.2, True)]
        self.guess = nn.Sequential(*layers, nn.Linear(128, guesses))  # Q's own

    def forward(self, x):
        x = self.trunk(x)
        return self.classify(x).squeeze(1).float(), self.guess(x).float()  # (B,), (B, guesses)

def discriminator_loss(logits_real, logits_fake):
    """-log D(x) - log(1 - D(G(z))): -log sigmoid(l) = softplus(-l), and -log(1 - sigmoid(l)) = softplus(l)."""
    return softplus(-logits_real).mean() + softplus(logits_fake).mean()

def generator_loss(logits_fake):
    """-log D(G(z)) = softplus(-l): its gradient is large while D sees through G."""
    return softplus(-logits_fake).mean()

def categorical_bound(guesses, c, sizes):
    """H(c) + E log Q(c|x) in nats, summed over the one-hot codes of these sizes; guesses (B, guesses), c (B, codes)."""
    logits, codes = (x[:, : sum(sizes)].split(sizes, 1) for x in (guesses, c))  # each (B, size)
    return sum(map(math.log, sizes)) - sum(map(cross_entropy, logits, codes))

def continuous_bound(guesses, c, sizes, variance):
    """The same for the numbers, the last columns, uniform in [-1, 1]: H = log 2. Q is normal; "fixed": variance 1."""
    mean, log_variance = guesses[:, sum(sizes) :].chunk(2, 1)  # (B, C) each
    v = log_variance.exp() if variance == "learned" else 1.0
    return (math.log(2) - gaussian_nll_loss(mean, c[:, sum(sizes) :], v, full=True, reduction="none")).mean(0).sum()

def draw_codes(n, sizes, continuous, device="cpu", rng=None):
    """c (n, sum(sizes) + continuous): a random category, one-hot, for each of sizes, then numbers from [-1, 1]."""
    categories = [one_hot(torch.randint(size, (n,), generator=rng, device=device), size) for size in sizes]
    return torch.cat([*categories, 2 * torch.rand(n, continuous, generator=rng, device=device) - 1], 1)

def augment(x, strength):
    """x (B, C, H, W), each picture scaled, slanted and turned at random, and shifted by up to strength * W / 2."""
    maps = torch.eye(2, 3, device=x.device) + strength * (2 * torch.rand(len(x), 2, 3, device=x.device) - 1)
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round places in the picture
        return grid_sample(x.float(), affine_grid(maps, x.shape, False), padding_mode="border", align_corners=False)

def best_matching(table):
    """How many pictures of table (categories, labels), a list of lists, fit the best one-to-one matching, and the label
    of each category. Exact, category by category: for each set of labels given so far only the best way is kept."""
    best = [(0, ())]  # ways to label the categories so far: the pictures that fit, and the labels
    for row in table:
        ways = [(fit + n, (*labels, k)) for fit, labels in best for k, n in enumerate(row) if k not in labels]
        best = {frozenset(labels): (fit, labels) for fit, labels in sorted(ways)}.values()  # the last is the best
    return max(best)

def number(kind, low, high=math.inf):  # a type for argparse: an int or a float from low to high
    def number(text):  # argparse puts this name into its message
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
    return number

def parse_args(argv=None, known=None):
    """The flags: argv wins over known, the Namespace of an older run, and that over the defaults."""
    parser = argparse.ArgumentParser(description="InfoGAN, arXiv 1606.03657. In brackets: the defaults.")
    count, share, amount = number(int, 1), number(float, 0, 1), number(float, 0, 1e9)
    groups = [parser.add_argument_group(name) for name in ("run", "data", "model", "optimiser", "information")]
    run, data, model, adam, info = (group.add_argument for group in groups)
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
    model("--latent-dim", type=count, default=16, help="how many numbers z has (%(default)s)")
    model("--hidden-channels", type=count, nargs="+", help="from image to z (16 32; at 64x64: 32 64 128)")
    model("--hidden", type=count, default=512, help="width of G's first layer and of the last shared one (%(default)s)")
    adam("--lr-g", type=share, default=1e-3, help="Adam's rate for G (%(default)s)")
    adam("--lr-d", type=share, default=5e-4, help="Adam's rate for D and Q (%(default)s)")
    adam("--betas", type=number(float, 0, 0.9999), nargs=2, default=[0.5, 0.999], help="Adam's decay rates (0.5 0.999)")
    adam("--adam-eps", type=number(float, 1e-20, 1), default=1e-8, help="Adam's epsilon (%(default)s)")
    adam("--lr-schedule", choices=["constant", "cosine"], default="constant", help="cosine: towards 0 (%(default)s)")
    adam("--clip-grad-norm", type=amount, help="scale gradients down to this L2 norm, against jumps (off)")
    adam("--ema", type=share, default=0.999, help="decay of averages: G's for samples, D's for the test (0.999)")
    info("--categorical", type=number(int, 2, 250), nargs="+", default=[10], help="categories of each code (10)")
    info("--continuous", type=number(int, 0), default=2, help="how many continuous codes (%(default)s)")
    info("--continuous-variance", choices=["fixed", "learned"], default="fixed", help="Q's: 1, or learned (fixed)")
    info("--info-weight-cat", type=amount, default=1, help="weight of the bound for categories (%(default)s)")
    info("--info-weight-cont", type=amount, default=0.3, help="weight of the bound for numbers (%(default)s)")
    info("--augment", type=share, default=0.25, help="how far to distort fakes for Q's categories (%(default)s)")
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
    shape, n = (args.img_size, args.img_channels, args.hidden_channels, args.hidden), sum(args.categorical)
    return Generator(args.latent_dim + n + args.continuous, *shape), Discriminator(n + 2 * args.continuous, *shape)

@torch.no_grad()
def measure(D, data, training, held_out, args, device):
    """How often Q's category is not the label at held_out, by the matching that fits held_out best; D is in eval mode.
    Draws factors.png. Without labels, with a label over 15 or more than 16 categories: nan, and nothing is drawn."""
    size, n_codes = args.categorical[0], args.continuous
    if data.labels is None or (n := max(size, data.labels.max().item() + 1)) > 16:  # there are 2^n sets of labels
        return math.nan
    update_bn([to_batch(data.images, training[:512], device)], D)  # statistics of real pictures, not of fakes
    guesses = torch.cat([D(to_batch(data.images, index, device))[1].cpu() for index in held_out.split(500)])
    table = one_hot(guesses[:, :size].argmax(1), n).T @ one_hot(data.labels[held_out], n)  # categories by labels
    fit, labels = best_matching(table.tolist())
    error, shares = 1 - fit / len(held_out), (table / table.sum(0).clamp(min=1))[:size].numpy()
    rows = [f"category {k}: {label if table[:, label].any() else '-'}" for k, label in enumerate(labels[:size])]
    panels = [(f"Share of each label (columns) in each category: error {error:.1%}", shares, rows, range(n))]
    if data.factors and n_codes:
        both = [*guesses.T[sum(args.categorical) :][:n_codes], *(factor[held_out] for factor in data.factors.values())]
        r = torch.stack(both).argsort(1).argsort(1).float().corrcoef().abs()[:n_codes, n_codes:].numpy()  # (C, F)
        panels += [("|Rank correlation|: code and factor", r, [f"code {j + 1}" for j in range(n_codes)], data.factors)]
    figure = Figure(figsize=(7 * len(panels) + 1, 4.5), layout="constrained")
    for axes, (title, values, rows, cols) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        axes.imshow(values, cmap="Blues", aspect="auto", vmin=0, vmax=1.5)  # never too dark for black text
        axes.set(title=title, xticks=range(len(cols)), xticklabels=cols, yticks=range(len(rows)), yticklabels=rows)
        for row, column in np.argwhere(values >= 0.005):
            axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center")
    figure.savefig(Path(args.out) / "factors.png", dpi=100)
    return error

def save_traversals(G, args, device):
    """traversal.png: a block for each code; traversal.gif: each continuous code to and fro. A category is a row."""
    noise, sweep, blocks, frames = fixed_noise(9, args.latent_dim, args.seed), torch.linspace(-2, 2, 9)[:, None], {}, []
    def block(k, z, values):  # rows: categories of code k; columns: z (9 or 1, latent_dim), values (9, C) or (C,)
        rows = torch.arange(args.categorical[k])[:, None]
        codes = [one_hot(rows if i == k else 0 * rows, size) for i, size in enumerate(args.categorical)]  # others: 0
        inputs = [part.expand(len(rows), 9, -1) for part in (z, *codes, values)]
        return grid(sample(G, torch.cat(inputs, 2).flatten(0, 1).to(device)), 9)
    for k in range(len(args.categorical)):
        blocks[f"categorical code {k + 1}: a row each, z by column"] = block(k, noise, torch.zeros(args.continuous))
    for j, unit in enumerate(torch.eye(args.continuous)):  # (C,)
        blocks[f"continuous code {j + 1}: -2 to 2 (trained: -1 to 1)"] = block(0, noise[:1], sweep * unit)
        frames += [block(0, noise, 2 * angle.sin() * unit) for angle in torch.arange(0, 2 * math.pi, math.pi / 12)]
    figure = Figure(figsize=(4.5 * len(blocks), 0.5 + 0.45 * max(args.categorical)), layout="constrained")
    for i, (title, picture) in enumerate(blocks.items()):
        figure.add_subplot(1, len(blocks), i + 1, title=title, xticks=[], yticks=[]).imshow(picture)
    figure.savefig(Path(args.out) / "traversal.png", dpi=100)
    if frames:
        save_gif(Path(args.out) / "traversal.gif", frames, 100)

def save_plots(out, log):
    """losses.png: the curves of log, the lines of log.csv, each with its running mean."""
    log = np.atleast_1d(np.genfromtxt(log, delimiter=",", names=True))
    figure, n = Figure(figsize=(13, 7), layout="constrained"), len(log) // 40 + 1  # rows in the running mean
    panels = [("loss_d loss_g", "Loss", "loss", {})]
    panels += [("d_real d_fake", "What D thinks: 0.5 is a draw", "probability of being real", {"ylim": (0, 1)})]
    panels += [(name, f"What Q reads: {name}", "lower bound in nats", {}) for name in ("info_cat", "info_cont")]
    panels += [("code_accuracy cluster_error", "Q: accuracy on fakes, error on data", "share", {"ylim": (0, 1.02)})]
    panels += [("grad_norm_d grad_norm_g", "Gradient norm", "L2 norm of all gradients", {"yscale": "log"})]
    for axes, (columns, title, ylabel, more) in zip(figure.subplots(2, 3).flat, panels, strict=True):
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
    c = draw_codes(args.sample, args.categorical, args.continuous, rng=torch.Generator().manual_seed(args.seed + 2))
    z = fixed_noise(args.sample, args.latent_dim, args.seed + 1)
    save_pictures(Path(args.out) / "generated", sample(G_ema, torch.cat([z, c], 1)))

def train(args, run):
    """Train G and D as the flags say, on from run or from the start, into args.out. Raises Misuse or Fault."""
    out, (device, bf16) = Path(args.out), pick_device(args)
    data = load_data(args.dataset, args.data_dir, args.img_size, args.classes, args.background, device)
    images, sizes, variance = data.images, args.categorical, args.continuous_variance
    if run and images.shape[:2] != (args.num_images, args.img_channels):
        raise Fault(f"{out} was trained on {args.num_images} pictures of {args.img_channels} channels, not these.")
    args.num_images, args.img_channels, args.img_size, _ = images.shape  # for build() and the checkpoint
    halvings, width = max(1, round(math.log2(args.img_size / 8))), 16 if args.img_size < 64 else 32  # to about 8x8
    args.hidden_channels = args.hidden_channels or [width * 2**n for n in range(halvings)]
    torch.manual_seed(args.seed + (run["step"] if run else 0))  # on a GPU a resumed run draws new noise
    G, D = (network.to(device, memory_format=torch.channels_last) for network in build(args))
    G_ema, D_ema = AveragedModel(G), AveragedModel(D).eval()  # for samples; to measure what the codes mean
    opt_g = torch.optim.Adam(G.parameters(), args.lr_g, args.betas, args.adam_eps, fused=True)
    opt_d = torch.optim.Adam(D.parameters(), args.lr_d, args.betas, args.adam_eps, fused=True)
    parts = {"G": G, "D": D, "G_ema": G_ema, "D_ema": D_ema, "opt_g": opt_g, "opt_d": opt_d}
    if args.compile:
        G.compile(), D.compile()
    c = draw_codes(8 * sizes[0], sizes, args.continuous, rng=torch.Generator().manual_seed(args.seed + 3))
    c[:, : sizes[0]] = torch.eye(sizes[0]).repeat_interleave(8, 0)  # in the grid a row a category
    step, z_fixed = 0, torch.cat([fixed_noise(len(c), args.latent_dim, args.seed), c], 1).to(device)
    shuffled, n = epoch_order(len(images), len(images), args.seed, 0)[0], len(images) // 10
    held_out, training = shuffled[: n or 1], shuffled[n:]  # indexes; of under 10 pictures all are trained on
    batch_size = min(args.batch_size, len(training))
    steps_per_epoch = len(training) // batch_size
    args.epochs = args.epochs or max(10, math.ceil(9000 / steps_per_epoch))
    last_step = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    counts = {name: sum(p.numel() for p in parts[name].parameters()) for name in ("G", "D")}
    facts = {"torch": torch.__version__, "on": f"{device}, {'bf16' if bf16 else 'fp32'}", "parameters": counts}
    log = ["epoch,step,loss_d,loss_g,d_real,d_fake,grad_norm_d,grad_norm_g,images_per_second"]
    log[0] += ",info_cat,info_cont,code_accuracy,cluster_error"
    if run:
        for name, part in parts.items():
            part.load_state_dict(run[name])
        step, z_fixed, log = run["step"], run["z_fixed"].to(device), run["log"]
        torch.set_rng_state(run["rng"])
    elif (out / "checkpoint.pt").exists() or (out / "samples/000000.png").exists():  # --overwrite: clear the old run
        own = "factors.png", "traversal.png", "traversal.gif", "nearest.png", "score.*"
        for name in "checkpoint.pt", "generated.png", *own, "samples/[0-9]*.png", "gen*/*[0-9].p*":
            list(map(Path.unlink, sorted(out.glob(name))))
    save_png(out / "real.png", grid(images[:: max(1, len(images) // 64)][:64].cpu()))
    save_png(out / f"samples/{step:06d}.png", grid(sample(G_ema, z_fixed)))
    error = run["cluster_error"] if run else measure(D_ema, data, training, held_out, args, device)
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
            # (1) D step: maximise log D(x_real) + log(1 - D(G(z, c))) + weight * L
            D.requires_grad_(True)
            index = training[epoch_order(len(training), batch_size, args.seed, epoch)[i]]  # (B,)
            x_real = to_batch(images, index, device)  # (B, C, H, W) in [-1, 1]
            c = draw_codes(batch_size, sizes, args.continuous, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                x_fake = G(torch.cat([torch.randn(batch_size, args.latent_dim, device=device), c], 1))  # kept for (2)
                (logits_real, _), (logits_fake, guesses) = D(x_real), D(x_fake.detach())  # no gradient for G
                _, warped = D(augment(x_fake.detach(), args.augment))  # Q learns categories from these alone
            loss_d = discriminator_loss(logits_real, logits_fake)
            info_cat, info_cont = categorical_bound(warped, c, sizes), continuous_bound(guesses, c, sizes, variance)
            opt_d.zero_grad()
            (loss_d - args.info_weight_cat * info_cat - args.info_weight_cont * info_cont).backward()
            if logging or args.clip_grad_norm:  # up to inf: measured, not changed
                norm_d = nn.utils.clip_grad_norm_(D.parameters(), args.clip_grad_norm or math.inf)
            opt_d.step()
            # (2) G step: maximise log D(G(z, c)) + weight * L, same z and c, D and Q frozen. This L is logged
            D.requires_grad_(False)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits, guesses = D(x_fake)
            loss_g = generator_loss(logits)
            info_cat, info_cont = categorical_bound(guesses, c, sizes), continuous_bound(guesses, c, sizes, variance)
            opt_g.zero_grad()
            (loss_g - args.info_weight_cat * info_cat - args.info_weight_cont * info_cont).backward()
            if logging or args.clip_grad_norm:
                norm_g = nn.utils.clip_grad_norm_(G.parameters(), args.clip_grad_norm or math.inf)
            opt_g.step()
            G_ema.multi_avg_fn = D_ema.multi_avg_fn = get_ema_multi_avg_fn(min(args.ema, (1 + step) / (10 + step)))
            G_ema.update_parameters(G), D_ema.update_parameters(D)  # averages the parameters, copies the buffers
            # (3) log, sample, save
            if logging:
                speed = (step - first) / (time.perf_counter() - started)  # steps a second
                row = [loss_d, loss_g, logits_real.sigmoid().mean(), logits_fake.sigmoid().mean(), norm_d, norm_g]
                right = guesses[:, : sizes[0]].argmax(1) == c[:, : sizes[0]].argmax(1)
                row = torch.stack([*row, info_cat, info_cont, right.float().mean()]).tolist()
                row.insert(6, speed * batch_size)  # images_per_second
                if epoch_ends and step % 100 < steps_per_epoch:  # after an epoch, or about once in 100 steps
                    error = measure(D_ema, data, training, held_out, args, device)
                for name, value in zip(log[0].split(",")[2:], row, strict=False):  # cluster_error may be nan
                    if not math.isfinite(value):
                        raise Fault(f"{name} is {value} at step {step}, which is not saved. Try a lower rate.")
                if epoch_ends or step % args.log_every == 0:  # not where Ctrl-C fell: a resumed run has the same rows
                    log.append(",".join([str(epoch + 1), str(step), *(f"{value:.6g}" for value in [*row, error])]))
                    with open(out / "log.csv", "a") as file:
                        print(log[-1], file=file)
                line = f"epoch {epoch + 1}/{args.epochs} [{'#' * (10 * step // last_step):10}] loss_d {row[0]:.3f} "
                line += f"loss_g {row[1]:.3f} {row[6]:.0f} img/s {(last_step - step) / speed / 60:.1f} min left "
                if sys.stdout.isatty() or epoch_ends:
                    print(line, end="\r" if sys.stdout.isatty() and not stopping else "\n", flush=True)
            keeping = epoch_ends and args.snapshot_every and (epoch + 1) % args.snapshot_every == 0
            saving = keeping or stopping or (epoch_ends and (epoch < 100 or step % 100 < steps_per_epoch))
            if saving or step % (args.sample_every or math.inf) == 0 or (epoch == 0 and step.bit_count() == 1):
                save_png(out / f"samples/{step:06d}.png", grid(sample(G_ema, z_fixed)))  # update_bn: no better here
            state = {"args": vars(args), "step": step, "epoch": epoch + epoch_ends}
            if keeping:  # before the checkpoint: a run that is killed between the two makes it again
                save_atomically(out / f"generators/epoch_{epoch + 1:03d}.pt", state | {"G": G_ema.module.state_dict()})
            if saving:  # after each epoch; from the 101st on, if epochs have under 100 steps, once in 100
                rest = {k: part.state_dict() for k, part in parts.items()} | {"rng": torch.get_rng_state(), "log": log}
                save_atomically(out / "checkpoint.pt", state | rest | {"z_fixed": z_fixed, "cluster_error": error})
                if step % 100 < steps_per_epoch and not stopping:  # once in each 100: it takes as long as many steps
                    save_plots(out, log)
            if stopping:
                break
    finally:  # at the end, after Ctrl-C, and after a fault
        signal.signal(signal.SIGINT, old_handler)
        save_plots(out, log)
        save_history(out, step)
    save_traversals(G_ema, args, device)
    measure(D_ema, data, training, held_out, args, device)  # factors.png of the last step
    print(f"Step {step} of {max(step, last_step)}. Look at {out}/samples.gif, traversal.png and losses.png.")

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
