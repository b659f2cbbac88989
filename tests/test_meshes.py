"""Surfaces: closed, outward, as large as their voxels; and the figure of them in a browser without a network."""

import base64
import io
import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

from mitoseg_lib.instances import label_instances
from mitoseg_lib.meshes import Mesh, MeshFigure, make_meshes

NM = (5.0, 5.0, 5.0)


def ball(shape, centre, radius, size_nm=NM):
    """bool (z, y, x); the radius is in nm, the centre in voxels."""
    distance = sum(((i - c) * nm) ** 2 for i, c, nm in zip(np.indices(shape), centre, size_nm, strict=True))
    return distance <= radius**2


def two_balls():
    """Labels of a volume of 24 x 40 x 64 voxels: 1 on the left, 2 on the right."""
    left, right = (ball((24, 40, 64), (12, 20, x), 45) for x in (16, 47))
    return left + 2 * right.astype(np.int32)


def figure(meshes=None, description="Two balls", extent_um=(0.12, 0.2, 0.32)):
    return MeshFigure(meshes or make_meshes(two_balls(), NM), extent_um=extent_um, description=description)


def volume_um3(mesh):
    """By the divergence theorem; positive where faces point outwards."""
    a, b, c = mesh.vertices[mesh.faces].astype(np.float64).transpose(1, 0, 2)
    return np.sum(a * np.cross(b, c)) / 6


def assert_closed(mesh):
    """Every edge has two faces, which go along it in opposite directions."""
    edges = np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]])
    assert len(np.unique(edges, axis=0)) == len(edges)
    assert set(map(tuple, edges)) == set(map(tuple, edges[:, ::-1]))


def n_faces(meshes):
    return sum(len(mesh.faces) for mesh in meshes)


# Surfaces


def test_a_balls_surface_is_closed_and_points_outwards():
    mask = ball((40, 40, 40), (20, 19, 20), 75)
    (mesh,) = make_meshes(mask.astype(np.uint8), NM)
    assert mesh.vertices.dtype == np.float32 and mesh.faces.dtype == np.int32
    assert_closed(mesh)
    assert mesh.volume_um3 == pytest.approx(mask.sum() * 125e-9)
    assert volume_um3(mesh) == pytest.approx(mesh.volume_um3, rel=0.03)
    centre = mesh.vertices.mean(axis=0)
    np.testing.assert_allclose(centre, np.array([20.5, 19.5, 20.5]) * 0.005, atol=1e-4)  # middle of a voxel
    a, b, c = mesh.vertices[mesh.faces].transpose(1, 0, 2)
    assert (np.sum(np.cross(b - a, c - a) * (a - centre), axis=1) >= -1e-9).all()


def test_voxels_that_are_no_cubes_keep_their_proportions():
    size_nm = (25.0, 5.0, 10.0)
    mask = ball((20, 80, 40), (10, 40, 20), 150, size_nm)
    (mesh,) = make_meshes(mask.astype(np.int64), size_nm)
    assert_closed(mesh)
    assert volume_um3(mesh) == pytest.approx(mask.sum() * 1250e-9, rel=0.03)
    np.testing.assert_allclose(np.ptp(mesh.vertices, axis=0), 0.3, rtol=0.1)


def test_an_object_at_the_border_is_closed_there():
    labels = np.ones((20, 24, 28), np.int32)
    (mesh,) = make_meshes(labels, NM)
    assert_closed(mesh)
    np.testing.assert_allclose(np.ptp(mesh.vertices, axis=0), np.array(labels.shape) * 0.005, atol=0.005)
    mask = ball((40, 40, 40), (0, 3, 39), 150)  # an eighth of a ball and more
    (mesh,) = make_meshes(mask.astype(np.int32), NM)
    assert_closed(mesh)
    assert volume_um3(mesh) == pytest.approx(mask.sum() * 125e-9, rel=0.03)
    assert mesh.vertices.min() > -0.005 and mesh.vertices.max() < 0.205


def test_surfaces_of_any_mask_are_closed():
    labels = label_instances(np.random.default_rng(0).random((12, 14, 16)) < 0.15)
    for most in (150_000, 5_000):
        meshes = make_meshes(labels, (12.0, 5.0, 5.0), max_faces=most)
        assert len(meshes) == labels.max() and n_faces(meshes) <= most
        for mesh in meshes:
            assert_closed(mesh)
            assert volume_um3(mesh) > 0


@pytest.mark.parametrize("most", [300, 1_000, 3_000])
def test_coarser_surfaces_keep_to_the_limit_and_stay_where_they_were(most):
    labels = two_balls()
    fine, coarse = make_meshes(labels, NM), make_meshes(labels, NM, max_faces=most)
    assert n_faces(fine) > n_faces(coarse) > most / 8 and n_faces(coarse) <= most
    for a, b in zip(fine, coarse, strict=True):
        assert_closed(b)
        np.testing.assert_allclose(a.vertices.mean(axis=0), b.vertices.mean(axis=0), atol=0.01)
        assert a.volume_um3 == b.volume_um3
        assert volume_um3(b) == pytest.approx(b.volume_um3, rel=0.4)


def test_thick_slices_are_joined_last():
    mask = ball((12, 100, 100), (6, 50, 50), 200, (40, 5, 5))
    (mesh,) = make_meshes(mask.astype(np.uint8), (40, 5, 5), max_faces=1_000)
    assert volume_um3(mesh) == pytest.approx(mesh.volume_um3, rel=0.15)


def test_objects_are_chosen_and_named_by_their_numbers():
    labels = two_balls() * 300
    assert [mesh.name for mesh in make_meshes(labels, NM)] == ["mitochondrion 300", "mitochondrion 600"]
    (mesh,) = make_meshes(labels, NM, numbers=[600])
    assert mesh.name == "mitochondrion 600" and mesh.vertices[:, 2].min() > 0.16


def test_a_single_voxel_can_be_seen():
    labels = np.zeros((5, 5, 5), np.uint16)
    labels[2, 2, 2] = 1
    (mesh,) = make_meshes(labels, NM)
    assert_closed(mesh)
    assert mesh.volume_um3 == pytest.approx(125e-9) and 0 < volume_um3(mesh) < 1000e-9


SOME = np.ones((4, 4, 4), np.int32)


@pytest.mark.parametrize(
    ("labels", "options", "words"),
    [
        (SOME.astype(np.float32), {}, "labels are float32.*label_instances"),
        (SOME.astype(bool), {}, "labels are bool.*label_instances"),
        (SOME[0], {}, r"shape \(4, 4\)"),
        ([[[1]]], {}, "labels are list"),
        (SOME[:0], {}, "at least one voxel"),
        (-SOME, {}, "from -1 to -1"),
        (SOME.astype(np.uint32) * 2**31, {}, "relabel_sequential"),
        (SOME * 0, {}, "0 objects"),
        (SOME, {"numbers": []}, "0 objects"),
        (SOME, {"numbers": [1, 7]}, "no object 7"),
        (SOME, {"numbers": [0]}, "no object 0"),
        (SOME, {"max_faces": 5}, "1 objects can't be drawn with 5 faces"),
        (SOME, {"voxel_size_nm": (5, 5)}, r"voxel_size_nm is \(5, 5\).*three positive"),
        (SOME, {"voxel_size_nm": (5, 0, 5)}, "three positive"),
    ],
)
def test_what_has_no_surface_is_refused_in_one_sentence(labels, options, words):
    with pytest.raises(ValueError, match=words) as refusal:
        make_meshes(labels, **{"voxel_size_nm": NM} | options)
    assert str(refusal.value).endswith(".") and "\n" not in str(refusal.value)


# The figure's HTML


def drawn(html):
    """What the script gets."""
    return json.loads(re.search(r'startMeshFigures\("\w+", (.*)\);\n', html).group(1))


def decoded(text):
    numbers, value, bits = [], 0, 0
    for byte in base64.b64decode(text):
        value, bits = value | (byte & 127) << bits, bits + 7
        if byte < 128:
            numbers.append(value)
            value = bits = 0
    return np.array(numbers)


def test_the_figure_holds_the_meshes():
    meshes = make_meshes(two_balls(), NM)
    data = drawn(figure(meshes).html)
    moves = decoded(data["positions"])
    steps = np.cumsum(np.where(moves % 2, -(moves + 1) // 2, moves // 2).reshape(-1, 3), axis=0)
    back, seen, corners = decoded(data["corners"]), 0, []
    for number in back:
        corners.append(seen - number)
        seen += number == 0
    triangles = (steps * data["step"])[np.array(corners).reshape(-1, 3)]
    expected = np.concatenate([mesh.vertices[mesh.faces[:, ::-1]][..., ::-1] for mesh in meshes])
    np.testing.assert_allclose(triangles, expected, atol=0.32 / 2**14)
    assert data["faces"] == [len(mesh.faces) for mesh in meshes]
    assert data["names"] == [f"mitochondrion {i}, {meshes[i - 1].volume_um3:.3g} µm³" for i in (1, 2)]
    assert data["lengths"] == ["x 0.32 µm", "y 0.2 µm", "z 0.12 µm"]


def test_the_same_meshes_give_the_same_bytes_and_nothing_is_fetched():
    html = figure().html
    assert html == figure()._repr_html_() == figure().html
    assert "://" not in html and not re.search(r"\bsrc=|\bhref=|@import|url\(|0x[0-9a-f]{8}", html)
    assert repr(figure()) == f"MeshFigure(2 objects, {n_faces(make_meshes(two_balls(), NM))} faces)"
    keys = {re.search('data-mesh-figure="(.*?)"', f.html).group(1) for f in (figure(), figure(description="Balls"))}
    assert len(keys) == 2


def test_names_and_descriptions_cannot_break_out():
    nasty = "\"><script>alert(1)</script><!-- ' & \u2028"
    mesh = make_meshes(two_balls(), NM)[0]
    html = figure([Mesh(mesh.vertices, mesh.faces, nasty)], nasty).html
    assert html.count("<script>") == html.count("</script>") == 1
    assert "<!--" not in html
    assert drawn(html)["names"] == [nasty]
    assert 'aria-label="&quot;&gt;&lt;script&gt;' in html


def test_forty_objects_of_100_000_faces_stay_small():
    one = ball((34, 34, 34), (16.6, 16.9, 17.2), 80)
    labels = np.zeros((2 * 34, 4 * 34, 5 * 34), np.int32)
    for number, (z, y, x) in enumerate(np.ndindex(2, 4, 5), start=1):
        labels[34 * z : 34 * z + 34, 34 * y : 34 * y + 34, 34 * x : 34 * x + 34] = one * number
    meshes = make_meshes(labels, NM)
    assert len(meshes) == 40 and 90_000 < n_faces(meshes) < 150_000
    assert len(figure(meshes, extent_um=None).html) < 9 * n_faces(meshes) + 20_000


def test_colours_return_in_another_lightness():
    mesh = make_meshes(two_balls(), NM)[0]
    colours = drawn(figure([mesh] * 19).html)["colours"]
    assert len(set(map(tuple, colours))) == 18 and colours[18] == colours[0] == [230, 159, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"meshes": []}, "0 meshes"),
        ({"extent_um": (1, 2)}, "extent_um is"),
        ({"extent_um": (1, 2, float("nan"))}, "three positive numbers"),
        ({"description": " "}, "description is empty"),
    ],
)
def test_a_figure_of_nothing_is_refused(change, words):
    options = {"meshes": make_meshes(two_balls(), NM), "extent_um": None, "description": "Balls"} | change
    with pytest.raises(ValueError, match=words):
        MeshFigure(options.pop("meshes"), **options)


# The figure in a browser


@pytest.fixture
def show(browser):
    """Shows figures in a page, which may fetch nothing; at the end there must have been no error."""
    pages = []

    def show_(*figures, script="", **options):
        page = browser.new_page(viewport={"width": 700, "height": 700}, **options)
        pages.append(page)
        page.problems = []
        page.route("**/*", lambda route: (page.problems.append(route.request.url), route.abort()))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda m: page.problems.append(m.text) if m.type == "error" else None)
        page.set_content(
            f"<!doctype html><meta charset=utf-8><script>{script}</script>" + "".join(f.html for f in figures)
        )
        return page

    yield show_
    problems = [page.problems for page in pages]
    for page in pages:
        page.close()
    assert not any(problems), problems


def settle(page):
    """Wait for what is due to be drawn."""
    page.evaluate("() => new Promise((done) => setTimeout(() => requestAnimationFrame(() => done()), 60))")


def pixels(page, number=0):
    """The figure on the screen."""
    settle(page)
    shot = page.locator("canvas").nth(number).screenshot()
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)


def stored(page):
    """The first figure as it was drawn, without scrolling there."""
    settle(page)
    return page.evaluate("document.querySelector('canvas').toDataURL()")


def middle(page, number=0):
    box = page.locator("canvas").nth(number).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def coloured(picture):
    """Where a picture isn't grey."""
    return np.ptp(picture, axis=2) > 60


def test_it_draws_the_objects_in_their_box(show):
    page = show(figure())
    picture = pixels(page)
    orange, blue = (coloured(picture) & (picture.argmax(axis=2) == k) for k in (0, 2))
    assert 5_000 < orange.sum() < 60_000 and 5_000 < blue.sum() < 60_000
    assert np.nonzero(orange)[1].mean() < 320 < np.nonzero(blue)[1].mean(), "the first ball is on the left"
    assert (picture[[0, -1]] == 255).all() and (picture[:, [0, -1]] == 255).all(), "the box fits"
    assert page.locator("p").is_hidden()
    label = page.get_by_role("img", name="Two balls")
    assert label.count() == 1 and page.locator("span").all_inner_texts() == drawn(figure().html)["lengths"]


def test_dragging_keys_and_zooming_change_it_and_a_double_click_brings_it_back(show):
    page = show(figure())
    first = pixels(page)
    x, y = middle(page)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 80, y + 30, steps=3)
    page.mouse.up()
    seen = [first, pixels(page)]
    for key in ("ArrowLeft", "ArrowUp", "+", "-", "-"):
        page.keyboard.press(key)
        seen.append(pixels(page))
    page.mouse.wheel(0, -200)
    seen.append(pixels(page))
    for before, after in itertools.pairwise(seen):
        assert np.abs(before - after).max() > 50
    page.mouse.dblclick(x, y)
    page.keyboard.press("Escape")  # takes the focus and its outline
    np.testing.assert_array_equal(pixels(page), first)


def test_what_is_clicked_is_named(show):
    page = show(figure())
    said, (x, y) = page.locator("[aria-live=polite]"), middle(page)
    names = drawn(figure().html)["names"]
    for right, expected in ((-110, names[0]), (110, names[1]), (-300, "")):
        page.mouse.click(x + right, y)
        assert said.inner_text() == expected
    for expected in (names[0], names[1], names[0]):
        page.keyboard.press("Enter")
        assert said.inner_text() == expected
    picture = pixels(page)
    assert coloured(picture)[:, :320].any() and not coloured(picture)[:, 400:].any(), "the other one is faded"
    page.keyboard.press("Home")
    assert said.inner_text() == ""


def test_the_page_scrolls_until_the_figure_has_the_focus(show):
    page = show(figure(), figure(description="more"), figure(description="of it"))
    before = stored(page)
    page.mouse.move(*middle(page))
    page.mouse.wheel(0, 100)
    page.wait_for_function("scrollY === 100")
    page.keyboard.down("Control")
    page.mouse.wheel(0, 100)
    page.keyboard.up("Control")
    assert stored(page) != before and page.evaluate("scrollY") == 100


def test_figures_in_one_page_do_not_disturb_one_another(show):
    page = show(figure(), figure(), figure(description="other"))
    before = [pixels(page, number) for number in range(3)]
    for picture in before:
        assert coloured(picture).any()
    page.locator("canvas").nth(1).focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Escape")
    same = [(pixels(page, number) == before[number]).all() for number in range(3)]
    assert same == [True, False, True]


def test_it_fits_a_narrow_page_and_a_dense_screen(browser, show):
    page = show(figure(), device_scale_factor=2)
    page.set_viewport_size({"width": 320, "height": 500})
    settle(page)
    width, shown = page.locator("canvas").evaluate("(canvas) => [canvas.width, canvas.clientWidth]")
    assert shown <= 304 and width == 2 * shown
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert coloured(pixels(page)).any()


@pytest.mark.parametrize("how", ["no script", "no WebGL"])
def test_where_it_cannot_be_drawn_a_sentence_says_so(show, how):
    if how == "no script":
        page = show(figure(), java_script_enabled=False)
    else:
        page = show(figure(), script="HTMLCanvasElement.prototype.getContext = () => null")
    assert page.locator("p").is_visible() and page.locator("canvas").is_hidden()
    assert "It shows: Two balls" in page.locator("p").inner_text()


def test_a_lost_context_comes_back(show):
    page = show(figure())
    first = pixels(page)
    page.evaluate("""async () => {
      const gl = document.querySelector("canvas").getContext("webgl"), context = gl.getExtension("WEBGL_lose_context");
      context.loseContext();
      await new Promise((done) => setTimeout(done, 50));
      context.restoreContext();
    }""")
    page.wait_for_timeout(150)
    np.testing.assert_array_equal(pixels(page), first)


def test_it_starts_where_jupyterlab_puts_it(show):
    page = show()
    page.evaluate(
        """(html) => {
      const host = document.createElement("div");
      host.innerHTML = html;
      for (const script of host.querySelectorAll("script")) {
        const again = document.createElement("script");
        again.textContent = script.textContent;
        script.replaceWith(again);
      }
      document.body.append(host);
    }""",
        figure().html,
    )
    assert coloured(pixels(page)).any()


def test_fingers_turn_and_zoom_it(show):
    page = show(figure(), has_touch=True)
    touch = page.context.new_cdp_session(page)
    x, y = middle(page)

    def move(kind, *offsets):
        points = [{"x": x + right, "y": y, "id": i} for i, right in enumerate(offsets)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    seen = [stored(page)]
    for before, after in (([0], [60]), ([-30, 30], [-90, 90])):
        move("touchStart", *before)
        move("touchMove", *after)
        move("touchEnd")
        seen.append(stored(page))
    assert len(set(seen)) == 3
    assert page.locator("[aria-live]").inner_text() == "", "nothing was tapped"
    page.keyboard.press("Home")
    page.touchscreen.tap(x + 110, y)
    assert page.locator("[aria-live]").inner_text() != ""
