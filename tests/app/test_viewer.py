"""The viewer in a real browser: three linked planes, grey scale, the model's view, the rendered volume, keyboard."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests.app.conftest import open_scan
from tests.app.scans import torso

PLANES = ("axial", "coronal", "sagittal")


def pictures(page) -> list[bytes]:
    return [page.evaluate(f"window.med3dvlm.planes[{number}].canvas.toDataURL()") for number in range(3)]


def places(page) -> list[str]:
    return [page.inner_text(f"[data-view={plane}] output") for plane in PLANES]


@pytest.fixture(autouse=True)
def middle(page):
    """Each test starts with the crosshair in the middle, the first window and nothing enlarged."""
    page.evaluate("window.med3dvlm.preset('Soft tissue'); window.med3dvlm.move(window.med3dvlm.scan.middle())")
    page.evaluate("window.med3dvlm.planes.forEach((plane) => plane.showAll())")


def frame(page) -> dict:
    """Where the axial plane lies on its canvas, with the place of the canvas on the page as x and y."""
    box = page.locator("[data-view=axial] canvas").bounding_box()
    return page.evaluate("window.med3dvlm.planes[0].frame") | {"x": box["x"], "y": box["y"]}


def under(frame: dict, x: float, y: float) -> tuple[float, float]:
    """What of the plane lies at a place of the page, as fractions across and down."""
    across = (x - frame["x"] - frame["left"]) / frame["width"]
    return across, (y - frame["y"] - frame["top"]) / frame["height"]


def test_every_plane_follows_its_slider(page):
    assert places(page) == ["13 / 24", "21 / 40", "25 / 48"]
    for number, plane in enumerate(PLANES):
        before = pictures(page)
        slider = page.locator(f"[data-view={plane}] input[type=range]")
        slider.press("ArrowRight")
        slider.press("ArrowRight")
        after = pictures(page)
        assert after[number] != before[number]  # another slice
        assert after != before
    assert places(page) == ["15 / 24", "23 / 40", "27 / 48"]


def test_a_click_moves_the_other_planes(page):
    frame = page.evaluate("window.med3dvlm.planes[0].frame")
    box = page.locator("[data-view=axial] canvas").bounding_box()
    page.mouse.click(box["x"] + frame["left"] + frame["width"] * 0.25, box["y"] + frame["top"] + frame["height"] * 0.75)
    assert places(page) == ["13 / 24", "31 / 40", "13 / 48"]


def test_planes_are_true_to_the_spacing_and_say_where_the_patient_is(page):
    # 24 x 40 x 48 voxels of 6 x 4 x 3 mm
    for number, ratio in enumerate((48 * 3 / (40 * 4), 48 * 3 / (24 * 6), 40 * 4 / (24 * 6))):
        frame = page.evaluate(f"window.med3dvlm.planes[{number}].frame")
        assert frame["width"] / frame["height"] == pytest.approx(ratio)
    letters = {plane: page.locator(f"[data-view={plane}] .letter").all_inner_texts() for plane in PLANES}
    assert letters == {"axial": [*"RLAP"], "coronal": [*"RLSI"], "sagittal": [*"APSI"]}


def test_the_right_side_of_the_patient_is_on_the_left(page):
    """The file runs the other way round on every axis; what is drawn is the array in canonical order."""
    expected = torso((24, 40, 48))
    for voxel in ((11, 18, 12), (36, 18, 12), (24, 29, 3)):
        assert page.evaluate("(voxel) => window.med3dvlm.scan.value(voxel)", voxel) == expected[voxel[::-1]]
    grey = """([x, y]) => { const view = window.med3dvlm.planes[0], ratio = window.devicePixelRatio, f = view.frame;
        return view.canvas.getContext("2d").getImageData(
            (f.left + x * f.width) * ratio, (f.top + y * f.height) * ratio, 1, 1).data[0]; }"""
    stomach, liver = page.evaluate(grey, [0.68, 0.4]), page.evaluate(grey, [0.36, 0.55])
    assert stomach < liver - 20 and liver > 100  # the stomach lies on the patient's left, which is drawn on the right


def test_arrows_move_through_slices_and_w_changes_the_window(page):
    page.locator("[data-view=coronal] canvas").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Shift+ArrowUp")
    assert places(page) == ["13 / 24", "12 / 40", "25 / 48"]
    before = pictures(page)
    page.keyboard.press("w")
    assert page.input_value(".preset") == "Mediastinum" and page.input_value(".level") == "50"
    assert pictures(page) != before
    page.locator("#question textarea").focus()
    page.keyboard.type("w")  # a letter like any other there
    assert page.input_value(".preset") == "Mediastinum" and page.input_value("#question textarea") == "w"
    page.fill("#question textarea", "")


def test_the_wheel_moves_through_slices_and_with_ctrl_zooms(page):
    whole = frame(page)
    x, y = whole["x"] + whole["left"] + 60, whole["y"] + whole["top"] + 50
    page.mouse.move(x, y)
    page.mouse.wheel(0, 120)
    for _ in range(5):
        page.mouse.wheel(0, -10)  # a touchpad
    page.mouse.wheel(0, -120)
    assert places(page)[0] == "12 / 24"
    page.keyboard.down("Control")
    for _ in range(3):
        page.mouse.wheel(0, -120)
    page.keyboard.up("Control")
    page.wait_for_selector("[data-view=axial] .zoom")
    zoomed = frame(page)
    assert zoomed["width"] > 1.5 * whole["width"] and places(page)[0] == "12 / 24"
    assert zoomed["width"] / zoomed["height"] == pytest.approx(whole["width"] / whole["height"])
    assert under(zoomed, x, y) == pytest.approx(under(whole, x, y), abs=0.005)  # what lies below the mouse stays
    page.click("[data-view=axial] .zoom")
    assert frame(page) == whole and not page.is_visible("[data-view=axial] .zoom")


def test_a_zoomed_plane_is_dragged_and_the_crosshair_still_goes_where_one_clicks(page):
    whole = frame(page)
    page.locator("[data-view=axial] canvas").focus()
    for _ in range(4):
        page.keyboard.press("+")
    before = frame(page)
    x, y = whole["x"] + whole["left"] + whole["width"] / 2, whole["y"] + whole["top"] + whole["height"] / 2
    page.keyboard.down("Shift")
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 40, y - 30, steps=3)
    page.mouse.up()
    page.keyboard.up("Shift")
    after = frame(page)
    assert (after["left"] - before["left"], after["top"] - before["top"]) == pytest.approx((40, -30))
    assert places(page) == ["13 / 24", "21 / 40", "25 / 48"]
    page.mouse.click(x + 70, y + 20)
    across, down = under(after, x + 70, y + 20)
    assert places(page) == ["13 / 24", f"{int(down * 40) + 1} / 40", f"{int(across * 48) + 1} / 48"]
    page.mouse.move(x, y)
    page.mouse.down(button="middle")
    page.mouse.move(x + 3000, y, steps=3)
    page.mouse.up(button="middle")
    assert frame(page)["left"] == pytest.approx(whole["left"])  # it can't be lost
    page.keyboard.press("0")
    assert frame(page) == whole


def test_two_fingers_zoom(page):
    whole = frame(page)
    middle = whole["x"] + whole["left"] + whole["width"] / 2, whole["y"] + whole["top"] + whole["height"] / 2
    session = page.context.new_cdp_session(page)
    for kind, apart in (("touchStart", 20), ("touchMove", 40), ("touchMove", 60), ("touchEnd", None)):
        points = [{"x": middle[0] + side * apart, "y": middle[1], "id": side + 1} for side in (-1, 1) if apart]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    assert frame(page)["width"] == pytest.approx(3 * whole["width"], rel=0.01)


def test_the_right_button_drags_the_window(page):
    before = pictures(page)
    here = frame(page)
    page.mouse.move(here["x"] + 200, here["y"] + 150)
    page.mouse.down(button="right")
    page.mouse.move(here["x"] + 240, here["y"] + 130, steps=4)
    page.mouse.up(button="right")
    assert page.input_value(".preset") == "Own"
    assert float(page.input_value(".width")) > 400 and float(page.input_value(".level")) > 40
    assert pictures(page) != before and places(page) == ["13 / 24", "21 / 40", "25 / 48"]


def test_window_and_level_may_be_anything(page):
    before = pictures(page)
    page.fill(".level", "-500")
    page.fill(".width", "900")
    page.locator(".width").press("Enter")
    assert page.input_value(".preset") == "Own"
    assert pictures(page) != before
    page.fill(".width", "-3")
    page.locator(".width").press("Enter")
    assert page.input_value(".width") == "900"  # a width that is none is taken back


def test_as_the_model_sees_it(page, server):
    page.click("text=As the model sees it")
    page.wait_for_function("window.med3dvlm.which === 'model'")
    assert places(page) == ["17 / 32", "33 / 64", "33 / 64"]  # the input size of the tiny model
    image = server.sessions.by_token(page.evaluate("window.med3dvlm.state.session")).chat.seen.image[0]
    for voxel in ((31, 20, 16), (40, 50, 9), (3, 3, 30)):
        shown = page.evaluate("(voxel) => window.med3dvlm.scan.value(voxel)", voxel)
        assert shown == pytest.approx(image[voxel[::-1]].item(), abs=1e-4)
    page.click(".source label:first-child")
    page.wait_for_function("window.med3dvlm.which === 'scan'")


def test_the_volume_is_rendered(page):
    page.wait_for_function("window.med3dvlm.rendering.ready")
    page.wait_for_timeout(300)
    picture = Image.open(BytesIO(page.locator("[data-view=volume] .stage").screenshot())).convert("L")
    assert (np.asarray(picture) > 60).mean() > 0.02


def test_the_rendered_volume_follows_even_while_it_is_being_drawn(page):
    page.evaluate("window.med3dvlm.rendering.drawn = null; window.med3dvlm.drawVolume()")
    page.evaluate("window.med3dvlm.move([40, 10, 5]); window.med3dvlm.preset('Bone')")
    page.evaluate("window.med3dvlm.rendering.drawing")
    page.wait_for_function("window.med3dvlm.rendering.viewer.volumes[0].cal_max === 1300")
    at = page.evaluate("[...window.med3dvlm.rendering.viewer.scene.crosshairPos]")
    assert at == pytest.approx([1 - 40.5 / 48, 1 - 10.5 / 40, 1 - 5.5 / 24])


def test_a_view_can_fill_the_viewer(page):
    page.dblclick("[data-view=sagittal] canvas")
    assert [page.is_visible(f"[data-view={plane}]") for plane in PLANES] == [False, False, True]
    page.keyboard.press("Escape")
    assert all(page.is_visible(f"[data-view={plane}]") for plane in PLANES)


def test_no_letters_where_the_anatomy_is_unknown(new_page, tmp_path):
    np.save(tmp_path / "array.npy", np.random.default_rng(0).random((8, 12, 16), dtype=np.float32))
    page = new_page()
    open_scan(page, tmp_path / "array.npy")
    assert "".join(page.locator(".letter").all_inner_texts()) == ""
    assert page.locator(".view h2").all_inner_texts()[0] == "Slices"
    assert "orientation unknown" in page.inner_text(".facts")
    assert "Lung" not in page.inner_text(".preset")


def test_planes_work_without_webgl(new_page, scan):
    page = new_page(
        script="""
        const original = HTMLCanvasElement.prototype.getContext;
        HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {
          return kind.startsWith("webgl") ? null : original.call(this, kind, ...rest);
        };"""
    )
    open_scan(page, scan)
    assert places(page) == ["13 / 24", "21 / 40", "25 / 48"]
    assert "WebGL 2" in page.inner_text("[data-view=volume] .note")


def test_narrow_screen(new_page, scan):
    page = new_page(390, 844)
    assert page.is_visible(".empty")
    open_scan(page, scan)
    assert page.is_visible("[data-view=axial] canvas") and not page.is_visible("[data-view=coronal]")
    page.click(".tabs >> text=Coronal")
    assert page.is_visible("[data-view=coronal] canvas")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.is_visible("#ask")


def test_no_scrolling_on_a_desktop_and_everything_has_a_name(page):
    assert page.evaluate("document.documentElement.scrollHeight") <= 900
    unnamed = page.evaluate("""() => [...document.querySelectorAll('button, input, select, textarea, canvas[tabindex]')]
        .filter((e) => e.checkVisibility() && !(e.innerText || e.ariaLabel || e.title || e.labels?.length
                       || e.closest('label') || e.getAttribute('aria-label')))
        .map((e) => e.outerHTML.slice(0, 120))""")
    assert not unnamed


def test_nothing_on_the_page_points_outside(page):
    outside = page.evaluate("""() => [...document.querySelectorAll('[src], [href], [action]')]
        .map((e) => e.getAttribute('src') ?? e.getAttribute('href') ?? e.getAttribute('action'))
        .filter((address) => !/^(data|blob):/.test(address) && new URL(address, location).host !== location.host)""")
    assert not outside
