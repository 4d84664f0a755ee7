"""What tests over the whole registry share."""
from xbench.backbones.core import entry, names
from xbench.export import normalise, photographs

NAMES = names()
PHOTOGRAPHS = photographs(8, 224)


def sizes(name):
    """Two sizes that it takes: the least that a batch norm can be trained at, and a larger one."""
    e = entry(name)
    return [e.size] if e.step is None else [e.step*-(-max(32, e.least)//e.step), e.step*-(-max(47, e.least + 1)//e.step)]


def images(size):
    return normalise(PHOTOGRAPHS, size)
