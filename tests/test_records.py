"""What is behind a cell, and runs of another machine taken into the study: all faults named, nothing trained again."""
import hashlib
import json
import re
import shutil
import tarfile

import numpy as np
import pytest
import yaml
from conftest import Checkout

from xbench import records, runs
from xbench.errors import InputError
from xbench.settings import load, resolve

pytestmark = pytest.mark.in_order
CELL = 'shufflenet-digits-s0'
STAGE = 'train@shufflenet-digits-0'
WHERE = {'run.json': 'runs', 'predictions.npz': 'cells', 'metrics.json': 'cells', 'history.csv': 'cells'}


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """A clone whose `demo` profile has one cell of an epoch."""
    made = Checkout(tmp_path_factory.mktemp('a path')/'x bench')
    made.settings(demo__backbones=['shufflenet'], demo__datasets={d: f'data/{d}.tar.xz' for d in ('digits', 'tissue')},
                  demo__proxy='digits', demo__protocol=['digits', 'tissue'], demo__images={'size': 32, 'train': 64, 'test': 48},
                  demo__train={'epochs': 1, 'warmup_epochs': 0, 'batch': 16})
    made.commit()
    return made


@pytest.fixture(autouse=True)
def inside(clone, monkeypatch): monkeypatch.setenv('XBENCH_ROOT', str(clone.path))


@pytest.fixture(scope='module')
def sent(clone, tmp_path_factory):
    """The run's record, as another machine sends it: its own folder of weights is not here."""
    out = tmp_path_factory.mktemp('sent')/'out'
    with pytest.MonkeyPatch.context() as m:
        m.setenv('XBENCH_ROOT', str(clone.path))
        runs.execute(resolve(load(), 'demo', 'shufflenet', 'digits'), out, progress=False)
    shutil.rmtree(clone.path/'work')
    return out


@pytest.fixture
def copy(sent, tmp_path): return shutil.copytree(sent, tmp_path/'copy')


def refused(path, *words, profile='demo'):
    """Nothing is taken, and one line says why; the rows tell each fault."""
    with pytest.raises(InputError) as e: records.import_runs(path, profile, dry_run=False)
    assert '\n' not in str(e.value) and not (paths := [*records.paths.results('demo').rglob('*.*')]), paths
    said = [str(e.value), *(' '.join(row) for row in e.value.rows)]
    for w in words: assert any(w in line for line in said), said
    return said


def edit(folder, name, **values):
    """Change values of a JSON file by dotted key."""
    file = folder/WHERE[name]/CELL/name
    content = json.loads(file.read_text())
    for key, v in values.items():
        *parents, last = key.split('__')
        block = content
        for p in parents: block = block[p]
        block[last] = v
    file.write_text(json.dumps(content))


def repack(folder, **values):
    """Change arrays of the predictions."""
    file = folder/'cells'/CELL/'predictions.npz'
    kept = dict(np.load(file))
    np.savez_compressed(file, **kept | {k: change(kept[k]) for k, change in values.items()})


@pytest.mark.parametrize('name', list(WHERE))
def test_a_file_that_is_missing_or_cut_off_is_named(copy, name):
    file = copy/WHERE[name]/CELL/name
    whole = file.read_bytes()
    for content, word in ((None, 'is not there'), (whole[:len(whole)//2], 'is damaged'), (b'', 'is damaged')):
        file.unlink() if content is None else file.write_bytes(content)
        said = refused(copy, f'{CELL} {WHERE[name]}/{CELL}/{name}: {word}')
        assert said[0].endswith('nothing was taken; not fit: 1 of 1 records') and len(said) == 2


@pytest.mark.parametrize('name, changes, words', [
    ('run.json', {'cell__recipe__lr': .5}, ['lr: 0.5 in the record, 0.001 here']),
    ('run.json', {'cell__recipe__lr': .5, 'cell__options': {'wide': 2}}, ['lr: 0.5 in', 'options: {"wide": 2} in the record, {} here']),
    ('run.json', {'run_id': f'{CELL}-00000000'}, ['run.json: its id ends in 00000000, settings and teacher give']),
    ('run.json', {'data__hash': 'f'*16}, ['hash: ffffffffffffffff in the record,']),
    ('run.json', {'data__ids_sha256': 'f'*64}, ['ids_sha256: ffff']),
    ('run.json', {'data__val_sha256': 'f'*64}, ['val_sha256: ffff']),
    ('run.json', {'cell__seed': 1}, ['run.json: is of shufflenet-digits-s1']),
    ('run.json', {'code': 'f'*16}, ['run.json: its code changed since (ffffffff -> ', 'train it anew there, with this code']),
    ('run.json', {'network': 'f'*16}, ['run.json: its network changed since (ffffffff -> ']),
    ('metrics.json', {'top1': 99.9}, ['metrics.json: top1 is 99.9, the other files give']),
    ('metrics.json', {'top1_high': 99.9}, ['metrics.json: top1_high is 99.9']),
    ('metrics.json', {'ece': float('nan')}, ['metrics.json: ece is nan']),
    ('metrics.json', {'lr': .5}, ['metrics.json: lr is 0.5, the other files give 0.001']),
    ('metrics.json', {'val_top1': 99.9}, ['metrics.json: val_top1 is 99.9']),
])
def test_a_record_that_was_edited_is_refused(copy, name, changes, words):
    edit(copy, name, **changes)
    refused(copy, *words)


@pytest.mark.parametrize('changes, word', [
    ({'ids': lambda v: v[::-1]}, 'are not the test images of packed/demo/digits/ids.csv: another order'),
    ({'ids': lambda v: np.char.add(v, 'x')}, 'csv: 48 are missing, 48 are unknown'),
    ({'true': lambda v: v[::-1]}, 'its true classes are not those of the images'),
    ({'log_prob': lambda v: np.full_like(v, np.log(.1))}, 'metrics.json: ece is'),
    ({'log_prob': lambda v: v*np.nan}, '48 of 48 images have a prediction that is not finite'),
    ({'log_prob': lambda v: v[:-1]}, 'shapes differ'),
])
def test_predictions_of_other_images_or_no_use_are_refused(copy, changes, word):
    repack(copy, **changes)
    refused(copy, word)


def test_a_curve_of_another_length_or_with_nan_is_refused(copy):
    file = copy/'cells'/CELL/'history.csv'
    text = file.read_text()
    head, row = text.splitlines()
    file.write_text(f'{text}2{row[1:]}\n')
    refused(copy, 'history.csv: 2 epochs, settings ask for 1', 'metrics.json: epochs is 1, the other files give 2')
    file.write_text(re.sub(r',[\d.]+\n$', ',NaN\n', text))
    refused(copy, 'history.csv: is damaged (epoch 1: val_top1 is no number)')


def test_settings_that_changed_since_are_listed(clone, copy):
    before = (clone.path/'params.yaml').read_text()
    clone.settings(demo__train={'epochs': 1, 'warmup_epochs': 0, 'batch': 32, 'ema': .9})
    try: refused(copy, 'batch: 16 in the record, 32 here', 'ema: 0 in the record, 0.9 here')
    finally: (clone.path/'params.yaml').write_text(before)


def test_a_cell_that_is_none_of_the_profile_is_refused(clone, copy):
    refused(copy, 'shufflenet-digits-s0 digits is not in params.yaml: lite.datasets', profile='lite')
    refused(copy, 'did you mean demo', profile='dmo')


def test_one_wrong_record_and_none_is_taken(copy, sent):
    both = copy.parent/'both'
    for k in ('a', 'b'): shutil.copytree(sent, both/k)
    (both/'b').rename(both/'c')
    for kind in ('cells', 'runs'): (both/'c'/kind/CELL).rename(both/'c'/kind/'shufflenet-tissue-s0')
    said = refused(both, 'not fit: 1 of 2 records', 'run.json: is of shufflenet-digits-s0')
    assert len(said) == 2 and said[1].startswith('shufflenet-tissue-s0')


def test_archives_that_are_cut_off_or_reach_outside(copy, tmp_path):
    archive = tmp_path/'sent.tar.gz'
    with tarfile.open(archive, 'w:gz') as t: t.add(copy, 'out')
    whole = archive.read_bytes()
    archive.write_bytes(whole[:len(whole)//2])
    refused(archive, 'sent.tar.gz: no whole .tar, .tar.gz or .zip', 'copy it again')
    with tarfile.open(archive, 'w:gz') as t: t.add(copy/'cells'/CELL/'metrics.json', f'../../cells/{CELL}/metrics.json')
    refused(archive, 'sent.tar.gz: no whole')
    (tmp_path/'text.zip').write_text('no archive')
    refused(tmp_path/'text.zip', 'text.zip: no whole')
    (tmp_path/'nothing').mkdir()
    refused(tmp_path/'nothing', 'holds no record')


def test_other_versions_are_said_and_taken_unless_that_is_refused(copy, capsys):
    edit(copy, 'run.json', versions__timm='0.1')
    row = records.import_runs(copy, 'demo', dry_run=True).iloc[0]
    assert row.code == 'as here' and row.versions.startswith('timm 0.1 (here')
    assert 'runs were made with other versions' in capsys.readouterr().err
    with pytest.raises(InputError) as e: records.import_runs(copy, 'demo', strict=True)
    assert e.value.rows[0][1].startswith('run.json: it was made with timm 0.1 (here') and len(e.value.rows) == 1


def test_a_digit_of_the_curve_that_was_changed_is_found(copy):
    file = copy/'cells'/CELL/'history.csv'
    file.write_text(re.sub(r'(\n1,adam,[\d.]+,)\d', r'\g<1>9', file.read_text()))
    refused(copy, f'{CELL} history.csv: its content is not what was written')


def test_a_dry_run_writes_nothing(clone, sent):
    before = clone.run('git', 'status', '--porcelain', '--ignored').stdout
    row = records.import_runs(sent, 'demo', dry_run=True).iloc[0]
    assert row.becomes == 'new' and row.run_id.startswith(f'{CELL}-') and row.code == 'as here'
    assert clone.run('git', 'status', '--porcelain', '--ignored').stdout == before


def test_a_run_of_another_machine_is_taken_and_nothing_trains_again(clone, sent, tmp_path):
    archive = shutil.make_archive(str(tmp_path/'sent'), 'zip', sent.parent, sent.name)
    assert records.import_runs(archive, 'demo').becomes.tolist() == ['new']
    for name, kind in WHERE.items():
        assert (clone.path/'results/demo'/kind/CELL/name).read_bytes() == (sent/kind/CELL/name).read_bytes(), name
    assert 'top-1' in (clone.path/'results/demo/runs'/CELL/'train.ipynb').read_text()
    assert not (clone.path/'work').exists(), 'something was trained'
    assert 'Running stage' not in clone.run('dvc', 'repro', '-s', STAGE).stdout
    assert STAGE in yaml.safe_load((clone.path/'dvc.lock').read_text())['stages']
    assert records.import_runs(sent, 'demo', dry_run=True).becomes.tolist() == ['here already']
    assert records.listed('demo').run_id.tolist() == [records.find(CELL).run_id]
    assert records.explain(CELL)['equal'] and 'its predictions give its metrics' in records.told(records.explain(CELL))


def test_what_is_here_is_not_replaced_by_other_results(clone, copy):
    repack(copy, log_prob=lambda v: v[:, ::-1])
    kept = records.recomputed(records.read(records.Record(copy, CELL)))
    edit(copy, 'metrics.json', **kept)
    files = {n: hashlib.sha256((copy/k/CELL/n).read_bytes()).hexdigest() for n, k in WHERE.items() if n != 'run.json'}
    edit(copy, 'run.json', files=files)
    with pytest.raises(InputError) as e: records.import_runs(copy, 'demo')
    assert e.value.rows == [(CELL, f'results/demo holds this run with other results; remove its runs/{CELL} first, or leave this one out')]


def test_explain_names_what_is_damaged_and_how_to_get_it(clone):
    here = clone.path/'results'/'demo'
    edit(here, 'metrics.json', macro_f1=1.)
    found = records.explain(CELL)
    assert not found['equal'] and 'does not follow from the other files: macro_f1\n' in records.told(found)
    for name, kind in WHERE.items():
        file = here/kind/CELL/name
        whole = file.read_bytes()
        file.write_bytes(whole[:20])
        with pytest.raises(InputError, match=f'^results/demo/{kind}/{CELL}/{name}: is damaged .*fetch it with `dvc pull --force {STAGE}`'):
            records.explain(CELL)
        file.unlink()
        with pytest.raises(InputError, match=f'^results/demo/{kind}/{CELL}/{name}: is not there; fetch it'): records.explain(CELL)
        file.write_bytes(whole)
