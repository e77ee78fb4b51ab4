"""A picture, a question, a budget; the answer with its exit, its verdict and its time: on Android, or in a browser.

  python devices/android/src/main.py                      # a browser's page at http://127.0.0.1:8550/
  EDGESAFE_BUNDLE=build/rpi5/bundle ...                   # another bundle than the folder `bundle` beside this file

What a person sees of a model's refusal is the refusal; an exit that is not certified here is never used.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import flet as ft
from asking import ERROR, REFUSAL, Asker, Shown, budget_ms, in_words

HERE = Path(__file__).resolve().parent
PHONES = (ft.PagePlatform.ANDROID, ft.PagePlatform.IOS)
COLOURS = {ERROR: ft.Colors.ERROR, REFUSAL: ft.Colors.TERTIARY}
START = 0.825  # 2 s on the slider
PORT = 8550


async def show(page: ft.Page, asker: Asker) -> None:
    """Lay out the page and connect it to what it asks."""
    page.title, page.scroll, page.padding = "edgesafe", ft.ScrollMode.AUTO, 16
    picture: list[bytes] = []
    look = ft.Image(src=b"", height=200, fit=ft.BoxFit.CONTAIN, visible=False, semantics_label="the picture")
    question = ft.TextField(label="Question", multiline=True, max_lines=4)
    slider = ft.Slider(value=START, min=0, max=1, expand=True)
    limit = ft.Text(_limit(START), width=170)
    working = ft.ProgressBar(visible=False)
    said, line = ft.Text(size=20), ft.Text()
    standing = ft.Text("Opening the model ...")

    def chosen(data: bytes | None) -> None:
        if data:
            picture[:] = [data]
            look.src, look.visible = data, True
            page.update()

    def put(shown: Shown, text: ft.Text, facts: ft.Text | None = None) -> None:
        text.value, text.color = shown.text, COLOURS.get(shown.kind)
        if facts is not None:
            facts.value = f"The model refuses · {shown.facts}" if shown.kind == REFUSAL else shown.facts
            facts.color = ft.Colors.ERROR if shown.missed or not shown.certified else None

    async def busy(work, *arguments) -> Shown:
        ask.disabled = test.disabled = working.visible = True
        page.update()
        try:
            return await asyncio.to_thread(work, *arguments)
        finally:
            ask.disabled = test.disabled = working.visible = False
            page.update()

    async def asked(_: ft.Event) -> None:
        data = picture[0] if picture else None
        put(await busy(asker.ask, data, question.value, budget_ms(slider.value or 0)), said, line)
        page.update()

    async def tested(_: ft.Event) -> None:
        put(await busy(asker.test), standing)
        page.update()

    def told(what: str) -> None:
        put(Shown(what, ERROR), said, line)
        page.update()

    def moved(_: ft.Event) -> None:
        limit.value = _limit(slider.value or 0)
        page.update()

    slider.on_change = moved
    ask = ft.FilledButton("Ask", on_click=asked)
    test = ft.OutlinedButton("Test refusals on this device", on_click=tested)
    buttons = ft.Row([_gallery(page, chosen), *_camera(page, chosen, told)], wrap=True)
    page.add(buttons, look, question, ft.Row([ft.Text("Budget"), slider, limit]), ask, working, said, line)
    page.add(ft.Divider(), standing, test)
    put(await busy(asker.standing), standing)
    page.update()


def _limit(place: float) -> str:
    return f"first word within {in_words(budget_ms(place))}"


def _gallery(page: ft.Page, chosen) -> ft.Control:
    """A button that opens the gallery, or a browser's file chooser."""
    picker = ft.FilePicker(on_result=lambda event: chosen(event.files[0].bytes if event.files else None))
    page.services.append(picker)
    pick = ft.PickFiles(picker, file_type=ft.FilePickerFileType.IMAGE, with_data=True, cancel_upload_on_window_blur=False)
    return ft.Button("Choose a picture", icon=ft.Icons.IMAGE, action=pick)


def _camera(page: ft.Page, chosen, told) -> list[ft.Control]:
    """A button that takes a picture, where flet-camera can: on phones."""
    if page.platform not in PHONES:
        return []
    import flet_camera as fc

    camera = fc.Camera(height=200, visible=False)

    async def take(_: ft.Event) -> None:
        if not camera.visible:
            camera.visible = True
            page.update()
            cameras = await camera.get_available_cameras()
            if not cameras:
                camera.visible = False
                return told("This device has no camera that the app may use.")
            await camera.initialize(cameras[0], fc.ResolutionPreset.MEDIUM, enable_audio=False)
            return
        chosen(await camera.take_picture())

    return [ft.Button("Camera", icon=ft.Icons.PHOTO_CAMERA, on_click=take), camera]


def main() -> None:
    """Serve a page on a desktop; on a phone, be the app."""
    data = os.environ.get("FLET_APP_STORAGE_DATA")
    if data:  # where an app may write: the measurement, and the record of the refusal test
        os.environ |= {"XDG_STATE_HOME": data, "XDG_CACHE_HOME": data}
    asker = Asker(Path(os.environ.get("EDGESAFE_BUNDLE", HERE / "bundle")))
    view = ft.AppView.FLET_APP if data else ft.AppView.WEB_BROWSER

    async def start(page: ft.Page) -> None:
        await show(page, asker)

    ft.run(start, view=view, host="127.0.0.1", port=int(os.environ.get("PORT", PORT)), no_cdn=True)


if __name__ == "__main__":
    main()
