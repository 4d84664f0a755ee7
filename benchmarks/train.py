"""Images a second of the training loop beside timm's and a plain PyTorch one; what the loop itself costs; whether it keeps memory.

    python benchmarks/train.py [throughput overhead memory gpu]

throughput: batches and `train_step` through Fabric, augmentation included; beside it what timm's train.py is made of, by default (four
workers, fast collate, prefetcher, contiguous, no AMP) and with --channels-last, and a plain loop (ImageFolder, two workers, torchvision's
transforms) in both layouts. Targets at 32 and 64 px, geometric means over the backbones of `demo`: 1.3 times timm by default, 1.0 times
timm with --channels-last.
overhead: the share of a step at 32 px that is not forward, backward or optimiser, for the three fastest backbones. Target: under 3 %.
memory: resident memory over a `fit` of 50 epochs, checkpoints included. Target: no growth after the second epoch, that is less than 5 MiB
from epoch 2 to 50, and less than 2 MiB from the median of epochs 26 to 35 to that of 41 to 50.
gpu: throughput at 64 and 224 px, target 1.2 times timm's default, and the share of a step spent waiting for a batch, target 5 %.

All train by the recipe `cross_dataset` (Adam, flip, jitter, CutMix) in batches of 64 on the same images: ours packed, theirs JPEG files of
the right size already, so timm's random crop is set to take all of an image. Each backbone has a process of its own with two torch threads,
where the variants take turns, a different one first each round; a ratio is the median of ratios within a round. A turn is one step
that is not timed, and four that are at 32 px, two above. Between its turns a variant's workers are stopped (SIGSTOP): none gets a batch
ahead on another's time, and all find their queues as they left them, which some seconds of training filled before the first round. No epoch
ends meanwhile. As in timm's script, cuDNN is tuned and TF32 allowed in its turns.
"""
import json
import os
import signal
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle
from multiprocessing import active_children, get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from timm.data import FastCollateMixup, create_dataset, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from xbench import paths
from xbench.augment import Augment, Batches
from xbench.backbones import core
from xbench.data import load
from xbench.latency import device_name, versions
from xbench.pack import pack
from xbench.settings import load as settings
from xbench.train import Run, fabric, fit, seed_all, train_step

THREADS, BATCH, STEPS, ROUNDS, SECONDS, WARM, LONG = 2, 64, {32: 4, 64: 2, 224: 2}, (3, 24), 20, 1.5, 100
SOURCES = {32: 'tinyimagenet184', 64: 'tinyimagenet184', 224: 'flowers5'}
LAYOUTS = {'channels_last': torch.channels_last, 'contiguous': torch.contiguous_format}


def images(folder, size):
    """Real images, packed and as an image folder."""
    try: archive, name = paths.source(settings().data.checked[SOURCES[size]]), SOURCES[size]
    except ValueError: archive, name = paths.root()/'data'/'photographs.tar.xz', 'photographs'
    pack(archive, folder/'packed', size, name, train=4096, test=512, progress=False)
    data = load(folder/'packed')
    for k in np.flatnonzero(data.split == 'train'):
        file = folder/'train'/f'{data.labels[k]:03}'/f'{k}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.images[k]).save(file, quality=90)
    return name


def begin(device):
    """What a process of its own starts with."""
    if device == 'cpu': os.environ['CUDA_VISIBLE_DEVICES'] = ''
    warnings.filterwarnings('ignore', 'This DataLoader will create')
    torch.set_num_threads(THREADS)


def apart(f, *args, device='cpu'):
    """A function's answer, from a process of its own."""
    with ProcessPoolExecutor(1, get_context('spawn'), begin, (device,)) as pool: return pool.submit(f, *args).result()


def network(name, data):
    seed_all(0)
    return core.create(name, len(data.card['classes']), **settings().backbone[name].options)


def trainer(name, folder, layout='channels_last', device='cpu'):
    """A run, and the batches that `fit` would give it."""
    data, recipe = load(folder/'packed'), settings().recipe['cross_dataset'].model_copy(update={'batch': BATCH, 'layout': layout})
    augment = Augment(recipe, data.card['mean'], data.card['std'], len(data.card['classes']), len(data.labels))
    batches = Batches(data.images, data.labels, np.flatnonzero(data.split == 'train'), augment, BATCH)
    run = Run(network(name, data), recipe, fabric(recipe), batches.steps, BATCH)
    run.net.train()
    workers = min(8, os.cpu_count() - 1) if device == 'cuda' else 0
    return run, iter(batches.loader(0, recipe.epochs*batches.steps, workers, device == 'cuda'))


def ours(name, folder, layout, device):
    """The loop of `fit`."""
    run, passes = trainer(name, folder, layout, device)
    return lambda: train_step(run, passes)


def timms(name, folder, layout, device):
    """train.py --opt adam --color-jitter .2 --cutmix 1 --smoothing 0 --scale 1 1 --ratio 1 1 --train-interpolation bilinear"""
    data, dataset = load(folder/'packed'), create_dataset('', str(folder), split='train', is_training=True)
    dataset.reader.samples *= LONG
    net = network(name, data).to(device=device).train()
    if layout == 'channels_last': net = net.to(memory_format=torch.channels_last)
    opt, criterion, losses = create_optimizer_v2(net, 'adam', lr=1e-3), SoftTargetCrossEntropy().to(device), AverageMeter()
    mixed = FastCollateMixup(mixup_alpha=0., cutmix_alpha=1., label_smoothing=0., num_classes=len(data.card['classes']))
    batches = iter(create_loader(dataset, (3, *data.images.shape[1:3]), BATCH, is_training=True, scale=(1, 1), ratio=(1, 1), hflip=.5,
                                 color_jitter=.2, interpolation='bilinear', mean=data.card['mean'], std=data.card['std'],
                                 num_workers=4, collate_fn=mixed, device=torch.device(device)))
    def step():
        x, y = next(batches)
        if layout == 'channels_last': x = x.contiguous(memory_format=torch.channels_last)
        loss = criterion(net(x), y)
        loss.backward()
        opt.step()
        losses.update(loss.item(), len(x))
        opt.zero_grad()
    return step


def plain(name, folder, layout, device):
    """What a tutorial would write."""
    data = load(folder/'packed')
    steps = v2.Compose([v2.RandomHorizontalFlip(.5), v2.ColorJitter(.2, .2, .2), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
                        v2.Normalize(data.card['mean'], data.card['std'])])
    dataset, mix = ImageFolder(folder/'train', steps), v2.CutMix(alpha=1., num_classes=len(data.card['classes']))
    dataset.samples *= LONG
    batches = iter(DataLoader(dataset, BATCH, shuffle=True, num_workers=2, drop_last=True, collate_fn=lambda b: mix(*default_collate(b)),
                              multiprocessing_context='fork', pin_memory=device == 'cuda'))
    net = network(name, data).to(device=device, memory_format=LAYOUTS[layout]).train()
    opt = torch.optim.Adam(net.parameters(), lr=1e-3)
    def step():
        x, y = next(batches)
        x, y = x.to(device=device, memory_format=LAYOUTS[layout], non_blocking=True), y.to(device, non_blocking=True)
        opt.zero_grad()
        cross_entropy(net(x), y).backward()
        opt.step()
    return step


VARIANTS = {'ours': (ours, 'channels_last'), 'ours, contiguous': (ours, 'contiguous'),
            'timm': (timms, 'contiguous'), 'timm, channels_last': (timms, 'channels_last'),
            'plain': (plain, 'contiguous'), 'plain, channels_last': (plain, 'channels_last')}


def clock(device='cpu'):
    if device == 'cuda': torch.cuda.synchronize()
    return time.perf_counter()


def seconds(device, kind, step, workers, steps=2):
    """Of a step in a turn of one variant."""
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = kind is timms
    for w in workers: os.kill(w.pid, signal.SIGCONT)
    step()
    begun = clock(device)
    for _ in range(steps): step()
    took = (clock(device) - begun)/steps
    for w in workers: os.kill(w.pid, signal.SIGSTOP)
    return took


def compare(name, folder, device):
    """Images a second of each variant, and how many times faster than the others ours is."""
    made, took, rounds, steps = {}, {t: [] for t in VARIANTS}, 0, STEPS[load(folder/'packed').images.shape[1]]
    try:
        for title, (kind, layout) in VARIANTS.items():
            before, step = active_children(), kind(name, folder, layout, device)
            step()    # which starts the workers
            made[title], begun = (kind, step, [w for w in active_children() if w not in before]), clock()
            while clock() - begun < WARM: seconds(device, *made[title])
        begun = clock()
        while rounds < ROUNDS[0] or rounds < ROUNDS[1] and clock() - begun < SECONDS:
            for title in [*made, *made][rounds % len(made):][:len(made)]: took[title].append(seconds(device, *made[title], steps))
            rounds += 1
    finally:
        for w in active_children(): os.kill(w.pid, signal.SIGCONT)    # so that they can end
    return {'rounds': rounds, 'images_per_s': {t: round(BATCH/statistics.median(s), 1) for t, s in took.items()},
            'ours_to': {t: round(statistics.median(b/a for a, b in zip(took['ours'], s)), 3) for t, s in took.items() if t != 'ours'}}


def waiting(name, folder, device, steps=100):
    """Share of a step spent waiting for the next batch."""
    run, passes = trainer(name, folder, device=device)
    waited = total = 0
    for k in range(-20, steps):
        begun = clock(device)
        batch = next(passes)
        got = time.perf_counter()
        train_step(run, iter([batch]))
        if k >= 0: waited, total = waited + got - begun, total + clock(device) - begun
    return round(waited/total, 4)


def at(size, device='cpu'):
    """All backbones at one size."""
    partial = paths.work('benchmark')/f'train-{device}-{size}.json'    # what was measured before it was interrupted
    rows = json.loads(partial.read_text()) if partial.exists() else {}
    with TemporaryDirectory() as d:
        dataset = images(Path(d), size)
        for name in settings().profiles['demo'].backbones:
            if name in rows: continue
            rows[name] = apart(compare, name, Path(d), device, device=device)
            if device == 'cuda': rows[name]['waiting'] = apart(waiting, name, Path(d), device, device=device)
            print(size, name, rows[name], flush=True)
            with paths.whole(partial) as part: part.write_text(json.dumps(rows))
    means = {t: round(statistics.geometric_mean(r['ours_to'][t] for r in rows.values()), 3) for t in VARIANTS if t != 'ours'}
    print(size, 'geometric means', means, flush=True)
    return {'dataset': dataset, 'ours_to': means, 'backbones': rows}


def share(name, folder, most):
    """A step of the loop against a bare one on the same network and batches, in turn, and the making of a batch; medians."""
    run, passes = trainer(name, folder)
    net, opt, ready, rows = run.net, run.opt.optimizer, cycle([next(passes) for _ in range(8)]), []
    def bare(batch):
        x, y = batch
        cross_entropy(net(x), y).backward()
        opt.step()
        opt.zero_grad()
    acts = bare, lambda batch: train_step(run, iter([batch])), lambda _: next(passes)
    while len(rows) < most:
        batch, row = next(ready), [0, 0, 0]
        for i in ((0, 1, 2), (1, 0, 2))[len(rows) % 2]:
            begun = clock()
            acts[i](batch)
            row[i] = clock() - begun
        rows.append(row)
    times = np.array(rows[2:])
    (without, loop, augment), extra = np.median(times, 0), np.median(times[:, 1] - times[:, 0])
    return {'bare_ms': round(1e3*without, 2), 'loop_ms': round(1e3*loop, 2), 'augmentation_ms': round(1e3*augment, 2),
            'loop_share': round(extra/loop, 4), 'loop_and_augmentation_share': round((extra + augment)/(loop + augment), 4)}


def overhead():
    with TemporaryDirectory() as d:
        images(Path(d), 32)
        quick = {name: apart(share, name, Path(d), 12)['bare_ms'] for name in settings().profiles['demo'].backbones}
        rows = {name: apart(share, name, Path(d), 400) for name in sorted(quick, key=quick.get)[:3]}
    return {'target_share': 0.03, 'size': 32, 'backbones': rows}


def resident(folder):
    """MiB after each of fifty epochs."""
    pack(paths.root()/'data'/'photographs.tar.xz', folder/'packed', 32, 'photographs', train=384, test=192, progress=False)
    data, recipe, kept = load(folder/'packed'), settings().recipe['cross_dataset'].model_copy(update={'epochs': 50, 'batch': 32}), []
    pages = lambda row: kept.append(int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20)
    fit(network('starnet', data), data, recipe, work=folder/'work', progress=False, every=5, log=pages)
    return kept


def memory():
    with TemporaryDirectory() as d: kept = apart(resident, Path(d))
    early, late = statistics.median(kept[25:35]), statistics.median(kept[40:])
    return {'target_mib': 5, 'target_late_mib': 2, 'backbone': 'starnet', 'images': 384, 'epochs': len(kept),
            'growth_mib': round(kept[-1] - kept[1], 1), 'late_growth_mib': round(late - early, 1), 'mib': [round(m, 1) for m in kept]}


def throughput(kind, sizes, **targets):
    """Given after each size, so that a long run leaves what it has."""
    found = targets | {'sizes': {}}
    for size in sizes:
        found['sizes'][str(size)] = at(size, kind)
        yield found


PARTS = {'throughput': lambda: throughput('cpu', (32, 64), target_to_timm=1.3, target_to_timm_channels_last=1),
         'overhead': lambda: [overhead()], 'memory': lambda: [memory()],
         'gpu': lambda: throughput('cuda', (64, 224), device=device_name('cuda'), target_to_timm=1.2, target_waiting=.05)}

if __name__ == '__main__':
    file = Path(__file__).parent/'results'/'train.json'
    found = json.loads(file.read_text()) if sys.argv[1:] and file.exists() else {}
    for part in sys.argv[1:] or [p for p in PARTS if p != 'gpu' or torch.cuda.is_available()]:
        for answer in PARTS[part]():
            found |= {'device': device_name(), 'versions': versions(), 'threads': THREADS, 'batch': BATCH, part: answer}
            file.write_text(json.dumps(found, indent=1) + '\n')
        for rest in paths.work('benchmark').glob('train-*.json'): rest.unlink()
    print(json.dumps(found, indent=1))
