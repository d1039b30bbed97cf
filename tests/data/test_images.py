"""Images to pixel values: layouts, ranges, sizes, Pillow, processors, and every refusal."""

import io

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from PIL import Image

from hf_efficient.data.datasets import load_dataset_any
from hf_efficient.data.preparation import prepare
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


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(contents, feature=None, processor=None, **options):
    """The pixel values of encoded images, mapped back to 0..1."""
    storage = pa.array([{"bytes": each, "path": None} for each in contents], datasets.Image.pa_type)
    table = pa.table({"image": storage, "label": [n % 2 for n in range(len(contents))]})
    features = datasets.Features(image=feature or datasets.Image(), label=datasets.Value("int64"))
    data = datasets.Dataset(table.cast(features.arrow_schema), info=datasets.DatasetInfo(features=features))
    ready = prepare({"train": data, "test": data}, "image-classification", processor, **options)
    return (ready.train[:]["pixel_values"] + 1) / 2


SIXTEEN = np.array([[0, 255, 256], [32767, 40000, 65535]], dtype="uint16")


@pytest.mark.parametrize("mode", [None, "L", "RGB"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_and_never_clipped(kind, mode):
    values = pixels([encoded(Image.fromarray(SIXTEEN), kind)] * 2, datasets.Image(mode=mode))
    assert values.shape == (2, 3 if mode == "RGB" else 1, 2, 3)
    torch.testing.assert_close(values[0, 0], torch.tensor(SIXTEEN / 65535, dtype=torch.float32))


def test_sixteen_bits_in_other_layouts_agree():
    swapped = Image.frombytes("I;16B", (3, 2), SIXTEEN.byteswap().tobytes())
    wide = Image.fromarray(SIXTEEN.astype("int32"))
    plain = pixels([encoded(Image.fromarray(SIXTEEN))] * 2)
    assert torch.equal(plain, pixels([encoded(swapped, "TIFF")] * 2))
    assert torch.equal(plain, pixels([encoded(wide, "TIFF")] * 2))
    column = datasets.Dataset.from_dict(
        {"image": [SIXTEEN.tolist()] * 2, "label": [0, 1]},
        features=datasets.Features(image=datasets.Array2D((2, 3), "uint16"), label=datasets.Value("int64")),
    )
    ready = prepare({"train": column, "test": column}, "image-classification", None)
    assert torch.equal(plain, (ready.train[:]["pixel_values"] + 1) / 2)


def test_a_processor_sees_sixteen_bits_as_eight():
    processor = transformers.ViTImageProcessorPil(do_resize=False)
    deep = np.repeat(np.arange(0, 256, dtype="uint16").reshape(16, 16) * 257, 1, axis=0)
    seen = [
        pixels([encoded(Image.fromarray(array))] * 2, processor=processor)
        for array in (deep, (deep // 257).astype("uint8"))
    ]
    assert torch.equal(*seen) and len(seen[0].unique()) == 256


def test_floats_from_black_to_white():
    values = np.array([[0.0, 0.25], [0.75, 1.0]], dtype="float32")
    torch.testing.assert_close(pixels([encoded(Image.fromarray(values), "TIFF")] * 2)[0, 0], torch.tensor(values))


def test_what_is_transparent_lies_on_white():
    glyph = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    glyph.putpixel((0, 0), (0, 0, 0, 255))
    grey = Image.new("LA", (2, 1), (0, 0))
    grey.putpixel((0, 0), (0, 255))
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((0, 0), 0)
    for content in (
        encoded(glyph),
        encoded(glyph, "WEBP", lossless=True),
        encoded(grey),
        encoded(palette, transparency=1),
    ):
        assert pixels([content] * 2)[0].tolist() == [[[0.0, 1.0]]] * 3
    assert pixels([encoded(Image.new("RGB", (2, 1), "red"))] * 2)[0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert pixels([encoded(Image.new("1", (2, 1), 1))] * 2)[0].tolist() == [[[1.0, 1.0]]] * 3


def wide(*values, kind="int32"):
    return encoded(Image.fromarray(np.array([values], dtype=kind)), "TIFF")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (wide(0, 70_000), "from 0 to 70000.*65535 white"),
        (wide(-1, 5), "from -1 to 5"),
        (wide(0, 255), "nobody knows if 255 or 65535 is white"),
        (wide(0, 255, kind="float32"), "from 0 to 255.*1 white"),
        (wide(0, float("nan"), kind="float32"), "nan"),
        (encoded(Image.new("RGB", (64, 64), "red"), "JPEG")[:-300], "cannot be decoded"),
        (encoded(Image.new("RGB", (4, 4)), "EPS"), "EPS is a program"),
        (encoded(Image.new("1", (10_000, 10_000))), "10000 x 10000 pixels, at most 89,478,485"),
        (encoded(Image.new("1", (20_000, 20_000))), "decompression bomb"),
        (b"", "cannot be decoded"),
        (None, "no image"),
    ],
    ids=range(11),
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_encoded_images_refused(content, words):
    fine = encoded(Image.new("L", (4, 4)))
    with pytest.raises(DataError, match=rf"(?s)Row 1, image column 'image': .*{words}"):
        pixels([fine, content], image_size=4)


def test_an_image_in_a_file_and_one_that_is_gone(tmp_path):
    path = tmp_path / "a[1]::b.png"
    path.write_bytes(encoded(Image.fromarray(SIXTEEN)))
    data = images([str(path)] * 2, datasets.Image())
    ready = prepare(data, "image-classification", None)
    torch.testing.assert_close((ready.train[0]["pixel_values"][0] + 1) / 2, torch.tensor(SIXTEEN / 65535).float())
    path.unlink()
    with pytest.raises(DataError, match="there is no image file"):
        prepare(data, "image-classification", None, image_size=3)


@pytest.mark.parametrize("kind", ["https", "HTTP", "ftp", "s3", "zip://a.png::https"])
def test_no_address_of_the_network_is_opened(kind, monkeypatch):
    import fsspec

    monkeypatch.setattr(fsspec, "open", lambda *_, **__: pytest.fail("it was opened"))
    data = images([{"bytes": None, "path": f"{kind}://me:password@host/a.png"}] * 2, datasets.Image(decode=False))
    with pytest.raises(DataError, match="images are read from files") as caught:
        prepare(data, "image-classification", None)
    assert "password" not in str(caught.value)
