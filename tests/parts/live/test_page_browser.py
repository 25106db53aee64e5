"""The live page and its calibration block in a real browser, at the width of a laptop and of a phone."""

import dataclasses
import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from braindecode_vis.parts.live.page.server import PageListener
from tests.parts.live.scripted import FACTS, IDS, INFO, Block, Script, find_images
from tests.report.browser import CHROMIUM, Browser, check_access

pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium in /usr/bin (on Debian: apt-get install chromium)")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def page():
    page = PageListener(find_images=find_images, calibration=Block(4, 0.05, 0.05))
    page.begin(INFO, FACTS)
    yield page
    page.end({})


def visit(browser, page, path="/", width=1280, height=800):
    address = page.address.replace("/?", f"{path}?")
    browser.open(SimpleNamespace(as_uri=lambda: address), width, height)


def wait_for(browser, expression):
    while not browser.ask(expression):
        time.sleep(0.03)


def list_troubles(browser):
    return [
        e["params"] for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")
    ]


@pytest.mark.parametrize("width, height", [(1280, 800), pytest.param(390, 844, marks=pytest.mark.further)])
def test_a_session_is_seen_as_it_goes(browser, page, width, height):
    script = Script()
    visit(browser, page, "/", width, height)
    wait_for(browser, "document.querySelector('#status').textContent === 'connected, no samples yet'")
    script.play(page, 12)
    page.decide(script.make_decision(lost="12 of 250 samples of the epoch were lost"))
    last = script.make_decision(IDS[4], right=1.0)
    page.decide(last)
    page.decide(dataclasses.replace(last, image=find_images([IDS[4]])[0]))
    page.tell("the network paused for 0.2 s", "warning")
    wait_for(browser, "document.querySelector('#messages').textContent.includes('paused')")
    wait_for(browser, "document.querySelector('#painted img')?.naturalWidth > 0")
    read = "document.querySelector('{}').textContent"
    best = last.posterior_top[0].replace("_", " ")
    assert browser.ask(read.format("#name")) == best
    wait_for(browser, read.format("#status") + " === 'live'")
    assert browser.ask(read.format("#n-decided")) == "13"
    assert browser.ask(read.format("#n-lost")) == "1"
    assert "chance is 5.0 % (1 of 20)" in browser.ask(read.format("#score-words"))
    assert "12 of 250 samples" in browser.ask(read.format("#losses"))
    assert browser.ask(read.format("#verdict")).startswith("✓" if last.posterior_top[0] == IDS[4] else "✗")
    wait_for(browser, "document.querySelector('#bad').textContent.includes('flat: FT10')")
    # what is decoded is read from afar, and drawings are drawn
    assert browser.ask("parseFloat(getComputedStyle(document.querySelector('#name')).fontSize)") > 30
    drawn = (
        "[...document.querySelectorAll('canvas')].filter((c) => !c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data.some((v) => v)).map((c) => c.id)"
    )
    assert browser.ask(drawn) == []
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask("[...document.images].filter((i) => i.complete && !i.naturalWidth).length") == 0
    assert browser.ask("document.cookie + location.search") == ""  # the token is nowhere in the page
    hosts = {
        e["params"]["request"]["url"].split("/")[2]
        for e in browser.events
        if e["method"] == "Network.requestWillBeSent"
        and not e["params"]["request"]["url"].startswith("data:")
    }
    assert hosts == {f"127.0.0.1:{page.port}"}
    assert [browser.ask(read.format(f"#{name} h3")) for name in ("best", "shown", "painted")] == [
        "Best match",
        "Shown",
        "Reconstruction",
    ]
    assert "amplitude of the last 2 s" in browser.ask(read.format("#quality-sub"))
    assert "Fp1 " in browser.ask(read.format("#values"))
    assert browser.ask(read.format("#link")).startswith("Every sample has arrived; the stream does not")
    # a decision of before is held, and the next one does not take its place
    browser.press("ArrowLeft")
    wait_for(browser, "document.querySelector('#name').textContent === 'Not decided'")
    page.decide(script.make_decision(IDS[0]))
    wait_for(browser, "document.querySelector('#n-decided').textContent === '14'")
    assert browser.ask(read.format("#name")) == "Not decided"
    browser.ask("document.querySelector('#hold').click()")
    wait_for(browser, "document.querySelector('#name').textContent !== 'Not decided'")
    if width < 600:  # in light, as a report
        browser.ask("document.querySelector('#scheme').click()")
        wait_for(browser, "getComputedStyle(document.body).backgroundColor === 'rgb(248, 247, 244)'")
    check_access(browser)
    browser.ask("localStorage.clear()")
    page.end({"decisions": 15})
    wait_for(browser, "document.querySelector('#status').textContent === 'session ended'")
    assert list_troubles(browser) == []


@pytest.mark.parametrize("width, height", [pytest.param(1280, 800, marks=pytest.mark.further), (390, 844)])
def test_a_recording_is_led_from_the_page(browser, width, height):
    page = PageListener(find_images=find_images)
    recorder = SimpleNamespace(is_recording=False, path=None, notes=[])
    recorder.start = lambda: recorder.__dict__.update(
        is_recording=True, path=Path("recorded/run-01_eeg.vhdr")
    )
    recorder.stop = lambda: recorder.__dict__.update(is_recording=False)
    recorder.note = recorder.notes.append
    page.control(recorder, lambda what: what())
    page.start()
    read = "document.querySelector('{}').textContent"
    with page.show_work("reading the run"):
        visit(browser, page, "/", width, height)
        wait_for(browser, read.format("#status") + " === 'reading the run'")
        wait_for(browser, "/^[0-9]+ s$/.test(" + read.format("#elapsed") + ")")
    page.begin(INFO, FACTS)
    wait_for(browser, "!document.querySelector('#record-button').hidden")
    assert browser.ask(read.format("#record-button")) == "Start recording"
    browser.ask("document.querySelector('#record-button').click()")
    wait_for(browser, read.format("#record-state") + ".startsWith('Recording into recorded/')")
    browser.ask("document.querySelector('#note-form button').click()")
    wait_for(browser, read.format("#record-answer") + ".startsWith('The note is empty')")
    browser.ask(
        "{ document.querySelector('#note').value = 'a blink'; document.querySelector('#note').focus(); 0 }"
    )
    browser.press("Enter")
    wait_for(browser, read.format("#record-answer") + " === 'Done.'")
    assert recorder.notes == ["a blink"]
    assert browser.ask("document.querySelector('#note').value") == ""
    assert browser.ask("document.documentElement.scrollWidth") <= width
    check_access(browser)
    browser.ask("document.querySelector('#record-button').click()")
    wait_for(browser, read.format("#record-state") + ".startsWith('Not recording; the last')")
    page.end({})
    wait_for(browser, "document.querySelector('#record-button').hidden")
    assert list_troubles(browser) == []


def test_calibration_shows_each_image_and_says_when(browser, page):
    visit(browser, page, "/calibrate")
    wait_for(browser, "document.querySelector('#words').textContent === 'Ready.'")
    check_access(browser)
    started = time.perf_counter()
    browser.ask(
        "{ window.turned = 0; new MutationObserver(() => { window.turned++; })"
        ".observe(document.querySelector('#diode'), {attributes: true}); 0 }"
    )
    browser.ask("document.querySelector('#go').focus()")
    browser.press("Enter")
    wait_for(browser, "document.querySelector('#words').textContent.startsWith('The encoder was adapted')")
    block = page.calibration
    assert [name for name, _, _ in block.marks] == IDS[:4]
    times = [at for _, at, _ in block.marks]
    assert started < times[0] < times[-1] < time.perf_counter()
    assert min(b - a for a, b in itertools.pairwise(times)) > 0.09  # on the screen, and the cross
    assert max(apart for _, _, apart in block.marks) < 0.2
    assert block.ended == [True]
    assert browser.ask("window.turned") == 4
    assert list_troubles(browser) == []
