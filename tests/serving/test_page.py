"""The page: what it asks of the server and nobody else, and what it shows of a conversation."""

import re
import time

import pytest
from chromium import PATH, Page

pytestmark = pytest.mark.one_version


def test_the_pages_files_are_served_and_name_no_other_address(serve):
    client, _ = serve()
    whole = ""
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        got = client.get(path)
        assert got.status_code == 200 and got.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in got.headers["content-security-policy"]
        whole += got.text
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)|//cdn|@import|eval\(|innerHTML", whole)
    ids = set(re.findall(r'id="([\w-]+)"', whole))
    assert set(re.findall(r'\bat\("([\w-]+)"\)', whole)) <= ids
    assert not re.search(r"<script(?! src)|style=\"| on\w+=\"", client.get("/").text)  # which its policy forbids


@pytest.mark.slow  # starts a browser
@pytest.mark.skipif(PATH is None, reason="needs Chromium")
def test_a_conversation_in_a_browser(listening, tmp_path):
    address, engine = listening
    page = Page(tmp_path / "profile", address)
    text = lambda name: page.run(f"document.getElementById('{name}').innerText")
    say = lambda said: page.run(
        f"document.getElementById('say').value = {said!r}; document.getElementById('form').requestSubmit()"
    )
    turns = lambda count: page.until(f"document.querySelectorAll('#numbers tr').length === {count}")
    try:
        page.until("document.querySelectorAll('#facts div').length")
        assert "tiny" in text("facts")

        say("two plus two?")
        turns(1)
        page.until("!document.getElementById('send').disabled")
        assert "two plus two?" in text("turns") and "You" in text("turns") and "Model" in text("turns")
        [request] = engine.requests
        assert request.show_kept and request.max_new_tokens == 128
        assert "4 KiB" in text("numbers")  # of a row
        assert page.run("document.querySelectorAll('#layers td').length") == 4 and "6" in text("layers")
        shown = page.run("[...document.querySelectorAll('#tokens .tok')].map((t) => t.textContent)")
        assert shown[0] == "<|start|>" and len(shown) > len(request.prompt)
        assert page.run("document.querySelectorAll('#chart circle').length") == 2

        say("why?")
        turns(2)
        assert len(engine.requests[1].prompt) > len(request.prompt)
        page.until("!document.getElementById('send').disabled")

        engine.hold.set()  # and stop, before anything was said
        say("what?")
        page.until("!document.getElementById('stop').disabled")
        while not engine.running:
            time.sleep(0.01)
        page.run("document.getElementById('stop').click()")
        page.until("!document.getElementById('send').disabled")
        assert page.run("document.getElementById('say').value") == "what?" and not text("problem")
        while engine.running:
            time.sleep(0.01)
        engine.hold.clear()

        engine.is_ready = False
        say("<img src=x onerror=alert(1)>")
        page.until("!document.getElementById('problem').hidden")
        assert "not ready" in text("problem") and page.run("document.querySelectorAll('#turns img').length") == 0

        page.run("document.getElementById('reset').click()")
        assert not text("turns").strip() and page.run("document.querySelectorAll('#tokens .tok').length") == 0
        assert page.errors == [error for error in page.errors if "503" in error]
        assert {url.startswith((address, "data:")) for url in page.requested} == {True}
    finally:
        page.close()
