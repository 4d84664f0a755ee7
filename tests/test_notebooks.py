"""Every notebook of the library runs from top to bottom; its assertions are the unit tests."""
import os
import sys
from multiprocessing import get_context

import pytest
from conftest import ROOT

LIBRARY = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT/'nbs').rglob('*.ipynb')
                 if not {'studies', '.ipynb_checkpoints'} & set(p.parts))
FORKS = get_context('forkserver')    # each notebook in a process of its own that begins with the slow imports done
FORKS.set_forkserver_preload(['nbdev.test', 'torch', 'torchvision', 'timm', 'pandas', 'scipy.stats'])


def run_notebook(root, name, said):
    """Run a notebook by `nbdev_test`; what it prints goes to a file."""
    from nbdev.test import nbdev_test
    os.chdir(root)
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.path.insert(0, str(root))
    nbdev_test(path=name)
    print('passed', flush=True)


def outcome(root, name, tmp_path):
    """Exit code and output."""
    process = FORKS.Process(target=run_notebook, args=(root, name, tmp_path/'said'))
    process.start()
    process.join()
    return process.exitcode, (tmp_path/'said').read_text()


@pytest.mark.parametrize('name', LIBRARY)
def test_notebook(name, tmp_path):
    code, said = outcome(ROOT, name, tmp_path)
    assert code == 0 and said.endswith('passed\n') and 'Success' in said, said


def test_a_failing_notebook_is_noticed(tmp_path):
    """`nbdev_test` must not pass what fails."""
    import json
    import shutil
    shutil.copy(ROOT/'settings.ini', tmp_path)
    (tmp_path/'nbs').mkdir()
    cell = {'cell_type': 'code', 'id': 'a', 'execution_count': None, 'metadata': {}, 'outputs': [], 'source': ['assert 1 == 2']}
    (tmp_path/'nbs'/'a.ipynb').write_text(json.dumps({'cells': [cell], 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}))
    code, said = outcome(tmp_path, 'nbs/a.ipynb', tmp_path)
    assert code != 0 and 'AssertionError' in said and 'passed' not in said
