"""Image sets: Fashion-MNIST, CIFAR-100, folders of images, and their splits by class. Imports torch."""

from fct.data.cifar import load_cifar100
from fct.data.fashion_mnist import load_fashion_mnist
from fct.data.folders import ImageFolder, every_image, load_image_folder
from fct.data.idx import read_idx
from fct.data.image_set import ImageSet
from fct.data.splits import first_classes

__all__ = [
    "ImageFolder",
    "ImageSet",
    "every_image",
    "first_classes",
    "load_cifar100",
    "load_fashion_mnist",
    "load_image_folder",
    "read_idx",
]
