"""Every notebook of the library runs from top to bottom; its assertions are the unit tests."""
import subprocess

import pytest
from conftest import ROOT

LIBRARY = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT/'nbs').rglob('*.ipynb')
                 if not {'studies', '.ipynb_checkpoints'} & set(p.parts))


@pytest.mark.parametrize('name', LIBRARY)
def test_notebook(name):
    done = subprocess.run(['nbdev_test', '--path', name], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and 'Success' in done.stdout + done.stderr, done.stdout + done.stderr


def test_a_failing_notebook_is_noticed(tmp_path):
    """`nbdev_test` must not pass what fails."""
    import json
    import shutil
    shutil.copy(ROOT/'settings.ini', tmp_path)
    (tmp_path/'nbs').mkdir()
    cell = {'cell_type': 'code', 'id': 'a', 'execution_count': None, 'metadata': {}, 'outputs': [], 'source': ['assert 1 == 2']}
    (tmp_path/'nbs'/'a.ipynb').write_text(json.dumps({'cells': [cell], 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}))
    assert subprocess.run(['nbdev_test', '--path', 'nbs/a.ipynb'], cwd=tmp_path, capture_output=True).returncode != 0
