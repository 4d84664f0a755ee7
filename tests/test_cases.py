"""What users of other projects reported, tried here: each case ends in the right value or in one line that names the fix."""
import io
import json
import os
import re
import shutil
import struct
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image, ImageOps
from torch import nn

from xbench import cli, cost, own, pack
from xbench.backbones import core
from xbench.backbones.weights import load_weights
from xbench.check import check
from xbench.data import load
from xbench.errors import InputError
from xbench.files import list_folder
from xbench.pack import prepare
from xbench.settings import load as settings
from xbench.settings import read_yaml, resolve
from xbench.sources import decode, open_source


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A project folder with the settings and the embedded images, seen from this process."""
    for name in ('params.yaml', 'dvc.yaml'): shutil.copy(ROOT/name, tmp_path/name)
    (tmp_path/'data').symlink_to(ROOT/'data')
    monkeypatch.setenv('XBENCH_ROOT', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', sys.path[:])
    monkeypatch.setattr(core, '_entries', dict(core._entries))
    return tmp_path


def refused(call, *words):
    with pytest.raises(InputError) as e: call()
    said = str(e.value)
    assert '\n' not in said and all(w in said for w in words), said


def command(capsys, *argv, words=()):
    """A command that must end in one line and exit code 2."""
    with pytest.raises(SystemExit) as ended: cli.main([str(a) for a in argv])
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and said and said[-1].startswith('xbench: ') and all(w in said[-1] for w in words), said


def picture(colour, size=40, kind='PNG', **how):
    noise = np.random.default_rng(abs(hash(colour)) % 100).integers(-20, 20, (size, size, 3))
    Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8)).save(f := io.BytesIO(), kind, **how)
    return f.getvalue()


def pets(root, form='{s}/{c}/{k}.png', splits=('train', 'test'), n=20, kind='PNG'):
    """Cats are red, dogs blue."""
    for s in splits:
        for c, colour in (('cat', (200, 60, 60)), ('dog', (60, 60, 200))):
            for k in range(n):
                path = root/form.format(s=s, c=c, k=k, half=k % 2)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture(colour, kind=kind))
    return root


def packed(tmp_path, source, **how):
    pack.pack(source, tmp_path/'packed', 16, progress=False, **how)
    return load(tmp_path/'packed')


def brightness(data): return {c: data.images[data.labels == k].mean() for k, c in enumerate(data.card['classes'])}


# images

def test_mended_labels_of_the_same_size_are_seen(home):
    images = np.stack([np.full((8, 8), 40 + 150*(k % 2), np.uint8) for k in range(60)])
    def written(labels):
        np.savez('x.npz', **{f'{s}_{k}': v for s in ('train', 'test') for k, v in (('images', images), ('labels', labels))})
    made = []
    for labels in (np.arange(60)//30, np.arange(60) % 2):
        written(labels)
        made.append(load(prepare(resolve(settings(), 'demo', 'shufflenet', 'x.npz'), progress=False)).labels)
    assert (made[0] != made[1]).any() and sorted(made[1].tolist()) == [0]*60 + [1]*60


@pytest.mark.parametrize('form, splits', [('{c}/202{half}/{k}.png', ('',)), ('{s}/{c}/202{half}/{k}.png', ('train', 'test')),
                                          ('{s}/{c}/{k}.png', ('training_set', 'test_set')), ('{s}/{c}/{k}.png', ('seg_train', 'seg_test')),
                                          ('{s}/{c}/{k}.png', ('Train_data', 'eval')), ('{s}/{c}/{k}.png', ('train', 'dev')),
                                          ('x/{s}/{c}/{k}.png', ('TRAIN', 'Validation')), ('{c}/{s}/{k}.png', ('train', 'test'))])
def test_the_folder_below_the_split_is_the_class(tmp_path, form, splits):
    try: source = open_source(pets(tmp_path/'x', form, splits))
    except InputError as e: assert form.startswith('{c}') and 'splits or classes' in str(e)
    else:
        assert source.classes == ['cat', 'dog']
        if len(splits) == 2: assert source.split == 'official' and sum(i.split == 'train' for i in source.items) == 40


def test_splits_of_unknown_names_are_not_poured_together(tmp_path):
    refused(lambda: open_source(pets(tmp_path/'x', splits=('part1', 'part2'))), 'part1 and part2', 'train, val and test')


@pytest.mark.parametrize('folder', ['.ipynb_checkpoints', '@eaDir', '.thumbnails', '__MACOSX', '.git'])
def test_hidden_and_system_folders_are_no_classes(tmp_path, folder):
    for at in (folder, f'train/{folder}', f'train/cat/{folder}'):
        root = pets(tmp_path/at.replace('/', '-'), n=5)
        (root/at).mkdir(parents=True)
        (root/at/'1.png').write_bytes(picture((1, 2, 3)))
        source = open_source(root)
        assert source.classes == ['cat', 'dog'] and len(source.items) == 20 and any(at in note for note in source.notes)


def test_formats_by_any_name(tmp_path):
    root = pets(tmp_path/'x', n=6)
    for name in ('a.jfif', 'b.JPE', 'c'): (root/'train'/'dog'/name).write_bytes(picture((60, 60, 200), kind='JPEG'))
    for name in ('d.psd', 'e.psd', 'f.svg', 'notes.txt', 'Thumbs.db'): (root/'train'/'dog'/name).write_bytes(b'x')
    source = open_source(root)
    assert sum(i.label == 'dog' and i.split == 'train' for i in source.items) == 9
    assert source.notes == ('left out, of a format that is not read: .psd (2), .svg (1)',)


def test_links(tmp_path):
    far, root = pets(tmp_path/'far', n=5), tmp_path/'x'
    root.mkdir()
    for s in ('train', 'test'):
        (root/s).mkdir()
        (root/s/'cat').symlink_to(far/s/'cat')
        (root/s/'dog').mkdir()
        for f in (far/s/'dog').iterdir(): (root/s/'dog'/f.name).symlink_to(f)
    assert len(open_source(root).items) == 20
    for f in list((far/'train'/'dog').iterdir())[:3]: f.unlink()
    refused(lambda: open_source(root), 'train/dog/', 'link to nowhere (3 such links)')


@pytest.mark.parametrize('top, expected', [(255, 1.), (4095, 1.), (65535, 1.)])
def test_deep_files_are_scaled_by_the_dataset(tmp_path, top, expected):
    for s in ('train', 'test'):
        for c, share in (('dark', .25), ('bright', 1.)):
            (tmp_path/'x'/s/c).mkdir(parents=True)
            for k in range(6): Image.fromarray(np.full((20, 20), int(share*top), np.uint16)).save(tmp_path/'x'/s/c/f'{k}.png')
    found = brightness(packed(tmp_path, tmp_path/'x'))
    assert abs(found['dark'] - 64) < 1.5 and found['bright'] == 255
    assert check(tmp_path/'x', {'name': 'x', 'counts': {}, 'classes': 2}, progress=False)[0]['of_one_colour'] == ['bright', 'dark']


@pytest.mark.parametrize('labels, words', [([.5, 1.5, 2.5, .5], '0.5'), ([0, 1, np.nan, 1], 'nan'), (7, 'one label'),
                                           (np.array([0, 'a', 1, 2], object), 'Python objects')])
def test_labels_that_are_no_classes(tmp_path, labels, words):
    images = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path/'x.npz', train_images=images, train_labels=labels, test_images=images, test_labels=[0, 1, 0, 1])
    refused(lambda: open_source(tmp_path/'x.npz'), 'x.npz', words)


def test_labels_in_words_and_an_empty_validation_split(tmp_path):
    images = np.zeros((4, 8, 8), np.uint8)
    words = ['cat', 'dog', 'cat', 'dog']
    np.savez(tmp_path/'x.npz', train_images=images, train_labels=words, test_images=images, test_labels=words,
             val_images=images[:0], val_labels=np.array(words)[:0])
    source = open_source(tmp_path/'x.npz')
    assert source.classes == ['cat', 'dog'] and {i.split for i in source.items} == {'train', 'test'}


@pytest.mark.parametrize('name', ['x.tar.xz', 'x.tar.gz', 'x.tar.bz2', 'X.TAR.XZ', 'x.zip', 'x.tar'])
def test_archives_as_people_make_them(tmp_path, name):
    root, to = pets(tmp_path/'x', n=5), tmp_path/name
    if name.endswith('zip'):
        with zipfile.ZipFile(to, 'w') as z:
            for f in root.rglob('*.png'): z.write(f, f.relative_to(root))
    else:
        with tarfile.open(to, f"w:{name.lower().removeprefix('x.tar').removeprefix('.')}") as t: t.add(root, '.')    # as tar -C x .
    data = packed(tmp_path, to)
    assert data.card['counts'] == {'train': 10, 'test': 10} and data.card['classes'] == ['cat', 'dog']


def test_members_are_refused_for_their_one_reason(tmp_path):
    def made(name, kind=tarfile.REGTYPE):
        with tarfile.open(tmp_path/'x.tar.gz', 'w:gz') as t:
            m = tarfile.TarInfo(name)
            m.size, m.type, m.linkname = (4 if kind == tarfile.REGTYPE else 0), kind, 'train/cat/0.png'
            t.addfile(m, io.BytesIO(b'1234'))
        return tmp_path/'x.tar.gz'
    for name, kind, word in (('a\\b.png', tarfile.REGTYPE, 'backslashes'), ('../a.png', tarfile.REGTYPE, 'climbs'),
                             ('a.png', tarfile.LNKTYPE, 'hard link'), ('a.png', tarfile.SYMTYPE, 'is a link')):
        refused(lambda name=name, kind=kind: open_source(made(name, kind)), word)
    root = pets(tmp_path/'y', '{c}/{k}.png', ('',), n=5)
    with tarfile.open(tmp_path/'y.tar.gz', 'w:gz') as t: t.add(root, 'set 12:30')
    assert open_source(tmp_path/'y.tar.gz').classes == ['cat', 'dog']


def test_exif_that_cannot_be_written_turns_the_image():
    """A resolution of -1/0, which Pillow reads and cannot write, beside an orientation."""
    entries = struct.pack('<HHII', 0x0112, 3, 1, 6), struct.pack('<HHII', 0x011A, 10, 1, 38)
    exif = b'Exif\0\0' + b'II*\0' + struct.pack('<IH', 8, 2) + b''.join(entries) + struct.pack('<I', 0) + struct.pack('<ii', -1, 0)
    Image.new('RGB', (20, 10)).save(f := io.BytesIO(), 'JPEG', exif=exif)
    with pytest.raises(struct.error): ImageOps.exif_transpose(Image.open(io.BytesIO(f.getvalue())))
    assert decode(f.getvalue(), 'a.jpg').size == (10, 20)


def test_names(tmp_path, home):
    root = pets(tmp_path/'x', n=5)
    (root/'train'/'cat'/'a\rb\n"c",d.png').write_bytes(picture((200, 60, 60)))
    data = packed(tmp_path, root)
    assert 'train/cat/a\rb\n"c",d.png' in data.name and len(data.labels) == 21
    (root/'train'/'cat'/os.fsdecode(b'caf\xe9.png')).write_bytes(picture((200, 60, 60)))
    refused(lambda: list_folder(root), 'caf\\udce9.png', 'not UTF-8')


def test_pointers_in_place_of_images(tmp_path):
    root = pets(tmp_path/'x', n=5)
    for f in root.rglob('*.png'): f.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:1\n')
    found = check(root, {'name': 'x', 'counts': {}, 'classes': 2}, progress=False)[0]
    assert len(found['unreadable']) == 20 and all('git lfs pull' in line for line in found['unreadable'])
    refused(lambda: packed(tmp_path, root), 'git lfs pull')
    for content in (b'<!DOCTYPE html>', b'nothing'):
        with pytest.raises(InputError) as e: decode(content, 'a.jpg')
        assert '0x' not in str(e.value) and 'a.jpg' in str(e.value)


def test_a_folder_with_files_that_are_called_like_ours(tmp_path):
    for content in ('{"path": 3}', '[]', 'null', '{}'):
        root = pets(tmp_path/f'x{len(content)}{content[0].encode().hex()}', n=5)
        for name in ('card.json', 'fetched.json'): (root/name).write_text(content)
        assert open_source(root).classes == ['cat', 'dog']


# settings and tables

@pytest.mark.parametrize('text, words', [('train: {epochs: 3, epochs: 1}', 'epochs stands twice'), ('seeds: [010]', '010'),
                                         ('epochs: 1:30', '1:30'), ('no: data', 'no'), ('2024: data', '2024')])
def test_settings_that_mean_two_things(home, capsys, text, words):
    (home/'params.yaml').write_text((home/'params.yaml').read_text() + f'\nmore:\n  {text}\n')
    command(capsys, 'train', 'shufflenet', 'digits', '--dry-run', words=['params.yaml, line', words])


@pytest.mark.parametrize('coding', ['utf-16', 'latin-1'])
def test_settings_in_another_coding(home, capsys, coding):
    (home/'params.yaml').write_bytes(('# é\n' + (home/'params.yaml').read_text()).encode(coding))
    command(capsys, 'train', 'shufflenet', 'digits', '--dry-run', words=['params.yaml', 'not UTF-8'])


@pytest.mark.parametrize('given, words', [(('--seed', '-1'), 'seed -1'), (('--set', 'epochs=010'), '010'),
                                          (('--set', 'epochs=1:30'), '1:30')])
def test_values_on_the_command_line(home, capsys, given, words):
    command(capsys, 'train', 'shufflenet', 'digits', '--dry-run', *given, words=[words])


def test_what_papermill_makes_of_names_and_seeds(home):
    pets(home/'2024', n=5)
    assert resolve(settings(), 'demo', 'shufflenet', './2024').dataset == '2024'
    (home/'datasets'/'2024').mkdir(parents=True)
    assert resolve(settings(), 'demo', 'shufflenet', 2024).dataset == '2024'
    refused(lambda: resolve(settings(), 'demo', 'shufflenet', 'digits', 1e0), 'seed 1.0')


def test_the_reason_of_a_dry_run(home, capsys):
    (home/'x'/'cat').mkdir(parents=True)
    (home/'x'/'cat'/'1.png').write_bytes(picture((1, 1, 1)))
    command(capsys, 'train', 'shufflenet', './x', '--dry-run', words=['x', 'too few'])


@pytest.mark.parametrize('text, coding', [('b;cifar10\nmine;90,5\n', 'utf-8'), ('b\tcifar10\nmine\t90.5\n', 'utf-16'),
                                          ('sep=;\nb;CIFAR-10\nmine;90.5\n', 'utf-8-sig'),
                                          ('b,cifar10\n\nmine , 90.5 %\n', 'utf-8')])
def test_accuracies_as_spreadsheets_write_them(tmp_path, text, coding):
    from xbench.score import read_csv
    (tmp_path/'x.csv').write_bytes(text.encode(coding))
    assert read_csv(tmp_path/'x.csv').to_dict() == {'cifar10': {'mine': 90.5}}


@pytest.mark.parametrize('text, words', [('b,cifar10\nmine,90,5\n', 'row 2 has 3 cells'), ('b,cifar10\nStarNet,90\n', 'another name'),
                                         ('b,cifar10\n\n,90\n', 'row 3')])
def test_accuracies_that_are_refused(tmp_path, text, words):
    from xbench.score import from_csv
    (tmp_path/'x.csv').write_text(text)
    refused(lambda: from_csv(tmp_path/'x.csv'), 'x.csv', words)


# networks

NET = '''
class Net(nn.Module):
    def __init__(self, n):
        super().__init__()
        {init}
    def forward(self, x): {forward}
'''
HEAD, USE = 'self.head = nn.Linear(3, n)', 'return self.head(x.mean((2, 3)))'


def loaded(home, text, head='import torch\nfrom torch import nn\n', coding='utf-8'):
    (home/'net.py').write_bytes((head + text).encode(coding))
    return own.load('net.py:Net')


def checked(home, **parts): return own.check(loaded(home, NET.format(**{'init': HEAD, 'forward': USE} | parts)), [(32, 32)])


def test_a_network_that_reads_a_file_is_named_by_what_it_reads(home):
    text = 'import json\ndef Net(n): return nn.Sequential(nn.Conv2d(3, json.load(open("w.json")), 9, 9), nn.Flatten(), nn.LazyLinear(n))'
    slugs = []
    for width in (8, 64, 8):
        (home/'w.json').write_text(json.dumps(width))
        slugs.append(loaded(home, text).slug)
    assert slugs[0] == slugs[2] != slugs[1]


@pytest.mark.parametrize('parts, words', [
    ({'init': f'{HEAD}; self.blocks = [nn.Conv2d(3, 3, 1)]', 'forward': USE.replace('x.mean', 'self.blocks[0](x).mean')}, 'self.blocks'),
    ({'init': f'{HEAD}; self.d = {{"a": [nn.Conv2d(3, 3, 1)]}}', 'forward': USE.replace('x.mean', 'self.d["a"][0](x).mean')}, 'self.d'),
    ({'init': f'{HEAD}; self.w = [torch.ones(1, requires_grad=True)]', 'forward': USE.replace('x.mean', '(x*self.w[0]).mean')},
     'not registered'),
    ({'forward': 'x.mul_(.5).add_(3.); ' + USE}, 'changes the images'), ({'init': f'{HEAD}.double()'}, 'float64')])
def test_networks_that_would_not_be_what_they_seem(home, parts, words): refused(lambda: checked(home, **parts), words)


def test_networks_that_can_be_trained(home):
    waves = f'{HEAD}; self.w = nn.Parameter(torch.ones(3, 1, 1, dtype=torch.complex64))'
    assert checked(home, init=waves, forward='return self.head((x*self.w).real.mean((2, 3)))') == 43
    tied = f'{HEAD}; self.second = nn.Linear(3, n); self.second.weight = self.head.weight'
    assert checked(home, init=tied, forward='return self.head(x.mean((2, 3))) + self.second(x.amax((2, 3)))') == 50


@pytest.mark.parametrize('how', ['def Net(pretrained=False, **kwargs): return Small(kwargs["num_classes"])',
                                 'def Net(in_channels=3, n_classes=2): return Small(n_classes)',
                                 'def Net(*, classes): return Small(classes)', 'Net = Small'])
def test_the_number_of_classes_goes_where_it_belongs(home, how):
    small = NET.format(init=HEAD, forward=USE).replace('Net', 'Small')
    assert loaded(home, f'{small}\n{how}').make(7).head.out_features == 7


def test_a_number_of_classes_that_has_no_place_is_said(home):
    refused(lambda: loaded(home, 'def Net(in_channels, out): return nn.Linear(in_channels, out)'), 'first argument is in_channels')
    refused(lambda: loaded(home, 'import sys; sys.exit(2)'), '__main__')
    assert own.load('torchvision.models:resnet18').make(7).fc.out_features == 7


@pytest.mark.parametrize('head, coding', [('\ufeff', 'utf-8'), ('# -*- coding: latin-1 -*-\n# é\n', 'latin-1')])
def test_python_in_any_coding(home, head, coding):
    assert loaded(home, NET.format(init=HEAD, forward=USE), f'{head}import torch\nfrom torch import nn\n', coding).make(3)


def test_files_that_are_called_like_libraries(home):
    for name in ('papermill', 'onnx', 'html'): (home/f'{name}.py').write_text('raise ImportError("mine")')
    loaded(home, NET.format(init=HEAD, forward=USE))
    import html
    import importlib

    import papermill
    assert hasattr(html, 'escape') and hasattr(papermill, 'execute_notebook')
    assert importlib.util.find_spec('onnx').submodule_search_locations


def test_recurrent_layers_are_counted():
    class Steps(nn.Module):
        def __init__(self): super().__init__(); self.g = nn.GRU(256, 128, batch_first=True)
        def forward(self, x): return torch.fft.rfft(self.g(x.reshape(1, 16, -1)[..., :256])[0]).abs()
    assert cost.macs(Steps(), 64)['macs'] == 2_359_296 and cost.uncounted(Steps(), 64) == ['fft_rfft']


def test_weights_as_they_are_kept(tmp_path):
    net = core.create('mobileone_s0', 10)
    state = net.state_dict()
    first = next(iter(state))
    def put(kept):
        torch.save(kept, tmp_path/'w.pt')
        return lambda: load_weights(core.create('mobileone_s0', 10), tmp_path/'w.pt')
    for kept in ({f'module.{k}': v for k, v in state.items()}, {'state_dict': {f'_orig_mod.{k}': v for k, v in state.items()}},
                 {'ema': state}):
        assert put(kept)().state_dict()[first].equal(state[first])
    refused(put(core.create('mobileone_s0', 1000).state_dict()), '1000')
    refused(put({**state, first: state[first]*float('nan')}), first, 'NaN')
    (tmp_path/'w.pt').write_bytes(b'')
    refused(lambda: load_weights(net, tmp_path/'w.pt'), 'w.pt', 'empty')


def test_nothing_is_read_twice_in_yaml():
    for text in ('a: 1\na: 2', 'a: {b: 1, b: 2}', 'a: [{b: 1, b: 1}]'): refused(lambda text=text: read_yaml(text, 'x.yaml'), 'twice')
    assert read_yaml(re.sub('x', 'y', 'x: &x {a: 1}\nz: {<<: *y, a: 2}').replace('&x', '&y'), '') == {'y': {'a': 1}, 'z': {'a': 2}}
    assert yaml.safe_load('a: 010')['a'] == 8
