"""Data and fixed noise for the GAN scripts of this folder: nothing else is shared between them.

    data = load_data("mnist", "data")             # data.images is one uint8 tensor (N, C, H, W)
    for index in epoch_order(len(data.images), batch_size=64, seed=0, epoch=0):
        x_real = to_batch(data.images, index)     # (B, C, H, W), floats in [-1, 1]

    z = fixed_noise(64, latent_dim=100, seed=0)   # the same 64 points for the whole run
    save_grid("samples.png", sample(G, z))

A data set is decoded once and stays in memory as bytes. A batch is then an index, a cast and a scale: no DataLoader, no
worker processes, no per-image Python.
"""

import contextlib
import gzip
import hashlib
import os
import struct
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import imageio.v2 as imageio
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.utils import make_grid


class Fault(Exception):
    """What the user can mend. The scripts print it as one sentence, without a traceback, and exit with its code."""

    code = 1


class Misuse(Fault):
    """A flag that cannot be, alone or here."""

    code = 2


class Data(NamedTuple):
    images: torch.Tensor  # uint8 (N, C, H, W)
    labels: torch.Tensor | None = None  # int64 (N,)
    factors: dict | None = None  # what each of `digits` was rendered from: name -> float (N,)


def load_data(dataset, data_dir="data", img_size=None, classes=None, background="white"):
    """Read a whole data set into memory.

    dataset is a key of DATASETS. img_size None keeps the size of the data (64 for `folder`). classes keeps only the
    pictures with these labels. background is the colour that transparent pictures are laid on.

    Raises Fault when there is no data, a file is damaged, or fewer than two pictures are left.
    """
    data = DATASETS[dataset](dataset, Path(data_dir), img_size, background)
    if classes:
        if data.labels is None:
            raise Fault("--classes needs labels, and there are none: put the pictures of each class in a sub-folder.")
        missing = sorted(set(classes) - set(data.labels.unique().tolist()))
        if missing:
            raise Fault(f"--classes {missing[0]}: {dataset} has the labels {data.labels.min()} to {data.labels.max()}.")
        keep = torch.isin(data.labels, torch.tensor(classes))
        factors = data.factors and {name: values[keep] for name, values in data.factors.items()}
        data = Data(data.images[keep], data.labels[keep], factors)
    if len(data.images) < 2:
        raise Fault(f"{dataset} has {len(data.images)} picture, and batch norm needs at least 2 to train on.")
    if img_size and img_size != data.images.shape[-1]:
        data = data._replace(images=torch.cat([resize(chunk, img_size) for chunk in data.images.split(4096)]))
    return data


def resize(images, size):
    """uint8 (N, C, H, W) -> uint8 (N, C, size, size), bilinear and anti-aliased."""
    return F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True).round().to(torch.uint8)


def epoch_order(n, batch_size, seed, epoch):
    """The shuffled indexes of one epoch, int64 (steps, batch). The rest that does not fill a batch is left out.

    A function of its arguments alone: a resumed run sees the batches that it would have seen.
    """
    batch_size = min(batch_size, n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[: n // batch_size * batch_size].view(-1, batch_size)


def to_batch(images, index):
    """The pictures at index, as floats in [-1, 1], (B, C, H, W)."""
    return images[index].float() / 127.5 - 1


def fixed_noise(n, latent_dim, seed, device="cpu"):
    """z ~ N(0, I), (n, latent_dim), from a generator of its own: the same whatever was drawn before."""
    return torch.randn(n, latent_dim, generator=torch.Generator().manual_seed(seed)).to(device)


@torch.no_grad()
def sample(G, z):
    """G(z) in eval mode, as uint8 (N, C, H, W) on the CPU. G's mode is put back.

    In training mode batch norm would make each picture depend on the others of its batch.
    """
    was_training = G.training
    G.eval()
    x = torch.cat([G(chunk).float() for chunk in z.split(256)])  # (N, C, H, W) in [-1, 1]
    G.train(was_training)
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def save_grid(path, images, columns=8):
    """Write uint8 (N, C, H, W) as one picture, small images enlarged."""
    zoom = max(1, 56 // images.shape[-1])
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    imageio.imwrite(path, make_grid(images, columns, padding=2 * zoom, pad_value=96).permute(1, 2, 0).numpy())


# ---- digits: rendered, so that everything works without a download ----

SANS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "cmss10", "cmtt10"]
SERIF = ["DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "cmr10", "cmb10", "cmti10"]
FONTS = SANS + SERIF + ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"]


def signed_distance(ink):
    """bool (M, S, S) -> float (M, S, S): the distance to the outline in pixels, positive inside."""
    place = torch.arange(ink.shape[-1], dtype=torch.float32)
    cost = (place[:, None] - place) ** 2

    def distance(target):
        squared = torch.where(target, 0.0, 1e4)
        for _ in range(2):  # along the rows, then along the columns
            squared = (squared[:, :, None, :] + cost).amin(-1).transpose(1, 2)
        return squared.sqrt().clamp(min=0.5) - 0.5

    return distance(~ink) - distance(ink)


def render_digits(n, seed):
    """n digits, 28x28, white on black, in the fonts that matplotlib ships, each with random factors. Deterministic.

    Each glyph is drawn once, large, and turned into distances from its outline. Sampled under a rotation, slant, scale
    and shift, these give a smooth outline, and a constant added to them makes the stroke thicker or thinner.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    glyphs = []
    for name in FONTS:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 100)
        _, top, _, bottom = font.getbbox("0")
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 100 * 40 / (bottom - top))  # a zero is 40 pixels high
        for digit in "0123456789":
            glyph = Image.new("L", (64, 64))
            left, top, right, bottom = font.getbbox(digit)
            ImageDraw.Draw(glyph).text(((64 - left - right) / 2, (64 - top - bottom) / 2), digit, 255, font)
            glyphs.append(torch.from_numpy(np.array(glyph) > 127))
    distance = signed_distance(torch.stack(glyphs))  # (fonts * 10, 64, 64)
    half_stroke = distance.flatten(1).amax(1).view(-1, 10).median(1).values  # (fonts,)

    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=rng)
    font = torch.randint(len(FONTS), (n,), generator=rng)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=rng)

    rotation, slant, scale = uniform(-15, 15), uniform(-0.3, 0.3), uniform(0.85, 1.1)
    shift_x, shift_y = uniform(-2, 2), uniform(-2, 2)
    offset = (uniform(2.0, 4.5) - half_stroke[font]).clamp(min=-0.5)  # thinner, and hairlines would break

    # From a place in the picture back to the place in the glyph: undo the shift, the rotation, the slant and the scale.
    cos, sin, one = torch.deg2rad(rotation).cos(), torch.deg2rad(rotation).sin(), torch.ones(n)
    rotate = torch.stack([cos, sin, -sin, cos], 1).view(n, 2, 2)
    shear = torch.stack([one, slant, 0 * one, one], 1).view(n, 2, 2)
    linear = 14 / 16 / scale[:, None, None] * shear @ rotate  # a zero of 40/64 glyph becomes 20/28 picture
    theta = torch.cat([linear, -linear @ torch.stack([shift_x, shift_y], 1)[:, :, None] / 14], 2)  # (n, 2, 3)

    images = torch.empty(n, 1, 28, 28, dtype=torch.uint8)
    for i in torch.arange(n).split(4096):
        where = F.affine_grid(theta[i], (len(i), 1, 28, 28), align_corners=False)
        glyph = distance[font[i] * 10 + labels[i], None]  # (4096, 1, 64, 64)
        inside = F.grid_sample(glyph, where, padding_mode="border", align_corners=False) + offset[i].view(-1, 1, 1, 1)
        pixels = inside * scale[i].view(-1, 1, 1, 1) / 2  # one pixel is 2 / scale pixels of a glyph
        images[i] = ((pixels + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    factors = {"rotation": rotation, "slant": slant, "scale": scale, "thickness": (half_stroke[font] + offset) * scale}
    return Data(images, labels, factors | {"shift_x": shift_x, "shift_y": shift_y, "font": font.float()})


def load_digits(dataset, data_dir, img_size, background):
    """The 60,000 rendered digits, rendered at the first use and then kept in data_dir/digits."""
    cache = data_dir / "digits" / "digits-1.pt"  # count up when render_digits changes
    with contextlib.suppress(Exception):  # not there or damaged: render again
        return Data(**torch.load(cache, weights_only=True))
    data = render_digits(60_000, seed=0)
    with contextlib.suppress(OSError):  # a read-only folder costs two seconds a run, no more
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(data._asdict(), f"{cache}.{os.getpid()}")
        os.replace(f"{cache}.{os.getpid()}", cache)
    return data


# ---- mnist and fashion: IDX files, found or downloaded ----

MIRRORS = {
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    "fashion": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
}


def download(urls, path, md5, timeout=20):
    """Fetch the first of urls that answers with the right md5 into path, whole or not at all. Raises Fault."""
    reasons = []
    for url in urls:
        try:
            with urllib.request.urlopen(url, timeout=timeout) as answer:
                content = answer.read()
        except (OSError, ValueError) as error:
            reasons.append(f"{url} ({getattr(error, 'reason', None) or error})")
            continue
        if hashlib.md5(content).hexdigest() == md5:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}")
            part.write_bytes(content)
            os.replace(part, path)
            return
        reasons.append(f"{url} (wrong md5)")
    raise Fault("could not download " + " nor ".join(reasons))


def read_idx(path):
    """The uint8 array of an IDX file, raw or .gz, of the shape that its header gives. Raises Fault if damaged."""
    try:
        raw = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
        zeros, kind, dims = struct.unpack(">HBB", raw[:4])
        if (zeros, kind) != (0, 8):
            raise ValueError("its header is not that of an IDX file of bytes")
        shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy())
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise Fault(f"{path} is damaged ({error}): delete it, so that it is downloaded again.") from error


def load_idx(dataset, data_dir, img_size, background):
    """The 60,000 training images of MNIST or Fashion-MNIST."""
    from torchvision.datasets import MNIST, FashionMNIST  # for the names and md5s of the files

    source = {"mnist": MNIST, "fashion": FashionMNIST}[dataset]
    own = data_dir / source.__name__ / "raw"  # torchvision's layout
    folders = [own, data_dir / dataset, data_dir, *Path("/usr/share/datasets").glob(f"*{dataset}*")]
    arrays = []
    for name, md5 in source.resources[:2]:  # train images, train labels
        places = [folder / file for folder in folders for file in (name.removesuffix(".gz"), name)]
        path = next((place for place in places if place.is_file()), own / name)
        if not path.exists():
            print(f"Downloading {name} into {own}", flush=True)
            try:
                download([mirror + name for mirror in MIRRORS[dataset]], path, md5)
            except Fault as fault:
                raise Fault(
                    f"{dataset} not found: no {name}, packed or not, in {', '.join(map(str, folders))}; {fault}. Put its "
                    f"files into {own}, name their folder with --data-dir, or use --dataset digits, which needs none."
                ) from None
        arrays.append(read_idx(path))
    images, labels = arrays
    if images.dim() != 3 or labels.shape != images.shape[:1]:
        raise Fault(f"{path.parent}: {tuple(images.shape)} images for {tuple(labels.shape)} labels. Delete its files.")
    return Data(images[:, None], labels.long())


# ---- folder: your own pictures ----


def read_picture(path, size, background):
    """Any picture as RGB uint8 (3, size, size). Raises Fault that names a picture which cannot be decoded.

    A transparent one is laid on the background (plain convert("RGB") would show its hidden colours) and padded to a
    square; any other is cropped around its centre.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture).convert("RGB")
                picture = ImageOps.pad(picture, (size, size), Image.Resampling.BICUBIC, background)
            picture = ImageOps.fit(picture.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Fault(f"{path} cannot be read as a picture ({error}): repair it or take it out of the folder.") from error
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def load_folder(dataset, data_dir, img_size, background):
    """Every picture below data_dir. Its sub-folders in order are the labels 0, 1, ...; grey pictures give one channel."""
    endings = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}
    paths = sorted(path for path in data_dir.rglob("*") if path.suffix.lower() in endings and path.is_file())
    if not paths:
        raise Fault(f"no pictures ({', '.join(sorted(endings))}) below {data_dir}: name their folder with --data-dir.")
    images = torch.stack([read_picture(path, img_size or 64, background) for path in paths])  # (N, 3, size, size)
    if (images == images[:, :1]).all():
        images = images[:, :1].clone()  # (N, 1, size, size)
    tops = [path.relative_to(data_dir).parts[0] if path.parent != data_dir else "" for path in paths]
    names = sorted(set(tops))
    return Data(images, torch.tensor([names.index(top) for top in tops]) if len(names) > 1 else None)


DATASETS = {"digits": load_digits, "mnist": load_idx, "fashion": load_idx, "folder": load_folder}
