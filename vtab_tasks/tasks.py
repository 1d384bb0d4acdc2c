"""The 19 tasks of VTAB-1K as rows of data, and the rule that selects the items of each split.

Sizes, slices and label bins follow the official VTAB code, github.com/google-research/task_adaptation (Zhai et al.,
arXiv:1910.04867); dataset names and versions are those of tensorflow-datasets (TFDS).
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vtab_tasks import labels

SPLITS = ("train800", "val200", "train800val200", "test")
GROUPS = ("natural", "specialized", "structured")


@dataclass(frozen=True)
class Part:
    """Items start, ..., stop - 1 of one TFDS split, in TFDS order."""

    split: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        """The slice as TFDS writes it, for example `train[0:800]`."""
        return f"{self.split}[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class Edition:
    """Where a task's images are in its dataset.

    Attributes:
        sizes: numbers of examples in the TFDS splits that are used, as (split, number) pairs.
        train800: where the 800 training images are.
        val200: where the 200 validation images are.
        test: where the test images are.
    """

    sizes: tuple[tuple[str, int], ...]
    train800: Part
    val200: Part
    test: Part

    def parts(self, split: str) -> tuple[Part, ...]:
        """List the slices that make up a split, in order.

        Raises:
            ValueError: `split` is none of `SPLITS`.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        if split == "train800val200":
            return (self.train800, self.val200)
        return (getattr(self, split),)

    def size(self, split: str) -> int:
        """Count the images in a split."""
        return sum(len(part) for part in self.parts(split))


@dataclass(frozen=True)
class Task:
    """One task of VTAB-1K.

    Attributes:
        name: the task's id, for example `dsprites_loc`.
        group: one of `GROUPS`.
        num_classes: width of the head; labels are 0, ..., num_classes - 1. Some may be missing from the 1,000 images.
        classes: what a class means, in words.
        folders: names that the task's folder has in community copies of `vtab-1k`.
        tfds_name: the dataset's name in TFDS, with the configuration if it has one.
        tfds_versions: the TFDS versions that hold the same data, as patterns such as `2.*.*`.
        image_size: native (height, width) in pixels; None where images differ.
        pixel_scale: what a stored pixel is multiplied by to fill 0, ..., 255.
        label_fn: label of one TFDS example, from its features.
        editions: where the images are; the first is the one of VTAB, others hold the same images within a few.
        manual: what has to be fetched by hand before TFDS can prepare the dataset; empty if nothing has.
        manual_files: patterns of the files and folders that must then be there, below the folder for such files.
        url: home of the data.
        citation: whom to cite for it.
    """

    name: str
    group: str
    num_classes: int
    classes: str
    folders: tuple[str, ...]
    tfds_name: str
    tfds_versions: tuple[str, ...]
    image_size: tuple[int, int] | None
    label_fn: Callable[[Mapping[str, Any]], int]
    editions: tuple[Edition, ...]
    url: str
    citation: str
    pixel_scale: int = 1
    manual: str = ""
    manual_files: tuple[str, ...] = ()

    def parts(self, split: str) -> tuple[Part, ...]:
        """List the slices of the official edition that make up a split, in order.

        Raises:
            ValueError: `split` is none of `SPLITS`.
        """
        return self.editions[0].parts(split)

    def size(self, split: str) -> int:
        """Count the images in a split of the official edition."""
        return self.editions[0].size(split)

    def sizes(self, split: str) -> tuple[int, ...]:
        """List the numbers of images that a split may have, the official one first."""
        return tuple(dict.fromkeys(edition.size(split) for edition in self.editions))


def _cut(train: int, val_from: int, test: int, test_split: str = "test") -> Edition:
    """Validation images are cut from TFDS's training split."""
    sizes = (("train", train), (test_split, test))
    return Edition(sizes, Part("train", 0, 800), Part("train", val_from, val_from + 200), Part(test_split, 0, test))


def _tail(train: int, val_from: int, test_from: int) -> Edition:
    """All three are cut from TFDS's only split."""
    val = Part("train", val_from, val_from + 200)
    return Edition((("train", train),), Part("train", 0, 800), val, Part("train", test_from, train))


def _three(train: int, validation: int, test: int) -> Edition:
    """TFDS has all three splits."""
    sizes = (("train", train), ("validation", validation), ("test", test))
    return Edition(sizes, Part("train", 0, 800), Part("validation", 0, 200), Part("test", 0, test))


def _clevr(name: str, num_classes: int, classes: str, label_fn: Callable[[Mapping[str, Any]], int]) -> Task:
    return Task(
        name=name,
        group="structured",
        num_classes=num_classes,
        classes=classes,
        folders=(name,),
        tfds_name="clevr",
        tfds_versions=("3.*.*",),
        image_size=(320, 480),
        label_fn=label_fn,
        # TFDS's test split has no scene labels.
        editions=(_cut(70_000, 63_000, 15_000, "validation"),),
        url="https://cs.stanford.edu/people/jcjohns/clevr/",
        citation="Johnson, Hariharan, van der Maaten, Fei-Fei, Zitnick, Girshick: CLEVR, CVPR 2017",
    )


def _dsprites(name: str, classes: str, label_fn: Callable[[Mapping[str, Any]], int]) -> Task:
    return Task(
        name=name,
        group="structured",
        num_classes=16,
        classes=classes,
        folders=(name,),
        tfds_name="dsprites",
        tfds_versions=("2.*.*",),
        image_size=(64, 64),
        pixel_scale=255,
        label_fn=label_fn,
        editions=(_tail(737_280, 589_824, 663_552),),  # 80/10/10
        url="https://github.com/google-deepmind/dsprites-dataset",
        citation="Matthey, Higgins, Hassabis, Lerchner: dSprites - Disentanglement testing Sprites, 2017",
    )


def _smallnorb(
    name: str, folder: str, num_classes: int, classes: str, label_fn: Callable[[Mapping[str, Any]], int]
) -> Task:
    """Training images show other toys than validation and test images, which halve TFDS's test split."""
    test = Part("test", 12_150, 24_300)
    edition = Edition((("train", 24_300), ("test", 24_300)), Part("train", 0, 800), Part("test", 0, 200), test)
    return Task(
        name=name,
        group="structured",
        num_classes=num_classes,
        classes=classes,
        folders=(folder,),
        tfds_name="smallnorb",
        tfds_versions=("2.*.*",),
        image_size=(96, 96),
        label_fn=label_fn,
        editions=(edition,),
        url="https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/",
        citation="LeCun, Huang, Bottou: Learning methods for generic object recognition, CVPR 2004",
    )


_ROWS = (
    Task(
        name="caltech101",
        group="natural",
        num_classes=102,
        classes="101 kinds of objects, and background as class 4, by folder name in alphabetical order",
        folders=("caltech101",),
        tfds_name="caltech101",
        tfds_versions=("3.*.*",),
        image_size=None,
        label_fn=labels.given,
        # TFDS draws the training images from the order in which the system lists a folder, and one drawn file may be
        # no image: the second edition is the community's.
        editions=(_cut(3_060, 2_754, 6_084), _cut(3_059, 2_753, 6_085)),  # 90/10
        url="https://data.caltech.edu/records/mzrjq-6wc02",
        citation="Fei-Fei, Fergus, Perona: Learning generative visual models from few training examples, 2004",
    ),
    Task(
        name="cifar100",
        group="natural",
        num_classes=100,
        classes="100 fine classes in alphabetical order",
        folders=("cifar", "cifar100"),
        tfds_name="cifar100",
        tfds_versions=("3.*.*",),
        image_size=(32, 32),
        label_fn=labels.given,
        editions=(_cut(50_000, 45_000, 10_000),),  # 90/10
        url="https://www.cs.toronto.edu/~kriz/cifar.html",
        citation="Krizhevsky: Learning multiple layers of features from tiny images, 2009",
    ),
    Task(
        name="dtd",
        group="natural",
        num_classes=47,
        classes="47 textures in alphabetical order",
        folders=("dtd",),
        tfds_name="dtd",
        tfds_versions=("3.*.*",),
        image_size=None,
        label_fn=labels.given,
        editions=(_three(1_880, 1_880, 1_880),),
        url="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        citation="Cimpoi, Maji, Kokkinos, Mohamed, Vedaldi: Describing textures in the wild, CVPR 2014",
    ),
    Task(
        name="flowers102",
        group="natural",
        num_classes=102,
        classes="102 flowers, in the order of the authors' imagelabels.mat",
        folders=("oxford_flowers102",),
        tfds_name="oxford_flowers102",
        tfds_versions=("2.*.*",),
        image_size=None,
        label_fn=labels.given,
        editions=(_three(1_020, 1_020, 6_149),),
        url="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        citation="Nilsback, Zisserman: Automated flower classification over a large number of classes, ICVGIP 2008",
    ),
    Task(
        name="pets",
        group="natural",
        num_classes=37,
        classes="37 breeds of cats and dogs in alphabetical order",
        folders=("oxford_iiit_pet", "oxford_pet"),
        tfds_name="oxford_iiit_pet",
        tfds_versions=("3.*.*", "4.0.*"),  # 4.0 re-encodes a few damaged files; keys and lists are the same
        image_size=None,
        label_fn=labels.given,
        editions=(_cut(3_680, 2_944, 3_669),),  # 80/20
        url="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        citation="Parkhi, Vedaldi, Zisserman, Jawahar: Cats and dogs, CVPR 2012",
    ),
    Task(
        name="svhn",
        group="natural",
        num_classes=10,
        classes="the digit, 0 to 9",
        folders=("svhn",),
        tfds_name="svhn_cropped",
        tfds_versions=("3.*.*",),
        image_size=(32, 32),
        label_fn=labels.given,
        editions=(_cut(73_257, 65_931, 26_032),),  # 90/10
        url="http://ufldl.stanford.edu/housenumbers/",
        citation="Netzer et al.: Reading digits in natural images with unsupervised feature learning, 2011",
    ),
    Task(
        name="sun397",
        group="natural",
        num_classes=397,
        classes="397 scenes in the order of TFDS; the 1,000 images show 325 of them",
        folders=("sun397",),
        tfds_name="sun397/tfds",
        tfds_versions=("4.*.*",),
        image_size=None,
        label_fn=labels.given,
        # Newer TFDS leaves out one training image that cannot be decoded; it is far behind the first 800.
        editions=(_three(76_128, 10_875, 21_750), _three(76_127, 10_875, 21_750)),
        url="https://vision.princeton.edu/projects/2010/SUN/",
        citation="Xiao, Hays, Ehinger, Oliva, Torralba: SUN database, CVPR 2010",
    ),
    Task(
        name="patch_camelyon",
        group="specialized",
        num_classes=2,
        classes="0 normal tissue, 1 tumour in the middle of the patch",
        folders=("patch_camelyon",),
        tfds_name="patch_camelyon",
        tfds_versions=("2.*.*",),
        image_size=(96, 96),
        label_fn=labels.given,
        editions=(_three(262_144, 32_768, 32_768),),
        url="https://github.com/basveeling/pcam",
        citation="Veeling, Linmans, Winkens, Cohen, Welling: Rotation equivariant CNNs for digital pathology, 2018",
    ),
    Task(
        name="eurosat",
        group="specialized",
        num_classes=10,
        classes="10 kinds of land use in alphabetical order",
        folders=("eurosat",),
        tfds_name="eurosat/rgb",
        tfds_versions=("2.*.*",),
        image_size=(64, 64),
        label_fn=labels.given,
        editions=(_tail(27_000, 16_200, 21_600),),  # 60/20/20
        url="https://github.com/phelber/eurosat",
        citation="Helber, Bischke, Dengel, Borth: EuroSAT, IEEE J-STARS 2019",
    ),
    Task(
        name="resisc45",
        group="specialized",
        num_classes=45,
        classes="45 scenes from above in alphabetical order",
        folders=("resisc45",),
        tfds_name="resisc45",
        tfds_versions=("3.*.*",),
        image_size=(256, 256),
        label_fn=labels.given,
        editions=(_tail(31_500, 18_900, 25_200),),  # 60/20/20
        manual="Fetch NWPU-RESISC45.rar from the dataset's home and unpack it there, to NWPU-RESISC45/<class>/*.jpg.",
        manual_files=("NWPU-RESISC45/airplane/*.jpg", "NWPU-RESISC45/wetland/*.jpg"),
        url="https://gcheng-nwpu.github.io/",
        citation="Cheng, Han, Lu: Remote sensing image scene classification, Proceedings of the IEEE 2017",
    ),
    Task(
        name="retinopathy",
        group="specialized",
        num_classes=5,
        classes="severity of retinopathy, 0 to 4",
        folders=("diabetic_retinopathy", "retinopathy"),
        tfds_name="diabetic_retinopathy_detection/btgraham-300",
        tfds_versions=("3.*.*",),
        image_size=None,
        label_fn=labels.given,
        editions=(_three(35_126, 10_906, 42_670),),
        manual="With a Kaggle account fetch the competition's files and unpack them there: sample.zip to sample/, "
        "train.zip.* to train/, test.zip.* to test/, and trainLabels.csv.zip.",
        manual_files=("sample/*.jpeg", "train/*_left.jpeg", "test/*_left.jpeg", "trainLabels.csv"),
        url="https://www.kaggle.com/c/diabetic-retinopathy-detection",
        citation="Kaggle and EyePACS: Diabetic retinopathy detection, 2015",
    ),
    _clevr("clevr_count", 8, "number of objects, 3 to 10", labels.clevr_count),
    _clevr(
        "clevr_dist", 6, "depth of the nearest object, in bins that end at 8, 8.5, 9, 9.5 and 10", labels.clevr_dist
    ),
    Task(
        name="dmlab",
        group="structured",
        num_classes=6,
        classes="distance (close, far, very far) of an object with positive (0 to 2) or negative (3 to 5) reward",
        folders=("dmlab",),
        tfds_name="dmlab",
        tfds_versions=("2.0.*",),
        image_size=(360, 480),
        label_fn=labels.given,
        editions=(_three(65_550, 22_628, 22_735),),
        url="https://github.com/google-research/task_adaptation",
        citation="Zhai et al.: A large-scale study of representation learning with VTAB, 2019",
    ),
    Task(
        name="kitti_dist",
        group="structured",
        num_classes=4,
        classes="distance of the nearest vehicle: up to 8 m, up to 20 m, farther, none",
        folders=("kitti", "kitti_dist"),
        tfds_name="kitti",
        tfds_versions=("3.*.*",),
        image_size=None,
        label_fn=labels.kitti_dist,
        editions=(_three(6_347, 423, 711),),
        url="http://www.cvlibs.net/datasets/kitti/",
        citation="Geiger, Lenz, Stiller, Urtasun: Vision meets robotics: the KITTI dataset, IJRR 2013",
    ),
    _dsprites("dsprites_loc", "horizontal position in 16 equal bins, from the left", labels.dsprites_loc),
    _dsprites("dsprites_ori", "orientation in 16 bins of 2.5 steps of 2 pi / 39", labels.dsprites_ori),
    _smallnorb("snorb_azim", "smallnorb_azi", 18, "azimuth in steps of 20 degrees", labels.snorb_azim),
    _smallnorb("snorb_elev", "smallnorb_ele", 9, "elevation, 30 to 70 degrees in steps of 5", labels.snorb_elev),
)

TASKS: dict[str, Task] = {task.name: task for task in _ROWS}


def get_task(name: str) -> Task:
    """Look up a task by its name.

    Raises:
        ValueError: there is no such task; the message gives the nearest names and all names.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise ValueError(f"unknown task {name!r}{hint} The tasks are: {', '.join(TASKS)}")
