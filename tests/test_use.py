"""Used the way people will: by hand in Jupyter, by bare papermill, on the command line."""
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

pytestmark = pytest.mark.xdist_group('small')

FOLDER = ROOT/'nbs'/'studies'
STUDIES = sorted(p.relative_to(FOLDER).as_posix() for p in FOLDER.rglob('*.ipynb') if 'checkpoint' not in p.name)


def test_every_study_notebook_runs_by_hand_with_its_defaults(small):
    """As in JupyterLab: a kernel in the notebook's own folder, all cells from top to bottom."""
    small.run('git', 'checkout', '-q', '.')
    small.settings(backbone__starnet={'lr': 0.001, 'options': {}})
    small.run('dvc', 'repro', '-q')
    before = small.run('git', 'status', '--porcelain').stdout

    def by_hand(name):
        path = small.path/'nbs'/'studies'/name
        return name, small.run('jupyter', 'execute', path.name, '--output', f'{small.path}/work/{path.stem}', cwd=path.parent, code=None)
    (small.path/'work').mkdir(exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        for name, done in pool.map(by_hand, STUDIES): assert done.returncode == 0, f'{name}\n{done.stderr[-3000:]}'
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
    assert small.run('xbench', 'list', 'conv*').stdout.count('cross_dataset') == 2
    assert json.loads(small.run('xbench', 'data', 'show', 'tissue').stdout)['classes'] == ['cell', 'ihc', 'retina']
    row = json.loads(small.run('xbench', 'train', 'convnext', 'digits', '--out', tmp_path, '--format', 'json').stdout)[0]
    assert row['n'] == 48 and row['run_id'].startswith('convnext-digits-s0-')
    assert json.loads((tmp_path/'runs'/'convnext-digits-s0'/'run.json').read_text())['run_id'] == row['run_id']


@pytest.mark.parametrize('form', ['folder', 'archive', 'medmnist'])
def test_images_of_ones_own_by_path_alone(small, tmp_path, form):
    import tarfile

    import numpy as np
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
    row = json.loads(small.run('xbench', 'train', 'convnext', path, '--format', 'json', '--out', tmp_path/'out').stdout)[0]
    assert row['run_id'].startswith('convnext-my_cells-s0-') and row['n'] == 48
