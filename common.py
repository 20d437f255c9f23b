"""Data loading and fixed-noise sampling for the GAN scripts of this folder, and how files are written; nothing else.
A data set is decoded once and kept as one uint8 tensor (N, C, H, W); a batch is an index, a cast and a scale."""
import contextlib
import gzip
import hashlib
import io
import math
import os
import socket
import urllib.request
import zipfile
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import imageio.v2 as imageio
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from torchvision.datasets import CIFAR10, MNIST, FashionMNIST
from torchvision.utils import make_grid

FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "cmss10", "cmtt10", "cmr10"]
FONTS += ["DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "cmb10", "cmti10"]
FONTS += ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"]
MIRRORS = {"mnist": "https://storage.googleapis.com/cvdf-datasets/mnist/"}  # tried after torchvision's first
MIRRORS["fashion"] = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
RESIDENT = 2**29  # bytes: a folder that is larger in RGB is kept in a memory-mapped file, and no larger data on a GPU

class Fault(Exception):
    """What the user can mend: the scripts print it as one sentence, without a traceback, and exit with code 1."""

class Misuse(Fault):
    """A flag whose value is impossible, or does not fit the data or the run: exit code 2."""

class Data(NamedTuple):
    images: torch.Tensor  # uint8 (N, C, H, W)
    labels: torch.Tensor | None = None  # int64 (N,)
    factors: dict | None = None  # what each of `digits` was rendered from: name -> float (N,)

def load_data(dataset, data_dir="data", img_size=None, classes=None, background="white", device="cpu"):
    """The data set of this name in DATASETS, on the device if it fits (RESIDENT). img_size None is its own, 64 for a
    folder; classes keeps only these labels; background goes below transparency. Raises Misuse (flags), Fault (data)."""
    torch.empty(31 * 2**20, dtype=torch.uint8)  # freed: glibc now keeps 62 MB; page faults took up to 9% of a step
    try:
        background = ImageColor.getrgb(background)[:3]
    except ValueError as error:
        raise Misuse(f"--background {background} is not a colour: give a name like white, or '#rrggbb'.") from error
    data = DATASETS[dataset](dataset, Path(data_dir), img_size, background)
    if classes and (data.labels is None or not set(classes) <= set(data.labels.tolist())):
        raise Misuse(f"--classes {classes}: not all are labels here (those of a folder: its sub-folders, 0, 1, ...).")
    if classes:
        i = torch.isin(data.labels, torch.tensor(classes))
        data = Data(data.images[i], data.labels[i], data.factors and {k: v[i] for k, v in data.factors.items()})
    if len(data.images) < 2:
        raise Fault(f"{len(data.images)} pictures are not enough for batch norm: give more, or other --classes.")
    if img_size and img_size != data.images.shape[-1]:
        resize = partial(F.interpolate, size=(img_size, img_size), mode="bilinear", antialias=True)
        data = data._replace(images=torch.cat([resize(x.float()).round().byte() for x in data.images.split(1024)]))
    return data if data.images.nbytes > RESIDENT else data._replace(images=data.images.to(device))

@lru_cache(1)  # it is asked at each step
def epoch_order(n, batch_size, seed, epoch):
    """The indexes of an epoch, (steps, batch_size), in a random order that is the same when a run is resumed."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    order = order.repeat(math.ceil(batch_size / n))  # more than once only if there are too few
    return order[: len(order) // batch_size * batch_size].view(-1, batch_size)

def to_batch(images, index, device="cpu"):
    """The pictures at index, as floats (B, C, H, W) in [-1, 1] on the device."""
    return images[index].to(device).float() / 127.5 - 1

def fixed_noise(n, latent_dim, seed):
    """z ~ N(0, I), (n, latent_dim), from a generator of its own: the same whatever was drawn before."""
    return torch.randn(n, latent_dim, generator=torch.Generator().manual_seed(seed))

@torch.no_grad()
def sample(G, z):
    """G(z) as uint8 (N, C, H, W) on the CPU. In training mode batch norm would make pictures depend on each other."""
    was_training = G.training
    G.eval()
    x = [((G(chunk).float() + 1) * 127.5).round().clamp(0, 255).byte().cpu() for chunk in z.split(256)]
    G.train(was_training)
    return torch.cat(x)

def grid(images, columns=8):
    """uint8 (N, C, H, W) -> one picture, uint8 (height, width, 3); small ones enlarged, those over 256 reduced."""
    zoom = max(1, 56 // images.shape[-1])
    images = F.interpolate(images, [min(zoom * images.shape[-1], 256)] * 2)  # to the nearest pixel
    return make_grid(images, columns, padding=2 * zoom, pad_value=96).permute(1, 2, 0).numpy()

def save_png(path, picture):
    """A picture, uint8 (height, width) or (height, width, 3), as a file that is whole or not there."""
    save_atomically(path, imageio.imwrite("<bytes>", picture, format="png"))

def save_pictures(folder, images):
    """uint8 (N, C, H, W) as N single pictures in the folder, and all of them on a grid beside it."""
    list(map(Path.unlink, sorted(folder.glob("[0-9]*.png"))))  # of another --sample
    for i, image in enumerate(images):
        save_png(folder / f"{i:05d}.png", image.permute(1, 2, 0).squeeze(2).numpy())
    save_png(folder.with_suffix(".png"), grid(images))
    print(f"{len(images)} pictures in {folder}, all of them in {folder}.png")

def save_gif(path, frames, duration):
    """Pictures, uint8 (height, width, 3), each shown for so many milliseconds, over and over."""
    save_atomically(path, imageio.mimwrite("<bytes>", frames, format="gif", duration=duration, loop=0))

def save_history(out, step):
    """samples.gif: up to 60 of the grids in out/samples up to this step (later ones: a killed run's), the last held."""
    paths = [p for n in range(step + 1) if (p := out.absolute() / f"samples/{n:06d}.png").exists()]  # imageio expands ~
    save_gif(out / "samples.gif", [imageio.imread(p) for p in paths[:: len(paths) // 60 + 1] + paths[-1:] * 10], 200)

def render_digits(n, seed):
    """n digits, 28x28, white on black, in the fonts that matplotlib ships, each with random factors.
    Each glyph is drawn once, large, and turned into distances from its outline, positive inside. Sampled under a
    rotation, slant, scale and shift, these give a smooth outline; adding a constant makes the stroke thicker."""
    glyphs = []
    for name in FONTS:
        path = f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf"
        _, top, _, bottom = ImageFont.truetype(path, 100).getbbox("0")
        font = ImageFont.truetype(path, 100 * 40 / (bottom - top))  # a zero is 40 pixels high
        for digit in "0123456789":
            glyph = Image.new("L", (64, 64))
            left, top, right, bottom = font.getbbox(digit)
            ImageDraw.Draw(glyph).text(((64 - left - right) / 2, (64 - top - bottom) / 2), digit, 255, font)
            glyphs.append(torch.from_numpy(np.array(glyph) > 127))
    ink, place = torch.stack(glyphs), torch.arange(64.0)  # (fonts * 10, 64, 64)
    squared = torch.where(torch.stack([~ink, ink]), 0, 1e4)  # distances to a pixel without ink, and to one with ink
    for _ in range(2):  # along the rows, then along the columns
        squared = (squared[..., None, :] + (place[:, None] - place) ** 2).amin(-1).transpose(-1, -2)
    distance = torch.sub(*squared.sqrt().clamp(min=0.5))  # (fonts * 10, 64, 64), negative where there is no ink
    half_stroke = distance.flatten(1).amax(1).view(-1, 10).median(1).values  # (fonts,), in pixels of the glyph
    rng = torch.Generator().manual_seed(seed)
    labels, font = torch.randint(10, (n,), generator=rng), torch.randint(len(FONTS), (n,), generator=rng)
    low, high = torch.tensor([[-15, -0.3, 0.85, 2.0, -2, -2], [15, 0.3, 1.10, 4.5, 2, 2]])[..., None]
    rotation, slant, scale, thickness, shift_x, shift_y = low + (high - low) * torch.rand(6, n, generator=rng)
    thicker = (thickness - half_stroke[font]).clamp(min=-0.5)  # any thinner, and hairlines would break
    # From a place in the picture to its place in the glyph: undo the shift, the rotation, the slant and the scale.
    cos, sin = torch.deg2rad(rotation).cos(), torch.deg2rad(rotation).sin()
    linear = torch.stack([cos - slant * sin, sin + slant * cos, -sin, cos], 1).view(n, 2, 2)
    linear *= 14 / 16 / scale.view(n, 1, 1)  # so that a zero of scale 1 is 20 pixels high
    theta = torch.cat([linear, -linear @ torch.stack([shift_x, shift_y], 1)[:, :, None] / 14], 2)  # (n, 2, 3)
    images = torch.empty(n, 1, 28, 28, dtype=torch.uint8)
    for i in torch.arange(n).split(4096):
        where = F.affine_grid(theta[i], (len(i), 1, 28, 28), align_corners=False)
        glyph = distance[font[i] * 10 + labels[i], None]  # (4096, 1, 64, 64)
        inside = F.grid_sample(glyph, where, padding_mode="border", align_corners=False) + thicker[i].view(-1, 1, 1, 1)
        inside *= scale[i].view(-1, 1, 1, 1) / 2  # a pixel of the picture is 2 / scale pixels of the glyph
        images[i] = ((inside + 0.5).clamp(0, 1) * 255).byte()
    factors = {"rotation": rotation, "slant": slant, "scale": scale, "thickness": (half_stroke[font] + thicker) * scale}
    return Data(images, labels, factors | {"shift_x": shift_x, "shift_y": shift_y})

def load_digits(dataset, data_dir, img_size, background):
    """60,000 rendered digits, kept in data_dir/digits after the first time."""
    cache = data_dir / "digits" / "digits-2.pt"  # count up when render_digits changes
    with contextlib.suppress(Exception):  # not there, or damaged: render again
        return Data(**torch.load(cache, weights_only=True))
    data = render_digits(60_000, seed=0)
    with contextlib.suppress(OSError):  # a read-only folder costs two seconds each time, no more
        save_atomically(cache, data._asdict())
    return data

def save_atomically(path, content):
    """Write bytes, what torch.save takes, or what content(file) writes: path is the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not (isinstance(content, bytes) or callable(content)):
        buffer = io.BytesIO()
        torch.save(content, buffer)  # into memory first: straight into a full disk it is no OSError
        content = buffer.getbuffer()
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with part.open("wb") as file:
            content(file) if callable(content) else file.write(content)
        os.replace(part, path)
    finally:  # on a full disk half a file helps nobody
        part.unlink(missing_ok=True)

def download(urls, path, places, md5=None):
    """Fetch the first of urls that answers with the right md5 into path. Raises Fault, which names the places too."""
    print(f"Downloading {path}", flush=True)
    reasons = []
    for url in urls:
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                content = answer.read()
            if md5 in (None, hashlib.md5(content).hexdigest()):
                return save_atomically(path, content)
            reasons.append(f"{url} has the wrong md5")
        except Exception as error:  # each way of breaking off raises its own kind
            reasons.append(f"{url} failed ({getattr(error, 'reason', error)})")
    reasons.append(f"put it into {path.parent}, name its folder with --data-dir, or use --dataset digits: built in.")
    raise Fault(f"no {path.name}, packed or not, in {', '.join(map(str, places))}; {'; '.join(reasons)}")

def read_idx(path):
    """The uint8 tensor in an IDX file, raw or .gz, of the shape that its header gives. Raises Fault if damaged."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
        return torch.from_numpy(np.frombuffer(raw, {8: np.uint8}[raw[2]], offset=4 + 4 * raw[3]).reshape(shape).copy())
    except Exception as error:  # each way of being damaged raises its own kind
        raise Fault(f"{path} is damaged ({error}): delete it, so that it is downloaded again.") from error

def load_idx(dataset, data_dir, img_size, background, test=False):
    """The 60,000 training or 10,000 test images of MNIST or Fashion-MNIST, found on this machine or downloaded."""
    source = {"mnist": MNIST, "fashion": FashionMNIST}[dataset]
    folders = [data_dir / source.__name__ / "raw", data_dir / dataset, data_dir]  # the first is torchvision's
    folders += Path("/usr/share/datasets").glob(f"{dataset}*")  # Debian's; not fashion-mnist for mnist
    arrays = []
    for name, md5 in source.resources[2:] if test else source.resources[:2]:  # images, labels
        places = [folder / file for folder in folders for file in (name.removesuffix(".gz"), name)]
        path = next((place for place in places if place.is_file()), folders[0] / name)
        if not path.exists():
            download([mirror + name for mirror in (source.mirrors[0], MIRRORS[dataset])], path, folders, md5)
        arrays.append(read_idx(path))
    if arrays[0].shape[1:] != (28, 28) or arrays[1].shape != arrays[0].shape[:1]:
        raise Fault(f"{path.parent}: not images of 28x28 and their labels. Delete them; they will be downloaded.")
    return Data(arrays[0][:, None], arrays[1].long())

def load_stacked(dataset, data_dir, img_size, background):
    """128,000 random triples of MNIST digits as R, G and B; the label is the mode, 0 to 999 (VEEGAN, PacGAN)."""
    images, labels, _ = load_idx("mnist", data_dir, img_size, background)
    triples = torch.randint(len(images), (128_000, 3), generator=torch.Generator().manual_seed(0))
    return Data(images[triples].squeeze(2), labels[triples] @ torch.tensor([100, 10, 1]))

def load_cifar(dataset, data_dir, img_size, background, test=False):
    """The 50,000 training or 10,000 test images of CIFAR-10, by torchvision, which checks their md5."""
    try:
        socket.setdefaulttimeout(20)  # torchvision sets none
        source = CIFAR10(data_dir, not test, download=True)
    except Exception as error:  # each way of breaking off raises its own kind
        raise Fault(f"no {CIFAR10.filename} ({error}): put it into {data_dir}, or use --dataset digits.") from error
    return Data(torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(source.targets))

def load_pokemon(dataset, data_dir, img_size, background):
    """The 1,352 sprites of pokemon-gen8/regular in msikma/pokesprite: 68x56, cut and padded to 64x64."""
    path = data_dir / "pokesprite-c5aaa610ff2acdf7fd8e2dccd181bca8be9fcb3e.zip"  # the name has the commit
    if not path.exists():
        download([f"https://github.com/msikma/pokesprite/archive/{path.name.split('-')[1]}"], path, [data_dir])
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in sorted(archive.namelist()) if "/pokemon-gen8/regular/" in n and n.endswith(".png")]
            return Data(torch.stack([read_picture(archive.open(n), 68, background)[:, 2:-2, 2:-2] for n in names]))
    except (zipfile.BadZipFile, RuntimeError, Fault) as error:  # no zip file; without sprites; a damaged one
        raise Fault(f"{path} is damaged: delete it, so that it is downloaded again.") from error

def read_picture(file, size, background):
    """RGB uint8 (3, size, size): padded if transparent, else cropped to its middle. Raises Fault, naming the file."""
    try:
        with Image.open(file) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I;16"):  # convert("RGB") alone would make nearly all of it white
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            if picture.has_transparency_data and picture.convert("RGBA").getextrema()[3][0] < 255:  # not all opaque
                canvas = Image.new("RGBA", picture.size, background)  # convert("RGB") alone shows hidden colours
                picture = Image.alpha_composite(canvas, picture.convert("RGBA")).convert("RGB")
                picture = ImageOps.pad(picture, (size, size), Image.Resampling.BICUBIC, background)
            picture = ImageOps.fit(picture.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise Fault(f"{getattr(file, 'name', file)} is no picture ({error}): mend it or take it away.") from error
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

def load_folder(dataset, data_dir, img_size, background):
    """Pictures below data_dir, not hidden, not of a run. Sub-folders, by name: labels 0, 1, ...; grey: 1 channel."""
    folder, size = data_dir if dataset == "folder" else data_dir / dataset, img_size or 64
    names = sorted(os.path.join(top, name) for top, _, files in os.walk(folder, followlinks=True) for name in files)
    runs = tuple(name.removesuffix("args.json") for name in names if name.endswith(f"{os.sep}args.json"))  # no data
    names = [n for n in names if n.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"))]
    names = [n for n in names if not n.startswith(runs) and f"{os.sep}." not in n[len(str(folder)) :]]  # nor hidden
    if not names:
        dead = {"celeba": "img_align_celeba", "lsun": "the pictures of a category"}
        todo = f"fetch {dead[dataset]} by hand (its download is dead)" if dataset in dead else "put some there"
        raise Fault(f"{dataset}: no png, jpg, webp, gif or bmp in {folder}, runs apart: {todo}, or change --data-dir.")
    tops = [os.path.relpath(name, folder).rpartition(os.sep)[0].split(os.sep)[0] for name in names]
    labels = torch.from_numpy(np.unique(tops, return_inverse=True)[1]) if len(set(tops)) > 1 else None
    if 3 * len(names) * size**2 <= RESIDENT:
        pixels = np.frombuffer(decode(names, size, background, io.BytesIO()).getbuffer(), np.uint8)
    else:
        stats = [(os.path.relpath(name, folder), os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in names]
        cache = folder / f"decoded-{hashlib.md5(repr((size, background, stats)).encode()).hexdigest()}.raw"
        if not cache.exists() or cache.stat().st_size not in (len(names) * size**2, 3 * len(names) * size**2):
            save_atomically(cache, partial(decode, names, size, background))
        pixels = np.memmap(cache, np.uint8, "c")  # read page by page, never written
    return Data(torch.from_numpy(pixels.reshape(len(names), -1, size, size)), labels)

def decode(names, size, background, file, channels=1):
    """Write the pictures, uint8 (N, 1, size, size), or (N, 3, size, size) as soon as one of them has a colour."""
    for i, name in enumerate(names):
        picture = read_picture(name, size, background)
        if channels == 1 and (picture != picture[:1]).any():
            file.seek(0)
            return decode(names, size, background, file, channels=3)
        file.write(picture[:channels].numpy().tobytes())
        if i % 10_000 == 9_999:
            print(f"{i + 1:,} of {len(names):,} pictures read", flush=True)
    return file

DATASETS = {"digits": load_digits, "mnist": load_idx, "fashion": load_idx, "stacked-mnist": load_stacked}
DATASETS |= {"cifar10": load_cifar, "pokemon": load_pokemon} | dict.fromkeys(["celeba", "lsun", "folder"], load_folder)
