"""Images to pixel values: layouts, ranges, sizes, Pillow, processors, and every refusal."""

import datasets
import numpy as np
import pytest
import torch
import transformers

from hf_efficient.data import load_dataset_any, prepare
from hf_efficient.errors import ConfigError, DataError


def images(arrays, feature=None):
    data = datasets.Dataset.from_dict({"image": arrays, "label": [i % 2 for i in range(len(arrays))]})
    data = data if feature is None else data.cast_column("image", feature)
    return {"train": data, "test": data}


def test_digits_become_normalised_pixels():
    loaded = load_dataset_any("bundled:digits", limit=60)
    ready = prepare(loaded, "image-classification", None)
    batch = ready.collator([ready.train[i] for i in range(5)])
    assert batch["pixel_values"].shape == (5, 1, 8, 8) and batch["pixel_values"].dtype == torch.float32
    expected = np.asarray(loaded["train"][:5]["image"]) / 127.5 - 1
    torch.testing.assert_close(batch["pixel_values"][:, 0], torch.tensor(expected, dtype=torch.float32))
    assert batch["labels"].tolist() == loaded["train"][:5]["label"] and ready.num_labels == 10


def test_layouts_and_ranges_agree():
    generator = np.random.default_rng(0)
    last = generator.integers(0, 256, (4, 6, 5, 3))
    results = [
        prepare(images(arrays.tolist()), "image-classification", None).train[:]["pixel_values"]
        for arrays in (last, last.transpose(0, 3, 1, 2), last / 255)
    ]
    assert results[0].shape == (4, 3, 6, 5)
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])
    assert not torch.equal(results[0][0], results[0][1])


def test_image_size_resizes_to_a_square():
    ready = prepare(
        images([np.full((4, 6), 255).tolist(), np.zeros((8, 8), int).tolist()]),
        "image-classification",
        None,
        image_size=5,
    )
    values = ready.train[:]["pixel_values"]
    assert values.shape == (2, 1, 5, 5)
    torch.testing.assert_close(values[0], torch.ones(1, 5, 5))
    torch.testing.assert_close(values[1], -torch.ones(1, 5, 5))


def test_pillow_images_and_a_processor():
    from PIL import Image

    arrays = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype("uint8")
    data = images([Image.fromarray(array) for array in arrays], datasets.Image())
    plain = prepare(data, "image-classification", None).train[:]["pixel_values"]
    torch.testing.assert_close(plain, torch.tensor(arrays.transpose(0, 3, 1, 2) / 127.5 - 1, dtype=torch.float32))
    processor = transformers.ViTImageProcessorPil(size={"height": 12, "width": 12})
    sized = prepare(data, "image-classification", processor).train[:]["pixel_values"]
    expected = processor(images=list(arrays), return_tensors="pt")["pixel_values"]
    assert sized.shape == (4, 3, 12, 12)
    torch.testing.assert_close(sized, expected)
    grey = prepare(images(arrays[..., 0].tolist()), "image-classification", processor).train[0]["pixel_values"]
    assert grey.shape == (3, 12, 12) and torch.equal(grey[0], grey[2])


@pytest.mark.parametrize(
    ("arrays", "options", "words"),
    [
        ([[[0, 1]], [[0, 1], [1, 2]]], {}, r"Row 1 has an image of shape \(1, 2, 2\).*image_size"),
        ([[[0, 256]], [[0, 1]]], {}, "values from 0 to 256"),
        ([[[0.0, 1.5]], [[0.0, 1.0]]], {}, "values from 0.0 to 1.5"),
        ([[[float("nan")]], [[0.0]]], {}, "values from nan"),
        ([[0, 1], [1, 2]], {}, r"shape \(2,\)"),
        ([[[0, 1], [2]], [[0, 1], [2]]], {}, "an image is"),
        (["a.png", "b.png"], {}, "where an image is needed"),
        ([[[0]], [[1]]], {"image_size": 0}, "image_size must be an integer"),
        ([[[0]], [[1]]], {"image_size": 10**6}, "image_size must be an integer"),
    ],
)
def test_images_refused(arrays, options, words):
    with pytest.raises((DataError, ConfigError), match=words):
        prepare(images(arrays), "image-classification", None, **options)
