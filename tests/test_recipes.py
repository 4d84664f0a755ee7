"""What every recipe of params.yaml claims to draw, held as a statistic of what it draws, on a pack in class order as packs are."""
import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scipy import stats
from torch import nn

from xbench import data
from xbench.augment import Augment, Batches
from xbench.pack import prepare
from xbench.settings import load, resolve
from xbench.train import Run, fabric, judge, train_step

SETTINGS = load(ROOT/'params.yaml')
RECIPES = SETTINGS.recipe
STILL = {'flip': 0., 'crop': 0, 'resized_crop': 0., 'policy': 'none', 'jitter': 0., 'hue': 0., 'mixup': 0., 'cutmix': 0.,
         'stats': 'own', 'input_size': None, 'progressive': None}
CLASSES, EACH = 50, 20
N = CLASSES*EACH
CLASS_OF = np.arange(N)//EACH    # packs are sorted by class
PARTS = {'whole': (1, 0, 1), 'accumulated': (4, 0, 1), 'second of two devices': (2, 1, 2)}
SURE = 1e-4    # a sound recipe fails a test of distribution once in ten thousand seeds, and the seed is fixed


def having(*names):
    """Names of the recipes that use one of some settings."""
    return [k for k, r in RECIPES.items() if any(getattr(r, n) for n in names)]


def only(name, *kept, **changed):
    """A recipe of which nothing acts on images but some settings."""
    return RECIPES[name].model_copy(update={k: v for k, v in STILL.items() if k not in kept} | {'precision': 'float32'} | changed)


def augment(recipe, n=N, classes=N, seed=0): return Augment(recipe, [0.]*3, [1.]*3, classes, n, seed)


def passes(recipe, parts, epochs, labels):
    """Every pass of some epochs: images are of no interest, labels tell which they were."""
    images = np.zeros((N, 8, 8, 3), np.uint8)
    drawn = Batches(images, labels, np.arange(N), augment(recipe), recipe.batch, *parts)
    for k in range(epochs*drawn.steps*drawn.passes): yield drawn[k][1]


def near(values, expected):
    """Is a mean within four standard errors of what is expected?"""
    values = np.asarray(values, float)
    error = values.std(ddof=1)/math.sqrt(len(values))
    assert abs(values.mean() - expected) <= 4*error, f'{values.mean():.4f} for {expected:.4f}, standard error {error:.4f}'


@pytest.mark.parametrize('parts', PARTS.values(), ids=PARTS)
@pytest.mark.parametrize('name', having('mixup', 'cutmix'))
def test_partners_are_strangers(name, parts):
    """As many partners are of the same class as two images drawn from the training split are."""
    shares = []
    for y in passes(only(name, 'mixup', 'cutmix'), parts, 8, np.arange(N)):
        pairs = [np.flatnonzero(row) for row in y.numpy()]
        same = [CLASS_OF[a] == CLASS_OF[b] for a, b in (p for p in pairs if len(p) == 2)]
        if same: shares.append(np.mean(same))
    near(shares, (EACH - 1)/(N - 1))


@pytest.mark.parametrize('parts', PARTS.values(), ids=PARTS)
@pytest.mark.parametrize('name', RECIPES)
def test_a_pass_holds_as_many_classes_as_chance_gives(name, parts):
    recipe = only(name)
    seen = [y.numpy() for y in passes(recipe, parts, 3, CLASS_OF)]
    size = round(np.mean([len(y) for y in seen]))
    missed = math.comb(N - EACH, size)/math.comb(N, size)
    assert len({len(y) for y in seen}) == 1
    near([len(set(y.tolist())) for y in seen], CLASSES*(1 - missed))


@pytest.mark.parametrize('name', RECIPES)
def test_an_epoch_takes_every_image_once(name):
    recipe = only(name)
    recipe = recipe.model_copy(update={'batch': max(b for b in range(2, recipe.batch + 1) if N % b == 0 and b % 4 == 0)})
    whole, orders = list(passes(recipe, (1, 0, 1), 2, np.arange(N))), []
    for epoch in np.split(torch.cat(whole).numpy(), 2):
        assert sorted(epoch.tolist()) == list(range(N))
        orders.append(epoch.tolist())
    assert orders[0] != orders[1]
    shared = [torch.cat(list(passes(recipe, (2, rank, 2), 1, np.arange(N)))).tolist() for rank in (0, 1)]
    assert sorted(shared[0] + shared[1]) == list(range(N)), 'two devices see one image, or none of them does'
    distance = np.abs(np.diff(orders[0]))
    near(distance, (N + 1)/3)    # of two numbers drawn without replacement; neighbours in a pack are not neighbours in a batch


@pytest.mark.parametrize('name', RECIPES)
def test_share_of_flips(name):
    recipe, n = only(name, 'flip'), 4000
    half = np.zeros((n, 8, 8, 3), np.uint8)
    half[:, :, 4:] = 255
    flipped = augment(recipe, n).train(half, np.arange(n), 0)[:, 0, 0, 0] > .5
    if recipe.flip in (0, 1): assert flipped.float().mean() == recipe.flip
    else: near(flipped, recipe.flip)


@pytest.mark.parametrize('name', having('mixup', 'cutmix'))
def test_how_much_is_mixed(name):
    """MixUp's share is a beta variate, CutMix's the area of a box of that area that the border cuts (Yun et al., 2019, Algorithm 1)."""
    recipe, side = only(name, 'mixup', 'cutmix'), 128
    a, kept = augment(recipe, classes=3), {'mixup': [], 'cutmix': []}
    for step in range(2500):
        x, y = a.mixed(torch.arange(3.).view(3, 1, 1, 1).repeat(1, 1, side, side), torch.arange(3), 0, step)
        values = x[1].unique()
        kind = 'cutmix' if values.equal(values.round()) else 'mixup'
        assert math.isclose(x[1].mean(), 1 + y[1, 2], abs_tol=1e-4), 'labels are not mixed as pixels are'
        kept[kind].append(y[1, 2].item())
    used = [k for k in kept if getattr(recipe, k)]
    assert [k for k in kept if kept[k]] == used
    if len(used) == 2: near([1.]*len(kept['mixup']) + [0.]*len(kept['cutmix']), .5)
    if recipe.mixup: assert stats.kstest(kept['mixup'], stats.beta(recipe.mixup, recipe.mixup).cdf).pvalue > SURE
    if recipe.cutmix: assert stats.ks_2samp(kept['cutmix'], boxes(recipe.cutmix, side)).pvalue > SURE


def boxes(alpha, side, n=50_000):
    """What CutMix keeps of an image, by the authors' algorithm, in real numbers."""
    rng = np.random.default_rng(1)
    wide = side*np.sqrt(1 - rng.beta(alpha, alpha, n))
    ends = [(np.minimum(side, c + wide/2) - np.maximum(0, c - wide/2)) for c in rng.uniform(0, side, (2, n))]
    return 1 - ends[0]*ends[1]/side**2


@pytest.mark.parametrize('name', having('jitter', 'hue'))
def test_spread_of_jitter(name):
    """Each factor is uniform, and none tells another. Found from pictures whose brightness, contrast and chroma are known."""
    recipe, n = only(name, 'jitter', 'hue'), 3000
    def seen(colour, other=None):
        picture = np.empty((n, 8, 8, 3), np.uint8)
        picture[:, :, :4], picture[:, :, 4:] = colour, other or colour
        return augment(recipe, n).train(picture, np.arange(n), 0).double()*255
    grey, split, coloured = seen((100,)*3), seen((80,)*3, (120,)*3), seen((120, 100, 80))
    brightness = grey.mean((1, 2, 3))/100
    contrast = (split[..., 4:].mean((1, 2, 3)) - split[..., :4].mean((1, 2, 3)))/40/brightness
    spread = coloured.std((1, 2, 3), correction=0)/np.std((120, 100, 80)) if not recipe.hue else None
    found = {'brightness': brightness, 'contrast': contrast}
    if spread is not None: found['saturation'] = spread/brightness/contrast
    for what, factor in found.items():
        assert stats.kstest(factor.numpy(), stats.uniform(1 - recipe.jitter, 2*recipe.jitter).cdf).pvalue > SURE, what
    against = np.corrcoef([f.numpy() for f in found.values()])
    assert np.abs(against - np.eye(len(found))).max() < 4/math.sqrt(n)


@pytest.mark.parametrize('name', having('crop'))
def test_crops_reach_as_far_as_the_border(name):
    """At any size the border is the share that the recipe says, and every shift within it is as likely."""
    recipe, n = only(name, 'crop'), 2000
    for side in (32, 64):
        border = recipe.crop if isinstance(recipe.crop, int) else round(recipe.crop*side)
        ramp = np.broadcast_to(np.arange(1, side + 1, dtype=np.uint8)[:, None, None], (n, side, side, 3))
        rows = augment(recipe, n).train(np.ascontiguousarray(ramp), np.arange(n), 0)[:, 0, side//2, side//2]*255
        shifts = (rows.round() - side//2 - 1).int().numpy()
        counts = np.bincount(shifts + border, minlength=2*border + 1)
        assert len(counts) == 2*border + 1 and stats.chisquare(counts).pvalue > SURE


class Small(nn.Module):
    """A convolution with a bias, a norm, a classifier."""
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x): return self.head(self.norm(self.conv(x)).mean((2, 3)))


def started(recipe, steps):
    torch.manual_seed(0)
    recipe = recipe.model_copy(update={'precision': 'float32', 'teacher': None, 'batch': 4*recipe.accumulate, 'search': None})
    return Run(Small(), recipe, fabric(recipe), steps, recipe.batch)


def one_step(run):
    train_step(run, iter([(torch.rand(run.batch//run.passes, 3, 6, 6), torch.arange(run.batch//run.passes) % 3)]*run.passes))


@pytest.mark.parametrize('name', RECIPES)
def test_rates_of_every_step(name):
    """Learning rate and weight decay follow torch's own schedulers, and what is to be spared of decay is."""
    recipe, steps = RECIPES[name], 2
    run, warm, total = started(recipe, steps), recipe.warmup_epochs*steps, recipe.epochs*steps
    dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], recipe.lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(dummy, total - warm, recipe.min_lr)
    share = lambda lr: (lr - recipe.min_lr)/(recipe.lr - recipe.min_lr)
    for step in range(total):
        one_step(run)
        lr = cosine.get_last_lr()[0] if recipe.schedule == 'cosine' else recipe.lr
        if step < warm: lr = recipe.lr*(step + 1)/warm
        decay = recipe.weight_decay
        if recipe.min_weight_decay is not None: decay = recipe.min_weight_decay + share(lr)*(decay - recipe.min_weight_decay)
        for group in run.opt.param_groups:
            assert math.isclose(group['lr'], lr, rel_tol=1e-6, abs_tol=1e-9), step
            assert group['weight_decay'] == 0 or math.isclose(group['weight_decay'], decay, rel_tol=1e-6), step
        dummy.step()
        if step >= warm: cosine.step()
    named = {p: k for k, p in run.net.named_parameters()}
    spared = {named[p] for g in run.opt.param_groups if not g['weight_decay'] for p in g['params']}
    asked = {'all': set(), 'weights': {'conv.bias', 'norm.weight', 'norm.bias', 'head.bias'}, 'all_but_norms': {'norm.weight', 'norm.bias'}}
    assert spared == (asked[recipe.decay] if recipe.weight_decay else set(named.values()))


@pytest.mark.parametrize('name', having('patience'))
def test_what_epochs_without_progress_do(name):
    recipe = RECIPES[name]
    run, lrs = started(recipe, 1), []
    run.net.train()
    for _ in range(3*recipe.patience):
        if run.ended: break
        judge(run, 50. if len(run.history) else 60.)
        run.history.append({})
        lrs.append((run.phase, run.opt.param_groups[0]['lr']))
    assert run.ended and run.best == 60
    assert len(lrs) == (1 + recipe.patience)*(2 if recipe.then else 1) - bool(recipe.then)
    first = [lr for phase, lr in lrs if not phase]
    dropped = recipe.schedule == 'plateau'
    assert first[:5] == [recipe.lr]*5 and math.isclose(first[-1], recipe.lr*(.1 if dropped else 1)**((len(first) - 1)//5))
    if recipe.then: assert lrs[-1] == (1, recipe.then.lr) and type(run.opt.optimizer).__name__.lower() == recipe.then.optimizer


@pytest.mark.parametrize('name', having('ema'))
def test_the_average_of_the_weights(name):
    """An exponential average whose decay rises to the recipe's, as 1 - step^(-2/3)."""
    run = started(RECIPES[name], 50)
    average = {k: v.clone() for k, v in run.net.state_dict().items()}
    for step in range(50):
        one_step(run)
        decay = min(RECIPES[name].ema, 1 - max(1, step)**(-2/3))
        for k, v in run.net.state_dict().items():
            average[k] = decay*average[k] + (1 - decay)*v if v.is_floating_point() else v.clone()
    assert any(not v.equal(run.net.state_dict()[k]) for k, v in run.tested.state_dict().items())
    for k, v in run.tested.state_dict().items(): assert torch.allclose(v.double(), average[k].double(), rtol=1e-4, atol=1e-6), k


@pytest.mark.parametrize('size', [(672, 448), (700, 460)], ids=['its own size', 'a little larger'])
@pytest.mark.parametrize('name', having('input_size'))
def test_a_network_sees_the_detail_of_its_size(name, size, tmp_path, monkeypatch):
    """Squares of one pixel, on a slide of the network's own size, come through as they are; packed at the profile's size they are grey."""
    squares = Image.fromarray(np.uint8(255*(np.indices(size[::-1]).sum(0) % 2)))
    for folder in (tmp_path/'slides'/s/c for s in ('train', 'test') for c in 'ab'):
        folder.mkdir(parents=True)
        squares.save(folder/'0.png')
    monkeypatch.setattr('xbench.paths.packed', lambda profile, slug: tmp_path/'packed'/slug)
    cell = resolve(SETTINGS, 'full', 'starnet', str(tmp_path/'slides'), recipe=name, changes={'input_size': [448, 672]})
    packed = data.load(prepare(cell, progress=False))
    seen = Augment(only(name, 'input_size', input_size=(448, 672)), [0.]*3, [1.]*3, 2, 4).eval(packed.images)
    assert seen.shape[2:] == (448, 672)
    assert seen.std() > (.49 if size == (672, 448) else .2)    # at this limit of sampling, making it smaller by 4 % halves the contrast
