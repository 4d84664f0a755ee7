"""Images that share a patient or a photograph: kept together by splits, drawn together by intervals; and records that stay small."""
import csv
import io
import json
import tarfile

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import settings as many
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from xbench import data, evaluate, pack, paths, records, results, runs
from xbench.errors import InputError
from xbench.evaluate import BINS, intervals, metrics, predictions
from xbench.settings import load, resolve
from xbench.splits import Item, assign, carve, thinned

# splits


@many(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=4, max_size=60), seed=st.integers(0, 4),
       share=st.sampled_from((.1, .2, .5)))
def test_a_validation_part_keeps_groups_whole_and_every_class_an_image(rows, seed, share):
    rows = sorted(rows)    # a pack is sorted by class; a group may hold images of several classes, 0 is none
    labels, group = np.array([c for c, _ in rows]), np.array([f'g{g}' if g else '' for _, g in rows])
    split = np.array(['train']*len(rows))
    units = [frozenset(np.flatnonzero(group == g)) for g in set(group) - {''}] + [frozenset([i]) for i in np.flatnonzero(group == '')]
    spare = [u for u in units if set(labels) == set(labels[[i for i in range(len(rows)) if i not in u]])]
    try: at = carve(labels, split, share, seed, group)
    except InputError as e:
        assert 'class ' in str(e) and '\n' not in str(e) and not spare, (rows, e)
        return
    val, train = set(at['val'].tolist()), set(at['train'].tolist())
    assert val and not val & train and val | train == set(range(len(rows)))
    assert all(u <= val or u <= train for u in units) and {labels[i] for i in train} == set(labels)


def test_the_last_images_of_a_class_are_not_dragged_along():
    labels, group = np.array([0]*10 + [1]*3), np.array(['']*8 + ['p']*4 + [''])
    for seed in range(20):
        at = carve(labels, np.array(['train']*13), .1, seed, group)
        assert set(labels[at['train']]) == {0, 1} and len({'p'} & set(group[at['val']]) & set(group[at['train']])) == 0


def test_without_groups_a_validation_part_is_what_it_always_was():
    labels, split = np.repeat([0, 1, 2], (9, 4, 2)), np.array(['train']*15)
    found = [carve(labels, split, .25, s)['val'].tolist() for s in range(4)]
    assert found == [[4, 5, 9, 13], [0, 7, 11, 13], [2, 7, 11, 14], [0, 7, 10, 13]]
    group = np.array(['a', 'a', 'b', 'b', '', '', 'c', 'c', 'c', 'd', 'd', 'e', '', 'f', 'g'])
    for s in range(20):
        val = carve(labels, split, .25, s, group)['val']
        assert not set(group[val]) & set(np.delete(group, val)) - {''} and 3 <= len(val) <= 5


@many(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.sampled_from('abc'), st.integers(0, 9)), min_size=30, max_size=90), data=st.data())
def test_a_made_split_hangs_on_names_not_on_their_order(rows, data):
    items = [Item(None, c, f'{k}.png', f'g{g}' if g else '') for k, (c, g) in enumerate(rows)]
    def made(listed):
        try: return {i.name: i.split for i in assign(listed, {'test': .3}, 1)}
        except InputError as e: return str(e)
    assert made(items) == made(data.draw(st.permutations(items)))


# tables of groups

def archive(path, names, rng):
    with tarfile.open(path, 'w') as tar:
        for n in names:
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(f := io.BytesIO(), 'PNG')
            info = tarfile.TarInfo(n)
            info.size = f.tell()
            f.seek(0)
            tar.addfile(info, f)
    return path


@pytest.fixture
def lesions(tmp_path, monkeypatch):
    """An archive sorted by class, of 20 uneven lesions a side, and the table of groups beside it; a project to train it in."""
    rng, groups = np.random.default_rng(0), {}
    for split, n in (('train', 90), ('test', 60)):
        for c in ('mole', 'tumour'):
            which = np.sort(rng.geometric(.1, n).clip(1, 20))
            for k, g in enumerate(which): groups[f'skin/{split}/{c}/{k:03}.png'] = f'{split} {c} {g}' if g > 1 else ''
    table = tmp_path/'skin_groups.csv'
    with table.open('w', newline='') as f: csv.writer(f).writerows([('file', 'group'), *groups.items()])
    (tmp_path/'home').mkdir()
    for name in ('params.yaml', 'dvc.yaml'): (tmp_path/'home'/name).write_text((ROOT/name).read_text())
    monkeypatch.setenv('XBENCH_ROOT', str(tmp_path/'home'))
    return archive(tmp_path/'skin.tar', groups, rng), table


def test_a_table_beside_an_archive_reaches_every_interval(lesions):
    file, table = lesions
    cell = resolve(load(), 'demo', 'starnet', str(file), changes={'epochs': 1, 'warmup_epochs': 0})
    done = runs.execute(cell, progress=False)
    packed, m = data.load(pack.prepare(cell, progress=False)), done['metrics']
    at = carve(packed.labels, thinned(packed.labels, packed.split, 1, packed.name), cell.recipe.val, 0, packed.group)
    assert not (set(packed.group[at['val']]) & set(packed.group[at['train']])) - {''}
    test = packed.group[packed.split == 'test']
    assert m['groups'] == len(set(test) - {''}) + (test == '').sum() < 100
    record = records.records(done['out'])[0]
    kept = dict(np.load(record.file('predictions.npz')))
    alone = intervals({k: v for k, v in kept.items() if k != 'group'})['top1']
    assert intervals(kept)['top1'] == (m['top1_low'], m['top1_high']) != alone
    found = records.explain(done['run_id'])
    assert found['equal'] and found['interval'] == {'top1_low': m['top1_low'], 'top1_high': m['top1_high'], 'groups': m['groups']}
    assert f"test images of {m['groups']} groups" in records.told(found)
    ids, right, group = results.named_rightly(record.file('predictions.npz'), cell.dataset, 'demo')
    assert len(ids) == 120 and group.max() + 1 == m['groups']


def test_an_older_record_is_asked_after_by_its_images(lesions):
    file, _ = lesions
    cell = resolve(load(), 'demo', 'starnet', str(file), changes={'epochs': 1, 'warmup_epochs': 0})
    packed = data.load(pack.prepare(cell, progress=False))
    test = np.flatnonzero(packed.split == 'test')
    older = {'ids': packed.name[test], 'true': packed.labels[test], 'classes': np.array(2),
             'prob': np.random.default_rng(0).dirichlet((1, 1), len(test)).astype(np.float16)}
    said = {'top1_low': 0., 'top1_high': 100.}, older
    made = {'cell': {'dataset': cell.dataset, 'profile': 'demo'}}
    low, high, n = records.interval(made, *said)
    same = older | {'group': evaluate.numbered(packed.group[test])}
    assert (low, high) == intervals(same)['top1'] and n == same['group'].max() + 1
    published = paths.results('demo')/'splits'/f'{cell.dataset}.csv'    # a clone without packed images
    published.parent.mkdir(parents=True)
    (paths.packed('demo', cell.dataset)/'ids.csv').rename(published)
    assert records.interval(made, *said) == (low, high, n)


@pytest.mark.parametrize('change, word', [
    (lambda t: t.replace('skin/test/mole/000.png', 'skin/test/mole/x.png'), 'skin_groups.csv: test/mole/x.png is no image of'),
    (lambda t: '\n'.join(t.splitlines()[:-2]), 'skin_groups.csv: no line for skin/test/tumour/058.png (2 such images of'),
    (lambda t: t.replace('file,group', 'name,lesion'), 'skin_groups.csv: line 2 lacks a file or a group'),
    (lambda t: t + 'skin/train/mole/000.png,another\n', "skin_groups.csv: line 302 puts skin/train/mole/000.png into 'another'")])
def test_a_table_that_does_not_fit_is_named_and_leaves_nothing(lesions, change, word):
    file, table = lesions
    table.write_text(change(table.read_text().replace('\r\n', '\n')))
    with pytest.raises(InputError) as e: pack.prepare(resolve(load(), 'demo', 'starnet', str(file)), progress=False)
    assert word in str(e.value) and '\n' not in str(e.value)
    assert not list((paths.root()/'packed').rglob('*.*'))


# coverage

@pytest.mark.slow
def test_intervals_of_groups_hold_what_they_promise():
    """85 groups of 12 images, right with a probability that is the group's; the truth is the mean of what probabilities are drawn from."""
    rng, group, lp = np.random.default_rng(3), np.repeat(np.arange(85), 12).astype(str), np.log([[.1, .9], [.9, .1]])
    held = {'groups': [], 'images': []}
    for k in range(600):
        right = (rng.random(1020) < np.repeat(rng.beta(.9, .6, 85), 12)).astype(int)
        for how, g in (('groups', group), ('images', None)):
            low, high = intervals(predictions(np.arange(1020), np.zeros(1020, int), lp[right], g), 200, seed=k)['top1']
            held[how].append(low <= 60 <= high)
    share = {how: 100*np.mean(h) for how, h in held.items()}
    print(share)
    assert 92 <= share['groups'] <= 97 and share['images'] < 75


def honest(n, sharp, rng):
    """Logits from whose softmax the classes are drawn, times `sharp`."""
    logits = 2*rng.normal(size=(n, 10))
    true = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    z = sharp*logits
    return true, z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)


def calibration(true, log_prob):
    """Expected calibration error in percent by SciPy's statistic of bins."""
    sure, right = np.exp(log_prob.max(1)), log_prob.argmax(1) == true
    gap = stats.binned_statistic(sure, right - sure, 'sum', BINS, (0, 1)).statistic
    return 100*np.abs(gap).sum()/len(true)


@pytest.mark.slow
@pytest.mark.parametrize('n, splits', [(192, 200), (1000, 200)])
@pytest.mark.parametrize('sharp', [1, 1.2, 1.5, 2, .6])
def test_intervals_of_the_calibration_error_hold_the_truth(n, splits, sharp):
    """From perfectly calibrated to far too sure, and not sure enough; drawing alone holds the truth in 0 to 94 %."""
    rng, held = np.random.default_rng(8), []
    truth = calibration(*honest(600_000, sharp, rng))
    for k in range(splits):
        true, lp = honest(n, sharp, rng)
        low, high = intervals(predictions(np.arange(n), true, lp), 200, seed=k)['ece']
        held.append(low <= truth <= high)
    print(n, sharp, round(truth, 2), 100*np.mean(held))
    assert np.mean(held) >= .9 - 2*(.9*.1/splits)**.5


# what a record keeps

def confident(n, classes, spread, rng):
    """Logits of a network that is right two times of three, in float32 as they come out of one."""
    logits, true = spread*rng.normal(size=(n, classes)), np.sort(rng.integers(0, classes, n))
    logits[np.arange(n), true] += spread*(stats.norm.isf(1/classes) + 1)*(rng.random(n) < .8)
    logits = logits.astype(np.float32)
    top = logits.max(1, keepdims=True)
    return true, logits, logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))


@pytest.mark.parametrize('classes', [2, 10, 20, 21, 184, 1000])
def test_the_record_names_the_five_that_the_network_names(classes):
    rng = np.random.default_rng(classes)
    for spread in (.01, 1, 5, 60, 3000):
        true, logits, lp = confident(400, classes, spread, rng)
        kept = predictions(np.arange(400), true, lp)
        five = np.argsort(-logits.astype(np.float64), 1, kind='stable')[:, :5]
        assert (evaluate.ranked(kept) == five).all(), spread
        assert abs(metrics(kept)['ece'] - calibration(true, lp.astype(np.float64))) < .05
        assert metrics(kept)['top5'] == round(100*float((five == true[:, None]).any(1).mean()), 4)


@pytest.mark.parametrize('classes', [10, 20, 21, 184, 1000])
@pytest.mark.parametrize('spread', [1, 3, 20])
def test_a_run_of_2000_test_images_takes_60_kilobytes(classes, spread, tmp_path):
    rng = np.random.default_rng(1)
    true, _, lp = confident(2000, classes, spread, rng)
    ids = np.array([f'tinyimagenet{classes}/test/n0{1443537 + 7919*c}/val_{k}.JPEG' for c, k in zip(true, rng.permutation(10_000))])
    lesion = np.char.add('HAM_', rng.integers(0, 1500, 2000).astype(str))
    evaluate.save(tmp_path/'predictions.npz', predictions(ids, true, lp, lesion))
    cell = resolve(load(), 'lite', 'starnet', 'cifar10')
    curve = ['epoch,optimizer,lr,train_loss,train_top1,val_loss,val_top1',
             *(f'{k},adamw,0.00012345,2.12345,45.1234,1.98765,51.2345' for k in range(40))]
    settings = {**vars(cell), 'recipe': cell.recipe.model_dump(), 'images': cell.images.model_dump()}
    hashes = dict.fromkeys(('ids_sha256', 'val_sha256', 'sha256'), 'f'*64)
    made = {'run_id': 'starnet-cifar10-s0-01234567', 'cell': settings, 'data': hashes, **runs.environment(), 'seconds': 1.5}
    m = metrics(dict(np.load(tmp_path/'predictions.npz')))
    (tmp_path/'history.csv').write_text('\n'.join(curve) + '\n')
    (tmp_path/'run.json').write_text(json.dumps(made, indent=1))
    (tmp_path/'metrics.json').write_text(json.dumps({f'{k} {i}': v for k, v in m.items() for i in range(4)}, indent=1))
    sizes = {f.name: f.stat().st_size for f in tmp_path.iterdir()}
    print(sizes, sum(sizes.values()))
    assert sum(sizes.values()) <= 60_000, sizes


def test_a_damaged_record_is_named(tmp_path):
    true, _, lp = confident(30, 4, 1, np.random.default_rng(0))
    kept = predictions(np.arange(30), true, lp, np.repeat(['a', '', 'b'], 10))
    assert len(set(kept['group'])) == 12 == evaluate.groups(kept)
    for wrong, word in (({'group': kept['group'][:9]}, 'shapes differ, see group'),
                        ({'true': kept['true'] + 4}, '30 of 30 images have a true class'),
                        ({'log_prob': kept['log_prob']*np.nan}, 'not finite')):
        with pytest.raises(InputError, match=word): evaluate.check(kept | wrong)
