"""Scenarios run in copies of the checkout, in a path with a space, as a user would run them."""
import io
import os
import random
import shutil
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import groupby
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
os.environ.setdefault('OMP_NUM_THREADS', '1')    # two workers on two cores: a second thread of each waits for a core, and burns it


@contextmanager
def registry_kept():
    """Backbones that others than the package register meanwhile are forgotten, and with them the modules that did it.

    What the package's own modules register stays: they are imported once in a process and would never say it again.
    """
    from xbench.backbones import core
    before = dict(core._entries)
    try: yield
    finally:
        for name, e in list(core._entries.items()):
            if (home := e.make.__module__).startswith('xbench.backbones.'): continue
            if name not in before and home != 'xbench.own': sys.modules.pop(home, None)
            del core._entries[name]
        core._entries.update(before)


@contextmanager
def inside(folder):
    """A folder as a fresh process sees that starts in it: its environment, imports and registered backbones are not kept."""
    with pytest.MonkeyPatch.context() as m, registry_kept():
        m.chdir(folder)
        m.setattr(sys, 'path', sys.path[:])
        m.delenv('XBENCH_ROOT', raising=False)
        yield m


def called(folder, main, *argv, **env):
    """What a command's `main` does in a folder, in this process: it has imported already what takes a fresh one seconds."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with inside(folder) as m, redirect_stdout(out), redirect_stderr(err):
        for name, value in env.items(): m.setenv(name, str(value))
        try: main([*map(str, argv)])
        except SystemExit as e: code = e.code
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


class Checkout:
    """A copy of the working tree as a git repository of its own, with the embedded images pulled."""

    def __init__(self, path):
        self.path = Path(path)
        self.env = {k: v for k, v in os.environ.items() if k not in ('XBENCH_ROOT', 'PYTHONPATH', 'MAKEFLAGS', 'MAKELEVEL')}
        self.env['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
        self.env |= {'PYTHONPATH': str(self.path), 'DVC_NO_ANALYTICS': '1'}
        found = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, found.stdout.split('\0')):
            if (ROOT/name).is_file():
                (self.path/name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT/name, self.path/name)
        for args in (('init', '-q'), ('config', 'user.name', 'test'), ('config', 'user.email', 'test@example.com')):
            self.run('git', *args)
        self.commit()
        self.run('dvc', 'pull', '-q', 'data.dvc')

    def run(self, *command, code=0, cwd=None, timeout=600):
        """Run a command here; its exit code must be `code` (None: any)."""
        done = subprocess.run([*map(str, command)], cwd=cwd or self.path, env=self.env, capture_output=True, text=True, timeout=timeout)
        assert code is None or done.returncode == code, f'{command} exited {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}'
        return done

    def commit(self):
        self.run('git', 'add', '-A')
        self.run('git', 'commit', '-qm', 'test', '--allow-empty')

    def settings(self, **changes):
        """Change settings by dotted key, as a user edits params.yaml."""
        file = self.path/'params.yaml'
        raw = yaml.safe_load(file.read_text())
        for key, value in changes.items():
            *parents, last = key.split('__')
            block = raw
            for p in parents: block = block[p]
            block[last] = value
        file.write_text(yaml.safe_dump(raw, sort_keys=False))

    def repro(self):
        """`dvc repro`; the names of the stages that ran."""
        out = self.run('dvc', 'repro').stdout
        return {line.split("'")[1] for line in out.splitlines() if line.startswith('Running stage')}


def pytest_addoption(parser):
    parser.addoption('--shuffle', type=int, metavar='SEED', help='files in another order, and tests within them unless marked in_order')


def pytest_collection_modifyitems(config, items):
    """Files that take longest begin first, so that both workers end together; or, with a seed, in any order."""
    if (seed := config.getoption('shuffle')) is None:
        first = ['pipeline', 'notebooks', 'faults', 'lite', 'backbones', 'cost', 'onnx', 'recommend', 'bad_input', 'own', 'bare', 'records']
        places = {f'test_{name}.py': k for k, name in enumerate(first)}
        items.sort(key=lambda i: places.get(i.path.name, len(first)))
        return
    files, draw = [list(tests) for _, tests in groupby(items, lambda i: i.path)], random.Random(seed)
    draw.shuffle(files)
    for tests in files:
        if not tests[0].get_closest_marker('in_order'): draw.shuffle(tests)
    items[:] = [i for tests in files for i in tests]


@pytest.fixture(autouse=True)
def surroundings():
    """Each test leaves the environment and the folder that it began in."""
    before, folder = dict(os.environ), Path.cwd()
    yield
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope='session')
def small(tmp_path_factory):
    """A pipeline of two backbones and two datasets, small enough to run in about a minute."""
    checkout = Checkout(tmp_path_factory.mktemp('a path')/'x bench')
    checkout.settings(
        demo__backbones=['convnext', 'shufflenet'], demo__proxy='tissue', demo__protocol=['digits', 'tissue'],
        demo__images={'size': 32, 'train': 64, 'test': 48},
        demo__datasets={'digits': 'data/digits.tar.xz', 'tissue': 'data/tissue.tar.xz'},
        demo__train={'epochs': 2, 'warmup_epochs': 1, 'batch': 16})
    checkout.commit()
    return checkout
