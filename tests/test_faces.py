"""models/faces.py: recognisers, the similarity of faces, and finding them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import facenet_pytorch
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tiny import noise
from transformers import AutoModel

import models.faces
from images import load_image, to_tensor
from models.faces import (
    Box,
    FaceDetector,
    Recognizer,
    clip_box,
    face_similarity_to,
    load_recognizer,
    scale_box,
    sepia,
)
from models.loading import ROOT

CPU = torch.device("cpu")
F32 = torch.float32


# ---------------------------------------------------------------------------------------------------------
# recognisers


@pytest.fixture(scope="session")
def facenet(tmp_path_factory) -> SimpleNamespace:
    """One random facenet in both of its file formats, its state, and the network itself."""
    root = tmp_path_factory.mktemp("facenet")
    pickle, safe = tiny.write_facenet(root / "net.pt"), tiny.write_facenet(root / "net.safetensors")
    state = load_file(safe)
    network = facenet_pytorch.InceptionResnetV1(pretrained=None, classify=False).eval()
    network.load_state_dict(state, strict=False)
    return SimpleNamespace(pt=pickle, safetensors=safe, state=state, network=network)


@pytest.fixture(scope="session")
def recognizer(tiny_models) -> Recognizer:
    return load_recognizer(str(tiny_models.recognizer), CPU, F32)


def whole(batch: torch.Tensor) -> list[list[Box]]:
    return [[(0, 0, batch.shape[3], batch.shape[2])]] * len(batch)


@pytest.mark.parametrize("write", [tiny.write_recognizer, tiny.write_convnext])
def test_transformers_recognizer_follows_its_preprocessor(tmp_path, write):
    write(tmp_path, size=24, mean=0.4, std=0.3)
    network = AutoModel.from_pretrained(tmp_path, dtype=F32)
    network.half().save_pretrained(tmp_path)  # as it is on disk; it must still run in float32
    loaded = load_recognizer(str(tmp_path), CPU, F32)
    x = noise(2, 3, 24, 24)
    expected = network.float().eval()(((x + 1) / 2 - 0.4) / 0.3).pooler_output.flatten(1)
    embeddings = loaded.embed(x, whole(x))
    assert loaded.size == 24 and embeddings.dtype == F32 and not embeddings.requires_grad
    torch.testing.assert_close(embeddings, F.normalize(expected.detach()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_facenet_file_and_its_standardisation(facenet, suffix):
    loaded = load_recognizer(str(getattr(facenet, suffix)), CPU, F32)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 160, 160, 3), dtype=np.uint8)
    raw = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    standardised = facenet_pytorch.fixed_image_standardization(raw)
    x = to_tensor(pixels)
    torch.testing.assert_close((x - loaded.mean) / loaded.std, standardised, atol=1e-6, rtol=0)
    with torch.no_grad():
        expected = facenet.network(standardised)  # of unit length already
    assert loaded.size == 160
    torch.testing.assert_close(loaded.embed(x, whole(x)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vggface2", "casia-webface"])
def test_facenet_by_name_is_read_as_weights_only(facenet, monkeypatch, name, tmp_path, fresh_loaders):
    asked = []
    (tmp_path / name).mkdir()  # the data set, which is no model
    monkeypatch.chdir(tmp_path)

    def fetch(url, **options):
        asked.append((url, options.get("weights_only")))
        return dict(facenet.state)

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    loaded = load_recognizer(name, CPU, F32)
    ((url, weights_only),) = asked
    assert weights_only is True and loaded.name == name
    assert url.startswith("https://github.com/timesler/facenet-pytorch/releases/") and url.endswith(
        f"{name}.pt"
    )


def test_embeddings_of_crops_are_unit_vectors_in_order(recognizer):
    x = noise(2, 3, 64, 64)
    boxes = [[(0, 0, 40, 30), (10, 20, 64, 64)], [(5, 5, 37, 37)]]
    embeddings = recognizer.embed(x, boxes)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3), atol=1e-5, rtol=0)
    for row, (image, (x0, y0, x1, y1)) in enumerate(((0, boxes[0][0]), (0, boxes[0][1]), (1, boxes[1][0]))):
        crop = F.interpolate(
            x[image : image + 1, :, y0:y1, x0:x1], size=(32, 32), mode="bilinear", antialias=True
        )
        torch.testing.assert_close(embeddings[row], recognizer.embed(crop, whole(crop))[0], atol=1e-5, rtol=0)


def test_face_similarity_is_the_mean_cosine_of_each_images_faces(recognizer):
    clean, other = noise(3, 3, 64, 64), noise(3, 3, 64, 64, seed=1)
    boxes = [[(0, 0, 64, 64)], [(0, 0, 32, 40), (8, 8, 64, 48), (20, 0, 60, 64)], [(16, 16, 48, 48)]]
    seen = []
    counting = dataclasses.replace(
        recognizer, network=lambda crops: seen.append(len(crops)) or recognizer.network(crops)
    )
    similarity = face_similarity_to(counting, clean, boxes)
    assert seen == [5]  # the clean faces, once
    other.requires_grad_(True)
    found = similarity(other)
    assert seen == [5, 5]
    by_hand = []
    for one, two, faces in zip(clean, other.detach(), boxes, strict=True):
        pairs = [
            (recognizer.embed(one[None], [[box]])[0], recognizer.embed(two[None], [[box]])[0])
            for box in faces
        ]
        by_hand.append(np.mean([float(a @ b) / float(a.norm() * b.norm()) for a, b in pairs]))
    assert found.detach().tolist() == pytest.approx(by_hand, abs=1e-5)
    assert similarity(clean).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    (gradient,) = torch.autograd.grad(found[2], other)
    assert gradient[2].abs().sum() > 0 and gradient[:2].abs().sum() == 0


# ---------------------------------------------------------------------------------------------------------
# finding faces


@pytest.fixture(scope="session")
def detector() -> FaceDetector:
    return FaceDetector(CPU)


@pytest.fixture(scope="session")
def astronaut() -> np.ndarray:
    """The face is at about x 180 to 270, y 60 to 175."""
    return load_image(ROOT / "assets/portraits/astronaut.png").pixels


def test_one_face_in_the_astronaut(detector, astronaut, monkeypatch):
    monkeypatch.setattr(models.faces, "DETECTION_SIDE", 256)  # it is reduced, and the box scaled back
    ((x0, y0, x1, y1),) = detector(astronaut)
    assert np.abs(np.array([x0, y0, x1, y1]) - [181, 62, 267, 172]).max() <= 12


def test_the_largest_face_is_first(detector, astronaut):
    face = astronaut[:256, 96:352]
    canvas = np.full((256, 384, 3), 128, np.uint8)
    canvas[:128, :128] = np.asarray(Image.fromarray(face).resize((128, 128)))
    canvas[:, 128:] = face
    large, small = detector(canvas)
    assert large[0] > 128 and small[2] <= 128
    assert all(isinstance(side, int) for side in large)


@pytest.mark.parametrize(
    "pixels",
    [
        np.full((64, 64, 3), 128, np.uint8),
        np.random.default_rng(0).integers(0, 256, (128, 96, 3), dtype=np.uint8),
        np.random.default_rng(0).integers(0, 256, (33, 33, 3), dtype=np.uint8),
        np.zeros((9, 9, 3), np.uint8),
    ],
    ids=["flat", "noise", "33x33", "9x9"],
)
def test_no_face(detector, pixels):
    assert detector(pixels) == []


@pytest.fixture(scope="session")
def portraits() -> list[np.ndarray]:
    """Three bundled portraits, one of them with a blue face, as an edit makes it."""
    paths = sorted((ROOT / "assets/portraits/mini").glob("*.png"))[:3]
    found = [load_image(path).pixels for path in paths]
    grey = found[0].astype(float).mean(axis=2, keepdims=True)
    return [np.clip(grey * [0.5, 0.8, 1.3], 0, 255).astype(np.uint8), *found[1:]]


def test_several_pictures_at_once_give_what_each_gives_alone(detector, portraits, monkeypatch):
    alone = [detector(pixels) for pixels in portraits]
    assert detector.find(portraits) == alone and all(len(boxes) == 1 for boxes in alone)
    assert detector.find([]) == []
    sizes, look = [], detector._look
    monkeypatch.setattr(detector, "_look", lambda one, some: sizes.append(len(some)) or look(one, some))
    monkeypatch.setattr(models.faces, "DETECTED_AT_ONCE", 2 * 128**2)
    assert detector.find(portraits) == alone and sizes[:2] == [2, 1]


def test_a_look_is_given_what_those_before_found_nothing_in(detector, portraits, monkeypatch):
    looks = []
    look_once = detector._look

    def look(look, images):
        looks.append((look, len(images)))
        return look_once(look, images) if len(looks) > 1 else [np.zeros((0, 4)), *look_once(look, images[1:])]

    monkeypatch.setattr(detector, "_look", look)
    assert all(detector.find(portraits))
    assert looks[:2] == [(models.faces.Look(32), 3), (models.faces.Look(32, sepia=True), 1)]
    looks.clear()
    detector(np.zeros((300, 257, 3), np.uint8))  # no face
    assert [look.min_face_size for look, _ in looks] == [20, 32, 40]
    looks.clear()
    detector(np.zeros((256, 256, 3), np.uint8))
    assert [look.min_face_size for look, _ in looks] == [32, 32, 40]


def test_a_look_in_sepia_sees_skin_whatever_its_hue(detector, portraits, monkeypatch):
    shown, images = [], np.stack(portraits)
    mtcnn = SimpleNamespace(detect=lambda some: shown.append(some) or ([None] * len(some), None))
    monkeypatch.setitem(detector.mtcnn, 32, mtcnn)
    for look in models.faces.LOOKS[:2]:
        detector._look(look, images)
    np.testing.assert_array_equal(shown, [images, sepia(images)])
    colours = np.array([[100, 100, 100], [0, 0, 255], [255, 255, 255]], np.uint8)
    assert sepia(colours).tolist() == [[112, 97, 88], [33, 28, 26], [255, 247, 224]]


def test_faces_are_found_in_float32_whatever_is_around(detector, astronaut):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = detector(astronaut)
    assert found == detector(astronaut)


@pytest.mark.parametrize(
    ("box", "inside"),
    [
        ((1.9, 2.1, 10.9, 20), (1, 2, 10, 20)),
        ((-5.5, -1, 100, 100), (0, 0, 70, 45)),
        ((70, 0, 90, 10), None),
        ((-9, -9, 0, 0), None),
        ((10, 10, 10.5, 20), None),
    ],
)
def test_clip_box(box, inside):
    assert clip_box(box, (45, 70)) == inside


@pytest.mark.parametrize(
    ("box", "target", "scaled"),
    [
        ((20, 40, 120, 110), (64, 64), (10, 20, 60, 55)),
        ((0, 1, 128, 128), (48, 96), (0, 0, 96, 48)),
        ((0, 0, 128, 1), (32, 32), None),
    ],
)
def test_scale_box(box, target, scaled):
    assert scale_box(box, (128, 128), target) == scaled
