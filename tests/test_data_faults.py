"""Images, archives and downloads that are broken, strange or hostile: read right, or refused in one line that names the file."""
import io
import os
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter, namedtuple
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from unittest.mock import patch

import numpy as np
import pooch
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from xbench import fetch, pack
from xbench.data import load
from xbench.errors import InputError
from xbench.sources import decode, open_source
from xbench.splits import Item, assign, carve

FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF', 'PPM')
many = partial(settings, deadline=None, derandomize=True, database=None)


def photograph(h=16, w=24):
    """Smooth, so that lossy formats keep it."""
    y, x = np.mgrid[:h, :w]
    return Image.fromarray(np.stack([60 + 6*x, 200 - 8*y, 90 + 3*x + 2*y], 2).clip(0, 255).astype(np.uint8))


def written(image, kind, **how):
    image.save(f := io.BytesIO(), kind, **how)
    return f.getvalue()


@contextmanager
def refused(*words):
    with pytest.raises(InputError) as e: yield
    said = str(e.value)
    assert len(said.splitlines()) == 1 and all(str(w) in said for w in words), said


def read(content):
    """What decoding gives: an RGB image, or a refusal that names the file; nothing else."""
    try: image = decode(content, 'cats/7.jpg')
    except InputError as e:
        assert 'cats/7.jpg cannot be read' in str(e) and len(str(e).splitlines()) == 1
        return None
    assert image.mode == 'RGB'
    return image


# images

@many(max_examples=60)
@given(kind=st.sampled_from(FORMATS), share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_image(kind, share):
    content = written(photograph(), kind)
    if (image := read(content[:int(share*len(content))])) is not None: assert image.size == (24, 16)


spoilt = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8)


@many(max_examples=80)
@given(kind=st.sampled_from(FORMATS), spoilt=spoilt)
def test_a_damaged_image(kind, spoilt):
    content = bytearray(written(photograph(), kind))
    for place, value in spoilt: content[int(place*len(content))] = value
    read(bytes(content))


@many(max_examples=40)
@given(st.binary(max_size=200))
def test_no_image(content):
    assert read(content) is None


MODES = ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'RGBX', 'CMYK', 'YCbCr', 'I;16', 'I')


@pytest.mark.parametrize('mode, kind', [(m, k) for m in MODES for k in ('PNG', 'TIFF', 'JPEG', 'GIF') if (m[0], k) != ('I', 'GIF')])
def test_every_mode_is_read_right(mode, kind):
    rgb = photograph()
    if mode[0] == 'I': image = Image.fromarray(np.asarray(rgb.convert('L')).astype(np.uint16 if mode == 'I;16' else np.int32)*257)
    else: image = rgb.quantize(256) if mode == 'P' else rgb.convert(mode)
    try: content = written(image, kind, **{'quality': 95} if kind == 'JPEG' else {})
    except (OSError, ValueError, KeyError): pytest.skip(f'{kind} has no {mode}')
    found = read(content)
    grey = rgb.convert('1' if mode == '1' else 'L').convert('RGB')
    expected = grey if mode in ('1', 'L', 'LA', 'I;16', 'I') else rgb
    assert found.size == rgb.size and np.abs(np.asarray(found, int) - np.asarray(expected, int)).mean() < 5


@pytest.mark.parametrize('orientation', range(1, 9))
def test_turned_as_the_camera_says(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90}.get(orientation)
    expected = photograph().transpose(turn) if turn is not None else photograph()
    found = read(written(photograph(), 'PNG', exif=exif))
    assert found.size == expected.size and np.array_equal(np.asarray(found), np.asarray(expected))


def test_transparent_pixels_are_white():
    alpha = np.tile(np.linspace(0, 255, 24).astype(np.uint8), (16, 1))
    clear = np.dstack([np.asarray(photograph()), alpha])
    found = np.asarray(read(written(Image.fromarray(clear, 'RGBA'), 'PNG')), int)
    assert (found[:, 0] == 255).all() and np.array_equal(found[:, -1], clear[:, -1, :3])


def test_a_picture_that_is_too_large_to_be_one():
    content = bytearray(written(Image.new('1', (8, 8)), 'PNG'))
    content[16:24] = (60_000).to_bytes(4, 'big')*2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, 'big')
    assert read(bytes(content)) is None


# folders

def folder(root, classes=('cat', 'dog'), n=10):
    for k, c in enumerate(classes):
        (Path(root)/c).mkdir(parents=True)
        for i in range(n): photograph(8 + i, 10 + k).save(Path(root)/c/f'{i}.png')
    return Path(root)


names = st.text(st.characters(exclude_categories=('Cs', 'Cc'), exclude_characters='/\\'), min_size=1, max_size=12).filter(
    lambda s: s.strip('. ') and s.lower() not in ('train', 'test', 'val') and len(s.encode()) < 100)


@many(max_examples=25)
@given(a=names, b=names)
def test_class_names_of_any_script(a, b):
    a, b = (unicodedata.normalize('NFC', x) for x in (a, b))
    assume(a != b)
    with TemporaryDirectory() as d:
        root = folder(f'{d}/x', (a, b))
        if a.casefold() == b.casefold():
            with refused('differ by case alone'): pack.pack(root, f'{d}/p', 8, progress=False)
        else:
            found = pack.pack(root, f'{d}/p', 8, progress=False)
            packed = load(f'{d}/p')
            assert found['classes'] == sorted((a, b)) == packed.card['classes'] and len(packed.name) == 20


def test_one_name_written_in_two_ways_is_one_class(tmp_path):
    for split, form in (('train', 'NFC'), ('test', 'NFD')):
        folder(tmp_path/split, (unicodedata.normalize(form, 'caf\u00e9'), 'tea'), 3)
    assert open_source(tmp_path).classes == ['caf\u00e9', 'tea']


@pytest.mark.parametrize('spoil, words', [
    (lambda f: (f/'cat'/'3.png').write_bytes(b''), ('cat/3.png', '0 bytes')),
    (lambda f: (f/'dog'/'3.png').write_text('<html>'), ('dog/3.png', 'cannot be read')),
    (lambda f: (f/'fox').mkdir(), ('folder fox holds no images',)),
    (lambda f: (f/'lone.png').write_bytes(b'x'), ('lone.png', 'no class folder')),
    (lambda f: [p.unlink() for p in (f/'dog').iterdir()] and (f/'dog').rmdir(), ('one class', "'cat'")),
    (lambda f: [p.unlink() for p in sorted((f/'dog').iterdir())[1:]], ("'dog' has 1 image ", 'too few')),
    (lambda f: (f/'cat'/'3.png').unlink() or (f/'cat'/'3.png').mkdir(), ('cat/3.png', 'no images')),
])
def test_a_spoilt_folder(spoil, words, tmp_path):
    spoil(folder(tmp_path/'x'))
    with refused(*words): pack.pack(tmp_path/'x', tmp_path/'out'/'p', 8, progress=False)
    assert not list(tmp_path.glob('out/*'))


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root reads every file')
def test_a_file_that_may_not_be_read(tmp_path):
    (folder(tmp_path/'x')/'cat'/'3.png').chmod(0)
    with refused('cat/3.png', 'Permission'): pack.pack(tmp_path/'x', tmp_path/'p', 8, progress=False)


@many(max_examples=12)
@given(stop=st.integers(0, 39), workers=st.integers(1, 3))
def test_packing_stopped_anywhere_ends_the_same(stop, workers):
    with TemporaryDirectory() as d:
        root, real, seen = folder(f'{d}/x', n=20), pack.decode, []

        def stops(content, name, *rest):
            if len(seen) >= stop: raise KeyboardInterrupt
            seen.append(name)
            return real(content, name, *rest)
        with patch.object(pack, 'decode', stops), pytest.raises(KeyboardInterrupt):
            pack.pack(root, f'{d}/p', 8, workers=workers, progress=False)
        assert not Path(d, 'p').exists()
        pack.pack(root, f'{d}/p', 8, workers=workers, progress=False)
        pack.pack(root, f'{d}/whole', 8, progress=False)
        for n in ('images.npy', 'labels.npy', 'ids.csv', 'card.json'):
            assert Path(d, 'p', n).read_bytes() == Path(d, 'whole', n).read_bytes()


def test_other_images_do_not_go_on_with_what_was_stopped(tmp_path):
    root = folder(tmp_path/'x')
    with patch.object(pack, 'decode', side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        pack.pack(root, tmp_path/'p', 8, progress=False)
    (root/'cat'/'3.png').rename(root/'cat'/'30.png')
    assert pack.pack(root, tmp_path/'p', 8, progress=False)['counts'] == {'train': 16, 'test': 4}


# archives

def tar_of(root, to, mode):
    with tarfile.open(to, f'w:{mode}') as tar: tar.add(root, arcname='x')
    return Path(to)


@many(max_examples=30)
@given(mode=st.sampled_from(('xz', 'gz', '')), share=st.floats(0, .999))
def test_a_truncated_archive(mode, share):
    with TemporaryDirectory() as d:
        a = tar_of(folder(f'{d}/x'), f'{d}/x.tar{"." if mode else ""}{mode}', mode)
        whole = {i.name for i in open_source(a).items}
        a.write_bytes(a.read_bytes()[:int(share*a.stat().st_size)])
        try: assert {i.name for i in open_source(a).items} == whole     # only padding was lost
        except InputError as e: assert str(a) in str(e) and len(str(e).splitlines()) == 1


@many(max_examples=30)
@given(kind=st.sampled_from(('zip', 'tar.gz', 'tar.xz')), spoilt=spoilt)
def test_a_damaged_archive_is_unpacked_whole_or_refused(kind, spoilt):
    with TemporaryDirectory() as d:
        root, a = folder(f'{d}/x', n=2), Path(d, f'a.{kind}')
        if kind == 'zip':
            with zipfile.ZipFile(a, 'w') as z:
                for f in sorted(root.rglob('*.png')): z.write(f, f.relative_to(root))
        else: tar_of(root, a, kind[4:])
        content = bytearray(a.read_bytes())
        for place, value in spoilt: content[int(place*len(content))] = value
        a.write_bytes(content)
        try: fetch.unpack(a, f'{d}/out', progress=False)
        except InputError as e: assert str(a) in str(e) or 'out' in str(e)
        assert {p.name for p in Path(d).iterdir()} <= {'x', a.name, 'out'}


@many(max_examples=60)
@given(st.sampled_from(('zip', 'tar')), st.lists(st.sampled_from(('..', '.', 'a', 'b.png', '', 'C:', '~', 'a\\b')), min_size=1, max_size=5))
def test_no_member_leaves_the_folder(kind, parts):
    name = '/'.join(parts)
    assume(name.strip('/.'))
    with TemporaryDirectory() as d:
        a = Path(d, 'in', f'a.{kind}')
        a.parent.mkdir()
        if kind == 'zip':
            with zipfile.ZipFile(a, 'w') as z: z.writestr(name, b'x')
        else:
            with tarfile.open(a, 'w') as tar:
                m = tarfile.TarInfo(name)
                m.size = 1
                tar.addfile(m, io.BytesIO(b'x'))
        try: fetch.unpack(a, Path(d, 'in', 'deep', 'out'), progress=False)
        except InputError as e: assert str(a) in str(e) or 'out' in str(e)
        outside = [p for p in Path(d).rglob('*') if p.is_file() and p != a and Path(d, 'in', 'deep', 'out') not in p.parents]
        assert not outside


@pytest.mark.parametrize('kind', ['zip', 'tar.gz', 'tar.xz'])
def test_a_bomb(kind, tmp_path):
    a = tmp_path/f'a.{kind}'
    if kind == 'zip':
        with zipfile.ZipFile(a, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('zeros.jpg', bytes(4*10**7))
    else:
        (tmp_path/'zeros.jpg').write_bytes(bytes(4*10**7))
        tar_of(tmp_path/'zeros.jpg', a, kind[4:])
    with refused(a, 'grows beyond'): fetch.unpack(a, tmp_path/'out', progress=False)
    assert sum(p.stat().st_size for p in (tmp_path/'out').rglob('*') if p.is_file()) < 3*10**7


@pytest.mark.parametrize('kind', ['link', 'hard link', 'device', 'pipe', 'zip link'])
def test_what_is_no_plain_file(kind, tmp_path):
    a = tmp_path/('a.zip' if kind == 'zip link' else 'a.tar')
    if kind == 'zip link':
        with zipfile.ZipFile(a, 'w') as z:
            link = zipfile.ZipInfo('x.jpg')
            link.external_attr = 0o120777 << 16
            z.writestr(link, '/etc/passwd')
    else:
        with tarfile.open(a, 'w') as tar:
            m = tarfile.TarInfo('x.jpg')
            m.type = {'link': tarfile.SYMTYPE, 'hard link': tarfile.LNKTYPE, 'device': tarfile.CHRTYPE, 'pipe': tarfile.FIFOTYPE}[kind]
            m.linkname = '/etc/passwd'
            tar.addfile(m)
    with refused(a, 'x.jpg', 'no plain file'): fetch.unpack(a, tmp_path/'out', progress=False)


@pytest.mark.parametrize('arrays, words', [
    ({}, 'no train_images'), ({'train_images': np.zeros((4, 8, 8), np.uint8)}, 'train_labels'),
    ({'train_images': np.zeros((4, 8, 8), complex), 'train_labels': np.zeros(4, int)}, 'uint8'),
    ({'train_images': np.zeros((4, 8, 8, 4), np.uint8), 'train_labels': np.zeros(4, int)}, 'N x H x W x 3'),
    ({'train_images': np.zeros((4, 8, 8), np.uint8), 'train_labels': np.zeros((4, 14), int)}, '14 labels an image'),
    ({'train_images': np.zeros((4, 8, 8), np.uint8), 'train_labels': np.arange(4) % 2}, 'no test split'),
])
def test_a_medmnist_file_that_is_none(arrays, words, tmp_path):
    np.savez(tmp_path/'x.npz', **arrays)
    with refused(tmp_path/'x.npz', words): open_source(tmp_path/'x.npz')


# downloads

class Breaking(BaseHTTPRequestHandler):
    """Serves `content`, and breaks off where `breaks` says, one after another."""
    content, breaks, ranges = b'', [], True

    def log_message(self, *args): pass

    def do_GET(self):
        first = int(self.headers['Range'][6:-1]) if self.ranges and 'Range' in self.headers else 0
        self.send_response(206 if first else 200)
        self.send_header('Content-Length', str(len(self.content) - first))
        self.send_header('ETag', '"1"')
        self.end_headers()
        self.wfile.write(self.content[first:first + Breaking.breaks.pop(0)] if Breaking.breaks else self.content[first:])


@pytest.fixture(scope='module')
def address():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Breaking)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/images.bin'
    server.shutdown()


@many(max_examples=25)
@given(breaks=st.lists(st.integers(0, 5000), max_size=6), ranges=st.booleans(), n=st.integers(1, 9000))
def test_a_download_that_breaks_off(address, breaks, ranges, n):
    content = np.random.default_rng(n).bytes(n)
    Breaking.content, Breaking.breaks, Breaking.ranges = content, list(breaks), ranges
    with TemporaryDirectory() as d, patch('time.sleep'):
        (Path(d)/'whole').write_bytes(content)
        checksum = f"sha256:{pooch.file_hash(f'{d}/whole', 'sha256')}"
        for _ in range(3):     # what arrived in one call is kept for the next
            try:
                fetch.download(address, Path(d, 'got', 'images.bin'), checksum, progress=False)
                break
            except InputError as e: assert 'bytes are kept' in str(e)
        assert Path(d, 'got', 'images.bin').read_bytes() == content and len(list(Path(d, 'got').iterdir())) == 1


def test_no_room_for_a_download(address, tmp_path):
    Breaking.content, Breaking.breaks = bytes(5000), []
    with patch('shutil.disk_usage', return_value=namedtuple('usage', 'free')(1000)), refused('make room'):
        fetch.download(address, tmp_path/'images.bin', progress=False)


def test_nobody_answers(tmp_path):
    with patch('time.sleep'), refused('127.0.0.1:9', '0 bytes are kept', 'XBENCH_MIRROR'):
        fetch.download('http://127.0.0.1:9/x.tar', tmp_path/'x.tar', progress=False)


# splits

@many(max_examples=40)
@given(rows=st.lists(st.tuples(st.sampled_from('abc'), st.integers(0, 30)), min_size=30, max_size=200),
       seed=st.integers(0, 3), share=st.sampled_from((.1, .2, .5)))
def test_groups_never_stand_on_both_sides(rows, seed, share):
    items = [Item(None, c, f'{k}.png', f'{c}{g}') for k, (c, g) in enumerate(rows)]
    groups = Counter(c for c, g in {(i.label, i.group) for i in items})
    if min(groups.values()) < 2:
        with refused('too few'): assign(items, {'test': share}, seed)
        return
    made = assign(items, {'test': share}, seed)
    sides = {}
    for i in made: sides.setdefault(i.group, set()).add(i.split)
    assert all(len(s) == 1 for s in sides.values()) and made == assign(items, {'test': share}, seed)
    assert all({i.split for i in made if i.label == c} == {'train', 'test'} for c in groups)
    labels, split, group = (np.array([getattr(i, k) for i in made]) for k in ('label', 'split', 'group'))
    if all(len(set(group[(labels == c) & (split == 'train')])) == 1 for c in groups):
        with refused('training image'): carve(labels, split, .2, seed, group)
        return
    at = carve(labels, split, .2, seed, group)
    assert not {made[k].group for k in at['val']} & {made[k].group for k in at['train']}
    assert sorted(np.concatenate(list(at.values()))) == list(range(len(made)))
