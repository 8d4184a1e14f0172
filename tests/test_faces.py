"""models/faces.py and models/recognizers.py: recognisers, the similarity of faces, and finding them."""

import json
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import facenet_pytorch
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tiny import CPU, F32, noise
from transformers import AutoModel

import models.faces
from calibration import strangers
from images import load_image, to_tensor, to_uint8
from models import recognizers
from models.dlib import dlib_network
from models.faces import USUAL_POINTS, Box, Face, FaceDetector, PointCrop, clip_box, scale_box
from models.loading import ROOT
from models.recognizers import Recognizer, face_similarity_to, load_recognizer
from utils import UserError

# ---------------------------------------------------------------------------------------------------------
# recognisers


@pytest.fixture(scope="session")
def facenet(tmp_path_factory) -> SimpleNamespace:
    """One random facenet: its file, its state, and the network itself."""
    path, state = tmp_path_factory.mktemp("facenet") / "net.safetensors", tiny.facenet_state()
    save_file(state, path)
    network = facenet_pytorch.InceptionResnetV1(pretrained=None, classify=False).eval()
    network.load_state_dict(state, strict=False)
    return SimpleNamespace(safetensors=path, state=state, network=network)


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
    assert loaded.crop.size == 24 and embeddings.dtype == F32 and not embeddings.requires_grad
    torch.testing.assert_close(embeddings, F.normalize(expected.detach()), atol=1e-5, rtol=0)


def test_facenet_file_and_its_standardisation(facenet):
    loaded = load_recognizer(str(facenet.safetensors), CPU, F32)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 160, 160, 3), dtype=np.uint8)
    raw = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    standardised = facenet_pytorch.fixed_image_standardization(raw)
    x = to_tensor(pixels)
    torch.testing.assert_close((x - loaded.mean) / loaded.std, standardised, atol=1e-6, rtol=0)
    with torch.no_grad():
        expected = facenet.network(standardised)  # of unit length already
    assert loaded.crop.size == 160
    torch.testing.assert_close(loaded.embed(x, whole(x)), expected, atol=1e-5, rtol=0)


def test_facenet_by_name_is_read_as_weights_only(facenet, monkeypatch, tmp_path, fresh_loaders):
    asked, name = [], "casia-webface"
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
    similarity = face_similarity_to([recognizer], clean, boxes)
    found = similarity(other.requires_grad_(True))
    by_hand = []
    for one, two, faces in zip(clean, other.detach(), boxes, strict=True):
        a, b = (recognizer.embed(image[None], [faces]) for image in (one, two))
        by_hand.append((a * b).sum(dim=1).mean().item())  # of unit vectors
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


def test_no_face(detector):
    draw = np.random.default_rng(0)
    noises = [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((128, 96), (33, 33))]
    for pixels in (np.full((64, 64, 3), 128, np.uint8), np.zeros((9, 9, 3), np.uint8), *noises):
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
    monkeypatch.setattr(models.faces, "DETECTED_AT_ONCE", 2 * 128**2)
    assert detector.find(portraits) == alone


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


def test_a_crop_by_points_undoes_a_turn_a_scale_and_a_shift(astronaut):
    """The same face in a turned and reduced picture gives the same crop, up to interpolation."""
    template = tuple((x * 96, y * 96) for x, y in USUAL_POINTS)
    points = np.array([(207, 98), (246, 96), (228, 119), (211, 143), (245, 141)], float)
    crop = PointCrop(96, template)
    upright = crop(to_tensor(astronaut), Face((181, 62, 267, 172), points))
    turn = 0.7 * np.exp(0.3j)  # of the picture around (228, 120), which goes to (180, 200)
    places = (points @ [1, 1j] - (228 + 120j)) * turn + (180 + 200j)
    back, from_ = 1 / turn, (228 + 120j) - (180 + 200j) / turn
    data = (back.real, -back.imag, from_.real, back.imag, back.real, from_.imag)
    image, size = Image.fromarray(astronaut), astronaut.shape[1::-1]
    turned = np.asarray(image.transform(size, Image.Transform.AFFINE, data, Image.Resampling.BICUBIC))
    again = crop(to_tensor(turned), Face((100, 100, 200, 260), np.stack([places.real, places.imag], axis=1)))
    middle = (..., slice(16, 80), slice(16, 80))
    assert (upright[middle] - again[middle]).abs().mean() < 0.03
    assert (upright[middle] - upright[middle].flip(-1)).abs().mean() > 0.1


def test_a_crop_by_points_is_antialiased_black_outside_and_has_gradients():
    stripes = torch.ones(1, 3, 512, 512)
    stripes[..., ::2] = -1  # far finer than the crop's pixels
    crop = PointCrop(16, tuple((x * 16, y * 16) for x, y in USUAL_POINTS))
    assert crop(stripes, Face((100, 100, 356, 356))).abs().max() < 0.1
    image = torch.zeros(1, 3, 64, 64, requires_grad=True)
    found = crop(image, Face((48, 16, 80, 48)))  # half of it is outside
    assert found[..., 0].eq(0).all() and found[..., -1].eq(-1).all()
    found.sum().backward()
    assert image.grad[..., 20:40, 50:60].abs().min() > 0 and image.grad[..., :30].abs().max() == 0
    assert crop(image, Face((500, 500, 540, 540))).eq(-1).all()


def test_points_are_carried_along_and_guessed_for_a_box_by_hand(detector, astronaut):
    (face,) = detector(astronaut)
    guess = np.array(Face(tuple(face)).points)
    assert np.abs(np.array(face.points) - guess).max() < 0.12 * (face[3] - face[1])
    small = scale_box(face, astronaut.shape[:2], (256, 256))
    np.testing.assert_allclose(np.array(small.points), (np.array(face.points) + 0.5) / 2 - 0.5)
    assert small == scale_box(tuple(face), astronaut.shape[:2], (256, 256))
    by_hand = scale_box((20, 40, 120, 110), (128, 128), (64, 64))
    np.testing.assert_allclose(by_hand.points, Face((10, 20, 60, 55)).points)


# ---------------------------------------------------------------------------------------------------------
# kinds of recognisers


@pytest.fixture(scope="session")
def dlib_recognizer() -> Recognizer:
    return load_recognizer("dlib", CPU, F32)


def test_dlibs_network_says_what_dlib_says_and_knows_people_apart(
    dlib_recognizer, detector, astronaut, portraits
):
    """On chips of photos and of synthetic portraits; its descriptors have a norm of about 1.5."""
    dlib = pytest.importorskip("dlib", reason="dlib-bin is not installed")
    package = Path(util.find_spec("face_recognition_models").submodule_search_locations[0])
    reference = dlib.face_recognition_model_v1(str(package / recognizers.DLIB_FILE))
    hopper, found = load_image(ROOT / "assets/portraits/grace_hopper.jpg").pixels, []
    for pixels in (astronaut, np.ascontiguousarray(astronaut[:, ::-1]), hopper, portraits[0]):
        chip = to_uint8(dlib_recognizer.crop(to_tensor(pixels), detector(pixels)[0]))
        expected = reference.compute_face_descriptor(np.ascontiguousarray(chip[0]))
        with torch.no_grad():
            scaled = (to_tensor(chip) - dlib_recognizer.mean) / dlib_recognizer.std
            found.append(dlib_recognizer.network(scaled)[0])
        assert np.linalg.norm(expected) > 1 and np.linalg.norm(found[-1].numpy() - expected) < 1e-4
    a, same, b, _ = F.normalize(torch.stack(found), dim=1)
    assert a @ same > dlib_recognizer.threshold > a @ b
    mini = load_recognizer("dlib", CPU, F32, portraits="mini")
    assert mini.threshold > dlib_recognizer.threshold
    assert mini.strangers_mean > dlib_recognizer.strangers_mean


def test_another_file_is_not_dlibs():
    folder = util.find_spec("face_recognition_models").submodule_search_locations[0]
    content = Path(folder, recognizers.DLIB_FILE)
    for data in (b"", b"\x01\x02" * 400, content.read_bytes()[:-5000]):
        with pytest.raises(ValueError, match="not dlib's recogniser"):
            dlib_network(data)


def write_onnx(path: Path, batch: int | str = "N", side: int = 112) -> torch.nn.Module:
    """Writes a small network as an ONNX file, by hand: torch's own exporter needs more packages."""
    onnx = pytest.importorskip("onnx", reason="onnx2torch is not installed")
    from onnx import helper, numpy_helper

    torch.manual_seed(3)
    layers = [torch.nn.Conv2d(3, 4, 3, stride=4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)]
    network = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(4, 6)).eval()
    values = [(name, value.detach().numpy()) for name, value in network.named_parameters()]
    weights = [numpy_helper.from_array(value, name) for name, value in values]
    nodes = [
        helper.make_node("Conv", ["x", "0.weight", "0.bias"], ["a"], strides=[4, 4]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "4.weight", "4.bias"], ["y"], transB=1),
    ]
    sizes = helper.make_tensor_value_info("x", 1, [batch, 3, side, side])
    out = helper.make_tensor_value_info("y", 1, [batch, 6])
    graph = helper.make_graph(nodes, "small", [sizes], [out], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), path)
    return network


@pytest.mark.parametrize("batch", ["N", 1])
def test_an_onnx_file_is_described_by_a_json_beside_it(tmp_path, batch, astronaut, detector):
    network = write_onnx(tmp_path / "net.onnx", batch)
    said = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "channel_order": "BGR"}
    said |= {"strangers_mean": 0.1, "verification_threshold": 0.4}
    (tmp_path / "net.json").write_text(json.dumps(said))
    loaded = load_recognizer(str(tmp_path / "net.onnx"), CPU, F32)
    assert (loaded.name, loaded.crop.size, loaded.threshold) == ("net", 112, 0.4)
    image = to_tensor(astronaut).requires_grad_(True)
    face = detector(astronaut)[0]
    found = loaded.embed(torch.cat([image, image.flip(-1)]), [[face, face], [face]])
    crop = (loaded.crop(image, face) + 1) / 2
    expected = F.normalize(network((crop.flip(1) - 0.5) / 0.25), dim=1)
    torch.testing.assert_close(found[:1], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], found[0])
    (gradient,) = torch.autograd.grad(found[0].sum(), image)
    assert gradient[..., 62:172, 181:267].abs().sum() > 0
    np.testing.assert_allclose(loaded.crop.template, recognizers.ARCFACE, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "said", "line"),
    [
        ("net.onnx", None, "net.json: not there; it says what net.onnx wants, .*image_mean"),
        ("net.onnx", {"image_mean": [0, 0, 0]}, "can't be loaded .*image_std"),
        ("net.onnx", {"image_mean": 0, "image_std": 1, "channel_order": "GRB"}, "neither RGB nor BGR"),
        ("net.onnx", {"size": {"height": 160}}, "net.json: says 160 px, the network takes 112"),
        ("none.onnx", None, "no such file"),
        ("text.onnx", {}, "can't be loaded"),
        ("flat.onnx", {}, r"takes \[0, 3, 112, 96\], not one batch of square pictures"),
    ],
)
def test_a_bad_onnx_file_is_one_line(tmp_path, file, said, line):
    write_onnx(tmp_path / "net.onnx")
    if file == "flat.onnx":
        onnx = pytest.importorskip("onnx")
        model = onnx.load(tmp_path / "net.onnx")
        model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 96
        onnx.save(model, tmp_path / file)
    (tmp_path / "text.onnx").write_text("no model")
    if said is not None:
        (tmp_path / file).with_suffix(".json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=line) as caught:
        load_recognizer(str(tmp_path / file), CPU, F32)
    assert "\n" not in str(caught.value)


def test_optional_kinds_say_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"")
    monkeypatch.setattr(recognizers.util, "find_spec", lambda name: None)
    kinds = {f"{tmp_path}/net.onnx": "onnx2torch", "frbench:ir-18-adaface-ms1m": "frbench"}
    for member, package in (kinds | {"dlib": "face_recognition_models"}).items():
        with pytest.raises(UserError, match=f"pip install {package}"):
            load_recognizer.__wrapped__(member, CPU, F32)


def test_frbench_is_loaded_from_its_own_files(tmp_path, monkeypatch, astronaut, detector):
    """With random weights in its layout: its own can't be had where this was written."""
    pytest.importorskip("frbench", reason="frbench is not installed")
    import yaml
    from frbench.backbones import build_backbone
    from frbench.utils import download

    kwargs = {"num_features": 32}
    torch.manual_seed(0)
    network = build_backbone("mobilefacenet", kwargs, CPU).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    config = {"backbone": {"name": "mobilefacenet", "kwargs": kwargs}}
    config["input"] = {"size": [112, 112], "mean": [0.5] * 3, "var": [0.5] * 3, "channel": "bgr"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    asked, contents = [], {"config": "config.yaml", "weight": "weights.pt"}
    monkeypatch.setattr(
        download,
        "get_asset",
        lambda name: asked.append(name) or {"path": str(tmp_path), "contents": contents},
    )
    loaded = load_recognizer("frbench:mobilefacenet-adaface-ms1m", CPU, F32)
    assert asked == ["mobilefacenet_adaface_ms1m"] and loaded.is_bgr and loaded.threshold is None
    face = detector(astronaut)[0]
    crop = loaded.crop(to_tensor(astronaut), face)
    with torch.no_grad():
        found = loaded.embed(to_tensor(astronaut), [[face]])
        torch.testing.assert_close(found, F.normalize(network(crop.flip(1))), atol=1e-5, rtol=0)
    assert loaded.left(torch.tensor(0.5)).isnan()


def test_several_recognisers_are_attacked_by_the_mean_of_their_similarities(recognizer, tiny_models):
    clean, other = noise(2, 3, 64, 64), noise(2, 3, 64, 64, seed=1)
    both = [recognizer, load_recognizer(str(tiny_models.judge), CPU, F32)]
    alone = [face_similarity_to([one], clean, whole(clean))(other) for one in both]
    together = face_similarity_to(both, clean, whole(clean))(other)
    torch.testing.assert_close(together, sum(alone) / 2)
    assert (alone[0] - alone[1]).abs().min() > 1e-3


class Given:
    """A recogniser whose embeddings are the pictures themselves."""

    name = "given"

    def embed(self, images, boxes):
        return F.normalize(images.flatten(1), dim=1)


def test_strangers_are_pairs_of_different_people():
    generator = torch.Generator().manual_seed(0)
    people = [(name, torch.randn(1, 3, 4, 4, generator=generator), None) for name in "aabbccdd" * 20]
    found = strangers.strangers(Given(), people)
    assert found["pairs"] == 160 * 120 // 2 and found["as if normal"]
    vectors = torch.cat([F.normalize(image.flatten(1)) for _, image, _ in people]).numpy()
    names = np.array([name for name, *_ in people])
    cosines = (vectors @ vectors.T)[np.triu(names[:, None] != names, 1)]
    assert found["strangers_mean"] == pytest.approx(cosines.mean(), abs=6e-4)
    assert found["verification_threshold"] == pytest.approx(cosines.mean() + 3.09 * cosines.std(), abs=2e-3)
    found = strangers.strangers(Given(), people * 2)
    assert not found["as if normal"] and found["pairs"] == 320 * 240 // 2
    assert found["verification_threshold"] == pytest.approx(np.quantile(cosines, 0.999), abs=0.01)
    with pytest.raises(UserError, match="two people with a face"):
        strangers.strangers(Given(), people[:2])


def test_strangers_of_a_folder_are_a_line_of_json(tmp_path, tiny_models, capsys, monkeypatch):
    monkeypatch.setattr(strangers, "FaceDetector", tiny.WholeImage)
    for number, name in enumerate(("anna", "ben", "cleo/1", "cleo/2")):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(tiny.portrait(32, seed=number)).save(path)
    flags = ["--models=mini", f"--image_dir={tmp_path}", "--recognizer", str(tiny_models.recognizer)]
    assert strangers.main(flags) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("recognizer: ") and json.loads(line.removeprefix("recognizer: "))["pairs"] == 5
