"""Time the README's commands in a fresh clone: install, pull, train cells, papermill's overhead, tables, a backbone of one's own, and a run
with nothing to do.

    python benchmarks/pipeline.py [--no-install | --stored] [--folder FOLDER]

Clones the committed state into a temporary folder, or into FOLDER and leaves it there. `--no-install` uses the packages of the Python
that runs it.
Takes as long as `make paper` on a fresh clone. Seconds are of this machine; what carries over are the ratios.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT/'benchmarks'/'results'/'pipeline.json'
OWN = '''from torch import nn
def MyNet(num_classes):
    block = lambda a, b: [nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*block(3, 32), *block(32, 64), *block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(128, num_classes))
'''
TABLES = ('collect', 'table', 'measured', 'figure', 'study')


def timed(*command, cwd, env):
    """Seconds that a command took, and what it said."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode: sys.exit(f'{command} failed:\n{done.stdout}\n{done.stderr}')
    return time.perf_counter() - start, done.stdout + done.stderr


def environment(clone, install):
    path = os.pathsep.join([f'{clone}/.venv/bin', str(Path(sys.executable).parent), os.environ['PATH']])
    return os.environ | {'DVC_NO_ANALYTICS': '1', 'PATH': path} | ({} if install else {'PYTHONPATH': str(clone)})


def measure(clone, install):
    env, found = environment(clone, install), {'cores': os.cpu_count()}
    if install:
        found['install_s'], _ = timed('make', '.venv/.complete', cwd=clone, env=env)
        found['venv_gb'] = sum(p.stat().st_size for p in (clone/'.venv').rglob('*') if p.is_file() and not p.is_symlink())/1e9
    found['pull_s'], _ = timed('dvc', 'pull', '-q', 'data.dvc', cwd=clone, env=env)
    found['paper_s'], said_paper = timed('python', '-m', 'xbench.pipeline', 'paper', 'demo', cwd=clone, env=env)
    stage = {m[1]: float(m[2]) for m in re.finditer(r'\] (\S+) took ([\d.]+) s', said_paper)}
    cells = {n: s for n, s in stage.items() if n.startswith('train@')}
    runs = [json.loads(p.read_text())['seconds'] for p in sorted((clone/'results/demo/runs').glob('*/run.json'))]
    found |= {'stages': len(stage), 'cells': len(cells), 'train_cells_s': sum(cells.values()), 'cell_s': sum(cells.values())/len(cells),
              'training_a_cell_s': sum(runs)/len(runs), 'overhead_a_cell_s': (sum(cells.values()) - sum(runs))/len(cells),
              'tables_s': sum(s for n, s in stage.items() if n.split('@')[0] in TABLES)}
    found['overhead_share'] = found['overhead_a_cell_s']/found['cell_s']
    found['noop_repro_s'], said = timed('dvc', 'repro', cwd=clone, env=env)
    assert 'Running stage' not in said, 'a second run ran something'
    found['noop_paper_s'], _ = timed('python', '-m', 'xbench.pipeline', 'paper', 'demo', cwd=clone, env=env)
    found['git_status'] = subprocess.run(['git', 'status', '--porcelain'], cwd=clone, capture_output=True, text=True).stdout.strip()
    names = [n for n in stage if n.split('@')[0] in TABLES]
    found['repro_tables_s'], _ = timed('dvc', 'repro', '-f', '-s', *names, cwd=clone, env=env)
    (clone/'net.py').write_text(OWN)
    found['score_s'], said = timed('xbench', 'score', 'net.py:MyNet', '--protocol', '4', cwd=clone, env=env)
    wanted = re.compile('measure|xscore|place|top1|params|eager')
    found['score'] = {'net': OWN, 'output': [line for line in said.splitlines() if wanted.match(line)]}
    found['stored_lite_s'] = stored(clone, env)
    lines = said_paper.strip().splitlines()
    found['output'] = [lines[len(lines)*3//4], lines[-1]]
    return found


def stored(clone, env):
    """Seconds to fetch the records of `lite` and draw all that is made of them."""
    for folder in ('results', 'paper'):
        for file in (clone/folder/'lite').rglob('*.*'): file.unlink()
    return timed('python', '-m', 'xbench.pipeline', 'paper', 'lite', '--stored', cwd=clone, env=env)[0]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--no-install', action='store_true', help='use the packages of this Python')
    parser.add_argument('--stored', action='store_true', help='only the tables of lite anew, with the packages of this Python')
    parser.add_argument('--folder', type=Path, help='clone into it, and leave it there')
    args = parser.parse_args()
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory(prefix='x bench ') as folder:
        clone = Path(folder).resolve()/'fresh clone'
        subprocess.run(['git', 'clone', '-q', ROOT, clone], check=True)
        if args.stored: found = json.loads(FILE.read_text()) | {'stored_lite_s': stored(clone, environment(clone, False))}
        else: found = measure(clone, not args.no_install)
    result = {k: round(v, 2) if isinstance(v, float) else v for k, v in found.items()}
    print(json.dumps(result, indent=1))
    FILE.write_text(json.dumps(result, indent=1) + '\n')
