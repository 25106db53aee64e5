"""The page: what it says, what it never does, and how it behaves in a real browser."""

import base64
import contextlib
import fcntl
import functools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.arrays import Score
from braindecode_vis.checks import DataError
from braindecode_vis.report import figures, gallery, page

CHROMIUM = Path("/usr/bin/chromium")
EVIL = "<script>document.title='owned'</script>"


def draw_digits(n, side=28, seed=0):
    """Return n ring-and-stem figures, a little like handwritten sixes (even) and nines (odd)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    images = np.zeros((n, side, side), np.float64)
    for i in range(n):
        up, radius, tilt = (1 if i % 2 else -1), rng.uniform(0.25, 0.36), rng.uniform(-0.2, 0.2)
        ring = np.exp(-(((np.hypot(x, y + up * 0.3) - radius) / 0.1) ** 2))
        stem = np.exp(-(((x - up * (radius - tilt * y)) / 0.1) ** 2)) * (up * y > -0.3) * (np.abs(y) < 0.8)
        images[i] = np.clip(ring + stem, 0, 1)
    return np.repeat((images * 255).astype(np.uint8)[..., None], 3, axis=3)


def make_gallery(n=40, side=28, **changes):
    rng = np.random.default_rng(1)
    seen = draw_digits(n, side)
    noise = rng.normal(0, rng.uniform(10, 80, (n, 1, 1, 1)), (*seen.shape[:3], 1))
    rows = {
        "reconstructed": np.clip(seen * 0.8 + noise + 20, 0, 255).astype(np.uint8),
        "nearest training image": np.roll(seen, 2, axis=0),
        "class mean": np.where(np.arange(n)[:, None, None, None] % 2, seen[1::2].mean(0), seen[::2].mean(0)),
        "shuffled brain": np.roll(seen, 1, axis=0),
    }
    flat = [images.reshape(n, -1).astype(np.float32) for images in (seen, rows["reconstructed"])]
    a, b = (images - images.mean(1, keepdims=True) for images in flat)
    score = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
    content = {
        "ids": [f"digit_{i:03}" for i in range(n)],
        "concepts": ["nine" if i % 2 else "six" for i in range(n)],
        "seen": seen,
        "rows": {label: images.astype(np.uint8) for label, images in rows.items()},
        "score": score,
        "metric": "pixcorr",
        "details": {
            "rank": (np.arange(n) % 10 + 1).tolist(),
            "subject": [f"sub-{i % 2 + 1:02}" for i in range(n)],
        },
        "filter_by": ["subject"],
    }
    return gallery.GalleryContent(**(content | changes))


SCORES = {
    ("pixcorr", 0.0): [("decoded", 0.787, 0.742, 0.829), ("mean_image", 0.655, 0.61, 0.70)],
    ("mse", None): [("decoded", 0.0385, 0.031, 0.046), ("mean_image", 0.0547, 0.047, 0.062)],
    ("ssim@28", None): [("decoded", 0.536, 0.48, 0.59), ("mean_image", 0.41, 0.37, 0.45)],
    ("two_way_identification", 0.5): [("shuffled_brain", 0.51, 0.43, 0.60), ("decoded", 0.933, 0.87, 0.98)],
    ("top1", 0.1): [("decoded", 0.6, 0.3, 0.9), ("shuffled_brain", 0.1, 0.0, 0.3)],
}


def make_scores(**changes):
    rows = []
    for (metric, chance), scores in SCORES.items():
        for method, value, low, high in scores:
            score = Score(
                method=method,
                metric=metric,
                value=value,
                ci_low=low,
                ci_high=high,
                chance=chance,
                n_queries=10,
                gallery_size=10 if metric in ("top1", "two_way_identification") else None,
                noise_ceiling=0.91 if metric == "pixcorr" and method == "decoded" else None,
                protocol="digits, published split",
                subject="01",
                split="test",
                seed=0,
                p_value=0.0001 if method == "decoded" and chance is not None else None,
            )
            rows.append(score.as_row() | changes)
    return rows


@functools.cache
def make_section():
    table = pd.DataFrame({"window (ms)": ["0-100", "100-200"], "top1": [0.1, float("nan")], "n": [200, 200]})
    curve = figures.render_svg(figures.plot_top_k_curve([1, 2, 9], 10))
    return page.ExtraSection("When the image is read out", "Accuracy by window.", curve, alt="A", table=table)


def make_content(**changes):
    content = {
        "title": "Digits seen, digits decoded",
        "dataset": "synthetic digits",
        "description": "One person saw handwritten sixes and nines in the scanner. A ridge regression maps the "
        "response of visual cortex to the image, and every result below is set against simple controls.",
        "protocol": {
            "Split": "90 training and 10 test images, as published",
            "Averaging": "none, single trials",
        },
        "facts": [
            ("Trials", 100),
            ("Voxels", 3092),
            ("Images", "28 x 28 px, grey"),
            ("Licence", "none seen"),
        ],
        "scores": make_scores(),
        "ranks": page.RankContent(np.array([1, 1, 1, 2, 1, 3, 1, 2, 1, 5]), 10, "One query for each trial."),
        "gallery": make_gallery(),
        "sections": [make_section()],
        "warnings": [
            "Block design: images of a class were shown together, so drifts can look like decoding."
        ],
        "provenance": {
            "seed": 0,
            "git_revision": "0" * 40,
            "config": {"encoder": {"kind": "ridge", "alphas": [1.0, 10.0]}, "target": {"kind": "pixels"}},
            "versions": {"numpy": "2.1.0", "torch": None},
            "inputs": {"digit69_28x28.mat": "sha256:" + "ab" * 32},
        },
        "command": "braindecode-vis run configs/digits69_ridge.yaml --root data/digits69 --out runs/first",
    }
    return page.ReportContent(**(content | changes))


def make_bare_content(**changes):
    return make_content(**({"gallery": None, "ranks": None, "sections": ()} | changes))


@pytest.fixture(scope="module")
def html():
    return page.render_report(make_content())


def test_nothing_is_loaded_from_outside(html):
    assert set(re.findall(r"\b(?:src|href|srcset|action|poster)=[\"']([^\"']{1,5})", html)) >= {"data:"}
    assert re.findall(r"\b(?:src|href|srcset|action|poster)=[\"'](?!data:|#)", html) == []
    assert "@import" not in html
    assert "url(" not in html
    assert "<link" not in html.replace('<link rel="icon" href="data:,">', "")
    assert "default-src 'none'" in html


def test_figures_inside_hold_no_address_but_namespaces():
    svg = figures.render_svg(figures.plot_rank_histogram([1, 2], 10))
    assert not re.search(r"(?:href|src)=[\"'](?!#)", svg)


def test_the_page_says_what_it_was_given(html):
    for text in (
        "Digits seen, digits decoded", "Block design", "3,092", "as published", "0.787", "0.742 to 0.829",
        "chance 0.10", "best control: mean image 0.655", "When the image is read out", "Wilson",
        "braindecode-vis run configs/digits69_ridge.yaml", "sha256:abab", "&lt; 0.001", "never a person",
    ):  # fmt: skip
        assert text in html, text
    assert html.startswith('<!doctype html>\n<html lang="en">')
    assert not re.search(r"\bnan\b", re.sub(r"base64,[^\"]*", "", html), re.I)


def test_every_image_has_words(html):
    images = re.findall(r"<img[^>]*>", html)
    assert len(images) > 20
    assert all(re.search(r'alt="[^"]+"', image) for image in images)


def test_decoded_comes_first_in_every_group(html):
    groups = re.findall(r'<tbody role="rowgroup">(.*?)</tbody>', html, re.S)
    assert len(groups) == 5
    for group in groups:
        methods = re.findall(r'scope="row">([^<]+)', group)
        assert methods[0].strip() == "decoded"


def test_two_protocols_never_share_a_group():
    scores = make_scores() + make_scores(protocol="transductive")
    text = page.render_report(make_bare_content(scores=scores))
    assert len(re.findall(r"<tr role=\"row\" class=\"group\"", text)) == 10
    assert text.count("Protocol: transductive") == 5


def test_several_subjects_become_a_mean_with_its_range():
    scores = make_scores() + make_scores(subject="02", value=0.5)
    text = page.render_report(make_bare_content(scores=scores, headline=["pixcorr"]))
    assert "mean of 2 subjects, range 0.50 to 0.787" in text
    assert "subject 02" in text


@pytest.mark.parametrize(
    "metric, chance, low, high, words",
    [
        ("top1", 0.1, 0.3, 0.9, "interval above chance"),
        ("top1", 0.1, 0.05, 0.3, "interval includes chance"),
        ("top1", 0.5, 0.1, 0.3, "interval below chance"),
        ("median_rank", 5.5, 1.0, 3.0, "better than chance"),
        ("median_rank", 5.5, 6.0, 8.0, "worse than chance"),
    ],
)
def test_the_verdict_follows_the_interval(metric, chance, low, high, words):
    row = make_scores()[0] | {
        "metric": metric,
        "chance": chance,
        "value": (low + high) / 2,
        "ci_low": low,
        "ci_high": high,
    }
    assert words in page.render_report(make_bare_content(scores=[row]))


def test_missing_numbers_become_a_dash():
    row = make_scores()[0] | {"value": float("nan"), "ci_low": None, "chance": None}
    text = page.render_report(make_bare_content(scores=[row]))
    assert '<p class="big">–</p>' in text
    assert not re.search(r"\bnan\b", text, re.I)


def test_a_bare_report_still_stands():
    text = page.render_report(page.ReportContent(title="Empty", dataset="none"))
    assert "Not stated." in text
    assert "<script" not in text


def test_all_text_is_escaped():
    small = make_gallery(6)
    content = make_content(
        title=EVIL,
        dataset=EVIL,
        description=EVIL,
        protocol=EVIL,
        facts=[(EVIL, EVIL)],
        warnings=[EVIL],
        command=EVIL,
        ranks=None,
        provenance={EVIL: {EVIL: [EVIL, {EVIL: EVIL}]}},
        scores=make_scores(split=EVIL, method="decoded") + make_scores(protocol=EVIL, method=EVIL),
        sections=[page.ExtraSection(EVIL, EVIL, table=[{EVIL: EVIL}])],
        gallery=make_gallery(
            6,
            ids=[f"{EVIL}{i}" for i in range(6)],
            concepts=[EVIL] * 6,
            rows={EVIL: small.seen},
            metric=EVIL,
            details={EVIL: [EVIL] * 6},
            filter_by=[EVIL],
        ),
    )
    text = page.render_report(content)
    assert "owned" in text
    assert text.count("<script") == 2
    assert EVIL not in text


def test_the_same_content_gives_the_same_bytes(html):
    assert page.render_report(make_content()) == html


def test_size_is_bounded_with_a_note(tmp_path):
    content = make_gallery(2000, side=20)
    text = page.render_report(make_bare_content(gallery=content))
    assert len(text) < 10_000_000
    carried = json.loads(re.search(r'id="gallery-data">(.*?)</script>', text, re.S)[1])["items"]
    assert 500 < len(carried) < 2000
    assert f"carries {len(carried):,} of 2,000 items" in text


def test_writing_is_atomic(tmp_path, monkeypatch):
    """A crash between writing and renaming leaves the former report and no debris."""
    target = tmp_path / "new folder" / "report.html"
    content = make_bare_content()
    assert page.write_report(target, content) == target
    before = target.read_text(encoding="utf-8")

    def crash(self, other):
        assert self.parent == target.parent
        raise OSError("disk went away")

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match="disk went away"):
        page.write_report(target, make_bare_content(title="Second"))
    assert target.read_text(encoding="utf-8") == before
    assert list(target.parent.iterdir()) == [target]


def test_unusable_content_is_refused():
    with pytest.raises(DataError, match="lacks the column"):
        make_content(scores=[{"method": "decoded", "metric": "top1"}])
    with pytest.raises(DataError, match="headline names 'top7'"):
        make_content(headline=["top7"])
    with pytest.raises(DataError, match="figure must be"):
        page.render_report(make_bare_content(sections=[page.ExtraSection("x", figure=b"GIF89a")]))


# ---- a real browser
class Browser:
    """Headless Chromium steered through its debugging pipe, so that phone widths are emulated truly."""

    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--remote-debugging-pipe",
    )
    start = (
        "import os, sys; read, write = map(int, sys.argv[1:3]); "
        "os.dup2(read, 3); os.dup2(write, 4); os.execv(sys.argv[3], sys.argv[3:])"
    )

    def __init__(self, profile):
        (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (read_in, write_out)]
        command = [sys.executable, "-c", self.start, *map(str, theirs), str(CHROMIUM), *self.flags]
        command += [f"--user-data-dir={profile}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=theirs, **quiet)
        for fd in (*theirs, read_in, write_out):
            os.close(fd)
        self.to, self.back, self.rest, self.count, self.events = write_in, read_out, b"", 0, []
        os.set_blocking(self.back, False)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        return self.wait(lambda m: m.get("id") == self.count).get("result", {})

    def wait(self, wanted, timeout=30):
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            while b"\0" in self.rest:
                raw, self.rest = self.rest.split(b"\0", 1)
                message = json.loads(raw)
                assert "error" not in message, message
                if "method" in message:
                    self.events.append(message)
                if wanted(message):
                    return message
            try:
                self.rest += os.read(self.back, 1 << 20)
            except BlockingIOError:
                time.sleep(0.005)
        raise TimeoutError("Chromium did not answer")

    def open(self, path, width=1280, height=900, *, scheme="light"):
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        if not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.wait(lambda m: m.get("method") == "Page.loadEventFired")
        self.ask("Promise.all([...document.images].map((i) => i.decode().catch(() => 0))).then(() => 1)")

    def ask(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key):
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def screenshot(self, path, *, full=True):
        data = self.call("Page.captureScreenshot", captureBeyondViewport=full, format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        with contextlib.suppress(OSError, TimeoutError):
            self.call("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.to)
        os.close(self.back)


KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "Escape": 27}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM.exists():
        pytest.skip("no /usr/bin/chromium here (on Debian: apt-get install chromium)")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory, html):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


@pytest.mark.parametrize("width, height, scheme", [(1280, 900, "light"), (390, 844, "dark")])
def test_images_show_nothing_overflows_nothing_is_fetched(browser, report, width, height, scheme, tmp_path):
    browser.open(report, width, height, scheme=scheme)
    assert browser.ask("innerWidth") == width
    broken = "[...document.images].filter((i) => i.naturalWidth === 0).map((i) => i.alt)"
    assert browser.ask(broken) == []
    assert browser.ask("document.images.length") > 100
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask("document.querySelector('#tiles .tile').getBoundingClientRect().width") > 100
    requests = [
        e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in requests if not url.startswith("data:")] == [report.as_uri()]
    assert [
        e["params"] for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")
    ] == []
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == (
        "rgb(17, 21, 26)" if scheme == "dark" else "rgb(248, 247, 244)"
    )
    browser.screenshot(tmp_path / "page.png")


def test_items_can_be_filtered_sorted_and_walked_by_keyboard(browser, report):
    browser.open(report)
    assert browser.ask("document.querySelectorAll('#tiles .tile').length") == 40

    def change(field, value):
        event = "new Event('input', {bubbles: true})"
        browser.ask(f"{{ const field = {field}; field.value = {value!r}; field.dispatchEvent({event}); 0 }}")

    change("concept", "six")
    assert browser.ask("document.querySelector('#count').textContent") == "Showing 20 of 20 items."
    change("document.querySelector('#more-filters select')", "sub-02")
    assert browser.ask("document.querySelector('#count').textContent") == "No item fits these filters."
    browser.ask("controls.reset()")
    change("order", "worst")
    scores = browser.ask("[...document.querySelectorAll('#tiles b')].map((b) => Number(b.textContent))")
    assert scores == sorted(scores)
    change("document.querySelector('#find')", "digit_007")
    assert browser.ask("document.querySelectorAll('#tiles .tile').length") == 1

    browser.ask("document.querySelector('.pick').click()")
    assert browser.ask("detail.open")
    best = make_gallery().select_items()["best"]
    ids = make_gallery().ids
    sub = "document.querySelector('#detail-sub').textContent"
    assert browser.ask(sub) == ids[best[0]]
    assert browser.ask("document.querySelectorAll('#detail-images img').length") == 5
    browser.press("ArrowRight")
    assert browser.ask(sub) == ids[best[1]]
    browser.press("ArrowLeft")
    assert browser.ask(sub) == ids[best[0]]
    browser.press("Escape")
    assert not browser.ask("detail.open")


def test_hostile_names_do_not_run(browser, tmp_path):
    hostile = "<img src=x onerror=\"document.title='owned'\">"
    sections = [page.ExtraSection("s", figure=f"<svg xmlns='http://www.w3.org/2000/svg'>{EVIL}</svg>")]
    content = make_content(
        gallery=make_gallery(9, concepts=[hostile] * 9), sections=sections, description=hostile
    )
    browser.open(page.write_report(tmp_path / "report.html", content))
    browser.ask("document.querySelector('.pick').click()")
    assert browser.ask("document.title") == "Digits seen, digits decoded · synthetic digits"
    assert browser.ask("document.querySelector('#detail-title').textContent") == hostile
