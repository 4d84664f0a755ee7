"""Every dataset of the papers: fetched from a file server on 127.0.0.1 in its source's own layout, unpacked, listed and packed."""
import csv
import io
import json
import shutil
import tarfile
import zipfile
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import h5py
import numpy as np
import pooch
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage
from scipy.io import savemat

from xbench import cards
from xbench.cards import card
from xbench.errors import InputError
from xbench.fetch import fetch
from xbench.pack import pack
from xbench.sources import LAYOUTS, open_source

RNG = np.random.default_rng(0)


def picture(kind='JPEG', size=(20, 24)):
    Image.fromarray(RNG.integers(0, 256, (*size, 3), np.uint8)).save(f := io.BytesIO(), kind)
    return f.getvalue()


def mat(**arrays):
    savemat(f := io.BytesIO(), arrays)
    return f.getvalue()


def cells(names):
    """A column of strings as MATLAB keeps it."""
    out = np.empty((len(names), 1), object)
    out[:, 0] = names
    return out


def records(**columns):
    """A MATLAB array of structures."""
    rows = np.zeros((1, len(next(iter(columns.values())))), [(k, object) for k in columns])
    for k, values in columns.items(): rows[k][0] = values
    return rows


def cifar(fine, *names):
    rows = lambda n: b''.join(bytes([0]*fine + [k % 3]) + RNG.integers(0, 256, 3072, np.uint8).tobytes() for k in range(n))
    return {f'{names[0]}/{n}': rows(6) for n in names[1:]} | {f'{names[0]}/{names[-1]}': rows(3)}


def dicom():
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID, d.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, SecondaryCaptureImageStorage
    d.file_meta.MediaStorageSOPInstanceUID = '1.2.3'
    d.SOPClassUID, d.SOPInstanceUID = SecondaryCaptureImageStorage, '1.2.3'
    d.Rows, d.Columns, d.SamplesPerPixel, d.PhotometricInterpretation = 20, 24, 1, 'MONOCHROME2'
    d.BitsAllocated = d.BitsStored = 16
    d.HighBit, d.PixelRepresentation = 15, 0
    d.PixelData = RNG.integers(0, 4096, (20, 24), np.uint16).tobytes()
    d.save_as(f := io.BytesIO(), enforce_file_format=True)
    return f.getvalue()


def galaxy():
    with h5py.File(f := io.BytesIO(), 'w') as h:
        h['images'], h['ans'] = RNG.integers(0, 256, (30, 16, 16, 3), np.uint8), np.arange(30, dtype=np.uint8) % 3
    return f.getvalue()


def breakhis():
    root = 'BreaKHis_v1/histology_slides/breast'
    slides = [('benign', f'SOB_B_A-14-{s}') for s in ('100AB', '100CD', '101', '102', '103')]
    slides += [('malignant', f'SOB_M_DC-14-{s}') for s in ('200', '201', '202', '203')]
    return {f'{root}/{kind}/SOB/x/{slide}/{px}X/{slide}-{px}-{k:03}.png': picture('PNG')
            for kind, slide in slides for px in (40, 100, 200, 400) for k in range(4)}


def ham():
    rows = [(f'HAM_{k//3:07}', f'ISIC_{k:07}', 'nv' if k < 30 else 'mel') for k in range(60)]
    table = 'lesion_id,image_id,dx,dx_type,age,sex,localization\n' + ''.join(f'{a},{b},{c},histo,50.0,male,back\n' for a, b, c in rows)
    return {'HAM10000_images_part_1.zip': {f'{b}.jpg': picture() for _, b, _ in rows[:30]},
            'HAM10000_images_part_2.zip': {f'{b}.jpg': picture() for _, b, _ in rows[30:]}, 'HAM10000_metadata': table.encode()}


def rsna():
    ids = [f'{k:08x}-patient' for k in range(20)]
    rows = [(p, k % 2) for k, p in enumerate(ids)] + [(ids[1], 1)]     # the second box of one radiograph
    table = 'patientId,x,y,width,height,Target\n' + ''.join(f'{p},,,,,{t}\n' for p, t in rows)
    images = {f'stage_2_train_images/{p}.dcm': dicom() for p in ids} | {'stage_2_test_images/x.dcm': dicom()}
    return {'rsna-pneumonia-detection-challenge.zip': {'stage_2_train_labels.csv': table.encode(), **images}}


def cub():
    names = [f'00{c}.Bird/b_{k}.jpg' for c in (1, 2) for k in range(4)]
    number = lambda values: ''.join(f'{k} {v}\n' for k, v in enumerate(values, 1)).encode()
    return {'CUB_200_2011.tgz': {**{f'CUB_200_2011/images/{n}': picture() for n in names}, 'CUB_200_2011/images.txt': number(names),
                                 'CUB_200_2011/train_test_split.txt': number([1, 1, 1, 0]*2), 'attributes.txt': b'1 has_bill\n'}}


def cars():
    box = dict(bbox_x1=[1.]*4, bbox_y1=[1.]*4, bbox_x2=[9.]*4, bbox_y2=[9.]*4)
    annos = lambda: mat(annotations=records(**box, **{'class': [1., 2., 1., 2.]}, fname=[f'0000{k}.jpg' for k in range(4)]))
    images = lambda s: {f'cars_{s}/0000{k}.jpg': picture() for k in range(4)}
    return {'cars_train.tgz': images('train'), 'cars_test.tgz': images('test'), 'cars_test_annos_withlabels.mat': annos(),
            'car_devkit.tgz': {'devkit/cars_meta.mat': mat(class_names=cells(['AM General Hummer SUV 2000', 'Acura RL Sedan 2012'])),
                               'devkit/cars_train_annos.mat': annos(), 'devkit/cars_test_annos.mat': mat(annotations=records(**box))}}


def folders(root, classes, n=10, kind='JPEG', suffix='jpg'):
    return {f'{root}/{c}/{c}_{k}.{suffix}': picture(kind) for c in classes for k in range(n)}


def lists(root, form, **parts):
    return {root + form.format(s): '\n'.join(names).encode() + b'\n' for s, names in parts.items()}


def indoor():
    names = {s: [f'{c}/{c}_{s}{k}.jpg' for c in ('bar', 'gym') for k in range(3)] for s in ('train', 'test')}
    images = {f'Images/{n}': picture() for names in names.values() for n in names} | {'Images/bar/in_neither_list.jpg': picture()}
    return {'indoorCVPR_09.tar': images,
            'TrainImages.txt': '\r\n'.join(names['train']).encode(), 'TestImages.txt': '\n'.join(names['test']).encode()}


def places():
    train = [f'train/{c}/{k:08}.jpg' for c in ('a/abbey', 'b/bar') for k in range(4)]
    val = [f'val/{k:08}.jpg' for k in range(4)]
    numbered = {'train': [f'{n} {int("/b/" in n)}\n' for n in train], 'val': [f'{n} {k % 2}\n' for k, n in enumerate(val)]}
    return {'data.tar.gz': {f'images/{n}': picture() for n in [*train, *val, 'test/00000001.jpg']},
            **{f'{s}.txt': ''.join(rows).encode() for s, rows in numbered.items()}}


def dogs():
    breeds = {'n02085620': 'Chihuahua', 'n02085782': 'Japanese_spaniel'}
    names = {s: [f'{n}-{b}/{n}_{s}{k}.jpg' for n, b in breeds.items() for k in range(3)] for s in ('train', 'test')}
    return {'images.tar': {f'Images/{n}': picture() for names in names.values() for n in names},
            'lists.tar': {f'{s}_list.mat': mat(file_list=cells(n), labels=np.ones((len(n), 1))) for s, n in names.items()}}


def tiny():
    train = {f'tiny-imagenet-200/train/{c}/images/{c}_{k}.JPEG': picture() for c in ('n01', 'n02') for k in range(4)}
    boxes = {f'tiny-imagenet-200/train/{c}/{c}_boxes.txt': b'' for c in ('n01', 'n02')}
    val = {f'tiny-imagenet-200/val/images/val_{k}.JPEG': picture() for k in range(4)}
    notes = ''.join(f'val_{k}.JPEG\tn0{1 + k % 2}\t0\t0\t9\t9\n' for k in range(4)).encode()
    return {'tiny-imagenet-200.zip': {**train, **boxes, **val, 'tiny-imagenet-200/val/val_annotations.txt': notes,
                                      'tiny-imagenet-200/test/images/test_0.JPEG': picture()}}


def flowers():
    ids = mat(trnid=np.arange(1, 5)[None], valid=np.arange(5, 7)[None], tstid=np.arange(7, 13)[None])
    return {'102flowers.tgz': {f'jpg/image_{k:05}.jpg': picture() for k in range(1, 13)},
            'imagelabels.mat': mat(labels=np.arange(12)[None] % 2 + 1), 'setid.mat': ids}


def food():
    names = {s: [f'{c}/{s}{k}' for c in ('pie', 'soup') for k in range(3)] for s in ('train', 'test')}
    return {'food-101.tar.gz': {**{f'food-101/images/{n}.jpg': picture() for names in names.values() for n in names},
                                **lists('food-101/meta/', '{}.txt', **names)}}


def textures():
    names = {s: [f'{c}/{c}_{s}{k}.jpg' for c in ('banded', 'woven') for k in range(3)] for s in ('train', 'val', 'test')}
    return {'dtd-r1.0.1.tar.gz': {**{f'dtd/images/{n}': picture() for names in names.values() for n in names},
                                  **lists('dtd/labels/', '{}1.txt', **names), **lists('dtd/labels/', '{}2.txt', **names)}}


def surfaces():
    return {'NEU-CLS.zip': {f'NEU-CLS/{c}_{k}.bmp': picture('BMP') for c in ('Cr', 'In', 'Pa', 'PS', 'RS', 'Sc') for k in range(1, 11)}}


def cifar10():
    names = b'airplane\nautomobile\nbird\n\n'
    batches = [f'data_batch_{k}.bin' for k in range(1, 6)]
    images = cifar(0, 'cifar-10-batches-bin', *batches, 'test_batch.bin')
    return {'cifar-10-binary.tar.gz': images | {'cifar-10-batches-bin/batches.meta.txt': names}}


def cifar100():
    names = {'cifar-100-binary/fine_label_names.txt': b'apple\nbear\nbed\n', 'cifar-100-binary/coarse_label_names.txt': b'fruit\n'}
    return {'cifar-100-binary.tar.gz': cifar(1, 'cifar-100-binary', 'train.bin', 'test.bin') | names}


def imagenette():
    images = folders('imagenette2-160/train', ['n01', 'n02'], 4) | folders('imagenette2-160/val', ['n01', 'n02'], 2)
    return {'imagenette2-160.tgz': images | {'imagenette2-160/noisy_imagenette.csv': b'path\n'}}


def merced():
    return {'UCMerced_LandUse.zip': folders('UCMerced_LandUse/Images', ['river', 'beach'], kind='TIFF', suffix='tif')}


def plants():
    images = folders('Plant_leave_diseases_dataset_without_augmentation', ['Apple___healthy', 'Corn___rust'], suffix='JPG')
    return {'Plant_leaf_diseases_dataset_without_augmentation.zip': images}


MADE = {'train': 16, 'test': 4}     # of twenty images without a split
SOURCES = {     # slug: files as the source has them; images a split
    'cifar10': (cifar10, {'train': 30, 'test': 3}), 'cifar100': (cifar100, {'train': 6, 'test': 3}),
    'tiny_imagenet': (tiny, {'train': 8, 'test': 4}), 'imagenette160': (imagenette, {'train': 8, 'test': 4}),
    'stanford_dogs': (dogs, {'train': 6, 'test': 6}), 'ham10000': (ham, {'train': 48, 'test': 12}),
    'indoor67': (indoor, {'train': 6, 'test': 6}), 'miniplaces': (places, {'train': 8, 'test': 4}),
    'flowers102': (flowers, {'train': 4, 'val': 2, 'test': 6}), 'cub200': (cub, {'train': 6, 'test': 2}),
    'stanford_cars': (cars, {'train': 4, 'test': 4}), 'food101': (food, {'train': 6, 'test': 6}),
    'dtd': (textures, {'train': 6, 'val': 6, 'test': 6}), 'surface_defects': (surfaces, {'train': 48, 'test': 12}),
    'ucmerced': (merced, MADE), 'plantvillage': (plants, MADE),
    'eurosat': (lambda: {'EuroSAT.zip': folders('2750', ['Forest', 'River'])}, MADE),
    'galaxy10_decals': (lambda: {'Galaxy10_DECals.h5': galaxy()}, {'train': 24, 'test': 6}), 'rsna_pneumonia': (rsna, MADE),
    **{f'breakhis_{px}x': (lambda: {'BreaKHis_v1.tar.gz': breakhis()}, {'train': 28, 'test': 8}) for px in (40, 100, 200, 400)},
}


def archive(path, members):
    if path.suffix == '.zip':
        with zipfile.ZipFile(path, 'w') as z:
            for name, content in members.items(): z.writestr(name, content)
    else:
        with tarfile.open(path, f'w:{ {".gz": "gz", ".tgz": "gz"}.get(path.suffix, "")}') as tar:
            for name, content in members.items():
                m = tarfile.TarInfo(name)
                m.size = len(content)
                tar.addfile(m, io.BytesIO(content))


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp('served')

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass

    at = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=folder))
    Thread(target=at.serve_forever, daemon=True).start()
    yield folder, f'http://127.0.0.1:{at.server_port}'
    at.shutdown()


@pytest.fixture
def sourced(server, tmp_path, monkeypatch):
    """Puts a small source on the server and a card that points to it, as the study's own cards point to theirs."""
    folder, address = server
    (tmp_path/'cards').mkdir()
    monkeypatch.setenv('XBENCH_DATA', str(tmp_path/'datasets'))
    for v in ('XBENCH_MIRROR', 'XBENCH_OFFLINE'): monkeypatch.delenv(v, raising=False)

    def make(slug):
        c, files = card(slug), SOURCES[slug][0]()
        shutil.rmtree(folder/slug, ignore_errors=True)    # another test may have spoilt it
        for name, content in files.items():
            (folder/slug).mkdir(exist_ok=True)
            if isinstance(content, dict): archive(folder/slug/name, content)
            else: (folder/slug/name).write_bytes(content)
        assert set(files) <= {f['name'] for f in c['files']}, 'the card names other files'
        c['files'] = [f for f in c['files'] if f['name'] in files]
        for f in c['files']:
            f['checksum'] = f"md5:{pooch.file_hash(folder/slug/f['name'], 'md5')}"
            if f['url']: f['url'] = f'{address}/{slug}/{f["name"]}'
        (tmp_path/'cards'/f'{slug}.json').write_text(json.dumps(c))
        monkeypatch.setattr(cards, 'CARDS', tmp_path/'cards')
        if c['access'] == 'hand':     # what a user does who downloaded the files himself
            shutil.copytree(folder/slug, tmp_path/'datasets'/slug/'archives')
        return c
    return make


def test_every_source_that_can_be_had_is_tried():
    study = {s for s in cards.cards() if card(s)['access'] in ('open', 'hand')}
    assert study == set(SOURCES) and set(LAYOUTS) <= study


@pytest.mark.parametrize('slug', SOURCES)
def test_fetched_listed_and_packed(slug, sourced, tmp_path):
    c = sourced(slug)
    home = fetch(slug, progress=False)
    source = open_source(home)
    assert dict(Counter(i.split for i in source.items)) == SOURCES[slug][1]
    assert (source.split == 'official') == (c['split'] == 'official')
    groups = {s: {i.group for i in source.items if i.split == s and i.group} for s in ('train', 'test')}
    assert bool(groups['train']) == bool(c['group']) and not groups['train'] & groups['test']
    found = pack(home, tmp_path/'packed', 16, slug, progress=False)
    assert found['counts'] == SOURCES[slug][1] and len(found['classes']) == len(source.classes) >= 2
    with open(tmp_path/'packed'/'ids.csv', newline='') as f: ids = list(csv.DictReader(f))
    assert len({i['sha256'] for i in ids}) == len(ids) == sum(SOURCES[slug][1].values())     # each picture is another one, none was lost
    assert fetch(slug, progress=False) == home     # nothing to do


@pytest.mark.parametrize('slug', ['breakhis_100x', 'ham10000', 'flowers102', 'dtd'])
def test_a_papers_split_by_name(slug, sourced):
    sourced(slug)
    source = open_source(fetch(slug, progress=False), split='cross_dataset' if slug == 'ham10000' else 'which_backbone')
    n = Counter(i.split for i in source.items)
    groups = {s: {i.group for i in source.items if i.split == s and i.group} for s in ('train', 'test')}
    if slug == 'ham10000': assert n == {'train': 44, 'val': 8, 'test': 8} and groups['train'] & groups['test'], 'the paper splits by image'
    elif slug == 'flowers102': assert n == {'train': 6, 'test': 6}
    elif slug == 'dtd': assert n == {'train': 6, 'test': 6}
    else: assert groups['train'] & groups['test']
    with pytest.raises(InputError, match='unknown split'): open_source(fetch(slug, progress=False), split='mobileone')


def test_ham_metadata_with_tabs(sourced):
    sourced('ham10000')
    home = fetch('ham10000', progress=False)
    table = next(home.rglob('HAM10000_metadata'))
    commas = open_source(home).items
    table.write_text(table.read_text().replace(',', '\t'))
    assert open_source(home).items == commas


@pytest.mark.parametrize('slug', LAYOUTS)
def test_a_source_with_a_part_missing_is_named(slug, sourced):
    sourced(slug)
    home = fetch(slug, progress=False)
    kept = {p for p in (home/'files').rglob('*') if p.is_file()}
    for p in sorted(kept):
        if p.suffix not in ('.jpg', '.png', '.bmp', '.JPEG', '.bin', '.dcm'): p.unlink()
    if slug in ('surface_defects', 'galaxy10_decals') or slug.startswith('breakhis'):     # nothing but images
        shutil.rmtree(home/'files')
        (home/'files').mkdir()
    with pytest.raises(InputError, match='unpack its own files') as e: open_source(home)
    assert str(home/'files') in str(e.value) and len(str(e.value).splitlines()) == 1


def test_a_changed_file_is_not_used(sourced, server):
    sourced('ucmerced')
    (server[0]/'ucmerced'/'UCMerced_LandUse.zip').write_bytes(b'something else')
    with pytest.raises(InputError, match='set aside as UCMerced_LandUse.zip.wrong') as e: fetch('ucmerced', progress=False)
    assert pooch.file_hash(server[0]/'ucmerced'/'UCMerced_LandUse.zip', 'md5') in str(e.value)
    home = Path(cards.paths.datasets('ucmerced'))
    assert [p.name for p in home.rglob('*') if p.is_file()] == ['UCMerced_LandUse.zip.wrong']


def test_first_fetch_records_a_checksum_that_nobody_published(sourced, server, tmp_path):
    c = sourced('indoor67')
    for f in c['files']: f['checksum'] = None
    (tmp_path/'cards'/'indoor67.json').write_text(json.dumps(c))
    home = fetch('indoor67', progress=False)
    recorded = json.loads((home/'fetched.json').read_text())['files']
    assert all(len(f['sha256']) == 64 and f['bytes'] for f in recorded.values()) and len(recorded) == 3
    shutil.rmtree(home/'files')
    shutil.rmtree(home/'archives')
    (server[0]/'indoor67'/'TrainImages.txt').write_text('bar/other.jpg')
    with pytest.raises(InputError, match='TrainImages.txt: checksum sha256:'): fetch('indoor67', progress=False)


def test_by_hand_says_what_and_where(sourced, tmp_path):
    sourced('rsna_pneumonia')
    shutil.rmtree(tmp_path/'datasets'/'rsna_pneumonia')
    with pytest.raises(InputError) as e: fetch('rsna_pneumonia', progress=False)
    said = str(e.value)
    assert 'Kaggle' in said and 'rsna-pneumonia-detection-challenge.zip (md5:' in said
    assert str(tmp_path/'datasets'/'rsna_pneumonia'/'archives') in said


def test_offline_and_mirror(sourced, server, tmp_path, monkeypatch):
    sourced('eurosat')
    monkeypatch.setenv('XBENCH_OFFLINE', '1')
    with pytest.raises(InputError, match='XBENCH_OFFLINE is set'): fetch('eurosat', progress=False)
    monkeypatch.setenv('XBENCH_MIRROR', str(server[0]))
    assert open_source(fetch('eurosat', progress=False)).classes == ['Forest', 'River']


def test_a_page_instead_of_a_file(sourced, server):
    c = sourced('dtd')
    page = server[0]/'dtd'/'dtd-r1.0.1.tar.gz'
    page.unlink()
    page.mkdir()     # the server lists a folder as a web page
    with pytest.raises(InputError, match='answers with a web page'): fetch('dtd', progress=False)
    assert c['files'][0]['name'] == page.name
