"""The Flet page on a page that is not drawn: its controls, and what pressing them shows. Drawn: tests/long/apps_page.py."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import asking
import flet as ft
import pytest
from asking import Shown


def import_page():
    import main

    return main


class Page:
    """What the app uses of Flet's page."""

    def __init__(self, platform=ft.PagePlatform.LINUX) -> None:
        self.platform, self.services, self.controls, self.updates = platform, [], [], 0

    def add(self, *controls) -> None:
        self.controls += controls

    def update(self) -> None:
        self.updates += 1

    def all(self, kind):
        rows = [c for control in self.controls for c in (getattr(control, "controls", None) or [control])]
        return [control for control in rows if isinstance(control, kind)]

    def shown(self) -> list[str]:
        return [control.value for control in self.all(ft.Text)]


class Asked:
    def __init__(self, *replies: Shown) -> None:
        self.replies, self.asked = list(replies), []

    def standing(self) -> Shown:
        return Shown("Certified here: exits 1, 2 of 3.", asking.ANSWER, certified=True)

    def test(self) -> Shown:
        return Shown("The refusal test failed on this device.", asking.ERROR)

    def ask(self, *what) -> Shown:
        self.asked.append(what)
        return self.replies.pop(0)


def laid_out(asker, platform=ft.PagePlatform.LINUX) -> Page:
    page = Page(platform)
    asyncio.run(import_page().show(page, asker))
    return page


def test_asking_shows_the_answer_and_how_it_came_about():
    answer = Shown("It is a van.", asking.ANSWER, "exit 2 of 3, certified · budget kept", True)
    refusal = Shown("I'm sorry.", asking.REFUSAL, "exit 2 of 3, certified · budget MISSED", True, True)
    asker = Asked(answer, refusal)
    page = laid_out(asker)
    assert "Certified here: exits 1, 2 of 3." in page.shown()
    (picker,) = page.services
    picker.on_result(SimpleNamespace(files=[SimpleNamespace(bytes=b"picture")]))
    page.all(ft.TextField)[0].value = "What is it?"
    (ask,) = page.all(ft.FilledButton)
    asyncio.run(ask.on_click(None))
    assert asker.asked == [(b"picture", "What is it?", pytest.approx(1995, abs=1))]
    assert {"It is a van.", "exit 2 of 3, certified · budget kept"} < set(page.shown()) and not ask.disabled
    asyncio.run(ask.on_click(None))
    line = next(t for t in page.all(ft.Text) if t.value.startswith("The model refuses · exit 2"))
    assert line.value.endswith("budget MISSED") and line.color == ft.Colors.ERROR


def test_a_chosen_nothing_keeps_the_picture_and_the_slider_says_its_time():
    page = laid_out(Asked())
    page.services[0].on_result(SimpleNamespace(files=[]))
    (slider,) = page.all(ft.Slider)
    slider.value = 0.5
    slider.on_change(None)
    assert "first word within 100 ms" in page.shown()
    asyncio.run(page.all(ft.OutlinedButton)[0].on_click(None))
    assert "The refusal test failed on this device." in page.shown()


def test_a_camera_is_offered_on_phones_alone():
    assert [b.content for b in laid_out(Asked()).all(ft.Button) if type(b) is ft.Button] == ["Choose a picture"]
    phone = laid_out(Asked(), ft.PagePlatform.ANDROID)
    assert "Camera" in [b.content for b in phone.all(ft.Button)]


def test_a_camera_takes_pictures_and_a_phone_without_one_says_so(monkeypatch):
    import flet_camera as fc

    cameras = []

    async def given(self, *_, **__):
        return cameras

    async def taken(self):
        return b"taken"

    for name, does in (("get_available_cameras", given), ("initialize", given), ("take_picture", taken)):
        monkeypatch.setattr(fc.Camera, name, does)
    asker = Asked(Shown("It is a van.", asking.ANSWER, "", True))
    phone = laid_out(asker, ft.PagePlatform.ANDROID)
    (button,) = [b for b in phone.all(ft.Button) if b.content == "Camera"]
    asyncio.run(button.on_click(None))
    assert "This device has no camera that the app may use." in phone.shown()
    cameras.append("back")
    for _ in range(2):  # the first press shows what the camera sees
        asyncio.run(button.on_click(None))
    asyncio.run(phone.all(ft.FilledButton)[0].on_click(None))
    assert asker.asked[0][0] == b"taken"
