"""One small pipeline from images to paper, changed and used the way people do. The tests share it and run in this order."""
import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT, called

from xbench import cli

pytestmark = pytest.mark.in_order
FOLDER = ROOT/'nbs'/'studies'
ELSEWHERE = ('leak', 'capacity', 'longer', 'card')    # what they read does not come with the clone
STUDIES = sorted(p.relative_to(FOLDER).as_posix() for p in FOLDER.rglob('*.ipynb')
                 if 'checkpoint' not in p.name and p.stem not in ELSEWHERE)
SOME = ['cross_dataset/claims.ipynb']    # `train.ipynb` is run by hand below, with papermill
TABLES = {f'table@table{n}' for n in (1, 2, 5)}
STUDIED = {'study@claims', 'study@examined'}
MEASURED = {'collect', 'measured@table3', 'measured@table4', 'figure@figure1'} | STUDIED
CELLS = {f'train@{b}-{d}-0' for b in ('convnext', 'shufflenet') for d in ('digits', 'tissue')}
NBCODE = {'nbcode@train', *(f'nbcode@cross_dataset/{n}' for n in ('figure1', 'claims', 'examined', *(f'table{i}' for i in range(1, 6))))}
ALL = (NBCODE | CELLS | TABLES | MEASURED | {f'{kind}@{d}' for kind in ('prepare', 'baseline') for d in ('digits', 'tissue')}
       | {'code', 'networks', 'settings', 'cost@convnext', 'cost@shufflenet'})


def ran(done):
    return {line.split('] ')[1].split(' took')[0] for line in done.stderr.splitlines() if ' took ' in line}


def outputs(checkout):
    return {p.relative_to(checkout.path).as_posix(): p.read_bytes() for folder in ('results/demo', 'paper/demo')
            for p in (checkout.path/folder).rglob('*.*') if p.is_file() and p.name != 'run.json'}


def test_at_first_everything_runs(small):
    done = small.run('python', '-m', 'xbench.pipeline', 'paper', 'demo')
    assert ran(done) == ALL
    assert f'{len(ALL)} of {len(ALL)} stages brought up to date' in done.stderr and ' left' in done.stderr
    small.commit()


def test_then_nothing_runs(small):
    assert small.repro() == set()
    done = small.run('python', '-m', 'xbench.pipeline', 'paper', 'demo')
    assert ran(done) == set() and 'nothing to run' in done.stderr
    assert small.run('git', 'status', '--porcelain').stdout == ''


def test_the_paper_is_complete(small):
    made = {p.relative_to(small.path/'paper'/'demo').as_posix() for p in (small.path/'paper'/'demo').rglob('*.*') if p.is_file()}
    tables, figures = {*(f'table{i}' for i in range(1, 6)), 'claims', 'examined'}, {'figure1', 'claims', 'examined'}
    assert made == {*(f'tables/cross_dataset_{n}.{kind}' for n in tables for kind in ('csv', 'md', 'tex')),
                    *(f'figures/cross_dataset_{n}.{kind}' for n in figures for kind in ('svg', 'png')),
                    *(f'notebooks/cross_dataset_{n}.ipynb' for n in tables | figures)}


def test_tables_hold_what_was_measured(small):
    tidy = pd.read_csv(small.path/'results/demo/cross_dataset.csv')
    assert len(tidy[(tidy.split == 'test') & (tidy.metric == 'top1')]) == 4 and tidy.n.dropna().eq(48).all()
    table = pd.read_csv(small.path/'paper/demo/tables/cross_dataset_table3.csv', index_col=0)
    cell = json.loads((small.path/'results/demo/cells/convnext-digits-s0/metrics.json').read_text())
    assert table.at['ConvNeXt', 'digits, demo'] == cell['top1'] and table.at['ConvNeXt', 'CIFAR-10, published'] == 91.97
    linear = json.loads((small.path/'results/demo/baseline/digits.json').read_text())
    assert table.at['linear classifier on pixels', 'digits, demo'] == linear['top1']


def test_results_do_not_name_this_machine(small):
    for name, content in outputs(small).items():
        assert str(small.path).encode() not in content and str(ROOT).encode() not in content, name


def test_running_again_changes_no_byte(small):
    before, lock = outputs(small), (small.path/'dvc.lock').read_bytes()
    small.run('dvc', 'repro', '-f', '-s', 'train@convnext-digits-0', 'collect', 'measured@table3', 'figure@figure1')
    assert outputs(small) == before and (small.path/'dvc.lock').read_bytes() == lock


def test_a_sentence_of_the_training_notebook_reruns_no_cell(small):
    path = small.path/'nbs'/'studies'/'train.ipynb'
    nb = json.loads(path.read_text())
    prose = next(c for c in nb['cells'] if c['cell_type'] == 'markdown')
    prose['source'] = [*prose['source'], '\n\nOne more sentence.']
    path.write_text(json.dumps(nb, indent=1))
    assert small.repro() == {'nbcode@train'}
    small.commit()


def edit(checkout, name, *changes):
    """Replace parts of a file, as its author would."""
    text = (checkout.path/name).read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    (checkout.path/name).write_text(text)


def outdated(checkout):
    """The cells that DVC would run again, and the files of `build/demo` for whose sake."""
    found = json.loads(checkout.run('dvc', 'status', '--json', *sorted(CELLS)).stdout)
    files = {stage: [name for change in changes for name in change['changed deps']] for stage, changes in found.items()}
    return {stage: {name.removeprefix('build/demo/') for name in names} for stage, names in files.items()}


def undone(checkout):
    checkout.run('git', 'checkout', '-q', '.')
    checkout.run('dvc', 'repro', '-q')


def test_what_decides_no_result_reruns_no_cell(small):
    """Prose, a message, what judges a finished run, a case of another cell, a setting that says what held anyway."""
    edit(small, 'xbench/train.py', ('"One step of the optimiser.', '"One step, in other words, of the optimiser.'),
         ('    r, fab, seen =', '    # Why.\n    r, fab, seen ='), ('precision fp16 needs a GPU;', 'fp16 is for GPUs;'))
    edit(small, 'xbench/runs.py', ('most: int = 500', 'most: int = 400'))
    cases = yaml.safe_load((small.path/'params.yaml').read_text())['recipe']['cross_dataset']['cases']
    small.settings(recipe__cross_dataset__cases=cases | {'starnet-cifar10': {'lr': .1}},
                   demo__train={'epochs': 2, 'warmup_epochs': 1, 'batch': 16, 'flip': .5})
    assert small.repro() == {'code', 'settings'}
    small.commit()


def test_what_decides_a_result_reruns_the_cells_whose_it_decides(small):
    """The loss all; a network its own; the order of overrides those whose values it changes: digits are not flipped, whoever asks."""
    edit(small, 'xbench/recipes.py', ('    return ', '    return 1*'))
    edit(small, 'xbench/backbones/cross_dataset.py', ('torch.cat((kept, self.branch2(worked))', 'torch.cat((worked, self.branch2(kept))'))
    of_dataset = 'settings.dataset.get(slug, Dataset()), '
    edit(small, 'xbench/settings.py', (f'p.train, own, {of_dataset}', f'{of_dataset}p.train, own, '))
    small.run('dvc', 'repro', '-q', '-s', 'code', 'networks', 'settings')
    code, net = {'train.code'}, {'networks/shufflenet.txt'}
    flipped = {b: {f'settings/{b}-digits.json'} for b in ('convnext', 'shufflenet')}
    assert outdated(small) == {
        'train@convnext-digits-0': code | flipped['convnext'], 'train@convnext-tissue-0': code,
        'train@shufflenet-digits-0': code | net | flipped['shufflenet'], 'train@shufflenet-tissue-0': code | net}
    undone(small)


def test_runs_of_code_that_computes_the_same_are_adopted(small):
    """By the bytes of a few; and by none of them if one comes out otherwise."""
    edit(small, 'xbench/train.py', ('    run.step += 1\n', '    run.step = run.step + 1\n'))
    done = small.run('xbench', 'runs', 'adopt', 'demo', '--format', 'json')
    assert sum(row['counts'] for row in json.loads(done.stdout)) == 4 and '4 runs of demo count as made by this code' in done.stderr
    assert small.repro() == set() and 'shufflenet' in (small.path/'results/demo/same_code.csv').read_text()
    small.commit()
    edit(small, 'xbench/train.py', ('fab.backward(mean*', 'fab.backward(2*mean*'))
    refused = small.run('xbench', 'runs', 'adopt', 'demo', code=2)
    lines = [line for line in refused.stderr.replace('\r', '\n').splitlines() if line.strip() and 'img' not in line]
    assert len(lines) == 1 and 'comes out otherwise by the code that is here, so no run of demo is adopted' in lines[0], refused.stderr
    assert outdated(small).keys() == CELLS and small.run('git', 'status', '--porcelain', 'results').stdout == ''
    undone(small)
    assert outdated(small) == {}


def test_a_setting_and_a_backbone_of_ones_own_run_their_cells_and_the_tables(small):
    """The backbone takes ten lines."""
    (small.path/'my_backbones.py').write_text('''from torch import nn
from xbench.backbones.core import register

@register(family='own')
def mynet(num_classes):
    "Two convolutions."
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))
''')
    small.settings(backbone__convnext={'lr': 0.002}, backbone__mynet={'module': 'my_backbones'},
                   demo__backbones=['convnext', 'shufflenet', 'mynet'])
    done = ran(small.run('python', '-m', 'xbench.pipeline', 'paper', 'demo'))
    cells = {f'train@{b}-{d}-0' for b in ('convnext', 'mynet') for d in ('digits', 'tissue')}
    ran_too = {'networks', 'settings', 'cost@convnext', 'cost@mynet'}
    assert done - TABLES == ran_too | cells | MEASURED, 'another backbone ran again'
    assert 'mynet' in (small.path/'paper/demo/tables/cross_dataset_table3.md').read_text()
    small.commit()


def test_metrics_and_plots_show_something(small):
    shown = small.run('dvc', 'metrics', 'show', '--json').stdout
    files = json.loads(shown)['']['data']
    assert len(files) == 6 and all('top1' in f['data'] for f in files.values())
    small.run('dvc', 'plots', 'show')
    page = (small.path/'dvc_plots'/'index.html').read_text()
    assert 'val_top1' in page and 'shufflenet' in page and 'facet' in page
    assert list((small.path/'dvc_plots'/'static').glob('*.png'))


@pytest.mark.slow
def test_an_experiment_with_another_setting(small):
    small.run('dvc', 'exp', 'run', '-S', 'demo.train.epochs=3', 'train@convnext-digits-0')
    cell = json.loads((small.path/'results/demo/cells/convnext-digits-s0/metrics.json').read_text())
    shown = pd.read_csv(io.StringIO(small.run('dvc', 'exp', 'show', '--csv').stdout))
    assert cell['epochs'] == 3 and {2, 3} <= set(shown['demo.train.epochs'].dropna().astype(int))
    small.run('git', 'checkout', '-q', '.')
    assert small.repro() == set(), 'the results before it did not come back from the cache'


@pytest.mark.parametrize('names', [SOME, pytest.param([n for n in STUDIES if n not in SOME], marks=pytest.mark.slow)], ids=['some', 'rest'])
def test_study_notebooks_run_by_hand_with_their_defaults(small, names):
    """As in JupyterLab: a kernel in the notebook's own folder, all cells from top to bottom."""
    small.run('git', 'checkout', '-q', '.')
    small.settings(backbone__starnet={'lr': 0.001})
    small.run('dvc', 'repro', '-q')
    before = small.run('git', 'status', '--porcelain').stdout

    def by_hand(name):
        path = small.path/'nbs'/'studies'/name
        return name, small.run('jupyter', 'execute', path.name, '--output', f'{small.path}/work/{path.stem}', cwd=path.parent, code=None)
    (small.path/'work').mkdir(exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        for name, done in pool.map(by_hand, names): assert done.returncode == 0, f'{name}\n{done.stderr[-3000:]}'
    assert small.run('git', 'status', '--porcelain').stdout == before, 'running by hand changed tracked files'
    assert small.repro() == set(), 'running by hand changed what the pipeline made'


def test_bare_papermill(small):
    small.run('papermill', 'nbs/studies/train.ipynb', 'work/out.ipynb',
              *('-p', 'backbone', 'shufflenet', '-p', 'dataset', 'tissue', '-p', 'seed', '3'))
    nb = json.loads((small.path/'work'/'out.ipynb').read_text())
    printed = ''.join(''.join(o.get('text', '')) for c in nb['cells'] for o in c.get('outputs', []))
    assert 'shufflenet-tissue-s3-' in printed and 'top-1' in printed


def test_command_line(small, tmp_path):
    assert all(word in small.run('python', '-m', 'xbench.cli', '--help').stdout for word in ('list', 'train', 'score', 'data'))
    said = lambda *argv: called(small.path, cli.main, *argv).stdout
    assert said('list', 'conv*').count('cross_dataset') == 2
    assert json.loads(said('data', 'show', 'tissue'))['class_names'] == ['cell', 'ihc', 'retina']
    row = json.loads(said('train', 'convnext', 'digits', '--out', tmp_path, '--format', 'json'))[0]
    assert row['n'] == 48 and row['run_id'].startswith('convnext-digits-s0-')
    assert json.loads((tmp_path/'runs'/'convnext-digits-s0'/'run.json').read_text())['run_id'] == row['run_id']


@pytest.mark.parametrize('form', ['archive', *(pytest.param(f, marks=pytest.mark.slow) for f in ('folder', 'medmnist'))])
def test_images_of_ones_own_by_path_alone(small, tmp_path, form):
    folder, data = tmp_path/'My Cells', tmp_path/'digits.tar.xz'
    data.write_bytes((ROOT/'data'/'tissue.tar.xz').read_bytes())
    with tarfile.open(data) as tar: tar.extractall(tmp_path, filter='data')
    (tmp_path/'tissue').rename(folder)
    if form == 'archive':
        with tarfile.open(tmp_path/'My Cells.tar.gz', 'w:gz') as tar: tar.add(folder, 'My Cells')
        path = tmp_path/'My Cells.tar.gz'
    elif form == 'medmnist':
        rng = np.random.default_rng(0)
        path = tmp_path/'My Cells.npz'
        np.savez(path, **{f'{s}_{k}': v for s in ('train', 'val', 'test') for k, v in
                          (('images', rng.integers(0, 256, (60, 28, 28), np.uint8)), ('labels', np.arange(60)[:, None] % 2))})
    else: path = folder
    row = json.loads(called(small.path, cli.main, 'train', 'convnext', path, '--format', 'json', '--out', tmp_path/'out').stdout)[0]
    assert row['run_id'].startswith('convnext-my_cells-s0-') and row['n'] == 48


@pytest.mark.slow
def test_a_fresh_clone_makes_the_paper_twice(tmp_path):
    """The README's commands, in a clone without .venv, in a path with a space."""
    from conftest import Checkout
    checkout = Checkout(tmp_path/'fresh clone')
    checkout.run('make', 'paper', timeout=3000)
    assert ran(checkout.run('make', 'paper')) == set()
