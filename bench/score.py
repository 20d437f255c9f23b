"""How good are the samples of a run? Distances, precision, recall and class balance, beside the same for real images.

    python bench/score.py runs/dcgan-mnist                     # 10,000 samples of the averaged G
    python bench/score.py runs/seed0 runs/seed1 runs/seed2     # and the mean and the range over these runs
    python bench/score.py runs/dcgan-mnist --snapshots         # each of generators/*.pt too: a curve, the best epoch
    python bench/score.py runs/dcgan-mnist --watch             # the same beside a training that is running
    python bench/score.py some/folder/of/pngs --dataset mnist  # pictures from anywhere
    python bench/score.py --sanity --dataset mnist             # real images, blurred ones and noise

Writes score.csv, score.png and nearest.png (16 samples, each before the three training images nearest to it) into the
folder. Features are the last hidden layer of a small classifier, trained once for each data set on its labels, seeded,
and kept in --data-dir: fd is a Frechet distance, but no FID. All is measured against test images, which neither G nor
the classifier has seen; without labels, by --features inception, against half of the training images.

    fd, fd_floor       Frechet distance (Heusel et al. 2017, 1706.08500), and that of as many training images
    kid, kid_se        unbiased squared MMD (Binkowski et al. 2018, 1801.01401), kernel (x.y / u + 1)^3, where u is the
                       mean x.x of real images, in place of the number of features; and its standard error
    precision, recall  the share of samples as near to a real image as its 3rd neighbour is, and the reverse
                       (Kynkaanniemi et al. 2019, 1904.06991)
    kl, classes        divergence of the samples' classes from the test images' in nats; how many classes 1 sample in
                       100 has. For stacked-mnist: from uniform; how many of 1,000 modes any of 26,000 samples has
"""
import argparse
import csv
import importlib
import math
import sys
import time
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate
from torchvision.datasets import CIFAR10, MNIST, FashionMNIST
from torchvision.models import Inception_V3_Weights, inception_v3

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import Data, Fault, epoch_order, fixed_noise, grid, load_data, load_folder, render_digits  # noqa: E402
from common import sample, save_atomically, to_batch  # noqa: E402

COLUMNS = ["epoch", "fd", "fd_floor", "kid", "kid_se", "precision", "recall", "kl", "classes"]
TESTS = {"mnist": MNIST, "fashion": FashionMNIST, "cifar10": CIFAR10}

def load_test(dataset, data_dir):
    """The test images of a data set, which no script trains on. Raises Fault if they are not there."""
    if dataset == "digits":
        return render_digits(10_000, seed=1)
    if dataset == "stacked-mnist":
        images, labels, _ = load_test("mnist", data_dir)
        triples = torch.randint(len(images), (26_000, 3), generator=torch.Generator().manual_seed(1))
        return Data(images[triples].squeeze(2), labels[triples] @ torch.tensor([100, 10, 1]))
    try:
        source = TESTS[dataset](data_dir, train=False, download=True)
    except (OSError, RuntimeError) as error:
        raise Fault(f"no test images of {dataset} in {data_dir}, and no download of them ({error}).") from error
    images = torch.as_tensor(source.data)
    return Data(images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2), torch.as_tensor(source.targets))

class Eyes(nn.Module):
    """image (B, channels, H, W) in [-1, 1] -> features (B, F); classify makes them logits."""
    def __init__(self, channels, see, classify):
        super().__init__()
        self.channels, self.see, self.classify = channels, see, classify

    def forward(self, x):
        return self.see(x)

@torch.no_grad()
def extract(eyes, images):
    """Features (N, F) and labels (N,) of uint8 images (N, C, H, W). Of stacked digits each is looked at by itself."""
    device, stack = next(eyes.parameters()).device, max(1, images.shape[1] // eyes.channels)
    rows = images.expand(-1, stack * eyes.channels, -1, -1).reshape(-1, eyes.channels, *images.shape[2:])
    features = torch.cat([eyes(to_batch(rows, index, device)) for index in torch.arange(len(rows)).split(500)])
    labels = eyes.classify(features).argmax(1).cpu().view(-1, stack) @ torch.tensor([100, 10, 1])[-stack:]
    return features.cpu().view(len(images), -1), labels

def load_inception():
    """torchvision's Inception v3 for ImageNet. Raises Fault without weights."""
    try:
        net = inception_v3(weights=Inception_V3_Weights.IMAGENET1K_V1)
    except OSError as error:
        raise Fault(f"the weights of Inception cannot be downloaded ({error}): omit --features.") from error
    classify, net.fc, net.transform_input = net.fc, nn.Identity(), False  # x is in [-1, 1], as the weights want it
    return Eyes(3, nn.Sequential(nn.Upsample((299, 299), mode="bilinear"), net), classify).eval()

def load_classifier(name, train, test, data_dir, device):
    """The classifier of a data set, from its cache or trained for 4 epochs; its test accuracy is printed."""
    cache = Path(data_dir) / f"score-{name}-{train.images.shape[-1]}-{len(train.labels.unique())}.pt"
    torch.manual_seed(0)
    convs = [nn.Conv2d(train.images.shape[1], 32, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, 1, 1)]
    see = nn.Sequential(*convs, nn.ReLU(), nn.AdaptiveMaxPool2d(7), nn.Flatten(), nn.Linear(3136, 128), nn.ReLU())
    eyes = Eyes(train.images.shape[1], see, nn.Linear(128, int(train.labels.max()) + 1)).to(device)
    try:
        eyes.load_state_dict(torch.load(cache, map_location=device, weights_only=True))
    except Exception:  # not there, or damaged
        print(f"Training the classifier of {name}, once", flush=True)
        optimiser = torch.optim.Adam(eyes.parameters(), 1e-3, fused=True)
        for epoch in range(4):
            optimiser.param_groups[0]["lr"] = 1e-3 / 3**epoch
            for index in epoch_order(len(train.images), min(128, len(train.images)), 0, epoch):
                logits = eyes.classify(eyes(to_batch(train.images, index, device)))
                optimiser.zero_grad()
                cross_entropy(logits, train.labels[index].to(device)).backward()
                optimiser.step()
        save_atomically(cache, eyes.state_dict())
    right = (extract(eyes, test.images)[1] == test.labels).float().mean()
    print(f"Classifier of {name}: {right:.2%} of {len(test.labels):,} test images right")
    return eyes

def frechet(a, b):
    """Frechet distance of features (N, F) and (M, F), each taken as a Gaussian."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()

def kid(a, b, subsets=50, size=1000):
    """Kernel distance of features (N, F) and real (M, F), unbiased, over random subsets, and its standard error."""
    rng, found, size = torch.Generator().manual_seed(0), [], min(size, len(a), len(b))
    unit = b.double().square().sum(1).mean()  # of products of features
    for _ in range(subsets):
        x, y = (s[torch.randperm(len(s), generator=rng)[:size]].double() for s in (a, b))
        xx, yy, xy = ((p @ q.T / unit + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        found.append((((xx.sum() - xx.trace()) + (yy.sum() - yy.trace())) / (size * (size - 1)) - 2 * xy.mean()).item())
    return float(np.mean(found)), float(np.std(found, ddof=1) / math.sqrt(subsets))

def precision_recall(real, fake, k=3):
    """Shares of fake that lie among real, and of real that lie among fake, (N, F) and (M, F)."""
    def among(points, others):  # in a ball around one of others, up to its k-th neighbour
        radius = torch.cat([torch.cdist(chunk, others).kthvalue(k + 1).values for chunk in others.split(1000)])
        return torch.cat([(torch.cdist(chunk, others) <= radius).any(1) for chunk in points.split(1000)])
    return among(fake, real).float().mean().item(), among(real, fake).float().mean().item()

def balance(found, expected, classes):
    """KL of the labels found from those expected, in nats; and the classes with 1 label in 100, or any if 1,000."""
    p, q = (torch.bincount(labels, minlength=classes).double() / len(labels) for labels in (found, expected))
    least = 0.01 if classes < 1000 else 1 / len(found)
    return torch.special.xlogy(p, p / q.clamp(min=1e-12)).sum().item(), int((p >= least - 1e-12).sum())

def draw(path, n):
    """n samples, uint8 (n, C, H, W), of the G in a checkpoint (its average) or a snapshot; its epoch; its flags."""
    try:
        run = torch.load(path, map_location="cpu", weights_only=True)
        script, args = importlib.import_module(run["script"]), argparse.Namespace(**run["args"])
        weights = {name.removeprefix("module."): value for name, value in run.get("G_ema", run["G"]).items()}
        weights.pop("n_averaged", None)
        G = script.build(args)[0]
        G.load_state_dict(weights)
    except Exception as error:  # torch.load raises many kinds for a file that is not a checkpoint
        raise Fault(f"{path} is missing, damaged or of another version ({error}).") from error
    z = fixed_noise(n, args.latent_dim, 12345)  # not the seed of any grid
    if hasattr(script, "draw_codes"):
        torch.manual_seed(12345)
        z = torch.cat([z, script.draw_codes(n, args.categorical, args.continuous)], 1)
    return sample(G, z), run["epoch"], args

@lru_cache(1)  # for several runs on the same data
def reference(dataset, data_dir, img_size, classes, background, inception, n):
    """The images of a data set, the network that looks at them, and what it finds in those that are held out."""
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    def load(name):  # train and test images, of one size and with the same labels
        train = load_data(name, data_dir, img_size, classes, background)
        if name in ["digits", "stacked-mnist", *TESTS]:
            test, size = load_test(name, data_dir), train.images.shape[-1:] * 2
            test = test._replace(images=interpolate(test.images.float(), size, mode="bilinear", antialias=True).round())
            keep = torch.isin(test.labels, train.labels.unique())
            return train, Data(test.images[keep].byte(), test.labels[keep])
        if inception:
            return Data(train.images[::2]), Data(train.images[1::2])
        raise Fault(f"{name} has no test images with labels: add --features inception.")
    train, test = load(dataset)
    one = "mnist" if dataset == "stacked-mnist" else dataset  # what the classifier is trained on
    eyes = load_inception().to(device) if inception else load_classifier(one, *load(one), data_dir, device)
    some = train.images[torch.randperm(len(train.images), generator=torch.Generator().manual_seed(0))[:n]]
    real = SimpleNamespace(train=train.images, eyes=eyes, some=some)
    real.features, real.labels = extract(eyes, test.images)
    if dataset == "stacked-mnist":
        real.labels = torch.arange(1000)
    real.kinds = 1000 if inception else int(train.labels.max()) + 1
    real.floor = frechet(extract(eyes, some)[0], real.features)
    return real

def score(images, epoch, real, rows, folder):
    """Measure images, put the row into rows, print it, and write score.csv and score.png, the curves over epochs."""
    fake, labels = extract(real.eyes, images)
    shares = precision_recall(real.features[:10_000], fake[:10_000])
    row = [epoch, frechet(fake, real.features), real.floor, *kid(fake, real.features), *shares]
    rows.append([*row, *balance(labels, real.labels, real.kinds)])
    table = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    print(folder, *(f"{name} {value}" for name, value in zip(COLUMNS, table[-1], strict=True)), sep="  ", flush=True)
    with open(folder / "score.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *table])
    curves = np.array(sorted(row for row in rows if not isinstance(row[0], str)), float).reshape(-1, len(COLUMNS)).T
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    panels = {"Frechet distance: lower is better": [1, 2], "Kernel distance: lower is better": [3]}
    for i, (title, columns) in enumerate((panels | {"Higher is better": [5, 6]}).items(), 1):
        panel = figure.add_subplot(1, 3, i, title=title, xlabel="epoch", ylabel=COLUMNS[columns[0]])
        panel.plot(curves[0], curves[columns].T, "o-", label=[COLUMNS[column] for column in columns])
        panel.legend()
    figure.savefig(folder / "score.png", dpi=100)

def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(description="Score the samples of runs, or any folders of pictures.")
    add = parser.add_argument
    add("folders", nargs="*", type=Path, help="runs, or folders of pictures to compare with --dataset")
    add("--dataset", help="of the real images (that of the run)")
    add("--data-dir", help="where these are (where the run had it; else data)")
    add("--samples", type=int, help="how many (10,000; of stacked-mnist 26,000)")
    add("--features", choices=["classifier", "inception"], default="classifier", help="inception: of ImageNet")
    add("--snapshots", action="store_true", help="score each of generators/*.pt too, and name the best")
    add("--watch", action="store_true", help="the same, and go on as new ones come, to Ctrl-C")
    add("--sanity", action="store_true", help="score real images, the same blurred by a 3x3 mean, and noise")
    return parser.parse_args(argv)

def score_folder(folder, args):
    """Score what the flags name, in this folder. Returns the last row. Raises Fault."""
    rows, done, is_run = [], set(), (folder / "checkpoint.pt").exists()
    flags = draw(folder / "checkpoint.pt", 2)[2] if is_run else SimpleNamespace(img_size=None, classes=None)
    dataset = args.dataset or getattr(flags, "dataset", None)
    if not dataset:
        raise Fault(f"{folder} holds no checkpoint.pt: name a run, or say with --dataset what to compare with.")
    data_dir = args.data_dir or getattr(flags, "data_dir", "data")
    n = args.samples or (26_000 if dataset == "stacked-mnist" else 10_000)
    data = flags.img_size, tuple(flags.classes or ()), getattr(flags, "background", "white")
    real = reference(dataset, data_dir, *data, args.features == "inception", n)
    while is_run and (args.snapshots or args.watch):
        for path in sorted({*folder.glob("generators/*.pt")} - done):
            done.add(path)
            score(*draw(path, n)[:2], real, rows, folder)
        if not args.watch:
            print(f"best: epoch {min(rows, key=lambda row: row[1])[0]}" if rows else "no generators/: --snapshot-every")
            break
        time.sleep(5)
    if is_run:
        images, epoch, _ = draw(folder / "checkpoint.pt", n)
    elif args.folders:
        images, epoch = load_folder("folder", folder, real.some.shape[-1], (255, 255, 255)).images, "pictures"
        images = images.expand(-1, real.some.shape[1], -1, -1)
    if is_run or args.folders:
        score(images, epoch, real, rows, folder)
        distances = torch.cdist(extract(real.eyes, images[:16])[0], extract(real.eyes, real.train)[0])  # (16, N)
        nearest = real.train[distances.topk(3, largest=False).indices]  # (16, 3, C, H, W)
        imageio.imwrite(folder / "nearest.png", grid(torch.cat([images[:16, None], nearest], 1).flatten(0, 1)))
    if args.sanity:
        score(real.some, "real", real, rows, folder)
        score(avg_pool2d(real.some.float(), 3, 1, 1).round().byte(), "blurred", real, rows, folder)
        score(torch.randint(256, real.some.shape, dtype=torch.uint8), "noise", real, rows, folder)
    return rows[-1]

def main(argv=None):
    """Run the script. Returns the exit code, 1 for a fault, told in one sentence."""
    try:
        args = parse_args(argv)
        ends = np.array([score_folder(folder, args)[1:] for folder in args.folders or [Path()]])
        for name, values in zip(COLUMNS[1:], ends.T if len(ends) > 1 else (), strict=False):
            print(f"{name}: mean {values.mean():.4g}, from {values.min():.4g} to {values.max():.4g}")
    except (Fault, OSError) as error:
        print("score.py:", str(error).partition("\n")[0], file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the end of --watch
        pass
    return 0

if __name__ == "__main__":
    sys.exit(main())
