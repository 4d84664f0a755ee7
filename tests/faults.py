"""Runs that are killed, cheap because one process imports torch and forks them. `python tests/faults.py 100`: a hundred kills."""
import importlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
EVERY = .04    # seconds between checkpoints, where they are wanted
PHASES = ('packing', 'training', 'checkpoint', 'record')
CELLS = (('shufflenet', 'two_phases'), ('mobilenet_v3_small', 'growing'), ('convnext', 'searched'))


def project(folder):
    """A folder to work in: settings of its own and the embedded images. Returns it."""
    raw = yaml.safe_load((ROOT/'params.yaml').read_text())
    plain = {'pretrained': False, 'precision': 'float32', 'batch': 16, 'cases': {}}
    short = plain | {'epochs': 3, 'recalibrate': True}
    raw['demo'] |= {'images': {'size': 32, 'fit': 'squash', 'train': 160, 'test': 48}, 'train': {}}
    known = raw['recipe']
    known['plain'] = known['cross_dataset'] | short | {'warmup_epochs': 1}
    known['two_phases'] = known['which_backbone'] | short | {'epochs': 5, 'patience': 1, 'input_size': 28}
    known['growing'] = known['mobileone'] | short | {'lr': .01, 'ema': .9}
    known['growing']['progressive'] = [{'after': 0, 'side': .75, 'strength': .3}, {'after': .3, 'side': 1., 'strength': 1.}]
    known['searched'] = known['memory_constrained'] | short | {'crop': 2}
    known['searched']['search'] = {'epochs': 1, 'optimizer': ['adam'], 'lr': [.001, .0003], 'batch': [16]}
    folder = Path(folder)
    folder.mkdir(parents=True)
    (folder/'params.yaml').write_text(yaml.safe_dump(raw, sort_keys=False))
    (folder/'data').symlink_to(ROOT/'data')
    return folder


def tree(root):
    """What lies in a project: content by path; of run.json, which holds date and duration, only that it is there."""
    files = (f for top in ('packed', 'work', 'out') for f in sorted((root/top).rglob('*')) if f.is_file())
    return {str(f.relative_to(root)): f.read_bytes() if f.name != 'run.json' else b'' for f in files}


def different(one, other):
    """Paths that only one of two trees has, or whose contents differ."""
    return sorted(p for p in one.keys() | other.keys() if one.get(p) != other.get(p))


class Warm:
    """A process that has imported everything and forks a child for each command."""

    def __init__(self):
        self.server = subprocess.Popen([sys.executable, __file__, 'serve'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                       start_new_session=True)
        self.ask(ready=True)

    def ask(self, **order):
        print(json.dumps(order), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(self, root, *argv, every=60, at=None, env=None):
        """Begin `xbench ARGV` in a project. `at`: which time it touches a file of a phase, `now` to be killed there, `later` to be told."""
        return Started(self, root, [*map(str, argv)], every, at, env or {})

    def run(self, root, *argv, code=0, **how):
        """`xbench ARGV` to its end, which must be with this code."""
        done = self.start(root, *argv, **how)
        assert done.wait() == code, f'{argv} exited {done.code}, not {code}\n{done.out}\n{done.err}'
        return done

    def __enter__(self): return self

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.wait()


class Started:
    """A command that the warm process has forked."""

    def __init__(self, warm, root, argv, every, at, env):
        self.warm, self.said, self.code = warm, tempfile.mkdtemp(prefix='said-', dir=root.parent), None
        self.pid = warm.ask(root=str(root), argv=argv, every=every, at=at, env=env, said=self.said)

    out = property(lambda self: Path(self.said, 'out').read_text())
    err = property(lambda self: Path(self.said, 'err').read_text())
    struck = property(lambda self: os.path.exists(f'{self.said}/struck'))
    lines = property(lambda self: [line for line in self.err.replace('\r', '\n').splitlines() if line.strip() and 'img' not in line])
    """Lines on standard error, but for the bar's."""

    def poll(self):
        if self.code is None: self.code = self.warm.ask(poll=self.pid)
        return self.code

    def wait(self, timeout=240, until=lambda: False, tick=.005):
        """Wait for the end, or for something else. Returns the exit code; None before the end."""
        end = time.monotonic() + timeout
        while self.poll() is None and not until():
            assert time.monotonic() < end, f'still running after {timeout} s\n{self.err}'
            time.sleep(tick)
        return self.code

    def send(self, number=signal.SIGKILL):
        if self.poll() is None: os.kill(self.pid, number)


def serve():
    """Import, then fork for every line on standard input, until it ends."""
    for name in ('dvclive', 'lightning_fabric', 'safetensors.torch', 'timm.optim', 'timm.utils', 'torch._dynamo',
                 'torch.utils.serialization.config', 'torchvision', 'xbench.runs', 'xbench.cli'): importlib.import_module(name)
    from xbench.backbones import core
    core.names()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        order = json.loads(line)
        if 'poll' in order:
            pid, status = os.waitpid(order['poll'], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif 'ready' in order: answer = True
        elif not (answer := os.fork()): _child(order)
        print(json.dumps(answer), flush=True)


def _child(order):
    "Be the command; never returns."
    code = 1
    try:
        os.chdir(order['root'])
        os.environ.update(order['env'] | {'XBENCH_ROOT': order['root']})
        for number, name in ((0, '/dev/null'), (1, f"{order['said']}/out"), (2, f"{order['said']}/err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o644), number)
        if order['at']: sys.addaudithook(_dying(order))
        from xbench import cli, runs
        runs.execute = partial(runs.execute, every=order['every'])
        cli.main(order['argv'])
        code = 0
    except SystemExit as e: code = e.code
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def phase_of(event, path):
    """What a file that is written, renamed or removed belongs to."""
    parts = path.split(os.sep)
    if 'packed' in parts: return 'packing'
    if 'work' not in parts and 'out' not in parts: return None
    if not parts[-1].startswith(('checkpoint', '.checkpoint')): return 'record'
    return 'clearing' if event == 'os.remove' and parts[-1][0] != '.' else 'checkpoint'


def _dying(order):
    "A hook that Python calls before it touches a file: the one that was asked for is the last, or the last but a few milliseconds."
    phase, number, how = order['at']
    seen = Counter()

    def hook(event, args):
        if event == 'open': touches = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else: touches = event in ('os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'shutil.rmtree')
        if not touches or isinstance(args[0], int) or not (found := phase_of(event, os.fsdecode(args[0]))): return
        for name in (found, f'{found} {event}'):
            seen[name] += 1
            if (name, seen[name]) != (phase, number): continue
            if how == 'now': os.kill(os.getpid(), signal.SIGKILL)
            Path(order['said'], 'struck').touch()
        if how == 'count': Path(order['said'], 'struck').write_text(json.dumps(seen))
    return hook


def landed(root, since):
    """Where a kill landed, by what it left: half a packed folder, half a checkpoint, a record begun; else it was in training."""
    new = lambda f: f.exists() and f.stat().st_mtime_ns >= since
    if not (root/'packed/demo/digits/asked.json').exists(): return 'packing'
    if list(root.glob('work/**/.checkpoint.pt.part')): return 'checkpoint'
    if any(not p.with_name('checkpoint.pt').exists() for p in root.glob('work/**/checkpoint.previous.pt')): return 'checkpoint'
    begun = [*root.glob('work/*/weights.safetensors'), *root.glob('work/*/.weights*'), *(root/'out').rglob('*.*')]
    return 'record' if any(map(new, begun)) else 'training'


def train_of(cell): return 'train', cell[0], 'digits', '--recipe', cell[1], '--out', 'out'


class Killer:
    """Kills runs until enough have been killed, each run until it is done, and compares it with one that nobody touched."""

    def __init__(self, warm, folder, seed=0, cells=CELLS):
        self.warm, self.folder, self.cells, self.random = warm, Path(folder), cells, random.Random(seed)
        self.counts, self.runs, self.whole, self.tried = Counter(), 0, {}, 0

    def reference(self, cell):
        """Files of an uninterrupted run, its seconds, and how often it touches files, by phase."""
        if cell not in self.whole:
            root, began = project(self.folder/f'whole {cell[1]}'), time.monotonic()
            done = self.warm.run(root, *train_of(cell), at=('', 0, 'count'))
            self.whole[cell] = tree(root), time.monotonic() - began, json.loads(Path(done.said, 'struck').read_text())
        return self.whole[cell]

    def order(self, root, cell):
        """When the next attempt dies: half of them after some seconds, half at a file of the phase that was met least."""
        _, seconds, events = self.reference(cell)
        self.tried += 1
        if self.tried % 2 == 0: return self.random.uniform(0, seconds), None
        open_to = [p for p in ('packing', 'checkpoint', 'record') if p != 'packing' or not (root/'packed/demo/digits/asked.json').exists()]
        phase = min(open_to, key=lambda p: self.counts[p])
        return None, (phase, self.random.randint(1, events[phase] if phase != 'checkpoint' else 12), self.random.choice(('now', 'later')))

    def attempt(self, root, cell, seconds=None, at=None):
        """Whether a run was killed before its end."""
        since, began = time.time_ns(), time.monotonic()
        run = self.warm.start(root, *train_of(cell), every=EVERY, at=at)
        if seconds is not None: run.wait(until=lambda: time.monotonic() - began > seconds, tick=.001)
        elif at:
            run.wait(until=lambda: run.struck, tick=.0003)
            time.sleep(self.random.uniform(0, .005))
        if seconds is not None or at: run.send()
        if run.wait() == 0: return False
        assert run.code == -signal.SIGKILL, f'it ended by itself, with {run.code}\n{run.err}'
        self.counts[landed(root, since)] += 1
        return True

    def one(self, most, enough):
        """One run, killed until it is done or until there have been enough kills, `most` of it."""
        cell = self.cells[self.runs % len(self.cells)]
        whole, root = self.reference(cell)[0], project(self.folder/f'killed {self.runs}')
        while most and not enough() and self.attempt(root, cell, *self.order(root, cell)): most -= 1
        self.attempt(root, cell)
        if wrong := different(whole, tree(root)): raise AssertionError(f'run {self.runs} ({cell[1]}) ended otherwise: {wrong}')
        shutil.rmtree(root)
        self.runs += 1

    def kill(self, times, report=lambda said: None):
        """So many kills at least, and one in every phase. Returns what was met, in words."""
        enough = lambda: self.counts.total() >= times and len(self.counts) == len(PHASES)
        while not enough():
            self.one(-(-times//len(self.cells)), enough)
            report(str(self))
        return str(self)

    def __str__(self):
        met = ', '.join(f'{self.counts[p]} {p}' for p in PHASES)
        return f'{self.counts.total()} kills: {met}; {self.runs} runs, all equal to the uninterrupted one'


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


if __name__ == '__main__':
    if sys.argv[1:] == ['serve']: serve()
    else:
        with tempfile.TemporaryDirectory(prefix='x bench ') as folder, Warm() as warm:
            times, seed = (*map(int, sys.argv[1:]), *(100, 0)[len(sys.argv) - 1:])
            print(Killer(warm, folder, seed).kill(times, lambda said: print(said, file=sys.stderr)))
