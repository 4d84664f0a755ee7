"""How fast images are packed, read and augmented, beside torchvision's ImageFolder and DataLoader on the same images in the same run.

    python benchmarks/data.py [sizes choice_at_64 ten memory]

Targets: reading and the `cross_dataset` augmentation at 64 px at least 3 times the baseline's images a second, and under 5 % of a training
step of the fastest backbone; the ten datasets at hand packed in 180 s; 100,000 images of 64 px packed in less than 1 GB of memory.
The baseline has two worker processes and is timed from its second epoch on. Ours augments in the training process, on one core.
"""
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from xbench import paths
from xbench.augment import POLICIES, Augment, Batches
from xbench.backbones import core
from xbench.data import load
from xbench.latency import device_name, versions
from xbench.pack import pack
from xbench.settings import load as settings
from xbench.sources import open_source
from xbench.splits import by_hash

BATCH, IMAGES, ROUNDS = 64, {32: 4096, 64: 4096, 224: 1024}, 3
PLAIN = dict(flip=0., crop=0, resized_crop=0., policy='none', jitter=0., hue=0., mixup=0., cutmix=0., stats='own', input_size=None,
             progressive=None, epochs=10, layout='channels_last')
PIPELINES = {'none': {}, 'flip': {'flip': .5}, 'crop with padding': {'flip': .5, 'crop': 4},
             'random resized crop': {'flip': .5, 'resized_crop': .08},
             'jitter': {'flip': .5, 'jitter': .2}, 'jitter and hue': {'flip': .5, 'jitter': .2, 'hue': .1},
             'cross_dataset': {'flip': .5, 'jitter': .2, 'cutmix': 1.}, 'mixup': {'flip': .5, 'mixup': .2},
             'autoaugment': {'flip': .5, 'policy': 'autoaugment'}, 'randaugment': {'flip': .5, 'policy': 'randaugment'},
             'trivialaugment': {'flip': .5, 'policy': 'trivialaugment'}}


def rate(run, n, rounds=ROUNDS):
    """Images a second: the median of some rounds."""
    took = []
    for _ in range(rounds):
        begun = time.perf_counter()
        run()
        took.append(time.perf_counter() - begun)
    return n/statistics.median(took)


def folder(path, size):
    """Some thousand real JPEG images as an image folder, in the size that they are found in."""
    name = 'flowers5' if size == 224 else 'tinyimagenet184'
    try: archive = paths.source(settings().data.checked[name])
    except ValueError: name, archive = 'photographs', paths.root()/'data'/'photographs.tar.xz'
    source = open_source(archive, name)
    kept = by_hash([i.name for i in source.items if i.split == 'train'])[:IMAGES[size]]
    label = {i.name: i.label for i in source.items}
    for k, (n, content) in enumerate(source.read(set(kept))):
        for split in ('train', 'test')[:1 + (k < 2*len(source.classes))]:
            (to := path/split/label[n]/f'{k}.jpg').parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(content)
    for c in source.classes:     # every class on both sides
        if not (path/'test'/c).exists() and (path/'train'/c).exists():
            (path/'test'/c).mkdir(parents=True)
            first = next((path/'train'/c).iterdir())
            (path/'test'/c/first.name).write_bytes(first.read_bytes())
    return name, sum(1 for f in (path/'train').rglob('*.jpg'))


def baseline(root, size, recipe, classes):
    """The same transforms by torchvision, in two worker processes."""
    steps = [v2.Resize((size, size))]
    if recipe.crop: steps.append(v2.RandomCrop(size, padding=recipe.crop))
    if recipe.resized_crop: steps.append(v2.RandomResizedCrop(size, (recipe.resized_crop, 1)))
    if recipe.policy != 'none':
        steps.append(POLICIES[recipe.policy]())
    if recipe.flip: steps.append(v2.RandomHorizontalFlip(recipe.flip))
    if recipe.jitter: steps.append(v2.ColorJitter(recipe.jitter, recipe.jitter, recipe.jitter, recipe.hue or None))
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([.5]*3, [.25]*3)]
    mix = v2.CutMix(alpha=recipe.cutmix, num_classes=classes) if recipe.cutmix else \
        v2.MixUp(alpha=recipe.mixup, num_classes=classes) if recipe.mixup else None
    collate = (lambda b: mix(*default_collate(b))) if mix else None
    loader = DataLoader(ImageFolder(root, v2.Compose(steps)), BATCH, shuffle=True, num_workers=2, drop_last=True, collate_fn=collate,
                        persistent_workers=True, multiprocessing_context='fork')
    def epoch():
        for _ in loader: pass
    epoch()
    return rate(epoch, len(loader)*BATCH)


def steps(size, classes):
    """Seconds of a training step of each backbone on this many threads, without data."""
    found = {}
    for name in settings().profiles['demo'].backbones:
        try: core.check_size(name, size)
        except ValueError: continue
        model = core.create(name, classes).to(memory_format=torch.channels_last)
        x, y = torch.randn(BATCH, 3, size, size).to(memory_format=torch.channels_last), torch.zeros(BATCH, dtype=torch.long)
        opt = torch.optim.Adam(model.parameters())
        def step(model=model, opt=opt, x=x, y=y):
            opt.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        step()
        found[name] = 1/rate(step, 1, 3)
    return found


def at(size):
    with TemporaryDirectory() as d:
        name, n = folder(Path(d, 'images'), size)
        packing = rate(lambda: pack(Path(d, 'images'), Path(d, 'packed'), size, 'benchmark', progress=False), n, 1)
        packed = load(Path(d, 'packed'))
        train, classes = np.flatnonzero(packed.split == 'train'), len(packed.card['classes'])
        order = np.random.default_rng(0).permutation(train)
        def read():
            for k in range(0, len(order) - BATCH, BATCH): packed.images[np.sort(order[k:k + BATCH])]
        row = {'dataset': name, 'images': n, 'packing': packing, 'reading': rate(read, len(order)), 'pipelines': {}}
        for title, changed in PIPELINES.items():
            recipe = SimpleNamespace(**PLAIN | changed)
            augment = Augment(recipe, [.5]*3, [.25]*3, classes, len(packed.labels))
            made = Batches(packed.images, packed.labels, train, augment, BATCH)
            def epoch(made=made):
                for _ in made.loader(0, made.steps): pass
            ours, theirs = rate(epoch, len(train)//BATCH*BATCH), baseline(Path(d, 'images', 'train'), size, recipe, classes)
            row['pipelines'][title] = {'ours': round(ours), 'imagefolder': round(theirs), 'ratio': round(ours/theirs, 2)}
            print(size, title, row['pipelines'][title], flush=True)
    row |= {'packing': round(packing), 'reading': round(row['reading'])}
    if size > 64: return row     # a step takes seconds there
    took = steps(size, classes)
    fastest = min(took, key=took.get)
    share = BATCH/row['pipelines']['cross_dataset']['ours']/took[fastest]
    return row | {'fastest_backbone': fastest, 'step_ms': round(1e3*took[fastest], 1), 'augmentation_share_of_step': round(share, 4)}


def choice(size=64):
    """One image at a time or a batch, tensors or Pillow, which library: what the choices in nbs/46_augment.ipynb rest on."""
    images = np.random.default_rng(0).integers(0, 256, (BATCH, size, size, 3), np.uint8)
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    found = {}
    for name, t in (('AutoAugment', v2.AutoAugment()), ('RandAugment', v2.RandAugment()), ('TrivialAugment', v2.TrivialAugmentWide()),
                    ('RandomResizedCrop', v2.RandomResizedCrop(size)), ('ColorJitter', v2.ColorJitter(.2, .2, .2)),
                    ('with hue', v2.ColorJitter(.2, .2, .2, .1))):
        found[name] = {'torchvision, tensors': rate(lambda t=t: [t(i) for i in tensors], BATCH, 9),
                       'torchvision, Pillow': rate(lambda t=t: [np.asarray(t(Image.fromarray(i))) for i in images], BATCH, 9)}
    from timm.data import auto_augment
    for name, t in (('AutoAugment', auto_augment.auto_augment_transform('original', {})),
                    ('RandAugment', auto_augment.rand_augment_transform('rand-m9-n2', {}))):
        found[name]['timm'] = rate(lambda t=t: [np.asarray(t(Image.fromarray(i))) for i in images], BATCH, 9)
    for name, changed in (('ColorJitter', {'jitter': .2}), ('with hue', {'jitter': .2, 'hue': .1})):
        augment, k = Augment(SimpleNamespace(**PLAIN | changed), [.5]*3, [.25]*3, 2, BATCH), np.arange(BATCH)
        found[name]['ours'] = rate(lambda a=augment, k=k: a.train(images, k, 0), BATCH, 9)
    with suppress(ImportError):
        import kornia.augmentation as K
        floats = tensors.float()/255
        for name, t in (('ColorJitter', K.ColorJitter(.2, .2, .2, 0., p=1.)), ('with hue', K.ColorJitter(.2, .2, .2, .1, p=1.)),
                        ('RandomResizedCrop', K.RandomResizedCrop((size, size))), ('RandAugment', K.auto.RandAugment(2, 9)),
                        ('TrivialAugment', K.auto.TrivialAugment()), ('AutoAugment', K.auto.AutoAugment())):
            found[name]['kornia, a batch'] = rate(lambda t=t: t(floats), BATCH, 9)
    return {name: {k: round(v) for k, v in row.items()} for name, row in found.items()}


def ten(size):
    """Seconds to pack the datasets at hand."""
    took = {}
    for slug, path in settings().data.checked.items():
        try: path = paths.source(path)
        except ValueError: continue
        with TemporaryDirectory() as d:
            begun = time.perf_counter()
            pack(path, Path(d, 'packed'), size, slug, progress=False)
            took[slug] = round(time.perf_counter() - begun, 1)
    return {'size': size, 'seconds': took, 'together': round(sum(took.values()), 1)}


def memory(n=100_000, size=64):
    """Peak memory of a process that packs many images; they are ten images under many names."""
    with TemporaryDirectory() as d:
        for c in range(10):     # a file takes 65,000 names
            (folder := Path(d, 'images', f'c{c}')).mkdir(parents=True)
            Image.effect_noise((96, 80), 60).convert('RGB').save(folder/'first.jpg')
            for k in range(1, n//10): os.link(folder/'first.jpg', folder/f'{k}.jpg')
        code = ('from xbench.pack import pack; '
                f'pack({str(Path(d, "images"))!r}, {str(Path(d, "packed"))!r}, {size}, "many", progress=False); '
                'print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))')
        begun = time.perf_counter()
        peak = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout
        return {'images': n, 'size': size, 'seconds': round(time.perf_counter() - begun, 1), 'mib_peak': round(int(peak)/1024)}


PARTS = {'sizes': lambda: {str(size): at(size) for size in IMAGES}, 'choice_at_64': choice, 'ten': lambda: ten(64), 'memory': memory}

if __name__ == '__main__':
    torch.set_num_threads(2)
    file = Path(__file__).parent/'results'/'data.json'
    found = json.loads(file.read_text()) if sys.argv[1:] and file.exists() else {}
    found |= {'device': device_name(), 'versions': versions(), 'batch': BATCH, 'target_ratio': 3, 'target_share': 0.05}
    for part in sys.argv[1:] or PARTS: found[part] = PARTS[part]()
    print(json.dumps(found, indent=1))
    file.write_text(json.dumps(found, indent=1) + '\n')
