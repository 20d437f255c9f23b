"""How good are the samples of a run? Distances, precision, recall and class balance, beside the same for real images.

    python bench/score.py runs/dcgan-mnist                     # 10,000 samples of the averaged G
    python bench/score.py runs/seed0 runs/seed1 runs/seed2     # and the mean and the range over these runs
    python bench/score.py runs/dcgan-mnist --snapshots         # each of generators/*.pt too: a curve, the best epoch
    python bench/score.py runs/dcgan-mnist --watch             # the snapshots, beside a training, to Ctrl-C
    python bench/score.py some/folder/of/pngs --dataset mnist  # pictures from anywhere
    python bench/score.py --sanity --dataset mnist             # real images, blurred ones and noise: ./score.csv
Writes score.csv, of a run score.png, and nearest.png (16 samples, each before the three training images with the
nearest features; of a folder of pictures: FOLDER-nearest.png, in the working directory).
Features are the last hidden layer of a small classifier of the data set, trained once on its labels, seeded, kept in
--data-dir: fd is no FID. All is measured against test images, which neither G nor the classifier has seen; without
labels, by --features inception, against half of the images that G has seen (there see what kl --sanity gives).
    fd, fd_floor       Frechet distance (Heusel et al. 2017, 1706.08500); of as many training images (fewer: too high)
    kid, kid_se        unbiased squared MMD (Binkowski et al. 2018, 1801.01401), kernel (x.y / u + 1)^3, where u is the
                       mean x.x of real images, in place of the number of features; and its standard error
    precision, recall  share of samples as near to a real image as its 3rd neighbour is; the reverse (2019, 1904.06991),
                       of as many of each: compare them at the same number, of some thousands (fewer: too much is near)
    kl, classes        divergence of the samples' classes from the test images', in nats; how many 1 sample in 100 has
                       (inception: any). stacked-mnist: from uniform; how many of 1,000 modes any of 26,000 samples has
"""
import argparse
import contextlib
import importlib
import json
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torchvision.models import inception_v3

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import DATASETS, Data, Fault, Misuse, epoch_order, fixed_noise, grid, load_data  # noqa: E402
from common import load_folder, render_digits, sample, save_atomically, save_png, to_batch  # noqa: E402

COLUMNS = ["epoch", "fd", "fd_floor", "kid", "kid_se", "precision", "recall", "kl", "classes"]

def load_test(dataset, data_dir):
    """The test images of a data set, which no script trains on. Raises Fault if they are not there."""
    if dataset == "digits":
        return render_digits(10_000, seed=1)
    if dataset == "stacked-mnist":
        images, labels, _ = load_test("mnist", data_dir)
        triples = torch.randint(len(images), (26_000, 3), generator=torch.Generator().manual_seed(1))
        return Data(images[triples].squeeze(2), labels[triples] @ torch.tensor([100, 10, 1]))
    return DATASETS[dataset](dataset, Path(data_dir), None, None, test=True)

def extract(eyes, images):
    """Features (N, F) and labels (N,) of uint8 images (N, C, H, W). Of stacked digits each is looked at by itself.
    eyes[0] makes (B, channels, H, W) in [-1, 1] features, eyes[1] makes these logits; both must be frozen."""
    conv = next(eyes.parameters())  # of the first layer: (outputs, channels, ...)
    rows = images.expand(-1, max(images.shape[1], conv.shape[1]), -1, -1).reshape(-1, conv.shape[1], *images.shape[2:])
    features = torch.cat([eyes[0](to_batch(rows, index, conv.device)) for index in torch.arange(len(rows)).split(100)])
    labels = eyes[1](features).argmax(1).cpu().view(len(images), -1)  # (N, digits in an image)
    return features.cpu().view(len(images), -1), labels @ torch.tensor([100, 10, 1])[-labels.shape[1] :]

def load_inception():
    """torchvision's Inception v3 for ImageNet. Raises Fault without weights."""
    try:
        net = inception_v3(weights="IMAGENET1K_V1")
    except (OSError, RuntimeError) as error:  # no network; broken off
        raise Fault(f"the weights of Inception cannot be downloaded ({error}): omit --features.") from error
    classify, net.fc, net.transform_input = net.fc, nn.Identity(), False  # x is in [-1, 1], as the weights want it
    return nn.Sequential(nn.Sequential(nn.Upsample(299, mode="bilinear"), net), classify).eval().requires_grad_(False)

def load_classifier(dataset, data_dir, img_size, device):
    """The classifier of a data set, of all its classes, from its cache or trained for 4 epochs."""
    images, labels, _ = load_data(dataset, data_dir, img_size)
    cache, channels = Path(data_dir) / f"score-{dataset}-{images.shape[-1]}.pt", images.shape[1]
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, 32, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, 1, 1), nn.ReLU()]
    layers += [nn.AdaptiveMaxPool2d(7), nn.Flatten(), nn.Linear(3136, 128), nn.ReLU()]
    eyes = nn.Sequential(nn.Sequential(*layers), nn.Linear(128, int(labels.max()) + 1)).to(device)
    try:
        eyes.load_state_dict(torch.load(cache, map_location=device, weights_only=True))
    except Exception:  # not there, or damaged
        print(f"Training the classifier of {dataset}, once", flush=True)
        optimiser = torch.optim.Adam(eyes.parameters(), 1e-3, fused=True)
        for epoch in range(4):
            optimiser.param_groups[0]["lr"] = 1e-3 / 3**epoch
            for index in epoch_order(len(images), min(128, len(images)), 0, epoch):
                optimiser.zero_grad()
                nn.functional.cross_entropy(eyes(to_batch(images, index, device)), labels[index].to(device)).backward()
                optimiser.step()
        with contextlib.suppress(OSError):  # a read-only folder: train it again the next time
            save_atomically(cache, eyes.state_dict())
    return eyes.requires_grad_(False)

def frechet(a, b):
    """Frechet distance of features (N, F) and (M, F), each taken as a Gaussian."""
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), torch.cov(x.T)) for x in (a.double(), b.double()))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()

def kid(a, b, blocks=10):
    """Kernel distance of features (N, F) and real (M, F), unbiased: mean over disjoint blocks, its standard error."""
    n, rng, found = min(len(a), len(b)), torch.Generator().manual_seed(0), []
    blocks, unit = min(blocks, n // 2), b.double().square().sum(1).mean()  # of products of features
    a, b = (s[torch.randperm(len(s), generator=rng)[: n // blocks * blocks]].double().chunk(blocks) for s in (a, b))
    for x, y in zip(a, b, strict=True):
        xx, yy, xy = ((p @ q.T / unit + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        found.append((xx.sum() - xx.trace() + (yy.sum() - yy.trace())) / (len(x) * (len(x) - 1)) - 2 * xy.mean())
    return torch.stack(found).mean().item(), torch.stack(found).std().item() / blocks**0.5

def precision_recall(real, fake, k=3):
    """Shares of fake that lie among real, and of real that lie among fake, (N, F) and (M, F)."""
    def among(points, others):  # in a ball around one of others, up to its k-th neighbour
        radius = torch.cat([torch.cdist(chunk, others).kthvalue(k + 1).values for chunk in others.split(1000)])
        return torch.cat([(torch.cdist(chunk, others) <= radius).any(1) for chunk in points.split(1000)])
    return among(fake, real).float().mean().item(), among(real, fake).float().mean().item()

def balance(found, expected, classes):
    """KL of the labels found from those expected, in nats; and the classes with 1 label in 100, or any if 1,000."""
    p = torch.bincount(found, minlength=classes).double() / len(found)
    q = (torch.bincount(expected, minlength=classes).double() + 1 / classes) / (len(expected) + 1)  # none is impossible
    return torch.special.xlogy(p, p / q).sum().item(), int((p >= 0.01 - 1e-12 if classes < 1000 else p > 0).sum())

def draw(path, n):
    """n samples, uint8 (n, C, H, W), of the G in a checkpoint (its average) or a snapshot; and its epoch."""
    try:
        run = torch.load(path, map_location="cpu", weights_only=True)
        args = argparse.Namespace(**run["args"])
        script = importlib.import_module(args.script)
        G, weights = script.build(args)[0], run.get("G_ema", run["G"])
        G.load_state_dict({k.removeprefix("module."): weights[k] for k in weights if k != "n_averaged"})
    except Exception as error:  # torch.load raises many kinds for a file that is not a checkpoint
        raise Fault(f"{path} is missing, damaged or of another version ({type(error).__name__}).") from error
    z, rng = fixed_noise(n, args.latent_dim, 12345), torch.Generator().manual_seed(54321)  # seeds of no grid, as a rule
    codes = [script.draw_codes(n, args.categorical, args.continuous, rng=rng)] if hasattr(script, "draw_codes") else []
    return sample(G, torch.cat([z, *codes], 1)), run["epoch"]

@lru_cache(1)  # for several runs on the same data
def reference(dataset, data_dir, img_size, classes, background, inception):
    """The images of a data set, the network that looks at them, and what it finds in those that are held out."""
    train, known, _ = load_data(dataset, data_dir, img_size, classes, background)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    if dataset in ["digits", "stacked-mnist", "mnist", "fashion", "cifar10"]:
        test, size = load_test(dataset, data_dir), train.shape[2:]
        images, y = (x[torch.isin(test.labels, known.unique())] for x in (test.images, test.labels))
        images = nn.functional.interpolate(images.float(), size, mode="bilinear", antialias=True).round().byte()
    elif inception:
        images, order = train[order[::2]], order[1::2]
    else:
        raise Fault(f"{dataset} has no test images with labels: add --features inception.")
    one, device = dataset.removeprefix("stacked-"), torch.accelerator.current_accelerator(check_available=True) or "cpu"
    eyes = load_inception().to(device) if inception else load_classifier(one, data_dir, img_size, device)
    seen, (held, labels) = extract(eyes, train)[0], extract(eyes, images)
    if not inception:
        print(f"Classifier of {one}: {(labels == y).float().mean():.2%} of {len(y):,} test images of {dataset} right")
    labels, classes = (labels, len(eyes[1].bias)) if inception or one == dataset else (known.unique().tile(1000), 1000)
    return argparse.Namespace(train=train, seen=seen, order=order, eyes=eyes, held=held, labels=labels, classes=classes)

def score(images, epoch, real, rows, folder):
    """Add the row of images, print it, write score.csv and score.png. Returns them as they were seen, and features."""
    if min(len(images), len(real.held)) < 4:
        raise Fault(f"{folder}: 4 pictures or more are needed, not {len(images)} beside {len(real.held)} real ones.")
    images = images.float().mean(1, True).round().byte() if real.train.shape[1] == 1 else images.expand(-1, 3, -1, -1)
    (fake, labels), held, rng = extract(real.eyes, images), real.held, torch.Generator().manual_seed(0)
    n = min(len(fake), len(held), 10_000)
    some = [x[torch.randperm(len(x), generator=rng)[:n]] for x in (held, fake)]  # they may come sorted
    row = [epoch, frechet(fake, held), frechet(real.seen[real.order[: len(fake)]], held), *kid(fake, held)]
    rows.append([*row, *precision_recall(*some), *balance(labels, real.labels, real.classes)])
    table = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    print(folder, *(f"{name} {value}" for name, value in zip(COLUMNS, table[-1], strict=True)), sep="  ", flush=True)
    (folder / "score.csv").write_text("".join(",".join(row) + "\n" for row in [COLUMNS, *table]))
    curves = torch.tensor(sorted(row for row in rows if not isinstance(row[0], str))).reshape(-1, len(COLUMNS)).T
    *panels, histogram = Figure(figsize=(16, 3.8), layout="constrained").subplots(1, 4)
    titles, lows = ("Frechet distance", "Kernel distance", "Precision and recall"), (0, None, 0)  # KID may be negative
    for panel, title, columns, low in zip(panels, titles, ([1, 2], [3], [5, 6]), lows, strict=True):
        panel.legend(panel.plot(curves[0], curves[columns].T, "o-"), [COLUMNS[column] for column in columns])
        panel.set(title=title, xlabel="epoch", ylabel="share" if 5 in columns else "lower is better", ylim=(low, None))
    for label, shift, found in ("samples", 0, labels), ("expected", 0.4, real.labels):
        shares = (torch.bincount(found, minlength=real.classes) / len(found)).numpy()
        histogram.bar(torch.arange(real.classes).numpy() + shift, shares, 0.4, label=label)
    histogram.set(title=f"Classes, epoch {epoch}", xlabel="class", ylabel="share"), histogram.legend(loc="lower left")
    if not isinstance(epoch, str):  # of a run
        histogram.figure.savefig(folder / "score.png", dpi=100)
    return images, fake

def score_folder(folder, args):
    """Score what the flags name, in this folder. Yields the row of the run or of the pictures. Raises Fault."""
    rows, done, flags = [], set(), {}
    with contextlib.suppress(OSError, ValueError):  # no run, or damaged
        flags = json.loads((folder / "args.json").read_text())
    dataset = args.dataset or flags.get("dataset")
    if not dataset or not folder.is_dir() or (bool(flags) != (folder / "checkpoint.pt").exists() and not args.watch):
        raise Misuse(f"{folder} holds no saved run: name another, or pictures, with --dataset to compare them with.")
    if (args.watch or args.snapshots) and not flags.get("snapshot_every"):
        raise Misuse(f"{folder} was not trained with --snapshot-every: it has no snapshots.")
    data = flags if dataset == flags.get("dataset") else {}  # of another data set only the size of the pictures counts
    real = reference(dataset, args.data_dir or data.get("data_dir", "data"), flags.get("img_size"),
                     tuple(data.get("classes") or ()), data.get("background", "white"), args.features == "inception")
    n = args.samples or (26_000 if dataset == "stacked-mnist" else min(10_000, len(real.order)))
    while args.snapshots or args.watch:
        for path in sorted({*folder.glob("generators/*.pt")} - done):
            done.add(path)
            score(*draw(path, n), real, rows, folder)
        if not args.watch:
            break
        time.sleep(5)
    if args.folders:
        pictures = None if flags else load_folder("folder", folder, real.train.shape[-1], (255, 255, 255)).images
        images = draw(folder / "checkpoint.pt", n) if flags else (pictures, "pictures")
        images, fake = score(*images, real, rows, folder)
        nearest = real.train[torch.cdist(fake[:16], real.seen).topk(3, largest=False).indices]
        path = folder / "nearest.png" if flags else Path(f"{folder.resolve().name}-nearest.png")  # not among pictures
        save_png(path, grid(torch.cat([images[:16, None], nearest], 1).flatten(0, 1)))
        if args.snapshots:
            print(f"best: epoch {min(rows, key=lambda row: row[1])[0]}")
        yield rows[-1]
    if args.sanity:
        some = real.train[real.order[:n]]
        score(some, "real", real, rows, folder)
        score(nn.AvgPool2d(3, 1, 1, False, False)(some.float()).round().byte(), "blurred", real, rows, folder)
        score(torch.randint(256, some.shape, dtype=torch.uint8), "noise", real, rows, folder)

def main(argv=None):
    """Run the script. Returns the exit code: 2 for bad use, 1 for a fault, each told in one sentence."""
    parser = argparse.ArgumentParser(description="Score the samples of runs, or any folders of pictures.")
    add = parser.add_argument
    add("folders", nargs="*", type=Path, help="runs, or folders of pictures to compare with --dataset")
    add("--dataset", choices=list(DATASETS), help="of the real images (that of the run)")
    add("--data-dir", help="where these are (where the run had it; else data)")
    add("--samples", type=int, help="of a run, or of --sanity, 4 or more (up to 10,000; of stacked-mnist 26,000)")
    add("--features", choices=["classifier", "inception"], default="classifier", help="inception: of ImageNet")
    add("--snapshots", action="store_true", help="score each of generators/*.pt too, and name the best")
    add("--watch", action="store_true", help="score each of generators/*.pt as it comes, to Ctrl-C")
    add("--sanity", action="store_true", help="score real images, the same blurred by a 3x3 mean, and noise")
    args = parser.parse_args(argv)
    try:
        if not (args.folders or args.sanity) or (args.watch and len(args.folders) != 1) or (args.samples or 4) < 4:
            raise Misuse("name runs or folders of pictures, or --sanity; one run with --watch; --samples 4 or more.")
        ends = [row for folder in args.folders or [Path()] for row in score_folder(folder, args)]
        for name, *values in zip(COLUMNS[1:], *(row[1:] for row in ends), strict=True) if len(ends) > 1 else ():
            print(f"{name}: mean {sum(values) / len(values):.4g}, from {min(values):.4g} to {max(values):.4g}")
    except (Fault, OSError) as error:
        print("score.py:", str(error).partition("\n")[0], file=sys.stderr)
        return 2 if isinstance(error, Misuse) else 1
    except KeyboardInterrupt:
        return 0 if args.watch else 1  # so --watch ends
    return 0

if __name__ == "__main__":
    sys.exit(main())
