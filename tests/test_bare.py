"""Training on a machine that has torch, timm, torchvision, Lightning and safetensors, and none of the study's other packages."""
import json
import re
import subprocess
import sys

from conftest import ROOT, called

from xbench import cells, cli, settings

THERE = {'filelock', 'torch', 'torchvision', 'timm', 'safetensors', 'lightning_fabric', 'numpy', 'pillow', 'tqdm', 'pyyaml', 'setuptools'}
BARE = '''import sys
sys.modules.update(dict.fromkeys({missing}))    # as if they were not there
from xbench.runs import main
main(sys.argv[1:])
'''


def test_cells_of_a_file_train_there(tmp_path):
    lines = (ROOT/'requirements.in').read_text().splitlines()
    names = [re.split('[=< ]', line)[0].replace('-', '_').replace('.', '_') for line in lines if line[:1].isalpha()]
    missing = {{'scikit_learn': 'sklearn', 'scikit_image': 'skimage'}.get(n, n) for n in names if n not in THERE}
    assert {'pydantic', 'pandas', 'dvc', 'sklearn', 'papermill'} <= missing and not missing & THERE
    changes = {'epochs': 1, 'warmup_epochs': 0}
    wanted = [settings.resolve(settings.load(), 'demo', 'shufflenet', 'digits', s, changes=changes) for s in (90, 91)]
    cells.write(wanted, tmp_path/'cells.json')
    command = [sys.executable, '-c', BARE.format(missing=missing), tmp_path/'cells.json', '--out', tmp_path/'back']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2, done.stderr
    here = ('train', 'shufflenet', 'digits', '--seed', 90, '--out', tmp_path/'here')
    assert called(ROOT, cli.main, *here, *(a for k, v in changes.items() for a in ('--set', f'{k}={v}'))).returncode == 0
    ours, theirs = (json.loads((tmp_path/p/'cells'/'shufflenet-digits-s90'/'metrics.json').read_text()) for p in ('here', 'back'))
    assert ours == theirs
