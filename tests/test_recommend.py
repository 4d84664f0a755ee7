"""Images of one's own: what is refused before training, and one small run from folder to answer."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from conftest import ROOT
from PIL import Image

from xbench import recommend as r
from xbench import runs
from xbench.backbones import core, weights
from xbench.errors import InputError
from xbench.recommend import LINEAR, Wish, recommend


@pytest.fixture(autouse=True)
def house(tmp_path, monkeypatch):
    """A project of its own, so that nothing is left in this one."""
    (tmp_path/'house').mkdir()
    shutil.copy(ROOT/'params.yaml', tmp_path/'house')
    monkeypatch.setenv('XBENCH_ROOT', str(tmp_path/'house'))
    return tmp_path/'house'


def bugs(root, n=60, classes=('ant', 'bee'), form='png'):
    """Noise, darker in one class."""
    rng = np.random.default_rng(0)
    for k, c in enumerate(classes):
        (root/c).mkdir(parents=True)
        for i in range(n): Image.fromarray(rng.integers(60*k, 60*k + 90, (24, 32, 3), np.uint8)).save(root/c/f'{i}.{form}')
    return root


def jpegs(folder):
    for f in folder.glob('*.png'): Image.open(f).save(f.with_suffix('.jpg')), f.unlink()


def truncated(folder):
    for f in sorted(folder.glob('*.png'))[:3]: f.write_bytes(f.read_bytes()[:300])


@pytest.mark.parametrize('n, spoil, words', [
    (60, lambda d: shutil.rmtree(d/'bee'), ("one class ('ant')", 'two or more')),
    (3, lambda d: (d/'bee'/'0.png').unlink(), ('5 images are too few', '100 images', 'add some')),
    (120, lambda d: [f.unlink() for f in list((d/'bee').iterdir())[5:]], ("class 'bee' has 4 images to learn from", 'leave the class out')),
    (60, lambda d: (d/'ant'/'0.png').rename(d/'0.png'), ('0.png lies in no class folder', 'CLASS/FILE')),
    (60, lambda d: (d/'ant'/'0.png').write_text('none'), ('image ant/0.png cannot be read', '1 such files of 120')),
    (60, lambda d: truncated(d/'bee'), ('image bee/0.png cannot be read', '3 such files of 120')),
    (60, lambda d: (d/'ant'/'x.psd').touch(), ('.psd (1)', 'PNG or JPEG')),
    (60, lambda d: jpegs(d/'bee'), ('JPEG tells the class', "100% of 'bee'", "0% of 'ant'", '--anyway')),
])
def test_bad_images_are_refused_before_anything_is_timed(tmp_path, house, monkeypatch, capsys, n, spoil, words):
    def never(*_, **__): raise AssertionError('a backbone was timed or trained')
    for where, name in ((r, 'timed'), (runs, 'execute')): monkeypatch.setattr(where, name, never)
    spoil(bugs(tmp_path/'bugs', n))
    with pytest.raises(InputError) as e: recommend(Wish(str(tmp_path/'bugs'), px=32, backbones=('starnet',)), progress=False)
    said = str(e.value)
    assert said.startswith(f'{tmp_path}/bugs: ') and all(w in said for w in words) and len(said.splitlines()) == 1, said
    assert not list(house.rglob('*.npy')) and not list(house.rglob('*.json'))


def test_a_latency_that_nobody_meets_names_the_nearest(tmp_path, house):
    with pytest.raises(InputError, match=r'^--latency 0.001ms: none of 1 .* in eager at 32 px; the nearest is shufflenet with [\d.]+ ms'):
        recommend(Wish(str(bugs(tmp_path/'bugs')), '0.001ms', 'eager', px=32, backbones=('shufflenet',)), progress=False)
    assert not list(house.rglob('*.safetensors')) and not list(house.rglob('plan.json'))


def test_weights_that_cannot_be_had_are_named_at_once(tmp_path, house, monkeypatch):
    monkeypatch.setenv('XBENCH_WEIGHTS', str(tmp_path/'nowhere'))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'cache'))
    with pytest.raises(InputError, match='efficientnet_b0: weights cannot be had from .*XBENCH_WEIGHTS'):
        recommend(Wish(str(bugs(tmp_path/'bugs')), pretrained=True), progress=False)
    assert not (house/'packed').exists() and not (house/'work').exists()


def test_weights_that_are_there_are_begun_with(tmp_path, house, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'cache'))
    _, name = weights.address(core.entry('mobilenet_v3_small'))
    (file := tmp_path/'cache'/'hub'/'checkpoints'/name).parent.mkdir(parents=True)
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), file)
    wish = Wish(str(bugs(tmp_path/'bugs')), engine='eager', backbones=('mobilenet_v3_*l',), px=32, pretrained=True, changes={'epochs': 2})
    table, said = recommend(wish, tmp_path/'out', progress=False)
    made = json.loads((tmp_path/'out'/'runs'/'mobilenet_v3_small-bugs-s0'/'run.json').read_text())['cell']['recipe']
    assert (made['pretrained'], made['stats'], made['lr'], made['epochs']) == (True, 'imagenet', 3e-4, 2)
    assert table.backbone.tolist() == ['mobilenet_v3_small', LINEAR] and 'nothing else was tried, trained once' in said


@pytest.fixture
def digits(tmp_path):
    """Four digits as CLASS/FILE, some of each class in another format."""
    shutil.unpack_archive(ROOT/'data'/'digits.tar.xz', tmp_path/'unpacked')
    for c in '0123':
        (folder := tmp_path/'numbers'/c).mkdir(parents=True)
        for k, f in enumerate(sorted((tmp_path/'unpacked'/'digits'/'train'/c).iterdir())[:110]):
            image = Image.open(f).convert('L')
            if k % 8 == 0: Image.fromarray(np.uint16(np.asarray(image))*256).save(folder/f'{k}.tif')
            elif k % 8 == 1: image.convert('CMYK').save(folder/f'{k}.jpg')
            elif k % 8 == 2: image.save(folder/f'{k}.gif', save_all=True, append_images=[Image.new('L', image.size)])
            else: image.save(folder/f'{k}.png')
    return tmp_path/'numbers'


def test_from_folder_to_answer_and_again(digits, house, monkeypatch, capsys):
    wish = Wish(str(digits), '50ms', 'eager', 5, ('starnet', 'shufflenet'), 32, changes={'epochs': 3, 'cutmix': 0, 'flip': 0})
    table, said = recommend(wish)
    err, out = capsys.readouterr().err, house/'work'/'recommend'/'numbers'
    for words in ('mixed: ', 'scaled by what the dataset holds', 'colour profile', 'several frames', '88 to test',
                  'training starnet, shufflenet'):
        assert words in err, err
    assert table.backbone.tolist()[-1] == LINEAR and set(table.backbone[:2]) == {'starnet', 'shufflenet'}
    ours = table[:2]
    assert (ours.low <= ours.top1).all() and (ours.top1 <= ours.high).all() and (ours.top1 > 50).all() and table.top1.iloc[-1] > 70
    assert (ours['first'] <= ours['last']).all() and ours.ms.between(0, 50).all() and (ours.mib > 1).all() and 'yes' in set(ours.front)
    assert said.startswith('take s') and 'each trained once' in said
    assert pd.read_csv(out/'recommend.csv').backbone.tolist() == table.backbone.tolist()
    for b, run in zip(ours.backbone, ours.run_id):
        m = json.loads((out/'cells'/f'{b}-numbers-s0'/'metrics.json').read_text())
        assert m['run_id'] == run and np.isclose(m['top1'], ours.set_index('backbone').top1[b], atol=1e-3) and m['n'] == 88
    for kind in ('svg', 'png'): assert (out/'figures'/f'pareto.{kind}').stat().st_size > 5000

    trained, fit = [], runs.fit
    monkeypatch.setattr(runs, 'fit', lambda *a, **k: trained.append(a[5]) or fit(*a, **k))
    monkeypatch.setattr(r, 'planned', None)
    kept = (out/'recommend.csv').read_bytes()
    pd.testing.assert_frame_equal(recommend(wish)[0], table)
    assert not trained and (out/'recommend.csv').read_bytes() == kept
    (out/'runs'/'starnet-numbers-s0'/'run.json').unlink()
    again = recommend(wish, progress=False)[0].set_index('backbone')
    assert [t.split('-')[0] for t in trained] == ['starnet'] and again.top1.equals(table.set_index('backbone').top1)
